import json
import multiprocessing
import os
import signal

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

import config
import data
import formats

TOKENIZER = AutoTokenizer.from_pretrained("configs/quickstart")
TEMPLATE = TOKENIZER.chat_template


def chat(*contents, **first):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"messages": messages, **first}


def tokens_of(tmp_path, rows, **options):
    folder = data.tokenise(rows, TOKENIZER, TEMPLATE, "all", tmp_path / "cache", "test", 1)
    return data.Examples([folder], options.get("max_seq_length", 1000), options.get("overlong", "drop"))


def test_the_batch_that_reaches_the_model_has_labels_on_the_answers_alone(tmp_path):
    examples = tokens_of(tmp_path, [chat("One?", "First.", "Two?", "Second."), chat("Three?", "Third.")])
    batch = data.collate(examples, [0, 1])
    ids, positions, targets = batch["input_ids"][0], batch["positions"].tolist(), batch["targets"]
    whole = [examples[i][0].tolist() for i in (0, 1)]
    kept = [len(document) - 2 for document in whole]  # the last end of a turn is predicted, and a line break follows it
    assert ids.tolist() == whole[0][:-2] + whole[1][:-2] and batch["documents"].ends == [kept[0], sum(kept)]
    assert batch["position_ids"][0].tolist() == [*range(kept[0]), *range(kept[1])]
    following = whole[0][1:-1] + whole[1][1:-1]
    assert [following[position] for position in positions] == targets.tolist()
    assert TOKENIZER.decode(targets) == "First.<|im_end|>Second.<|im_end|>Third.<|im_end|>"
    first = [ids[position] for position in positions if position - 1 not in positions]
    assert TOKENIZER.decode(first) == "\n\n\n"  # a turn is fed up to "assistant\n"


def test_a_conversation_of_the_maximal_length_is_kept_and_one_more_is_overlong(tmp_path):
    length = int(tokens_of(tmp_path, [chat("One?", "First.")]).lengths[0])
    kept = [len(tokens_of(tmp_path, [chat("One?", "First.")], max_seq_length=length + k)) for k in (-1, 0, 1)]
    assert kept == [0, 1, 1]
    cut = tokens_of(tmp_path, [chat("One?", "First.")], max_seq_length=length - 2, overlong="truncate")
    assert cut.lengths.tolist() == [length - 2] and cut.totals[0]["overlong"] == 1
    assert TOKENIZER.convert_tokens_to_ids("<|im_end|>") not in cut[0][1]  # no end of a turn that was cut
    with pytest.raises(ValueError, match="max_seq_length"):
        tokens_of(tmp_path, [chat("One?", "First.")], max_seq_length=length - 1, overlong="error")


def test_tokens_are_made_once_and_again_when_anything_changes(tmp_path):
    def folder(rows, template=TEMPLATE, train_on="all"):
        return data.tokenise(rows, TOKENIZER, template, train_on, tmp_path, "test", 1)

    first = folder([chat("One?", "First.")])
    made = (first / "input_ids").stat().st_mtime_ns
    assert folder([chat("One?", "First.")]) == first and (first / "input_ids").stat().st_mtime_ns == made
    others = [folder([chat("One?", "first.")]), folder([chat("One?", "First.")], TEMPLATE + "{# #}")]
    others.append(folder([chat("One?", "First.")], train_on="last"))
    assert len({first, *others}) == 4


def test_many_processes_write_the_tokens_of_one(tmp_path):
    rows = [chat(f"{i}?", f"It is {i}.") for i in range(1500)]
    one, two = (
        data.tokenise(rows, TOKENIZER, TEMPLATE, "all", tmp_path / str(workers), "test", workers) for workers in (1, 2)
    )
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in ("input_ids", "labels"))


def test_a_killed_process_ends_the_tokenising_with_a_reason(tmp_path):
    class Rows(list):
        def __getitem__(self, i):
            if i == 700 and multiprocessing.parent_process():  # in a worker
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(i)

    rows = Rows(chat(f"{i}?", f"It is {i}.") for i in range(1500))
    with pytest.raises(ValueError, match="a process that tokenises ended without a word"):
        data.tokenise(rows, TOKENIZER, TEMPLATE, "all", tmp_path, "test", 2)
    assert [*tmp_path.iterdir()] == []


def test_arrow_adds_nothing_to_the_tool_calls_of_a_class(tmp_path):
    def called(arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return {"messages": [chat("Go")["messages"][0], {"role": "assistant", "content": "", "tool_calls": [call]}]}

    rows = [called({"city": "Rome"}), called({"x": 1})]
    rows[1]["messages"][1]["content"] = None
    table = datasets.Dataset.from_list(rows)
    assert "city" in table[1]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    for i, row in enumerate(rows):
        assert data.read_row(table, i)["messages"] == row["messages"]


def test_a_class_in_any_file_is_a_dataset_if_it_has_what_one_has(tmp_path):
    path = tmp_path / "data.py"
    path.write_text(
        "from data import TaskDataSpec\n\nclass Whole:\n    task_spec = TaskDataSpec('whole')\n"
        f"    formatted_ds = {{'train': [{chat('A?', 'Yes.')}]}}\n"
        "\nclass NoSplits:\n    task_spec = TaskDataSpec('half')\n"
        "\nclass NoSpec:\n    formatted_ds = Whole.formatted_ds\n"
        "\nclass Stream(Whole):\n    formatted_ds = {'train': iter([])}\n"
        "\nclass Columns(Whole):\n    formatted_ds = {'train': {'messages': []}}\n"
        "\nclass More(Whole):\n    formatted_ds = Whole.formatted_ds | {'test': iter([])}\n"
        "\nclass Gone(Whole):\n    def __init__(self):\n        open('gone')\n"
        "\nvalue = 3\n"
    )

    def load(name):
        return data.load_entries(config.load(None, [f"data.dataset={path}:{name}", "validation.every=null"]))

    assert load("Whole")[0].splits == load("More")[0].splits == ["train"]
    for name, said in [
        ("NoSplits", "sets formatted_ds"), ("NoSpec", "task_spec"), ("Stream", "'train' is a list_iter"),
        ("Columns", "'train' is a dict; it must be a list, .* rows by number"), ("value", "has no class value"),
        ("Gone", "data.dataset = .* could not be read: .*'gone'"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            load(name)


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "not valid JSON"),
        ("{}", "of no format"),
        ('{"messages": []}', '"messages" is empty'),
        (
            '{"messages": [{"role": "assistant", "content": "a", "tool_calls": "x"}]}',
            "tool_calls is 'x', not a list of",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a"}], "tools": [5]}',
            r"tools is '\[5\]', not a list of desc",
        ),
        (json.dumps({"messages": [{"role": "robot", "content": "x"}]}), "role 'robot'"),
        (json.dumps({"messages": [{"role": "user", "content": 3}]}), "neither text"),
        (json.dumps(chat("a \ud83d", "b")), r"half a character \('\\ud83d'\)"),
        (json.dumps({"messages": [{"role": "user", "content": "x"}]}), "no assistant turn"),
    ],
)
def test_a_bad_row_stops_with_its_file_line_and_reason(tmp_path, line, reason):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(chat("One?", "First.")) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=reason) as error:
        tokens_of(tmp_path, formats.read_rows(str(path)))
    assert f"{path}:2:" in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []  # nothing half-written


def test_tool_arguments_reach_the_template_as_they_stand_in_the_file(tmp_path):
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": n, "arguments": a}}]}
             for n, a in (("f", {"x": 1}), ("g", {"y": None, "z": [1, {"w": "é"}]}))]  # fmt: skip
    rows = [{"messages": [{"role": "user", "content": "Go"}, call]} for call in calls]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [formats.read_rows(str(path))[i] for i in range(2)] == rows


def test_openassistant_has_every_path_and_no_validation_prompt_in_training(tmp_path, monkeypatch):
    def node(text, *replies, role="prompter"):
        other = "assistant" if role == "prompter" else "prompter"
        return {"text": text, "role": role, "replies": [reply(other) for reply in replies]}

    def make(text, *replies):
        return lambda role: node(text, *replies, role=role)

    trees = [
        {"prompt": node(f"q{i}", make("a", make("b", make("c"), make("d")), make("e")), make("f"))} for i in range(40)
    ]
    trees.append({"prompt": node("unanswered")})
    path = tmp_path / "trees.jsonl"
    path.write_text("".join(json.dumps(tree) + "\n" for tree in trees))
    monkeypatch.setattr(data.huggingface_hub, "hf_hub_download", lambda *_, **__: str(path))
    made = data.OpenAssistant()
    texts = {
        split: ["".join(m["content"] for m in row["messages"][1:]) for row in made.formatted_ds[split]]
        for split in ("train", "validation")
    }
    assert sorted(texts["train"] + texts["validation"]) == sorted(f"q{i}{p}" for i in range(40) for p in ("abc", "abd", "ae", "f"))  # fmt: skip  # noqa: E501
    prompts = [{row["messages"][1]["content"] for row in made.formatted_ds[split]} for split in texts]
    assert len(prompts[1]) == 2 and not prompts[0] & prompts[1]
    assert all(row["messages"][0]["content"] == data.OpenAssistant.system for row in made.formatted_ds["train"])


def test_squad_is_context_question_and_first_answer(monkeypatch):
    row = {"id": "1", "title": "t", "context": " A b. ", "question": "Who? ", "answers": {"text": ["Me", "You"], "answer_start": [0, 1]}}  # fmt: skip  # noqa: E501
    split = datasets.Dataset.from_list([row])
    monkeypatch.setattr(data.datasets, "load_dataset", lambda name: {"train": split, "validation": split})
    made = data.Squad().formatted_ds["train"][0]
    messages = made["messages"]
    assert data.answers_of(made) == ["Me", "You"] and made["id"] == "1"
    assert [(m["role"], m["content"]) for m in messages] == [
        ("system", " A b. "), ("user", "Who? "), ("assistant", "Me")]  # fmt: skip
    text, spans = data.templates.render(data.Squad.custom_template, messages)
    assert text == "Context: A b. Question: Who? Answer: Me" and [text[a:b] for a, b in spans] == [" Me"]


def test_rows_that_are_made_when_they_are_read_are_read_once_each(tmp_path):
    class Squares:
        def __len__(self):
            return 3

        def __getitem__(self, i):  # without an end of its own
            return chat(f"{i} times {i}?", str(i * i))

    made = tokens_of(tmp_path, Squares())
    assert len(made) == 3 and TOKENIZER.decode(made[2][0]).endswith("4<|im_end|>\n")


def test_a_file_of_another_kind_is_refused_with_the_kinds_that_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/chats.csv").write_text("question,answer\n")
    with pytest.raises(ValueError, match="a file of chats ends in .jsonl, .* write a class"):
        data.load_dataset_class("folder/chats.csv", {})


def test_a_fraction_is_held_out_the_same_way_each_time(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat(f"{i}?", "Yes.")) + "\n" for i in range(50)))
    a, b = (data.load_dataset_class(str(path), {"validation": 0.1}).formatted_ds for _ in range(2))
    assert len(a["train"]) == 45 and np.array_equal(a["validation"].indices, b["validation"].indices)
    for wrong in ({"validatoin": 0.1}, {"validation": 2.0}, {"seed": "x"}, {"seed": -1}):
        with pytest.raises(ValueError, match=f"data.args.*{[*wrong][0]}"):
            data.load_dataset_class(str(path), wrong)


def test_a_split_is_needed_where_it_is_read_and_read_nowhere_else(tmp_path):
    (tmp_path / "chats.jsonl").write_text(3 * (json.dumps(chat("A?", "Yes.")) + "\n"))
    only_train = f"{{dataset: {tmp_path}/chats.jsonl, args: {{validation: null}}}}"
    (tmp_path / "held_out.py").write_text(
        "import data\n\nclass HeldOut:\n    task_spec = data.TaskDataSpec('held_out')\n"
        f"    formatted_ds = {{'validation': [{chat('A?', 'Yes.')}]}}\n"
        "\nclass Nothing(HeldOut):\n    formatted_ds = {'train': [], 'validation': None}\n"
    )
    only_validation = f"{{dataset: {tmp_path}/held_out.py:HeldOut, weight: 0}}"

    def load(*entries, every=10, scoring=False):
        cfg = config.load(None, [f"data.dataset=[{', '.join(entries)}]", f"validation.every={every}"])
        return [entry.splits for entry in data.load_entries(cfg, scoring)]

    with pytest.raises(ValueError, match="no validation split: set data.args.validation .*, or validation.every=null"):
        load(only_train)
    assert load(only_train, every="null") == [["train"]]
    assert load(only_train, only_validation, every="null") == [["train"]]
    assert load(only_train, only_validation) == [["train"], ["validation"]]
    assert load(only_validation.replace("weight: 0", "weight: 1"), scoring=True) == [["validation"]]
    with pytest.raises(ValueError, match="has weight 0 and no validation split: leave it out"):
        load(only_validation.replace("HeldOut", "Nothing"), only_train)
    with pytest.raises(ValueError, match="has no split 'train'; it has 'validation'"):
        load(only_validation.replace("weight: 0", "weight: 1"))
    only_validation = only_validation.replace("HeldOut", "Nothing")
    with pytest.raises(ValueError, match="split 'train' is empty"):
        load(only_validation.replace("weight: 0", "weight: 1"))
