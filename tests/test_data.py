import gzip
import json
import os
from pathlib import Path

import datasets
import pyarrow
import pytest

import config
import data
import templates

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


@pytest.fixture(autouse=True)
def hub_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(data.huggingface_hub.constants, "HF_HOME", str(tmp_path_factory.mktemp("hf")))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path, format=None, columns=None):
    return data.as_conversations(data.read_table(data.find_files(str(path))), format, columns)


def questions(rows):
    return [row["messages"][0]["content"] for row in rows]


def conversations(rows, name="rows"):
    return [data.read_conversation(rows, i, name) for i in range(len(rows))]


# ---- files -----------------------------------------------------------------------------------------------------------


def test_rows_come_exactly_as_they_stand_in_the_file(tmp_path):
    values = [{"x": 3.141592653589793, "y": None, "z": [1, {"w": "é"}, []]}, {"x": 2**70, "s": "42", "t": "null"}, {}]
    rows = []
    for value in values:
        function = {"type": "function", "function": {"name": "f", "arguments": value}}
        call = {"role": "assistant", "content": "", "tool_calls": [{"id": "c", **function}]}
        blocks = {"role": "user", "content": [{"type": "text", "text": "Go"}]}
        rows.append({"messages": [blocks, call], "tools": [{"type": "function", "function": value}]})
    rows.append({"messages": [ASK, {**ANSWER, "content": "42"}], "other": "left alone"})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for path in (write(tmp_path / "rows.jsonl", *rows), tmp_path / "rows.json"):
        found = conversations(read(path))
        assert found[-1].pop("unread") == ["other"]
        assert json.dumps(found) == json.dumps([{k: v for k, v in row.items() if k != "other"} for row in rows])


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
    rows = read(tmp_path)
    assert [rows[i]["messages"][0]["content"] for i in range(len(rows))] == list("012345")
    for i, place in ((1, "a.jsonl:2"), (3, "b.jsonl.gz:2"), (4, "more/c.json:0"), (5, "more/d.parquet:0")):
        with pytest.raises(ValueError, match=f"{tmp_path}/{place}: wrong"), data.at_row(rows, i, "rows"):
            raise ValueError("wrong")
    assert len(read(f"{tmp_path}/*.jsonl*")) == 4 and len(read(f"{tmp_path}/**/*.j*")) == 5
    for wrong in ("*.csv", "none.jsonl", "*.md"):
        with pytest.raises(ValueError, match=wrong.replace("*", r"\*") + r".*\.jsonl, \.jsonl\.gz"):
            read(f"{tmp_path}/{wrong}")


def test_hidden_files_are_no_data_nor_are_those_validated_on(tmp_path):
    row = {"prompt": "a", "completion": "b"}
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/a.jsonl", ".b.jsonl", "c.jsonl", "val.jsonl"):
        write(tmp_path / name, {**row, "prompt": name})
    splits = data.load_dataset_class(str(tmp_path), {"validation": f"{tmp_path}/val.jsonl"}).formatted_ds
    prompts = {split: [row["messages"][0]["content"] for row in rows] for split, rows in splits.items()}
    assert prompts == {"train": ["c.jsonl"], "validation": ["val.jsonl"]}
    splits = data.load_dataset_class(f"{tmp_path}/val.jsonl", {"validation": f"{tmp_path}/val.jsonl"}).formatted_ds
    assert len(splits["train"]) == 1  # it is named, so it is wanted
    (tmp_path / "val.jsonl").rename(tmp_path / "D.JSONL")
    splits = data.load_dataset_class(str(tmp_path), {"validation": [f"{tmp_path}/c.jsonl"]}).formatted_ds
    prompts = {split: [row["messages"][0]["content"] for row in rows] for split, rows in splits.items()}
    assert prompts == {"train": ["val.jsonl"], "validation": ["c.jsonl"]}


@pytest.mark.parametrize("text", [b"%s\n%s", b"%s\r\n%s\n\n \n", b"\xef\xbb\xbf%s\n\n%s\n"])
def test_a_row_is_a_line_whatever_the_lines_end_with(tmp_path, text):
    line = json.dumps({"prompt": "a\u2028", "completion": "b"}, ensure_ascii=False).encode()
    (tmp_path / "rows.jsonl").write_bytes(text % (line, line))
    assert [row["messages"][0]["content"] for row in conversations(read(tmp_path / "rows.jsonl"))] == ["a\u2028"] * 2


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_a_file_is_never_read_from_a_stale_cache(tmp_path, ending):
    path, answers, prints = tmp_path / f"rows{ending}", [], []
    for answer in ("b", "c"):
        row = {"prompt": "a", "completion": answer}
        if ending == ".parquet":
            datasets.Dataset.from_list([row]).to_parquet(path)
        else:
            (gzip.open if ending.endswith("gz") else open)(path, "wt").write(
                json.dumps([row] if ending == ".json" else row)
            )
        os.utime(path, (1, 1))  # the same size, too
        rows = read(path)
        answers.append(rows[0]["messages"][1]["content"])
        prints.append(rows._fingerprint)
    assert answers == ["b", "c"] and prints[0] != prints[1]
    assert read(path)._fingerprint == prints[1]
    assert read(path, "prompt_completion")._fingerprint != prints[1]


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("rows.jsonl.gz", b"no gzip", "gzip"), ("rows.json", b"{", "Expecting"),
        ("rows.parquet", b"no parquet", "[Pp]arquet"), ("rows.jsonl", b"\n", "no rows"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    for _ in range(2):  # nothing of the first time is used the second time
        with pytest.raises(ValueError, match=f"{name}.*{reason}"):
            read(tmp_path / name)


def test_json_lines_in_a_json_file_are_rows_and_a_bad_one_is_named(tmp_path):
    row = json.dumps(SAME["messages"][0])
    for text in (f"{row}\n{row}", f"\n{row}\r\n\n{row}\n", json.dumps([SAME["messages"][0]] * 2, indent=1)):
        (tmp_path / "rows.json").write_bytes(text.encode())
        assert questions(read(tmp_path / "rows.json")) == ["One?"] * 2
    (tmp_path / "rows.json").write_text(f"{row}\n{{\n{row}")
    rows = read(tmp_path / "rows.json")
    with pytest.raises(ValueError, match="rows.json:2: "):
        data.read_conversation(rows, 1, "rows")


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv", ".tsv"])
@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_packed_files_are_read_as_what_they_hold(tmp_path, kind, packing):
    tables = {".csv": "prompt,completion\nOne?,First.\n", ".tsv": "prompt\tcompletion\ta,b,c\nOne?\tFirst.\t\n"}
    text = tables.get(kind) or json.dumps({"prompt": "One?", "completion": "F"})
    codec = {".gz": "gzip", ".zst": "zstd"}[packing]
    for content in (pyarrow.compress(text.encode(), codec, asbytes=True), b"neither"):
        (tmp_path / f"rows{kind}{packing}").write_bytes(content)
        if content != b"neither":
            assert questions(read(tmp_path)) == ["One?"]
    with pytest.raises(ValueError, match=f"rows{kind}{packing}"):
        read(tmp_path)


@pytest.mark.parametrize("separator", ",;\t")
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_spreadsheet_is_read_whatever_it_was_exported_with(tmp_path, separator, encoding):
    rows = [["question", "answer", ""], ['"Nä, ""one"";\r\n\tor 1?"', "007", ""], [], ["", "", ""], ["NA", "1.10", ""]]
    (tmp_path / "rows.csv").write_bytes("\r\n".join(separator.join(row) for row in rows).encode(encoding))
    rows = read(tmp_path, columns={"instruction": "question", "output": "answer"})
    texts = [[message["content"] for message in row["messages"]] for row in conversations(rows)]
    assert texts == [['Nä, "one";\r\n\tor 1?', "007"], ["NA", "1.10"]]
    with pytest.raises(ValueError, match="rows.csv:5: wrong"), data.at_row(rows, 1, "rows"):
        raise ValueError("wrong")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("question,answer\nOne?\n", "row 2 has 1 cells"), ("question,answer\na,b\nOne?,First., it is\n", "row 3 has 3"),
        ('question,answer\n"One?,First.\n', "unexpected end"), ("answer,question,answer\na,b,c\n", "answer, question"),
        ("question,answer\n", "no rows"), ("", "no rows"),
    ],
)  # fmt: skip
def test_a_spreadsheet_that_has_another_shape_is_refused(tmp_path, text, reason):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(ValueError, match=f"rows.csv.*{reason}"):
        read(tmp_path, columns={"instruction": "question", "output": "answer"})


def test_an_empty_cell_is_no_answer(tmp_path):
    (tmp_path / "rows.csv").write_text("instruction,output\nOne?,First.\nTwo?,\n")
    with pytest.raises(ValueError, match="rows.csv:3: .*instruction are of no format"):
        conversations(read(tmp_path))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_in_another_encoding_is_read_rightly_or_named(tmp_path, name, encoding):
    row = {"prompt": "é", "completion": "b"}
    text = "prompt,completion\né,b\n" if name == "rows.csv" else (json.dumps(row, ensure_ascii=False) + "\n") * 2
    (tmp_path / name).write_bytes(text.encode(encoding))
    if encoding == "utf-16" and name != "rows.jsonl":
        assert {*questions(read(tmp_path))} == {"é"}
    else:
        reason = (
            "is UTF-16.*save it as UTF-8"
            if encoding == "utf-16"
            else "codec"
            if name == "rows.jsonl"
            else "codec.*UTF-8"
        )
        with pytest.raises(ValueError, match=f"{name}.*{reason}"):
            rows = read(tmp_path)
            assert encoding == "latin-1" and name == "rows.jsonl"
            conversations(rows)


def test_a_saved_dataset_is_read_with_its_splits_as_it_stands(tmp_path):
    def row(question, arguments):
        call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
        return {"messages": [{**ASK, "content": question}, {**CALL, "content": "", "tool_calls": [call]}]}

    rows = {name: [row(f"{name} 0", {"x": 1}), row(f"{name} 1", {"y": "42"})] for name in ("train", "dev", "test")}
    tables = {name: datasets.Dataset.from_list(part) for name, part in rows.items()}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "saved")
    splits = data.load_dataset_class(str(tmp_path / "saved"), {}).formatted_ds
    assert [row["messages"] for row in conversations(splits["train"])] == [row["messages"] for row in rows["train"]]
    assert questions(splits["validation"]) == ["dev 0", "dev 1"]
    tables["train"].save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one/cache-1.arrow").write_bytes(b"of a map, and no part of the dataset")
    splits = data.load_dataset_class(str(tmp_path / "one"), {"validation": 0.5}).formatted_ds
    assert sorted(questions(splits["train"]) + questions(splits["validation"])) == ["train 0", "train 1"]
    (tmp_path / "one/data-00000-of-00002.arrow").unlink()
    with pytest.raises(OSError, match="data-00000-of-00002.arrow"):
        data.load_dataset_class(str(tmp_path / "one"), {})


# ---- formats ---------------------------------------------------------------------------------------------------------


def test_the_rows_of_a_saved_dataset_that_was_shuffled_are_in_its_order(tmp_path):
    table = datasets.Dataset.from_list([{"prompt": str(i), "completion": "b"} for i in range(9)])
    table.shuffle(seed=1).select(range(5)).save_to_disk(tmp_path / "saved")
    assert questions(read(tmp_path / "saved")) == table.shuffle(seed=1)["prompt"][:5]


@pytest.mark.parametrize("format", SAME)
def test_each_format_is_recognized_and_read_as_its_messages(tmp_path, format):
    row, messages = SAME[format]
    datasets.Dataset.from_list([row, row]).to_parquet(tmp_path / "rows.parquet")
    for rows in (
        read(write(tmp_path / "rows.jsonl", row, row)),
        read(write(tmp_path / "rows.jsonl", row, row), format),
        read(tmp_path / "rows.parquet"),
        data.as_conversations(datasets.Dataset.from_list([row, row]), None),
    ):
        assert conversations(rows)[1]["messages"] == messages


@pytest.mark.parametrize("row", [{"messages": [ASK, ANSWER]}, {"prompt": [ASK], "completion": [ANSWER]}])
def test_a_system_column_is_the_first_message(tmp_path, row):
    rows = read(write(tmp_path / "rows.jsonl", {**row, "system": "Be brief."}))
    assert rows[0]["messages"] == [{"role": "system", "content": "Be brief."}, ASK, ANSWER]


def test_of_a_prompt_of_messages_nothing_is_trained(tmp_path):
    prompt = [ASK, {**ANSWER, "train": None}, ASK]
    rows = [{"prompt": prompt, "completion": [ANSWER]}, {"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]}]
    for row in conversations(read(write(tmp_path / "rows.jsonl", rows[0], {**rows[1], "tools": '[{"name": "f"}]'}))):
        assert row["messages"] == [ASK, {**ANSWER, "train": False}, ASK, ANSWER]
    assert row["tools"] == [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    "rows, reasons",
    [
        ([{"messages": [], "prompt": "a", "completion": "b"}], [":1: ", "messages and prompt_completion"]),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "chosen": "b"}], [":2: ", "prompt", "no format"]),
        ([{"text": "a"}], [":1: ", "text", "no format"]),
        ([{"prompt": None, "completion": "b"}], [":1: ", "completion", "no format"]),
        ([{"instruction": "a", "output": "b"}] * 500 + [{"instruction": "a", "output": "b", "messages": [ASK, ANSWER]}],
         [":501: ", "messages and alpaca"]),
    ],
)  # fmt: skip
def test_a_row_without_one_format_of_its_own_is_an_error(tmp_path, rows, reasons):
    def check(open_rows, place):
        with pytest.raises(ValueError) as error:
            conversations(open_rows(), "hub")
        assert all(reason in str(error.value) for reason in [place, *reasons[1:], "data.args.format"])

    path = write(tmp_path / "rows.jsonl", *rows)
    check(lambda: read(path), f"{path}{reasons[0]}")
    columns = dict.fromkeys(name for row in rows for name in row)
    table = datasets.Dataset.from_list([{**columns, **row} for row in rows])
    check(lambda: data.as_conversations(table, None), f"hub row {int(reasons[0][1:-2]) - 1}: ")


def test_rows_of_several_formats_are_each_read_in_their_own(tmp_path):
    rows = conversations(read(write(tmp_path / "rows.jsonl", *(row for row, _ in SAME.values()))))
    assert [row["messages"] for row in rows] == [messages for _, messages in SAME.values()]
    columns = {"prompt": None, "completion": None, "messages": None}
    table = datasets.Dataset.from_list([columns | SAME[name][0] for name in ("messages", "prompt_completion")])
    assert [row["messages"] for row in conversations(data.as_conversations(table, None))] == [[ASK, ANSWER]] * 2


def test_a_json_file_of_one_object_is_that_row(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"data": [SAME["messages"][0]]}))
    with pytest.raises(ValueError, match="rows.json:0: .*columns data are of no format"):
        conversations(read(tmp_path / "rows.json"))


def test_a_format_that_is_named_decides_between_two(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"messages": [ASK, ANSWER], "prompt": "a", "completion": "b"})
    assert read(path, "messages")[0]["messages"] == [ASK, ANSWER]
    assert read(path, "prompt_completion")[0]["messages"][0]["content"] == "a"
    with pytest.raises(ValueError, match="data.args.format = chat;.*sharegpt"):
        read(path, "chat")


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_turns_may_be_json_text_in_a_column(tmp_path, column):
    row = {column: json.dumps([ASK, ANSWER])}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    datasets.Dataset.from_list([row]).to_csv(tmp_path / "rows.csv")
    write(tmp_path / "rows.jsonl", row)
    assert [row["messages"] for row in conversations(read(tmp_path))] == [[ASK, ANSWER]] * 3


def test_a_prompt_and_a_completion_may_be_messages_as_json_text_and_other_json_stays_text(tmp_path):
    for answer in (ANSWER, {"tool_calls": CALL["tool_calls"], **ANSWER}):
        prompt, completion = (json.dumps([message], indent=1) for message in (ASK, answer))
        rows = read(write(tmp_path / "rows.jsonl", {"prompt": prompt, "completion": completion}))
        assert conversations(rows)[0]["messages"] == [ASK, answer]
    texts = ['[{"name": "Ann"}]', "[1, 2]", '{"role": "?"}', '[role, "content"]', "[]", "7", "null", '["role"]']
    for text in [*texts, '[{"role": "Engineer", "name": "Ann"}]']:
        rows = read(write(tmp_path / "rows.jsonl", {"prompt": "Which?", "completion": text}))
        assert conversations(rows)[0]["messages"][1]["content"] == text
    python, cut, single = str([ANSWER]), json.dumps([ANSWER])[:-1], json.dumps(ANSWER)
    for text in (python, cut, single, '[{"from": "gpt", "value": "a"}]', json.dumps([ANSWER]) + " as YAML"):
        rows = read(write(tmp_path / "rows.jsonl", {"prompt": "Which?", "completion": text}))
        with pytest.raises(ValueError, match="rows.jsonl:1: .*(completion|role|content)"):
            conversations(rows)


def test_columns_of_other_names_are_read_under_their_own(tmp_path):
    columns = {"messages": "dialogue", "tools": "functions", "system": "persona"}
    row = {"dialogue": [ASK, ANSWER], "functions": [{"name": "f"}], "persona": None, "messages": "left out", "n": 3}
    wanted = {"messages": [ASK, ANSWER], "tools": [{"type": "function", "function": {"name": "f"}}], "unread": ["n"]}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    files, hub = read(tmp_path, columns=columns), datasets.Dataset.from_list([row])
    for rows in (
        read(write(tmp_path / "r.jsonl", row), None, columns),
        files,
        data.as_conversations(hub, None, columns),
    ):
        assert conversations(rows) == [wanted]
    with pytest.raises(ValueError, match=r"r.jsonl:1: .*'persone'.*data.args.columns.*dialogue, .*persona"):
        conversations(read(tmp_path / "r.jsonl", columns={**columns, "system": "persone"}))
    with pytest.raises(ValueError, match="data.args.columns.*'sytem'"):
        read(tmp_path / "r.jsonl", columns={"sytem": "persona"})
    with pytest.raises(ValueError, match="r.jsonl:1: .*dialogue.*no format.*data.args.columns"):
        conversations(read(write(tmp_path / "r.jsonl", {"dialogue": []})))


@pytest.mark.parametrize(
    "row, names",
    [
        ({**SAME["alpaca"][0], "context": "a", "id": 3}, ["context"]),
        ({**SAME["messages"][0], "input": "a", "source": "b", "gone": None}, ["input", "source"]),
        (SAME["sharegpt"][0], []),
    ],
)
def test_columns_that_nothing_reads_are_known_by_name(tmp_path, row, names):
    assert read(write(tmp_path / "rows.jsonl", row))[0]["unread"] == names
    assert data.as_conversations(datasets.Dataset.from_list([row]), None)[0]["unread"] == names


@pytest.mark.parametrize("share", [1, 1.5, 10, -0.1])
def test_a_share_to_hold_out_that_is_none_is_refused(tmp_path, share):
    path = write(tmp_path / "rows.jsonl", *[SAME["messages"][0]] * 4)
    with pytest.raises(ValueError, match=f"data.args.validation = {share} must be a share below 1"):
        data.Chats(path, validation=share)


@pytest.mark.parametrize(
    "row, reason",
    [
        ("{", "the row cannot be read as JSON"),
        ('{"messages": [{"role": "user", "content": "a", "role": "assistant"}]}', "duplicate key.*role"),
        ({"messages": "[{'role': 'user'}]"}, r"messages cannot be read as JSON.*\[\{'role'"),
        ({"conversations": ""}, "conversations cannot be read as JSON"),
        ({"messages": [ASK, ANSWER], "tools": '[{"name": "f", "name": "g"}]'}, "tools .* duplicate key.*name"),
        ([5], "messages is .*not a list of objects"),
        ("7", "no format"),
        ({"prompt": "Say it in JSON", "completion": json.dumps([ASK, ANSWER])}, "completion begins with 'user'"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": [{**ANSWER, "tool_calls": "x"}]}, r"messages\[0\]: tool_calls is 'x'"),
        ({"messages": [ASK, ANSWER], "tools": [5]}, r"tools is '\[5\]'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\]: the role 'robot'"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\]: the content is '3'"),
        ({"messages": [{**ASK, "content": "a \ud83d"}, ANSWER]}, "surrogates"),
        ({"messages": [ASK]}, "no assistant turn"),
        (
            {"messages": [{**ASK, "content": [{"type": "image_url", "image_url": "a"}]}, ANSWER]},
            r"messages\[0\]: .*image_url.*only text",
        ),
        ({"messages": [ASK, ANSWER], "images": ["a.png"]}, "'images': only text"),
        ({"messages": [ASK, ANSWER], "tools": "{"}, "tools cannot be read as JSON"),
        ({"messages": [{"role": "system", "content": "a"}, ASK, ANSWER], "system": "b"}, "both a 'system' column and"),
        ({"messages": [ASK, ANSWER], "train": False}, "'train' = False"),
        ({"messages": [ASK, ANSWER], "loss": False}, "'loss' = False for the whole row"),
        ({"messages": [ASK, ANSWER], "system": 0}, r"messages\[0\]: the content is '0'"),
        ({"prompt": "a", "completion": 3}, r"messages\[1\]: the content is '3'"),
        ({"prompt": "a", "completion": "b", "label": False}, "'label' = False"),
        ({"prompt": "a", "completion": "b", "input": "c"}, "'input' = 'c'"),
        ({"instruction": 3, "output": "b"}, r"messages\[0\]: the content is '3'"),
        ({"instruction": 3, "input": "a", "output": "b"}, "TypeError"),
        ({"instruction": "a", "input": 0, "output": "b"}, "input is 0"),
        ({"instruction": "a", "output": "b", "history": [["a", "b", "c"]]}, "too many values to unpack"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, r"messages\[0\]: the role 'robot'"),
        ({"conversations": [{"from": "human", "value": None}]}, r"messages\[0\]: the content is 'None'"),
        ({"conversations": [{"from": "gpt", "value": "a", "content": "b"}]}, "another 'content'"),
        ({"messages": [{**ASK, "images": ["cat.png"]}, ANSWER]}, "messages.0.: has 'images'"),
        ({"messages": [{**CALL, "tool_calls": [{"name": "f", "arguments": '{"a": 1, "a": 2}'}]}]}, "duplicate key"),
        ({"instruction": "a", "output": "b", "history": ["Hi", "Yo"]}, "history has 'Hi'"),
        ({"conversations": ["a"]}, r"messages is .*'a'.*, not a list of objects"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "function_call cannot be read as JSON"),
        ({"conversations": [{"from": "function_call", "value": "[5]"}]}, "tool_calls"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "tool_calls.* a name"),
        (
            {"conversations": [{"from": "function_call", "value": '{"name": "f", "args": {"x": 1}}'}]},
            "tool_calls.*args",
        ),
        ({"instruction": "a", "output": "b", "history": [{"user": "q", "assistant": "a"}]}, "KeyError"),
        ({"prompt": "a", "completion": "b", "loss": False}, "'loss' = False"),
    ],
)
def test_a_wrong_row_is_refused_with_its_place_and_the_reason(tmp_path, row, reason):
    columns = row if isinstance(row, dict) else SAME["messages"][0]
    good = next(good for good, _ in SAME.values() if any({*f} <= {*columns} & {*good} for f in data.FORMATS.values()))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(good) + "\n" + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    with pytest.raises(ValueError, match=rf"{path}:2: .*{reason}"):
        data.read_conversation(read(path), 1, "rows")


# ---- dataset classes -------------------------------------------------------------------------------------------------


def test_arrow_adds_nothing_to_the_tool_calls_of_a_class():
    def called(arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}]}

    rows = [called({"city": "Rome"}), called({"x": 1})]
    rows[1]["messages"][1]["content"] = None
    table = datasets.Dataset.from_list(rows)
    assert "city" in table[1]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    rows[1]["messages"][1]["content"] = ""
    assert [row["messages"] for row in conversations(table)] == [row["messages"] for row in rows]
    rows[1] = called({"x": None})
    typed = datasets.Dataset.from_list(rows, features=datasets.Features({"messages": datasets.Json()}))
    assert [row["messages"] for row in conversations(typed)] == [row["messages"] for row in rows]


def test_a_class_in_any_file_is_a_dataset_if_it_has_what_one_has(tmp_path):
    path = tmp_path / "data.py"
    path.write_text(
        "from data import TaskDataSpec\n\nclass Good:\n    task_spec = TaskDataSpec('good')\n"
        f"    formatted_ds = {{'train': [{SAME['messages'][0]}]}}\n"
        "\nclass NoSplits:\n    task_spec = TaskDataSpec('half')\n"
        "\nclass NoSpec:\n    formatted_ds = Good.formatted_ds\n"
        "\nclass Stream(Good):\n    formatted_ds = {'train': iter([])}\n"
        "\nclass Columns(Good):\n    formatted_ds = {'train': {'messages': []}}\n"
        "\nclass Empty(Good):\n    formatted_ds = {'train': []}\n"
        "\nclass More(Good):\n    formatted_ds = Good.formatted_ds | {'test': iter([])}\n"
        "\nclass Gone(Good):\n    def __init__(self):\n        open('gone')\n"
        "\nvalue = 3\n"
    )

    def load(name):
        return data.load_mixture(config.load(None, [f"data.dataset={path}:{name}", "validation.every=null"]))

    assert load("Good")[0].splits == load("More")[0].splits == ["train"]
    for name, kind, reason in [
        ("NoSplits", AttributeError, "formatted_ds"), ("NoSpec", AttributeError, "task_spec"),
        ("Stream", TypeError, "list_iterator"), ("Columns", ValueError, "no rows by number in 'train'"),
        ("Empty", ValueError, "no rows by number in 'train'"), ("value", ValueError, f"{path}:value"),
        ("Gone", OSError, "'gone'"),
    ]:  # fmt: skip
        with pytest.raises(kind, match=reason):
            load(name)


def test_openassistant_has_every_path_and_trains_no_validation_prompt(tmp_path, monkeypatch):
    def node(text, *replies, role="prompter"):
        other = "assistant" if role == "prompter" else "prompter"
        return {"text": text, "role": role, "replies": [reply(other) for reply in replies]}

    def make(text, *replies):
        return lambda role: node(text, *replies, role=role)

    trees = [
        {"prompt": node(f"q{i}", make("a", make("b", make("c"), make("d")), make("e")), make("f"))} for i in range(40)
    ]
    trees.append({"prompt": node("unanswered")})
    with gzip.open(tmp_path / "trees.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(tree) + "\n" for tree in trees))
    monkeypatch.setattr(data.huggingface_hub, "hf_hub_download", lambda *_, **__: tmp_path / "trees.jsonl.gz")
    splits = data.OpenAssistant().formatted_ds
    texts = {
        split: ["".join(m["content"] for m in row["messages"][1:]) for row in splits[split]]
        for split in ("train", "validation")
    }
    paths = ("abc", "abd", "ae", "f")
    assert sorted(texts["train"] + texts["validation"]) == sorted(f"q{i}{path}" for i in range(40) for path in paths)
    prompts = [{row["messages"][1]["content"] for row in splits[split]} for split in texts]
    assert len(prompts[1]) == 2 and not prompts[0] & prompts[1]
    assert all(row["messages"][0]["content"] == data.OpenAssistant.system for row in splits["train"])


def test_squad_is_context_question_and_first_answer(monkeypatch):
    answers = {"text": ["Me", "You"], "answer_start": [0, 1]}
    row = {"id": "1", "title": "t", "context": " A b. ", "question": "Who? ", "answers": answers}
    split = datasets.Dataset.from_list([row])
    loaded = datasets.DatasetDict({"train": split, "validation": split})
    monkeypatch.setattr(data.datasets, "load_dataset", lambda name: loaded)
    conversation = data.read_conversation(data.Squad().formatted_ds["validation"], 0, "squad")
    messages = conversation["messages"]
    assert conversation["answers"] == ["Me", "You"] and conversation["id"] == "1"
    texts = [("system", " A b. "), ("user", "Who? "), ("assistant", "Me")]
    assert [(message["role"], message["content"]) for message in messages] == texts


def test_a_file_of_another_kind_is_refused_with_the_kinds_that_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/chats.xlsx").write_text("question,answer\n")
    with pytest.raises(ValueError, match=r"folder/chats.xlsx.*my_data.py.*\.jsonl"):
        data.load_dataset_class("folder/chats.xlsx", {})


# ---- splits and mixtures ---------------------------------------------------------------------------------------------


def test_a_fraction_is_held_out_the_same_way_each_time(tmp_path):
    path = write(tmp_path / "chats.jsonl", *[{"prompt": f"{i}", "completion": "Yes."} for i in range(50)])
    a, b = (data.load_dataset_class(path, {"validation": 0.1}).formatted_ds for _ in range(2))
    prompts = [[row["messages"][0]["content"] for row in splits["validation"]] for splits in (a, b)]
    # The same rows as ever, as a run may be resumed by later code
    assert len(a["train"]) == 45 and prompts[0] == prompts[1] == ["5", "20", "25", "39", "49"]
    with pytest.raises(ValueError, match="data.args.*validatoin"):
        data.load_dataset_class(path, {"validatoin": 0.1})
    with pytest.raises(ValueError, match="data.args.validation = 2 must be a share"):
        data.load_mixture(config.load(None, [f"data.dataset={path}", "data.args.validation=2"]))


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "validation.jsonl", "test.jsonl"), ("train.jsonl", "val.jsonl", "extra.jsonl"),
        ("data/train-00000-of-00002.jsonl", "data/dev-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ("train/test.jsonl", "valid/train.jsonl", "TEST/0.jsonl"), ("chats.jsonl", "chats_val.jsonl", "eval-1.jsonl"),
        ("trainset.jsonl", "devset.jsonl", "testset.jsonl"),
    ],
)  # fmt: skip
def test_files_of_a_folder_are_splits_where_their_names_say_so(tmp_path, names, capsys):
    for name in names:
        (tmp_path / "train set" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "train set" / name, {**SAME["prompt_completion"][0], "prompt": name})
    splits = data.load_dataset_class(f"{tmp_path}/train set", {}).formatted_ds
    assert {split: questions(rows) for split, rows in splits.items()} == {"train": [names[0]], "validation": [names[1]]}
    said = next(line for line in capsys.readouterr().err.splitlines() if "left out" in line)
    assert names[2] in said and names[0] not in said
    path = f"{tmp_path}/train set/{names[2]}"
    splits = data.load_dataset_class(f"{tmp_path}/train set", {"validation": path}).formatted_ds
    said = capsys.readouterr().err
    assert f"1 left out by their names: {tmp_path}/train set/{names[1]}" in said
    assert {split: questions(rows) for split, rows in splits.items()} == {"train": [names[0]], "validation": [names[2]]}
    splits = data.load_dataset_class(f"{tmp_path}/train set", {"validation": None}).formatted_ds
    assert {split: questions(rows) for split, rows in splits.items()} == {"train": [names[0]]}


def test_the_folder_that_one_is_in_does_not_change_what_names_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    datasets.Dataset.from_list([{**SAME["prompt_completion"][0], "prompt": "a"}] * 20).save_to_disk("test/saved")
    for path in ("test/saved", "./test/saved", "test//saved/", f"{tmp_path}/test/saved"):
        assert {*questions(data.load_dataset_class(path, {}).formatted_ds["train"])} == {"a"}


def test_a_folder_whose_names_say_nothing_is_held_out_from_by_fraction(tmp_path, capsys):
    for name in ("contest", "trainer", "latest"):
        write(tmp_path / f"{name}.jsonl", *[SAME["messages"][0]] * 20)
    splits = data.load_dataset_class(str(tmp_path), {}).formatted_ds
    assert [len(rows) for rows in splits.values()] == [57, 3]
    assert "left out" not in capsys.readouterr().err
    (tmp_path / "only").mkdir()
    write(tmp_path / "only/test.jsonl", SAME["messages"][0])
    with pytest.raises(ValueError, match="only has no rows to train on"):
        data.load_dataset_class(str(tmp_path / "only"), {})


def test_a_dataset_of_the_hub_is_split_by_name_or_fraction(monkeypatch, capsys):
    row = SAME["alpaca"][0]
    loaded = datasets.DatasetDict({name: datasets.Dataset.from_list([row] * 20) for name in ("train", "test")})
    subsets = []
    monkeypatch.setattr(data.datasets, "load_dataset", lambda path, subset: subsets.append(subset) or loaded)
    for validation, sizes in (("test", [20, 20]), (0.1, [18, 2]), (None, [20])):
        splits = data.load_dataset_class("owner/name", {"validation": validation}).formatted_ds
        assert [len(rows) for rows in splits.values()] == sizes
        assert splits["train"][3]["messages"] == SAME["alpaca"][1]
    with pytest.raises(ValueError, match="owner/name has no split 'validation'.*train.*test"):
        data.load_dataset_class("owner/name", {})
    loaded["dev"] = loaded["test"].select([0])
    args = config.load(None, ["data.args.subset=2024"]).data.args
    splits = data.load_dataset_class("owner/name", args).formatted_ds
    assert [len(rows) for rows in splits.values()] == [20, 1] and subsets == [None] * 4 + ["2024"]
    assert "left out: test" in capsys.readouterr().err
    for args, reason in (({"subset": ["en"]}, r"data.args.subset = \['en'\]"), ({"train": "sft"}, "data.args.train")):
        with pytest.raises(ValueError, match=f"{reason}.*owner/name|owner/name.*{reason}"):
            data.load_dataset_class("owner/name", args)


def test_a_split_is_needed_where_it_is_read_and_read_nowhere_else(tmp_path):
    write(tmp_path / "chats.jsonl", *[SAME["messages"][0]] * 3)
    only_train = f"{{dataset: {tmp_path}/chats.jsonl, args: {{validation: null}}}}"
    (tmp_path / "held_out.py").write_text(
        "import data\n\nclass HeldOut:\n    task_spec = data.TaskDataSpec('held_out')\n"
        f"    formatted_ds = {{'validation': [{SAME['messages'][0]}]}}\n"
        "\nclass Nothing(HeldOut):\n    formatted_ds = {'train': [], 'validation': None}\n"
    )
    only_validation = f"{{dataset: {tmp_path}/held_out.py:HeldOut, weight: 0}}"

    def load(*entries, every=10, scoring=False):
        cfg = config.load(None, [f"data.dataset=[{', '.join(entries)}]", f"validation.every={every}"])
        return [entry.splits for entry in data.load_mixture(cfg, scoring)]

    with pytest.raises(ValueError, match="no validation split: set data.args.validation, or validation.every=null"):
        load(only_train)
    assert load(only_train, every="null") == [["train"]]
    assert load(only_train, only_validation, every="null") == [["train"]]
    assert load(only_train, only_validation) == [["train"], ["validation"]]
    assert load(only_validation.replace("weight: 0", "weight: 1"), scoring=True) == [["validation"]]
    with pytest.raises(ValueError, match="HeldOut'.* has no rows by number in 'train', of .*validation"):
        load(only_validation.replace("weight: 0", "weight: 1"))
    nothing = only_validation.replace("HeldOut", "Nothing")
    with pytest.raises(ValueError, match="Nothing'.* has no rows by number in 'validation'"):
        load(nothing, only_train)
    with pytest.raises(ValueError, match="Nothing'.* has no rows by number in 'train'"):
        load(nothing.replace("weight: 0", "weight: 1"))


def test_datasets_of_one_name_are_told_apart(tmp_path):
    for name in ("chats_2", "x/chats", "y/chats"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.jsonl", *[{"prompt": "a", "completion": "b"}] * 9)
    entries = ", ".join(f"{{dataset: {tmp_path}/{name}.jsonl}}" for name in ("chats_2", "x/chats", "y/chats"))
    mixture = data.load_mixture(config.load(None, [f"data.dataset=[{entries}]"]))
    assert [entry.name for entry in mixture] == ["chats_2", "chats", "chats_3"]


# ---- messages as OpenAI writes them today ----------------------------------------------------------------------------


def test_older_and_shorter_forms_of_calls_and_tools_are_read_as_todays():
    arguments = '{"z": 1.0, "a": {"b": null}, "n": [1e5, 2]}'
    function, tool = {"name": "f", "arguments": json.loads(arguments)}, {"name": "f", "parameters": {}}
    calls = [{"id": "1", "type": "function", "function": function}]
    answer = {"role": "tool", "name": "f", "content": "4"}
    expected = {
        "messages": [ASK, {"role": "assistant", "content": "", "tool_calls": calls}, answer, ANSWER],
        "tools": [{"type": "function", "function": tool}],
    }
    called = {"role": "assistant", "content": None}
    given = {"name": "f", "arguments": arguments}
    rows = [
        {"messages": [ASK, {**called, "tool_calls": [{"id": "1", "function": given}]}, answer, ANSWER],
         "tools": [tool]},
        {"messages": [ASK, {**called, "tool_calls": [{"id": "1", **function}]}, answer, ANSWER],
         "tools": json.dumps([{"type": "function", **tool}])},
        {"messages": [ASK, {"role": "assistant", "function_call": given, "tool_calls": None},
                      {**answer, "role": "function"}, {**ANSWER, "tool_calls": []}], "functions": [tool]},
    ]  # fmt: skip
    found = [data.normalize(row) for row in rows]
    assert found[:2] == [expected] * 2
    calls[0].pop("id")
    assert found[2] == expected
    assert list(found[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]) == ["z", "a", "n"]
    assert rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == arguments  # the row itself stays


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_nothing_given_is_nothing(tools):
    row = {"messages": [ASK, {**ANSWER, "tool_calls": None, "name": None}], "tools": tools}
    assert data.normalize(row) == {"messages": [ASK, ANSWER]}
    for arguments in ("", None, {}, "{}"):
        call = {"name": "f", "arguments": arguments}
        said = data.normalize({"messages": [ASK, {"role": "assistant", "tool_calls": [call]}]})["messages"][1]
        assert said["tool_calls"][0]["function"] == {"name": "f", "arguments": {}} and said["content"] == ""


@pytest.mark.parametrize("function", [*({"name": "f", "arguments": a} for a in ("{", "[1]", "null", [1], 5)), {}, 5])
def test_a_call_without_a_name_or_an_object_of_arguments_is_refused(function):
    row = {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}]}
    with pytest.raises(ValueError, match=r"row 7: messages\[1\]: tool_calls"):
        data.read_conversation([None] * 7 + [row], 7, "rows")


def test_the_weight_of_a_row_is_that_of_each_message(tmp_path):
    row = SAME["prompt_completion"][0]
    path = write(tmp_path / "rows.jsonl", *({**row, "weight": weight} for weight in (0, 1, None, 0.5, "0")))
    answers = [data.read_conversation(read(path), i, "rows")["messages"][1] for i in range(5)]
    trained = [templates.is_trained(answer, 1) for answer in (*answers[:3], answers[4])]  # "0": of a spreadsheet
    assert trained == [False, True, True, False]
    with pytest.raises(ValueError, match='"weight" is 0.5'):
        templates.is_trained(answers[3], 1)


def test_a_turn_of_sharegpt_keeps_all_its_keys_and_calls_may_be_objects(tmp_path):
    call = {"name": "f", "parameters": {"x": 1}}  # as Llama writes them
    turns = [
        {"from": "human", "value": "a"}, {"from": "function_call", "value": call},
        {"from": "observation", "value": "1"}, {"from": "gpt", "value": "b", "loss": False, "reasoning_content": "c"},
        {"from": "gpt", "value": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
    ]  # fmt: skip
    path = write(tmp_path / "rows.jsonl", {"conversations": turns})
    messages = data.read_conversation(read(path), 0, "rows")["messages"]
    called = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": called}
    assert messages[3] == {"role": "assistant", "content": "b", "loss": False, "reasoning_content": "c"}
    assert messages[4] == {"role": "assistant", "content": "", "tool_calls": called}


def test_a_prompt_may_be_text_and_its_completion_messages(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"prompt": "a", "completion": [ANSWER]})
    assert conversations(read(path)) == [{"messages": [{"role": "user", "content": "a"}, ANSWER]}]


@pytest.mark.parametrize("others", [{"arguments": 0}, {"arguments": {}, "input": {"x": 1}}, {"args": {"x": 1}}])
def test_a_call_with_what_is_not_read_is_refused(others):
    call = {"type": "function", "function": {"name": "f", **others}}
    for calls in ([call], [{"name": "f", **others}], [{"type": "function", "function": {"name": "f"}, **others}]):
        row = {"messages": [ASK, {**ANSWER, "tool_calls": calls}]}
        with pytest.raises(ValueError, match=r"messages\[1\]: tool_calls"):
            data.normalize(row)


@pytest.mark.parametrize("left", [100, 0, None])
def test_damaged_rows_in_the_cache_are_an_error_that_names_what_to_delete(tmp_path, left):
    path = write(tmp_path / "rows.jsonl", SAME["messages"][0])
    read(path)
    (rows,) = Path(data.huggingface_hub.constants.HF_HOME).glob("sft-rows/**/*.arrow")
    content = rows.read_bytes()
    rows.unlink()
    if left is not None:
        rows.write_bytes(content[:left])
    with pytest.raises(ValueError, match="rows.jsonl.*delete .*sft-rows"):
        read(path)
