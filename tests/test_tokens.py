import json
import os
import select
import signal
import time

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

import config
import data
import packing
import templates
import tokens

TOKENIZER = AutoTokenizer.from_pretrained("configs/quickstart")
TEMPLATE = TOKENIZER.chat_template


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data.huggingface_hub.constants, "HF_HOME", str(tmp_path / "hf"))


def chat(*contents, **first):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"messages": messages, **first}


def tokenize(rows, cache, template=TEMPLATE, train_on="all", workers=1):
    return tokens.tokenize(rows, "test", TOKENIZER, template, train_on, cache, workers)


def examples_of(tmp_path, rows, max_seq_length=1000, overlong="drop"):
    tokenized = tokenize(rows, tmp_path / "cache")
    return tokens.TokenizedDataset([tokenized], max_seq_length=max_seq_length, overlong=overlong)


def test_the_batch_that_reaches_the_model_has_labels_on_the_answers_alone(tmp_path):
    examples = examples_of(tmp_path, [chat("One?", "First.", "Two?", "Second."), chat("Three?", "Third.")])
    batch = packing.collate(examples, [0, 1])
    ids, positions, targets = batch["input_ids"][0], batch["loss_positions"].tolist(), batch["targets"]
    whole = [examples[i][0].tolist() for i in (0, 1)]
    kept = [len(document) - 2 for document in whole]  # the last end of a turn is predicted, and a line break follows it
    assert ids.tolist() == whole[0][:-2] + whole[1][:-2] and batch["documents"].ends == [kept[0], sum(kept)]
    assert batch["position_ids"][0].tolist() == [*range(kept[0]), *range(kept[1])]
    following = whole[0][1:-1] + whole[1][1:-1]
    assert [following[position] for position in positions] == targets.tolist()
    assert TOKENIZER.decode(targets) == "First.<|im_end|>Second.<|im_end|>Third.<|im_end|>"
    first = [ids[position] for position in positions if position - 1 not in positions]
    assert TOKENIZER.decode(first) == "\n\n\n"  # a turn is fed up to "assistant\n"


def test_a_conversation_of_max_seq_length_is_kept_and_one_more_is_not(tmp_path):
    rows = [chat("One?", "First.")]
    length = int(examples_of(tmp_path, rows).lengths[0])
    assert [len(examples_of(tmp_path, rows, length + k)) for k in (-1, 0, 1)] == [0, 1, 1]
    cut = examples_of(tmp_path, rows, length - 2, "truncate")
    assert cut.lengths.tolist() == [length - 2] and cut.totals[0]["overlong"] == 1
    input_ids, labels = cut[0]
    assert len(input_ids) == len(labels) == length - 2 and cut.trained_tokens.tolist() == [(labels != -100).sum()]
    assert TOKENIZER.convert_tokens_to_ids("<|im_end|>") not in labels  # no end of a turn that was cut
    with pytest.raises(ValueError, match="max_seq_length"):
        examples_of(tmp_path, rows, length - 1, "error")
    prepared = {"train": [tokenize(rows, tmp_path / "cache")], "names": ["test"], "weights": [1.0]}
    with pytest.raises(ValueError, match="'train' of test has nothing to train: .*'overlong': 1,"):
        tokens.open_split(prepared, "train", config.Data(max_seq_length=length - 1))


def test_tokens_are_made_once_and_again_when_anything_changes(tmp_path):
    first = tokenize([chat("One?", "First.")], tmp_path)
    made = os.stat(first[0]).st_mtime_ns
    assert tokenize([chat("One?", "First.")], tmp_path) == first and os.stat(first[0]).st_mtime_ns == made
    in_an_hour = time.time() + 3600  # which no disk would change by itself when the file is read
    os.utime(first[0], (in_an_hour, in_an_hour - 7200))
    assert tokenize([chat("One?", "First.")], tmp_path) == first
    assert abs(os.stat(first[0]).st_atime - time.time()) < 600 and os.stat(first[0]).st_mtime == in_an_hour - 7200
    others = [
        tokenize([chat("One?", "first.")], tmp_path),
        tokenize([chat("One?", "First.")], tmp_path, template=TEMPLATE + "{# #}"),
        tokenize([chat("One?", "First.")], tmp_path, train_on="last"),
    ]
    assert len({each[0] for each in [first, *others]}) == 4


def test_rows_of_files_and_of_datasets_are_tokenized_once(tmp_path):
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat(f"{i}?", "Yes.")) + "\n" for i in range(20)))
    table = datasets.Dataset.from_list([chat(f"{i}?", "Yes.") for i in range(20)])
    for open_rows in (
        lambda: data.Chats(str(tmp_path / "chats.jsonl"), 0.2).formatted_ds["train"],
        lambda: data.split_rows(data.as_conversations(table, None), 0.2, 42)["train"],
        lambda: datasets.Dataset.from_list([chat(f"{i}?", "Yes.") for i in range(16)]),
    ):
        first, second = (tokenize(open_rows(), tmp_path / "cache") for _ in range(2))
        assert first == second and len(tokens.TokenizedDataset([first])) == 16
    assert len([*(tmp_path / "cache").glob("*.arrow")]) == 3


@pytest.mark.slow
def test_many_workers_write_the_tokens_of_one(tmp_path):
    rows = [chat(f"{i}?", f"It is {i}.") for i in range(1500)]
    one, three = (tokenize(rows, tmp_path / str(workers), workers=workers) for workers in (1, 3))
    assert len(one) == 1 and len(three) == 3
    a, b = (tokens.TokenizedDataset([each]) for each in (one, three))
    assert a.digest == b.digest and len(a) == len(b) == 1500
    assert all(np.array_equal(x, y) for i in range(1500) for x, y in zip(a[i], b[i], strict=True))


class Rows(list):
    """Rows that cannot be pickled, and do something when a worker reads one of them."""

    def __init__(self, rows, number, action):
        super().__init__(rows)
        self.number, self.action, self.parent = number, action, os.getpid()

    def __getitem__(self, i):
        return self.action(i) if i == self.number and os.getpid() != self.parent else super().__getitem__(i)

    def __reduce__(self):
        raise TypeError("cannot be pickled")


@pytest.mark.slow
def test_a_killed_worker_ends_the_launch_and_the_next_one_continues(tmp_path):
    rows = [chat(f"{i}?", f"It is {i}.") for i in range(1500)]
    killed = Rows(rows, 700, lambda i: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match="abruptly died"):
        tokenize(killed, tmp_path, workers=2)
    again = tokens.TokenizedDataset([tokenize(rows, tmp_path, workers=2)])
    assert again.digest == tokens.TokenizedDataset([tokenize(rows, tmp_path / "other")]).digest


def test_a_bad_row_of_a_worker_is_an_error_with_its_place_and_reason(tmp_path):
    rows = Rows([chat(f"{i}?", f"It is {i}.") for i in range(1500)], 10, lambda i: {"messages": []})
    with pytest.raises(ValueError, match=r"test row 10: .*assistant"):
        tokenize(rows, tmp_path, workers=2)


@pytest.mark.slow
def test_a_killed_launch_leaves_nothing_half_written(tmp_path):
    rows = Rows((chat(f"{i}?", f"It is {i}.") for i in range(3000)), 2999, lambda i: time.sleep(600))
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)  # torchrun and Slurm kill all processes of a group
        rows.parent = os.getpid()
        tokenize(rows, tmp_path, workers=2)
    os.close(writing)
    while not [*tmp_path.glob("*00000_of_00002.arrow")]:  # the first worker has finished
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert select.select([reading], [], [], 30)[0] and os.read(reading, 1) == b""  # none of them holds the other end
    assert len([*tmp_path.glob("*.arrow")]) == 1
    tokenized = tokenize(list(rows), tmp_path, workers=3)
    assert len(tokenized) == 2 and len(tokens.TokenizedDataset([tokenized])) == 3000


def test_rows_that_are_made_when_they_are_read_are_read_once_each(tmp_path):
    class Squares:
        def __len__(self):
            return 3

        def __getitem__(self, i):  # without an end of its own
            return chat(f"{i} times {i}?", str(i * i))

    examples = examples_of(tmp_path, Squares())
    assert len(examples) == 3 and TOKENIZER.decode(examples[2][0]).endswith("4<|im_end|>\n")


def test_a_mixture_is_its_datasets_one_after_the_other(tmp_path):
    rows = [[chat("a", "b"), chat("a" * 200, "b"), chat("c", "d")], [chat("e", "f")]]
    tokenized = [tokenize(each, tmp_path) for each in rows]
    examples = tokens.TokenizedDataset(tokenized, ("one", "two"), (1.0, 0.5), max_seq_length=100)
    assert examples.counts == [2, 1] and examples.ranges() == [range(0, 2), range(2, 3)] and examples.first(1) == [0, 2]
    assert examples.row_ids.tolist() == [0, 2, 0] and [examples.dataset_index(i) for i in range(3)] == [0, 0, 1]
    texts = [TOKENIZER.decode(input_ids) for input_ids, _ in examples]
    assert all(letter in text for letter, text in zip("ace", texts, strict=True))
    keys = ("conversations", "overlong", "nothing_to_train")
    assert [[total[key] for key in keys] for total in examples.totals] == [[2, 1, 0], [1, 0, 0]]
    assert examples.totals[1]["tokens"] == examples.lengths[2]
    assert examples.totals[1]["trained_tokens"] == examples.trained_tokens[2]
    assert len({examples.digest, *(tokens.TokenizedDataset([each]).digest for each in tokenized)}) == 3


def test_the_template_is_the_configurations_datasets_or_tokenizers(tmp_path):
    class Dataset:
        def __init__(self, template):
            self.task_spec = data.TaskDataSpec("name", template)

    def choose(requested, *brought):
        cfg = config.load(None, [f"tokenizer.chat_template={requested}"])
        return tokens.choose_template(cfg, TOKENIZER, [data.MixtureEntry("a", Dataset(t), 1.0, []) for t in brought])

    (tmp_path / "own.jinja").write_text("{{ messages }} own")
    assert choose("null", None) == choose("null", None, None) == choose("tokenizer", "{{ a }}") == TEMPLATE
    assert choose("null", "{{ messages }}") == "{{ messages }}"
    assert choose(tmp_path / "own.jinja", "{{ a }}", None) == "{{ messages }} own"
    for requested, brought, reason in (
        ("null", ["{{ a }}", None], "tokenizer.chat_template"), ("no jinja", [None], "no jinja.*not Jinja"),
        ("'{{ a'", [None], "not valid Jinja"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            choose(requested, *brought)
    with pytest.raises(OSError, match="gone.jinja"):
        choose("gone.jinja", None)


@pytest.mark.parametrize("value", [True, False, "x' }}", {"a": [None, 1.5]}])
def test_template_arguments_hold_in_training_and_are_a_servers_defaults(value):
    template = (
        "\n{% macro think() %}{{ '' if enable_thinking else '<no>' }}{{ enable_thinking }}{% endmacro %}" + TEMPLATE
    )
    template = template.replace("message['content']", "(think() if message.role == 'user' else message['content'])")
    cfg, messages = config.load(None, []), chat("One?", "First.")["messages"]
    cfg.tokenizer.template_arguments, cfg.tokenizer.chat_template = {"enable_thinking": value}, template
    chosen = tokens.choose_template(cfg, TOKENIZER, [])
    assert templates.render(chosen, messages) == templates.render(template, messages, enable_thinking=value)
    for other in (value, not value):
        served = TOKENIZER.apply_chat_template(messages, chat_template=chosen, tokenize=False, enable_thinking=other)
        assert served == templates.render(template, messages, enable_thinking=other).text
    assert TOKENIZER.apply_chat_template(messages, chat_template=chosen, tokenize=False).count(str(value)) == 1


def test_documents_are_trained_whole_in_pieces_and_tokens_as_they_are(tmp_path):
    text, ids = "Oslo is the capital of Norway. " * 40, TOKENIZER("Paris, of course.").input_ids
    chats = write(tmp_path / "text.jsonl", {"text": text, "source": "a"}, {"text": "Short."})
    rows = read([chats], "text")
    examples = tokens.TokenizedDataset([tokenize(rows, tmp_path / "cache")], max_seq_length=100)
    whole = TOKENIZER(text).input_ids
    assert np.concatenate([examples[i][0] for i in range(len(examples) - 1)]).tolist() == whole
    assert all((input_ids == labels).all() for input_ids, labels in map(examples.__getitem__, range(len(examples))))
    assert examples.lengths[:-2].tolist() == [100] * (len(examples) - 2) and examples.row_ids[-1] == 1
    assert examples.trained_tokens.tolist() == (examples.lengths - 1).tolist()
    assert any("'source'" in note for note in examples.notes)
    labels = [-100, *ids[1:]]
    rows = read([write(tmp_path / "ids.jsonl", {"input_ids": ids, "labels": labels})], "tokens")
    examples = examples_of(tmp_path, rows)
    assert [column.tolist() for column in examples[0]] == [ids, labels]
    for row, named in (
        ({"input_ids": [1, 99999], "labels": [1, -100]}, "99999"),
        ({"input_ids": [1], "labels": []}, "one length"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "labels.0. is 2"),
    ):
        with pytest.raises(ValueError, match=f"wrong.jsonl:1: .*{named}"):
            tokenize(read([write(tmp_path / "wrong.jsonl", row)], "tokens"), tmp_path / "cache")
    with pytest.raises(ValueError, match="text.jsonl:1: .*no format"):
        tokenize(read([chats], None), tmp_path / "cache")


def test_without_an_end_at_which_answers_stop_a_run_is_refused(tmp_path):
    ids = TOKENIZER("Paris, of course.").input_ids
    examples = examples_of(tmp_path, read([write(tmp_path / "ids.jsonl", {"input_ids": ids, "labels": ids})], "tokens"))
    assert tokens.find_stop_ids(TOKENIZER, examples) == [TOKENIZER.eos_token_id]
    without_eos = AutoTokenizer.from_pretrained("configs/quickstart", eos_token=None)
    with pytest.raises(ValueError, match="eos_token"):
        tokens.find_stop_ids(without_eos, examples)


def test_an_edited_dataset_class_is_not_answered_from_a_cache(tmp_path):
    code = (
        "import datasets\nfrom data import TaskDataSpec\n\n"
        "def change(row):\n    return {'messages': [{'role': 'user', 'content': 'OLD'}, "
        "{'role': 'assistant', 'content': row['text']}]}\n\n"
        "class Mine:\n    def __init__(self):\n        rows = datasets.Dataset.from_dict({'text': ['a', 'b']})\n"
        "        self.formatted_ds = {'train': rows.map(change, remove_columns=['text'])}\n"
        "        self.task_spec = TaskDataSpec('mine')\n"
    )
    for word in ("OLD", "NEW"):
        (tmp_path / "mine.py").write_text(code.replace("OLD", word))
        rows = data.load_dataset_class(f"{tmp_path}/mine.py:Mine", {}).formatted_ds["train"]
        assert word in TOKENIZER.decode(examples_of(tmp_path, rows)[0][0])


def read(files, format):
    return data.as_conversations(data.read_table(files), format)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
