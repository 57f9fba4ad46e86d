import gzip
import json
import os

import datasets
import pytest

import config
import data
import formats

ASK, ANSWER = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "First."}
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}]}  # fmt: skip
SAME = {  # rows of each format, and the messages that they are
    "messages": ({"messages": [ASK, ANSWER]}, [ASK, ANSWER]),
    "prompt_completion": ({"prompt": "One?", "completion": "First."}, [ASK, ANSWER]),
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be short.", "history": [["a", "b"]]},
        [
            {"role": "system", "content": "Be short."}, {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"}, {"role": "user", "content": "Add.\n\n1 2"},
            {"role": "assistant", "content": "3"},
        ],
    ),
    "sharegpt": (
        {"system": "Be short.", "conversations": [
            {"from": "human", "value": "One?"},
            {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "it"}}'},
            {"from": "observation", "value": "1"}, {"from": "gpt", "value": "First.", "weight": 0}]},
        [{"role": "system", "content": "Be short."}, ASK, CALL, {"role": "tool", "content": "1"},
         {**ANSWER, "weight": 0}],
    ),
}  # fmt: skip


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("format", SAME)
def test_each_format_is_recognised_and_read_as_its_messages(tmp_path, format):
    row, messages = SAME[format]
    for rows in (
        formats.read_rows(write(tmp_path / "rows.jsonl", row, row)),
        formats.read_rows(write(tmp_path / "rows.jsonl", row, row), format),
        formats.Rows([formats.File("table", datasets.Dataset.from_list([row, row]))]),
    ):
        assert rows.format == format and rows[1]["messages"] == messages
        data.check_row(rows[1])


@pytest.mark.parametrize("row", [{"messages": [ASK, ANSWER]}, {"prompt": [ASK], "completion": [ANSWER]}])
def test_a_system_column_is_the_first_message(row):
    made = formats.to_messages({**row, "system": "Be brief."}, "messages" if "messages" in row else "prompt_completion")
    assert made["messages"] == [{"role": "system", "content": "Be brief."}, ASK, ANSWER]


def test_files_of_two_formats_are_named_with_one_row_of_each(tmp_path):
    rows = [{"messages": []}, {"messages": [], "output": "x"}, {"instruction": "a", "output": "b"}]
    with pytest.raises(ValueError, match=r":[12] is of the format messages and .*:3 of alpaca"):
        formats.read_rows(write(tmp_path / "rows.jsonl", *rows)).format  # noqa: B018


def test_of_a_prompt_of_messages_nothing_is_trained():
    asked = [ASK, {**ANSWER, "train": None}, ASK]
    made = formats.to_messages({"prompt": asked, "completion": [ANSWER]}, "prompt_completion")
    assert made["messages"][1]["train"] is False
    row = {"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER], "tools": '[{"name": "f"}]'}
    made = formats.to_messages(row, "prompt_completion")
    assert made == {"messages": [ASK, {"train": False, **ANSWER}, ASK, ANSWER], "tools": [{"name": "f"}]}


@pytest.mark.parametrize(
    "rows, reason",
    [
        ([{"messages": [], "prompt": "a", "completion": "b"}], "1: the format may be messages or prompt_completion"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "chosen": "b"}], "2: the columns chosen, prompt"),
        ([{"text": "a"}], "1: the columns text are of no format"),
        ([{"instruction": "a", "output": "b"}, {"messages": []}], "1 is of the format alpaca and .*2 of messages"),
        ([{"prompt": None, "completion": "b"}], "1: the columns completion"),
    ],
)
def test_a_format_that_not_all_rows_have_alone_is_an_error_with_the_choices(tmp_path, rows, reason):
    good = formats.read_rows(write(tmp_path / "rows.jsonl", *rows))
    with pytest.raises(ValueError, match=reason):
        good.format  # noqa: B018
    if "of the format" not in reason:
        with pytest.raises(ValueError, match="data.args.format.*sharegpt: conversations"):
            good.format  # noqa: B018


def test_a_row_far_down_that_fits_two_formats_is_found(tmp_path):
    row = {"instruction": "a", "output": "b"}
    rows = formats.read_rows(write(tmp_path / "rows.jsonl", *[row] * 500, {**row, "messages": [ASK, ANSWER]}))
    with pytest.raises(ValueError, match=":501: the format may be messages or alpaca"):
        rows.format  # noqa: B018
    table = datasets.Dataset.from_list([row] * 500 + [{**row, "output": None}])
    with pytest.raises(ValueError, match=":500: the columns instruction are of no format"):
        formats.Rows([formats.File("table", table)]).format  # noqa: B018
    other = {"prompt": None, "completion": None}
    table = datasets.Dataset.from_list([{**row, **other}] * 9 + [{**row, "prompt": "a", "completion": "b"}])
    with pytest.raises(ValueError, match=":9: the format may be prompt_completion or alpaca"):
        formats.Rows([formats.File("table", table)]).format  # noqa: B018


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "a", "completion": 3}, "'completion' is '3', which is not text"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "the speaker 'robot' is unknown"),
        ({"conversations": [{"from": "human", "value": None}]}, r"conversations\[0\]: the value"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, r"conversations\[0\]: is not valid JSON"),
        ({"messages": [ASK, ANSWER], "images": ["a.png"]}, "'images': only text is trained"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}, ANSWER]},
            "block of type 'image_url': only text is trained",
        ),
        ({"messages": [ASK, ANSWER], "tools": "{"}, "tools: is not valid JSON"),
        ({"messages": [{"role": "system", "content": "a"}, ASK, ANSWER], "system": "b"}, "both a 'system' column and"),
        ({"messages": [ASK, ANSWER], "train": False}, "'train' = False for the whole row, which is not read"),
        ({"prompt": "a", "completion": "b", "label": False}, "'label' = False for the whole row, which is not read"),
        ({"prompt": "a", "completion": "b", "input": "c"}, "'input' beside prompt and completion"),
    ],
)
def test_a_row_that_is_wrong_is_refused_with_its_place_and_the_reason(tmp_path, row, reason):
    good = {name: SAME[f][0][name] for f in SAME for name in formats.COLUMNS[f] if formats.COLUMNS[f] <= row.keys()}
    rows = formats.read_rows(write(tmp_path / "rows.jsonl", good, row))
    with pytest.raises(ValueError, match=rf"rows.jsonl:2: .*{reason}"):
        data.encode_rows(rows, None, "{{ messages }}", "all", "rows", [1])


def test_a_folder_and_a_glob_are_all_their_files_by_name(tmp_path):
    def row(i):
        return {"messages": [{"role": "user", "content": str(i)}, ANSWER]}

    (tmp_path / "more").mkdir()
    write(tmp_path / "a.jsonl", row(0), row(1))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps(row(2)) + "\n" + json.dumps(row(3)))
    (tmp_path / "more/c.json").write_text(json.dumps([row(4)]))
    datasets.Dataset.from_list([row(5)]).to_parquet(tmp_path / "more/d.parquet")
    (tmp_path / "README.md").write_text("Not data.")
    rows = formats.read_rows(str(tmp_path))
    assert [rows[i]["messages"][0]["content"] for i in range(len(rows))] == list("012345")
    assert rows.where(1).endswith("a.jsonl:2") and rows.where(3).endswith("b.jsonl.gz:2")
    assert rows.where(5).endswith("d.parquet:0")
    assert len(formats.read_rows(f"{tmp_path}/*.jsonl*")) == 4 and len(formats.read_rows(f"{tmp_path}/**/*.j*")) == 5
    for missing in (f"{tmp_path}/*.csv", f"{tmp_path}/none.jsonl"):
        with pytest.raises(ValueError, match="no file"):
            formats.read_rows(missing)
    with pytest.raises(ValueError, match="README.md: must end in"):
        formats.read_rows(f"{tmp_path}/*.md")


def test_lines_are_those_of_the_file_whatever_it_ends_with(tmp_path):
    for text, lines in ((b"a\nb", [b"a", b"b"]), (b"a\r\n\nb\n\n \n", [b"a\r", b"", b"b"]), (b"", []), (b"\n", [])):
        (tmp_path / "lines").write_bytes(text)
        made = formats.Lines(str(tmp_path / "lines"))
        assert [made[i] for i in range(len(made))] == lines


def test_the_fingerprint_changes_with_any_row_and_with_the_format(tmp_path):
    def fingerprint(*rows, format=None):
        return formats.read_rows(write(tmp_path / "rows.jsonl", *rows), format).fingerprint

    first = fingerprint({"prompt": "a", "completion": "b"})
    assert fingerprint({"prompt": "a", "completion": "b"}) == first
    assert fingerprint({"prompt": "a", "completion": "c"}) != first
    assert fingerprint({"prompt": "a", "completion": "b"}, format="prompt_completion") != first


def test_parquet_is_known_by_what_it_holds_not_by_its_time(tmp_path):
    path, prints, answers = tmp_path / "rows.parquet", [], []
    for answer in ("b", "c"):
        datasets.Dataset.from_list([{"prompt": "a", "completion": answer}]).to_parquet(path)
        os.utime(path, (1, 1))
        rows = formats.read_rows(str(path))
        prints.append(rows.fingerprint)
        answers.append(rows[0]["messages"][1]["content"])
    assert answers == ["b", "c"] and prints[0] != prints[1]


def test_hidden_files_of_a_folder_are_no_data_nor_are_those_that_are_validated_on(tmp_path):
    row = {"prompt": "a", "completion": "b"}
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/a.jsonl", ".b.jsonl", "c.jsonl", "val.jsonl"):
        write(tmp_path / name, row)
    made = data.load_dataset_class(str(tmp_path), {"validation": f"{tmp_path}/val.jsonl"}).formatted_ds
    assert [file.name for file in made["train"].files] == [str(tmp_path / "c.jsonl")]
    assert [file.name for file in made["validation"].files] == [str(tmp_path / "val.jsonl")]
    made = data.load_dataset_class(f"{tmp_path}/val.jsonl", {"validation": f"{tmp_path}/val.jsonl"}).formatted_ds
    assert len(made["train"]) == 1  # named, so wanted


def test_datasets_of_one_name_are_told_apart(tmp_path):
    for name in ("chats_2", "x/chats", "y/chats"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.jsonl", *[{"prompt": "a", "completion": "b"}] * 9)
    entries = ", ".join(f"{{dataset: {tmp_path}/{name}.jsonl}}" for name in ("chats_2", "x/chats", "y/chats"))
    made = data.load_entries(config.load(None, [f"data.dataset=[{entries}]"]))
    assert [entry.name for entry in made] == ["chats_2", "chats", "chats_3"]
