"""Files of conversations: rows of .jsonl, .json and .parquet files, and the formats that people keep chats in."""

import contextlib
import functools
import glob
import gzip
import hashlib
import json
import zlib
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import numpy as np
from huggingface_hub.utils.sha import sha_fileobj

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet")

# The columns that a row of each format has. Any row may also have `tools` (a list, or JSON text)
COLUMNS = {
    "messages": {"messages"},  # [{"role": "user", "content": "..."}, ...]
    "prompt_completion": {"prompt", "completion"},  # two texts, or two lists of messages: the completion is trained
    "alpaca": {"instruction", "output"},  # and perhaps `input`, `system`, `history`
    "sharegpt": {"conversations"},  # [{"from": "human", "value": "..."}, ...], and perhaps `system`
}
KNOWN = set().union(*COLUMNS.values())
NO_TEXT = ("image", "images", "video", "videos", "audio", "audios")
SPEAKERS = {  # of ShareGPT, and the roles they are
    **{"system": "system", "human": "user", "user": "user", "tool": "tool", "observation": "tool"},
    **{"gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "model": "assistant"},
    "function_response": "tool",
}


# ---- rows ------------------------------------------------------------------------------------------------------------


class File(NamedTuple):
    """`rows`: dicts, lines of JSON, or a table of `datasets`; `first`: the number of row 0 in messages; `digest`: of a
    file whose bytes are no longer at hand."""

    name: str
    rows: "list | Lines | datasets.Dataset"
    first: int = 0
    digest: str | None = None

    def where(self, i: int) -> str:
        return f"{self.name}:{i + self.first}"

    def row(self, i: int):
        row = self.rows[i]
        if isinstance(row, bytes):
            return read_json(row, self.where(i))
        return drop_none(row) if isinstance(self.rows, datasets.Dataset) else row


class Rows:
    """The rows of files, one file after the other, as {"messages": [...]} with `tools` where they have some. `format`:
    one of `COLUMNS`; None: it is known by the columns, see `recognise`."""

    def __init__(self, files: list[File], format: str | None = None):
        if format is not None and format not in COLUMNS:
            raise ValueError(f"data.args.format = {format!r} must be one of {', '.join(COLUMNS)}")
        self.files, self.asked = files, format
        self.ends = np.cumsum([len(file.rows) for file in files])

    @functools.cached_property
    def format(self) -> str:
        return self.asked or recognise(self.files)

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> dict:
        file, i = self.place(i)
        return to_messages(file.row(i), self.format)

    def place(self, i: int) -> tuple[File, int]:
        n = int(np.searchsorted(self.ends, i, side="right"))
        return self.files[n], int(i) - (int(self.ends[n - 1]) if n else 0)

    def where(self, i: int) -> str:
        file, i = self.place(i)
        return file.where(i)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes when any row does."""
        digest = hashlib.sha256(str(self.asked).encode())
        for _, rows, _, known in self.files:
            digest.update(f"{len(rows)}".encode())
            if isinstance(rows, datasets.Dataset):
                digest.update((known or rows._fingerprint).encode())
            elif isinstance(rows, Lines):
                digest.update(rows.text)
            else:
                for row in rows:
                    digest.update(row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode())
                    digest.update(b"\n")
        return digest.hexdigest()


class Part:
    """Some of the rows."""

    def __init__(self, rows: Rows, indices: np.ndarray):
        self.rows, self.indices = rows, indices

    @property
    def format(self) -> str:
        return self.rows.format

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i: int) -> dict:
        return self.rows[int(self.indices[i])]

    def where(self, i: int) -> str:
        return self.rows.where(int(self.indices[i]))

    @functools.cached_property
    def fingerprint(self) -> str:
        return self.rows.fingerprint + hashlib.sha256(self.indices.tobytes()).hexdigest()


class Lines:
    """The lines of a file as bytes. The file is memory-mapped, so that none of them is held in memory."""

    def __init__(self, path: str):
        size = Path(path).stat().st_size
        self.text = np.memmap(path, dtype=np.uint8, mode="r") if size else np.zeros(0, dtype=np.uint8)
        block = 2**26
        ends = [at + np.flatnonzero(self.text[at : at + block] == ord("\n")) for at in range(0, size, block)]
        self.ends = np.concatenate([*ends, [size]]).astype(np.int64)
        while len(self.ends) and not self[len(self.ends) - 1].strip():
            self.ends = self.ends[:-1]  # empty lines at the end

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i: int) -> bytes:
        return self.text[self.ends[i - 1] + 1 if i else 0 : self.ends[i]].tobytes()


def read_rows(path: str, format: str | None = None, without: list[str] = ()) -> Rows:
    """The rows of a file, of all files that a glob names, or of all in a folder, by their names; `without`: files that
    are left out. Raises ValueError."""
    without = {Path(name).resolve() for name in without}
    files = [read_file(name) for name in find_files(path) if Path(name).resolve() not in without]
    if not sum(len(file.rows) for file in files):
        raise ValueError(f"data: {path} holds no rows")
    return Rows(files, format)


def is_path(name: str) -> bool:
    """Whether a `data.dataset` names files."""
    return name.endswith(ENDINGS) or glob.has_magic(name) or Path(name).is_dir()


def find_files(path: str) -> list[str]:
    if Path(path).is_dir():
        inside = [p for p in sorted(Path(path).rglob("*")) if p.name.endswith(ENDINGS) and p.is_file()]
        inside = [p for p in inside if p.name not in ("dataset_info.json", "dataset_infos.json")]  # of the Hub
        found = [str(p) for p in inside if not any(part[0] == "." for part in p.relative_to(path).parts)]  # hidden
    elif Path(path).is_file():
        found = [path]
    elif glob.has_magic(path):
        found = sorted(name for name in glob.glob(path, recursive=True) if Path(name).is_file())
    else:
        raise ValueError(f"data: there is no file {path}")
    if not found:
        raise ValueError(f"data: {path} names no file that ends in {', '.join(ENDINGS)}")
    return found


def read_file(path: str) -> File:
    """A row of a .jsonl file is read exactly as it stands there."""
    if path.endswith(".parquet"):
        # datasets keys its cache by the file's name and time; this one is keyed by content
        with open(path, "rb") as file:
            digest = sha_fileobj(file).hex()
        cache = Path(huggingface_hub.constants.HF_HOME) / "sft-parquet" / digest[:32]
        try:
            return File(path, datasets.Dataset.from_parquet(path, cache_dir=str(cache)), digest=digest)
        except Exception as error:
            raise ValueError(f"{path}: cannot be read as parquet: {' '.join(str(error).split())[:200]}") from None
    if path.endswith(".json"):
        rows = read_json(Path(path).read_bytes(), path)
        if not isinstance(rows, list):
            raise ValueError(f"{path}: must hold a list of rows; one row per line is a .jsonl file")
        return File(path, rows)
    if path.endswith(".jsonl"):
        return File(path, Lines(path), first=1)
    if path.endswith(".jsonl.gz"):
        return File(path, read_gzip(path), first=1)
    raise ValueError(f"{path}: must end in {', '.join(ENDINGS)}")


def read_gzip(path: str) -> list[bytes]:
    try:
        with gzip.open(path) as file:
            lines = file.read().split(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read as gzip: {error}") from None
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def read_json(text: bytes, where: str):
    if not text.strip():
        raise ValueError(f"{where}: an empty line; each line holds one row")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is not valid JSON: {error}") from None


def drop_none(value):
    """Without the keys that Arrow adds to a dict because another row has them."""
    if isinstance(value, dict):
        kept = {"content"} if "role" in value else ()  # of a message that only calls tools, it is null
        return {name: drop_none(item) for name, item in value.items() if item is not None or name in kept}
    return [drop_none(item) for item in value] if isinstance(value, list) else value


# ---- formats ---------------------------------------------------------------------------------------------------------


def recognise(files: list[File]) -> str:
    """The one format whose columns every row has, where no row has the columns of another. Raises ValueError with the
    choices if there is none."""
    first = {}  # which known columns rows have: (the first such row's place, all its columns)
    for file in files:
        for names, i in column_sets(file):
            first.setdefault(frozenset(names & KNOWN), (file.where(i), names))
    fitting = {known: [name for name, needed in COLUMNS.items() if needed <= known] for known in first}
    found = {name for names in fitting.values() for name in names}
    if not first:
        files[0].row(0)  # says what is wrong with it
        raise ValueError(f"{files[0].where(0)}: a row is an object of columns")
    if len(found) == 1 and all(fitting.values()):
        return found.pop()
    choices = "; ".join(f"{name}: {', '.join(sorted(needed))}" for name, needed in COLUMNS.items())
    mend = f"name one in data.args.format (the columns of each: {choices}), or leave out or change such rows"
    for known, names in fitting.items():
        where, columns = first[known]
        if not names:
            raise ValueError(f"{where}: the columns {', '.join(sorted(columns)) or '(none)'} are of no format; {mend}")
        if len(names) > 1:
            raise ValueError(f"{where}: the format may be {' or '.join(names)}; {mend}")
    rows = {names[0]: first[known][0] for known, names in fitting.items()}
    (a, where_a), (b, where_b) = [*rows.items()][:2]
    raise ValueError(
        f"{where_a} is of the format {a} and {where_b} of {b}: files of one format each can be named in data.dataset "
        "as a list of entries"
    )


def column_sets(file: File):
    """(columns, the first row that has these) for each set of known columns in the file; null counts as absent."""
    if isinstance(file.rows, datasets.Dataset):
        columns = {*file.rows.column_names}
        known = sorted(columns & KNOWN)
        absent = [file.rows.data.column(name).is_null().to_numpy() for name in known] or [np.zeros(1, dtype=bool)]
        patterns, first = np.unique(np.array(absent), axis=1, return_index=True)  # (columns, patterns)
        for pattern, i in zip(patterns.T, first.tolist(), strict=True):
            yield columns - {name for name, null in zip(known, pattern, strict=False) if null}, i
        return
    seen = set()
    for i in range(len(file.rows)):
        row = None
        with contextlib.suppress(ValueError):
            row = file.row(i)
        if not isinstance(row, dict):
            continue  # an error when it is its turn
        names = {name for name, value in row.items() if value is not None}
        if (known := frozenset(names & KNOWN)) not in seen:
            seen.add(known)
            yield names, i


def to_messages(row: dict, format: str) -> dict:
    """A row of a format as {"messages": [...]}, with `tools` and `answers` where it has them. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError(f"a row is an object of columns, not {type(row).__name__}")
    if missing := sorted(name for name in COLUMNS[format] if row.get(name) is None):
        raise ValueError(f"has no {', '.join(map(repr, missing))}, which a row of the format {format} has")
    refuse_other_than_text(row)
    convert = {
        "messages": lambda row: row["messages"],
        "prompt_completion": from_prompt_completion,
        "alpaca": from_alpaca,
        "sharegpt": from_sharegpt,
    }[format]
    converted = {"messages": with_system(row, convert(row))}
    refuse_unread(row, format)
    if tools := tools_of(row):
        converted["tools"] = tools
    return {**converted, **{name: row[name] for name in ("answers", "id") if row.get(name) is not None}}


def refuse_other_than_text(row: dict):
    for name in NO_TEXT:
        if row.get(name):
            raise ValueError(f"has {name!r}: only text is trained here; leave such rows out")


def refuse_unread(row: dict, format: str):
    """Raises ValueError for a column whose meaning would be lost without a word."""
    for name in ("train", "label") if format == "prompt_completion" else ("train",):
        if row.get(name) is not None:
            raise ValueError(
                f"has {name!r} = {row[name]!r} for the whole row, which is not read: leave out the rows that "
                'are not to be trained, and put "train": false into messages'
            )
    if format == "prompt_completion" and row.get("input"):
        raise ValueError("has 'input' beside prompt and completion, which is not read: put it into the prompt")


def tools_of(row: dict):
    """A row's tools, which may be JSON text."""
    tools = row.get("tools")
    return read_json(tools.encode(), "tools") if tools and isinstance(tools, str) else tools


def text_of(row: dict, name: str) -> str:
    if not isinstance(row.get(name), str):
        raise ValueError(f"{name!r} is {str(row.get(name))[:60]!r}, which is not text")
    return row[name]


def from_prompt_completion(row: dict) -> list[dict]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        # an example of how to answer is part of the question
        asked = [
            {**m, "train": m.get("train") or False} if isinstance(m, dict) and m.get("role") == "assistant" else m
            for m in prompt
        ]
        return [*asked, *completion]
    return [
        {"role": "user", "content": text_of(row, "prompt")},
        {"role": "assistant", "content": text_of(row, "completion")},
    ]


def from_alpaca(row: dict) -> list[dict]:
    """The instruction and, behind an empty line, the input. https://github.com/tatsu-lab/stanford_alpaca#data-release;
    `system` and `history` (pairs of a question and an answer) as LLaMA-Factory has them."""
    messages = []
    for pair in row.get("history") or []:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise ValueError(f"'history' holds {str(pair)[:60]!r}, which is not a pair of question and answer")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = text_of(row, "instruction")
    if row.get("input"):
        asked += "\n\n" + text_of(row, "input")
    return [*messages, {"role": "user", "content": asked}, {"role": "assistant", "content": text_of(row, "output")}]


def from_sharegpt(row: dict) -> list[dict]:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise ValueError(f"'conversations' is {str(turns)[:60]!r}, not a list of turns")
    messages = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise ValueError(f"conversations[{i}] is {str(turn)[:60]!r}, not a turn")
        if "role" in turn and "from" not in turn:
            messages.append(turn)  # messages under another name
            continue
        speaker, value = turn.get("from"), turn.get("value")
        kept = {name: turn[name] for name in ("train", "weight") if name in turn}
        if not isinstance(value, str):
            raise ValueError(f"conversations[{i}]: the value is {str(value)[:60]!r}, not text")
        if speaker == "function_call":
            calls = read_json(value.encode(), f"conversations[{i}]")
            calls = calls if isinstance(calls, list) else [calls]
            messages.append({"role": "assistant", "content": "", "tool_calls": [as_call(c, i) for c in calls], **kept})
        elif isinstance(speaker, str) and speaker in SPEAKERS:
            messages.append({"role": SPEAKERS[speaker], "content": value, **kept})
        else:
            known = ", ".join([*SPEAKERS, "function_call"])
            raise ValueError(f"conversations[{i}]: the speaker {speaker!r} is unknown; 'from' must be one of {known}")
    if [message.get("role") for message in messages[:2]] == ["system", "system"]:
        raise ValueError("has two system turns; leave one out")
    return messages


def as_call(call, i: int) -> dict:
    if not (isinstance(call, dict) and isinstance(call.get("name"), str)):
        raise ValueError(f'conversations[{i}]: a function_call is {{"name": ..., "arguments": ...}}, not {call!r}')
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}


def with_system(row: dict, messages):
    """The messages behind that of a row's `system`. (Messages that are no list are refused later, with all others.)"""
    if not row.get("system") or not isinstance(messages, list):
        return messages
    if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system":
        raise ValueError("has both a 'system' column and a system turn; leave one out")
    return [{"role": "system", "content": text_of(row, "system")}, *messages]
