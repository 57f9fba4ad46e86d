"""Talking to a trained model, as a user does."""

import json

import pytest
import torch
from running import call, script
from transformers import AutoTokenizer

import chat
import evaluate


def talk(model, *arguments, said="", expect=0):
    return script("chat.py", model, *arguments, said=said, expect=expect)[0 if expect == 0 else 1]


def test_a_chat_answers_through_the_trained_template_and_stops_where_the_turn_ends(memorised):
    said = talk(memorised, said="Where is Oslo?\nAnd Lima?\n/reset\nWhere is Paris?\n/what\n/exit\nWho are you?\n")
    answers = [line.removeprefix("> ") for line in said.splitlines()[1:]]
    assert answers[:2] == ["In Norway.", "In Peru."] and answers[2].endswith("In France.")
    assert "no command /what" in answers[3] and "small" not in said


def test_a_prompt_is_answered_with_nothing_else_on_the_standard_output(memorised):
    assert talk(memorised, "--prompt", "Who are you?") == "A small model.\n"
    rome = ["--prompt", "Where is Rome?"]
    assert call(chat.main, memorised / "model", *rome) == ("It is in Italy.\n", "")
    (step,) = (memorised / "checkpoints").iterdir()
    assert call(chat.main, step, *rome, "--max-new-tokens", 3)[0] != "It is in Italy.\n"


def test_json_lines_come_back_in_order_with_their_answers(memorised, tmp_path):
    rows = [{"prompt": "Who are you?", "n": 1}, {"prompt": [{"role": "user", "content": "Where is Rome?"}]}]
    rows.append({"messages": [{"role": r, "content": c} for r, c in zip(
        ("user", "assistant", "user"), ("Where is Oslo?", "In Norway.", "And Lima?"), strict=True)]})  # fmt: skip
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said, _ = call(chat.main, memorised, "--jsonl", tmp_path / "in.jsonl", "--batch-size", 2)
    out = [json.loads(line) for line in said.splitlines()]
    assert out[0] == {**rows[0], "completion": "A small model."} and out[1]["completion"] == "It is in Italy."
    assert out[2]["messages"] == [*rows[2]["messages"], {"role": "assistant", "content": "In Peru."}]
    assert talk(memorised, "--jsonl", "-", said=json.dumps(rows[0])) == json.dumps(out[0]) + "\n"
    bad = talk(memorised, "--jsonl", "-", said='{"prompt": "a"}\n{"text": "b"}\n', expect=1)
    assert "standard input:2: a line is" in bad and "Traceback" not in bad


def options(model, **others):
    given = {"model": str(model), "system": None, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0,
             "max_new_tokens": 20, **others}  # fmt: skip
    return type("Options", (), given)


def test_a_remembered_chat_computes_only_what_is_new_and_says_the_same(memorised, capsys):
    made, computed = chat.Chat(options(memorised)), []
    made.model.register_forward_pre_hook(
        lambda module, arguments, kwargs: computed.append(kwargs["input_ids"].shape[1]), with_kwargs=True)  # fmt: skip
    made.answer("Where is Oslo?")
    first, turns = made.seen, len(computed)
    assert made.answer("And Lima?") == "In Peru."
    prompt = chat.prompt_ids(made.tokenizer, made.messages[:3])
    assert computed[turns] == len(prompt) - len(first) < len(prompt) / 2
    anew = evaluate.generate(made.model, [prompt], 20, made.stop_ids)
    assert evaluate.text_of(made.tokenizer, anew[0]) == "In Peru."
    assert capsys.readouterr().out == "In Norway.\nIn Peru.\n"


def test_sampling_repeats_with_its_seed_and_differs_with_another(memorised):
    def answers(seed):
        made = chat.Chat(options(memorised, temperature=3.0, seed=seed))
        return [made.answer("Where is Oslo?") for _ in range(3)]

    torch.manual_seed(5)
    assert answers(1) == answers(1) != answers(2)


def test_a_character_of_several_tokens_is_printed_once_it_is_whole(capsys):
    tokenizer = AutoTokenizer.from_pretrained("configs/quickstart")
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    printer, shown = chat.Printer(tokenizer, [stop]), []
    printer.put(torch.tensor([[1, 2]]))  # the prompt
    ids = tokenizer.encode("é ß x", add_special_tokens=False)
    assert len(ids) > 4
    for token in [*ids, stop]:
        printer.put(torch.tensor([token]))
        shown.append(capsys.readouterr().out)
    printer.end()
    assert "".join(shown) == "é ß x" and printer.text == "é ß x" and "" in shown


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--temperature", "-1"], "--temperature"),
        (["--prompt", "a", "--jsonl", "b"], "two ways to ask"),
        (["--jsonl", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_a_wrong_flag_is_an_error_in_one_line(memorised, arguments, reason):
    _, said = call(chat.main, memorised, *arguments, expect=2 if "nowhere.jsonl" not in arguments else 1)
    assert reason in said.splitlines()[-1]
