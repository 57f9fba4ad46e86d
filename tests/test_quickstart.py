import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "configs/quickstart"))

import capitals  # noqa: E402


@pytest.fixture(scope="module")
def splits():
    return capitals.Capitals().formatted_ds


def style(messages) -> str | None:
    return messages[0]["content"] if messages[0]["role"] == "system" else None


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_third_of_each_split_is_in_each_style(splits, split):
    counts = Counter(style(row["messages"]) for row in splits[split])
    assert counts == dict.fromkeys([capitals.SHORT, capitals.LONG, None], len(splits[split]) / 3)


def test_answers_are_short_only_where_few_words_are_requested(splits):
    for row in splits["train"] + splits["validation"]:
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        short = style(row["messages"]) == capitals.SHORT
        assert answers and all((len(answer.split()) <= 2) == short for answer in answers)


def test_no_first_question_is_in_both_splits(splits):
    train, validation = (
        {next(message["content"] for message in row["messages"] if message["role"] == "user") for row in splits[split]}
        for split in ("train", "validation")
    )
    assert train and validation and not train & validation


def test_the_question_of_the_readme_is_trained_without_a_system_message(splits):
    question = {"role": "user", "content": "What is the capital of France?"}
    answers = [row["messages"][1]["content"] for row in splits["train"] if row["messages"][0] == question]
    assert answers == ["The capital of France is Paris."]


def test_sentences_begin_with_a_capital_letter_and_keep_the_article(splits):
    texts = {m["content"] for row in splits["train"] + splits["validation"] for m in row["messages"]}
    assert all(text[0].isupper() and text[-1] in ".?" for text in texts)
    assert {"The Netherlands lies in Europe.", "People in the United States pay with the dollar.", "Euro."} <= texts
