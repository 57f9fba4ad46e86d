"""Dataset classes, mixtures and the formats of rows: conversations out."""

import contextlib
import functools
import glob
import gzip
import hashlib
import importlib.util
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import numpy as np

from files import ENDINGS, FILE_ROWS, SPLITS, find_files, from_json, read_table, split_files, without_filled_in

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
CONFIGS = Path(__file__).parent / "configs"
BY_NAME = "by name"  # as `validation`: the split that has such a name, or files of such names

FORMATS = {  # and the columns that a row of each has
    "messages": ("messages",),  # [{"role": "user", "content": "..."}, ...]
    "prompt_completion": ("prompt", "completion"),  # two texts, or two lists of messages: the completion is trained
    "alpaca": ("instruction", "output"),  # and perhaps those of `OF_ALPACA`
    "sharegpt": ("conversations",),  # [{"from": "human", "value": "..."}, ...]
    "text": ("text",),  # a document, all of which is trained
    "tokens": ("input_ids", "labels"),  # labels: the same ids, -100 where nothing is trained
}
NO_CHAT = ("text", "tokens")  # formats that are read only where `data.args.format` names them
NOT_TEXT = ("image", "images", "video", "videos", "audio", "audios")
OF_ALPACA = ("input", "history")
JSON_MESSAGES = re.compile(r"""(?s)\s*\[?\s*\{.*["'](role|from)["']\s*:\s*["'](system|user|assistant|human|gpt)["']""")
PASSED_ON = ("tools", "functions", "answers", "id", "weight", *NOT_TEXT)  # columns that a row of any format may have
SPEAKERS = {  # of ShareGPT, and the roles they are; others are called as their roles
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "function_call": "assistant", "function_response": "tool", "observation": "tool",
}  # fmt: skip


@dataclass
class TaskDataSpec:
    """The name of a dataset, and the Jinja chat template that it brings (None: the tokenizer's is used)."""

    task_name: str
    custom_template: str | None = None


# ---- dataset classes: `formatted_ds` holds the splits, rows by number ------------------------------------------------
class Squad:
    """https://huggingface.co/datasets/rajpurkar/squad: the context as system, the question, and its first answer."""

    custom_template = (CONFIGS / "squad.jinja").read_text(encoding="utf-8")

    def __init__(self):
        def conversation(row: dict) -> dict:
            texts = {"system": row["context"], "user": row["question"], "assistant": row["answers"]["text"][0]}
            messages = [{"role": role, "content": text} for role, text in texts.items()]
            return {"messages": messages, "answers": row["answers"]["text"]}

        rows = datasets.load_dataset("rajpurkar/squad")
        self.formatted_ds = rows.map(conversation, remove_columns=["title", "context", "question"], desc="SQuAD")
        self.task_spec = TaskDataSpec("squad", self.custom_template)


class OpenAssistant:
    """Every path from the root to a leaf of the reviewed trees of https://huggingface.co/datasets/OpenAssistant/oasst1
    (whose parquet files also hold spam). The split is by tree, so that no validation prompt was trained on."""

    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    custom_template = (CONFIGS / "oasst.jinja").read_text(encoding="utf-8")

    def __init__(self, seed: int = 42, validation: float | None = 0.05):
        name = "2023-04-12_oasst_ready.trees.jsonl.gz"
        with gzip.open(huggingface_hub.hf_hub_download("OpenAssistant/oasst1", name, repo_type="dataset")) as file:
            trees = [json.loads(line) for line in file]
        splits = {"train": [], "validation": []}
        for tree, chosen in zip(trees, held_out(len(trees), validation, seed), strict=True):
            for messages in tree_paths(tree["prompt"], [{"role": "system", "content": self.system}]):
                if len(messages) >= 3:  # the prompt has an answer
                    splits["validation" if chosen else "train"].append({"messages": messages})
        self.formatted_ds = {split: rows for split, rows in splits.items() if rows}
        self.task_spec = TaskDataSpec("openassistant", self.custom_template)


def tree_paths(node: dict, above: list[dict]) -> list[list[dict]]:
    """The messages above this one, it, and those below it: a list for every way to a leaf."""
    role = {"prompter": "user", "assistant": "assistant"}[node["role"]]
    messages = [*above, {"role": role, "content": node["text"]}]
    return [path for reply in node["replies"] for path in tree_paths(reply, messages)] or [messages]


class Chats:
    """Conversations in files (see `ENDINGS`): a file, a glob, or a folder of files or of a dataset saved to disk.

    `validation`: files, the fraction of the rows to hold out, or None; by default what `split_files` finds, else 0.05.
    `format`: of `FORMATS`; None: by the columns of each row. `columns`: other names, as {"messages": "dialogue"}."""

    def __init__(self, path: str, validation=BY_NAME, seed=42, format: str | None = None, columns: dict | None = None):
        files, others, left_out = split_files(path)
        if validation == BY_NAME:
            validation, others = others or 0.05, []
        left_out += others
        if isinstance(validation, str):
            validation = find_files(validation)
        if isinstance(validation, list) and not Path(path).is_file():  # a folder or a glob may name them too
            same = {os.path.realpath(file) for file in validation}
            files, left_out = ([f for f in part if os.path.realpath(f) not in same] for part in (files, left_out))
        if left_out:
            print(f"{path}: {len(left_out)} left out by their names: {', '.join(left_out[:5])}", file=sys.stderr)
        if not files:
            raise ValueError(f"data: {path} has no rows to train on: no file is left for it")
        read = functools.partial(as_conversations, format=format, columns=columns)
        train = read(read_table(files))
        if isinstance(validation, list):
            self.formatted_ds = {"train": train, "validation": read(read_table(validation))}
        else:
            self.formatted_ds = split_rows(train, validation, seed)
        self.task_spec = TaskDataSpec(Path(path).name.split(".")[0].strip("*?[]") or Path(path).absolute().parent.name)


class HubChats:
    """A dataset of the Hub in one of `FORMATS`. `validation`: a split's name, a fraction of `train`, or None; by
    default the split that is called validation, valid, dev or val. `format`, `columns`: as of `Chats`."""

    def __init__(self, path: str, subset=None, train="train", validation=BY_NAME, seed=42, format=None, columns=None):
        if not isinstance(subset, str | None):
            raise ValueError(f"data.args.subset = {subset!r} must be a text, the name of a configuration of {path}")
        loaded = datasets.load_dataset(path, subset)
        if validation == BY_NAME:
            validation = next((name for name in loaded if SPLITS.get(name) == "validation"), "validation")
        names = {"train": train, **({"validation": validation} if isinstance(validation, str) else {})}
        for split, name in names.items():
            if name not in loaded:
                fix = f"set data.args.{split} to one, or data.args.validation to a fraction, as 0.05"
                raise ValueError(f"{path} has no split {name!r}, only {[*loaded]}: {fix}")
        if left_out := [name for name in loaded if name not in names.values()]:
            print(f"{path}: splits left out: {', '.join(left_out)}", file=sys.stderr)
        splits = {split: as_conversations(loaded[name], format, columns) for split, name in names.items()}
        self.formatted_ds = splits if len(splits) == 2 else split_rows(splits["train"], validation, seed)
        self.task_spec = TaskDataSpec(path)


# ---- mixtures and splits ---------------------------------------------------------------------------------------------
class MixtureEntry(NamedTuple):
    """A dataset of the run. `weight`: passes over its training split per epoch; `splits`: the splits that are read."""

    name: str
    dataset: object
    weight: float
    splits: list[str]


def load_mixture(cfg, scoring: bool = False) -> list[MixtureEntry]:
    """The datasets that a `config.Config` names, under unique names. Training splits are read unless the weight is 0,
    validation splits unless the run never validates; for `scoring`, only these. ValueError if there is none to read."""
    entries, validates, mixture = [], scoring or cfg.validation.every is not None, cfg.data.dataset
    for requested in mixture if isinstance(mixture, list) else [{"dataset": mixture, "args": cfg.data.args}]:
        weight = float(requested.get("weight", 1))
        dataset = load_dataset_class(requested["dataset"], requested.get("args", {}))
        splits = [] if scoring or weight == 0 else ["train"]
        # One of a mixture need not have a validation split, unless it is there for that alone
        if validates and (weight == 0 or dataset.formatted_ds.get("validation") is not None):
            splits.append("validation")
        for split in splits:
            rows = dataset.formatted_ds.get(split)
            if rows is None or len(rows) == 0 or isinstance(rows, dict):
                raise ValueError(f"{requested} has no rows by number in {split!r}, of {[*dataset.formatted_ds]}")
        name = dataset.task_spec.task_name
        taken = {entry.name for entry in entries}
        free = next(n for n in [name, *(f"{name}_{k}" for k in range(2, len(entries) + 2))] if n not in taken)
        entries.append(MixtureEntry(free, dataset, weight, splits))
    if validates and not any("validation" in entry.splits for entry in entries):
        fix = "set data.args.validation, or validation.every=null to train without"
        raise ValueError(f"data.dataset = {mixture!r} has no validation split: {fix}")
    return [entry for entry in entries if entry.splits]


def load_dataset_class(name: str, args: dict):
    """The dataset that `data.dataset` names, made with `data.args`. Raises ValueError where there is none."""
    make = {"squad": Squad, "openassistant": OpenAssistant}.get(name)
    path, _, class_name = name.rpartition(":")
    if path.endswith(".py"):
        # Not the name of a module here, and another one for other code: so `datasets` caches nothing of the old code.
        module_name = f"dataset_{Path(path).stem}_{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = sys.modules[module_name] = importlib.util.module_from_spec(spec)  # where workers find its functions
        spec.loader.exec_module(module)
        make = getattr(module, class_name, None)
    elif name.lower().endswith(ENDINGS) or glob.has_magic(name) or Path(name).is_dir():
        make = functools.partial(Chats, name)
    elif name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists():
        make = functools.partial(HubChats, name)
    if not callable(make):
        kinds = f"squad, openassistant, my_data.py:MyDataset, owner/name on the Hub, or files ({', '.join(ENDINGS)})"
        raise ValueError(f"data.dataset = {name!r} does not exist, or is not one of {kinds}")
    try:
        return make(**args)
    except TypeError as error:
        raise ValueError(f"data.args = {args} of data.dataset = {name!r}: {error}") from error


def splits_of(entries: list[MixtureEntry]):
    """Yields (dataset index, split, rows, name for messages) of all that is read."""
    for split in ("train", "validation"):
        for k, entry in enumerate(entries):
            if split in entry.splits:
                yield k, split, entry.dataset.formatted_ds[split], f"{entry.name} {split}"


def held_out(count: int, fraction: float | None, seed: int) -> np.ndarray:
    """Which of `count` rows or trees are held out, bool (count,); None or 0: none."""
    if fraction and not 0 < fraction < 1:
        raise ValueError(f"data.args.validation = {fraction} must be a share below 1, files, or null")
    size = max(1, round(count * fraction)) if fraction else 0
    return np.isin(np.arange(count), np.random.default_rng(seed).permutation(count)[:size])


def split_rows(rows: datasets.Dataset, fraction: float | None, seed: int) -> dict[str, datasets.Dataset]:
    chosen = held_out(len(rows), fraction, seed)
    splits = {"train": rows.select(np.flatnonzero(~chosen)), "validation": rows.select(np.flatnonzero(chosen))}
    return {split: part for split, part in splits.items() if len(part)}


# ---- formats and rows ------------------------------------------------------------------------------------------------
def as_conversations(table: datasets.Dataset, format: str | None, columns: dict | None = None) -> datasets.Dataset:
    """The rows of a table, converted when they are read. `format`: of `FORMATS`; None: by the columns of each row."""
    if unknown := {*(columns or {})} - {"system", *OF_ALPACA, *PASSED_ON}.union(*FORMATS.values()):
        raise ValueError(f"data.args.columns: nothing reads {min(unknown)!r}; write messages: dialogue, for instance")
    if format not in (None, *FORMATS):
        raise ValueError(f"data.args.format = {format}; there are {', '.join(FORMATS)} and null")
    convert = functools.partial(to_conversations, features=table.features, format=format, columns=columns or {})
    return table.with_transform(convert)


def to_conversations(batch: dict[str, list], features: datasets.Features, format, columns) -> dict[str, list]:
    """The transform of a table: columns of rows in, columns of conversations out."""
    if features == FILE_ROWS:
        rows = [from_json(text.decode("utf-8-sig"), "the row") for text in batch["json"]]
    else:
        table = zip(*batch.values(), strict=True)
        rows = [without_filled_in(dict(zip(batch, values, strict=True)), features) for values in table]
    conversations = [to_conversation(row, format, columns) for row in rows]
    names = ("messages", *PASSED_ON, *FORMATS["text"], *FORMATS["tokens"], "unread")
    return {name: [each.get(name) for each in conversations] for name in names}


def to_conversation(row, format: str | None, columns: dict) -> dict:
    """A row as {"messages": [...] or None}, with the other columns that `normalize` reads, and the names of those that
    are `unread`. Raises ValueError where its columns (null counts as absent) are not those of one format."""
    if columns:
        if missing := [name for name in columns.values() if name not in row]:
            raise ValueError(f"has no column {missing[0]!r}, which data.args.columns names, only {', '.join(row)}")
        others = {name: value for name, value in row.items() if name not in columns.values()}
        row = others | {name: row[theirs] for name, theirs in columns.items()}
    row = {"messages": row} if isinstance(row, list) else row
    there = {name for name, value in row.items() if value is not None} if isinstance(row, dict) else set()
    wanted = [format] if format else [name for name in FORMATS if name not in NO_CHAT]
    fitting = [name for name in wanted if there.issuperset(FORMATS[name])]
    if len(fitting) != 1:
        kinds = f"{' and '.join(fitting) or 'no format'} with data.args.format = {format or 'null'}"
        fix = f"formats: {', '.join(FORMATS)}; data.args.columns={{messages: dialogue}} reads dialogue as messages"
        raise ValueError(f"the non-null columns {', '.join(sorted(there)) or '(none)'} are of {kinds}; {fix}")
    format = fitting[0]
    of_format = {"prompt_completion": ("label", "input"), "text": ("weight",), "tokens": ("weight",)}
    for name in ("train", "loss", "training", *of_format.get(format, ())):
        if row.get(name) not in (None, "", True):
            raise ValueError(f"has {name!r} = {row[name]!r} for the whole row, which is not read: put it into messages")
    if format in NO_CHAT:
        messages, read = None, {"id", *FORMATS[format]}
    else:
        convert = {"prompt_completion": from_prompt_completion, "alpaca": from_alpaca, "sharegpt": from_sharegpt}
        messages = convert[format](row) if format in convert else from_json(row["messages"], "messages")
        read = {"system", *PASSED_ON, *FORMATS[format], *(OF_ALPACA if format == "alpaca" else ())}
        if row.get("system") not in (None, ""):
            if messages and messages[0].get("role") == "system":
                raise ValueError("has both a 'system' column and a system turn; leave one out")
            messages = [{"role": "system", "content": row["system"]}, *messages]
    kept = {name: row[name] for name in there & {*PASSED_ON, *read}}
    return {**kept, "messages": messages, "unread": sorted(there - read)}


def from_prompt_completion(row: dict) -> list[dict]:
    sides = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        side = row[name]
        if isinstance(side, str) and JSON_MESSAGES.match(side):
            side = from_json(side, name)
        sides.append(side if isinstance(side, list) else [{"role": role, "content": side}])
    prompt, completion = sides
    if completion and completion[0].get("role") != "assistant":
        raise ValueError(f"completion begins with {completion[0].get('role')!r}, not with a message of the assistant")
    # An answer in the prompt is part of the question.
    question = [{**m, "train": m.get("train") or False} if m.get("role") == "assistant" else m for m in prompt]
    return question + completion


def from_alpaca(row: dict) -> list[dict]:
    """https://github.com/tatsu-lab/stanford_alpaca#data-release; LLaMA-Factory's `history`: pairs of texts before."""
    question, messages = row["instruction"], []
    if (given := row.get("input")) not in (None, ""):
        if not isinstance(given, str):
            raise ValueError(f"input is {given!r}, not a text")
        question = question + "\n\n" + given
    for pair in [*(row.get("history") or []), (question, row["output"])]:
        if isinstance(pair, str):
            raise ValueError(f"history has {pair!r}, not a pair of a question and an answer")
        user, assistant = (pair[k] for k in range(len(pair)))  # An error for an object.
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return messages


def from_sharegpt(row: dict) -> list[dict]:
    messages = []
    for turn in from_json(row["conversations"], "conversations"):
        if not isinstance(turn, dict) or "from" not in turn:
            messages.append(turn)  # a message under another name, or what `normalize` refuses
            continue
        message = {"role": SPEAKERS.get(turn["from"], turn["from"]), "content": turn.get("value")}
        if twice := [name for name in message if turn.get(name) not in (None, message[name])]:
            raise ValueError(f"a turn has from, value and another {twice[0]!r}: {str(turn)[:80]}")
        if turn["from"] == "function_call":
            calls = from_json(turn["value"], "the value of a function_call")
            message |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
        messages.append({**message, **{name: turn[name] for name in turn if name not in ("from", "value")}})
    return messages


def read_conversation(rows, i: int, name: str) -> dict:
    """Row i of a split (`name`: as "squad train"), normalized. ValueError, with its place: it cannot be trained on."""
    with at_row(rows, i, name):
        return normalize(without_filled_in(rows[i], rows.features) if isinstance(rows, datasets.Dataset) else rows[i])


@contextlib.contextmanager
def at_row(rows, i: int, name: str):
    """An error gets the place of row i in front: file and line, or the split's name and the row's number."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        of_file = isinstance(rows, datasets.Dataset) and rows.features == FILE_ROWS
        place = rows.with_format(None)[i]["place"] if of_file else f"{name} row {i}"
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{place}: {kind}{error}") from error


def normalize(row) -> dict:
    """A row as {"messages": [...]}, {"text": ...} or {"input_ids": [...], "labels": [...]}, with `tools` (a list),
    `answers` (texts), `id` and what is `unread` where it has them. Raises ValueError if it cannot be trained on."""
    row = row if isinstance(row, dict) else {"messages": row}
    if present := [name for name in NOT_TEXT if row.get(name)]:
        raise ValueError(f"has {present[0]!r}: only text is trained here; leave such rows out")
    messages, answers = row.get("messages"), row.get("answers")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        answers = None  # in another form, as {"text": [...]}
    if messages is None and isinstance(row.get("text"), str):
        return {"text": row["text"], "unread": row.get("unread")}
    if messages is None and row.get("input_ids") is not None:
        if len(row["input_ids"]) != len(row["labels"]) or not all(isinstance(id, int) for id in row["input_ids"]):
            raise ValueError("input_ids and labels must be lists of integers of one length")
        return {name: row.get(name) for name in ("input_ids", "labels", "unread")}
    tools = from_json(row.get("tools") or row.get("functions") or [], "tools") or []  # functions: OpenAI until 2023
    check_objects(messages, "messages")
    check_objects(tools, "tools")
    tools, messages = [wrapped(tool) for tool in tools], [normalize_message(m, i) for i, m in enumerate(messages)]
    if (weight := from_json(row.get("weight"), "weight")) not in (None, 1):  # 0: nothing of the row is trained
        messages = [{**message, "weight": weight} for message in messages]
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("has no assistant turn, so there is nothing to train")
    # A UnicodeEncodeError, which is a ValueError, where a text was cut inside a character
    json.dumps([messages, tools], ensure_ascii=False, default=str).encode()
    optional = {"tools": tools, "answers": answers, "id": row.get("id"), "unread": row.get("unread")}
    return {"messages": messages, **{name: value for name, value in optional.items() if value not in (None, [], "")}}


def normalize_message(message: dict, i: int) -> dict:
    """Message i as OpenAI writes it today, with the arguments of calls as objects. None counts as absent."""
    message = {name: value for name, value in message.items() if value is not None or name == "content"}
    if present := [name for name in NOT_TEXT if message.get(name)]:
        raise ValueError(f"messages[{i}]: has {present[0]!r}, but only text is trained here; leave such rows out")
    if "function_call" in message:  # until 2023, when tools had the role "function"
        message["tool_calls"] = [*message.get("tool_calls", []), message.pop("function_call")]
    role, calls, content = message.get("role"), message.pop("tool_calls", []), message.get("content")
    if role not in ROLES:
        raise ValueError(f"messages[{i}]: the role {role!r} is unknown; it must be one of {', '.join(ROLES)}")
    message["role"] = "tool" if role == "function" else role
    check_objects(calls, f"messages[{i}]: tool_calls")
    if calls:
        message["tool_calls"] = [normalize_call(call, f"messages[{i}]: tool_calls") for call in calls]
    if content is None and (calls or any(map(message.get, ("reasoning_content", "reasoning", "thinking")))):
        content = message["content"] = ""
    blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
    check_objects(blocks, f"messages[{i}]: the content")
    is_text = [block.get("type") == "text" and not {*block} & {*NOT_TEXT} for block in blocks]
    if not all(is_text) or not all(isinstance(block.get("text"), str) for block in blocks):
        raise ValueError(f"messages[{i}]: the content is {str(content)[:60]!r}, but only text is trained here")
    return message


def normalize_call(call: dict, name: str) -> dict:
    call = wrapped(call)
    check_objects([call["function"]], f"{name}: the function")
    function = {**call["function"]}
    given = function["arguments"] if "arguments" in function else function.pop("parameters", None)  # as Llama writes
    function["arguments"] = {} if given in (None, "") else from_json(given, name)
    others = {*call} - {"id", "type", "function", "index"} | {*function} - {"name", "arguments"}
    if others or not isinstance(function["arguments"], dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{name}: {str(call)[:80]!r} must have a name, a JSON object of arguments, and no more")
    return {**call, "function": function}


def wrapped(item: dict) -> dict:
    """A tool, or the call of one, as {"type": "function", "function": {...}}."""
    if "function" not in item:
        function = {name: value for name, value in item.items() if name not in ("id", "type")}
        item = {**{name: item[name] for name in item if name == "id"}, "type": "function", "function": function}
    return item if "type" in item else {"type": "function", **item}


def check_objects(value, name: str):
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{name} is {str(value)[:60]!r}, not a list of objects")
