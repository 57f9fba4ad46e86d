"""Dataset classes; conversations in, tokenised and memory-mapped examples out; rows of them as tensors."""

import collections
import concurrent.futures
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoTokenizer

import attention
import formats
import packing
import templates

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass
class TaskDataSpec:
    """What a dataset says of itself: its name, and the Jinja chat template it brings (None: the tokenizer's)."""

    task_name: str
    custom_template: str | None = None


# ---- dataset classes: `formatted_ds` holds the splits, rows of {"messages": [...], "tools": [...]} -------------------


class Squad:
    """Stanford's question answering data: the context as system, the question as user, the first answer as assistant.

    https://huggingface.co/datasets/rajpurkar/squad, 87,599 and 10,570 rows.
    """

    custom_template = (
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' -%}{{- 'Context: ' + message['content'] | trim -}}"
        "{%- elif message['role'] == 'user' -%}{{- ' Question: ' + message['content'] | trim + ' Answer:' -}}"
        "{%- elif message['role'] == 'assistant' -%}{{- ' ' + message['content'] | trim -}}"
        "{%- else -%}{{- raise_exception('the SQuAD template has no role ' + message['role']) -}}{%- endif -%}"
        "{%- endfor -%}"
    )

    def __init__(self):
        with from_hub("data.dataset", "rajpurkar/squad"):
            rows = datasets.load_dataset("rajpurkar/squad")
        self.formatted_ds = {
            split: rows[split].map(
                squad_messages, remove_columns=["title", "context", "question"], desc=f"SQuAD {split}"
            )
            for split in ("train", "validation")
        }
        self.task_spec = TaskDataSpec("squad", self.custom_template)


def squad_messages(row: dict) -> dict:
    return {
        "messages": [
            {"role": "system", "content": row["context"]},
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answers"]["text"][0]},
        ],
        "answers": row["answers"]["text"],
        "id": row["id"],
    }


class OpenAssistant:
    """Human-written conversations: every path from the root to a leaf of each message tree.

    Reads `2023-04-12_oasst_ready.trees.jsonl.gz` of https://huggingface.co/datasets/OpenAssistant/oasst1: the trees
    that were finished and reviewed. The repository's parquet files hold single messages, spam and unfinished trees
    among them. The split is by tree, so that no validation prompt was trained on.
    """

    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    )
    custom_template = (
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' -%}{{- 'System:\\n' + message['content'] | trim + '\\n\\n' -}}"
        "{%- elif message['role'] == 'user' -%}{{- 'User:\\n' + message['content'] | trim + '\\n\\n' -}}"
        "{%- elif message['role'] == 'assistant' -%}"
        "{{- 'Assistant:\\n' + message['content'] | trim + eos_token + '\\n\\n' -}}"
        "{%- else -%}{{- raise_exception('the OpenAssistant template has no role ' + message['role']) -}}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}"
    )

    def __init__(self, seed: int = 42, validation: float | None = 0.05):
        with from_hub("data.dataset", "OpenAssistant/oasst1"):
            path = huggingface_hub.hf_hub_download(
                "OpenAssistant/oasst1", "2023-04-12_oasst_ready.trees.jsonl.gz", repo_type="dataset"
            )
        file = formats.read_file(path)
        trees = [file.row(i) for i in range(len(file.rows))]
        chosen = set(validation_indices(len(trees), validation, seed).tolist())
        splits = {"train": [], "validation": []}
        for i, tree in enumerate(trees):
            for path_texts in tree_paths(tree["prompt"]):
                if len(path_texts) >= 2:
                    messages = [{"role": "system", "content": self.system}, *path_texts]
                    splits["validation" if i in chosen else "train"].append({"messages": messages})
        self.formatted_ds = {split: rows for split, rows in splits.items() if rows}
        self.task_spec = TaskDataSpec("openassistant", self.custom_template)


def tree_paths(node: dict):
    """Every way from this message to a leaf, as lists of messages."""
    message = {"role": {"prompter": "user", "assistant": "assistant"}[node["role"]], "content": node["text"]}
    if not node["replies"]:
        yield [message]
    for reply in node["replies"]:
        for rest in tree_paths(reply):
            yield [message, *rest]


class Chats:
    """Files of conversations, see formats.py: a file, a glob or a folder of .jsonl, .jsonl.gz, .json and .parquet.

    `validation`: files too, or the fraction of the rows that is held out (the same ones for the same seed), or None.
    `format`: messages, prompt_completion, alpaca or sharegpt; None: recognised by the columns of all rows.
    """

    def __init__(self, path: str, validation: str | float | None = 0.05, seed: int = 42, format: str | None = None):
        if isinstance(validation, str):
            # The files of a folder or a glob but those that are validated on; a file that is named is wanted
            without = [] if Path(path).is_file() else formats.find_files(validation)
            self.formatted_ds = {
                "train": formats.read_rows(path, format, without),
                "validation": formats.read_rows(validation, format),
            }
        else:
            self.formatted_ds = split_rows(formats.read_rows(path, format), validation, seed)
        self.task_spec = TaskDataSpec(Path(path).name.split(".")[0].strip("*?[]") or Path(path).absolute().parent.name)


class HubChats:
    """A data set of the Hub, in a format of formats.py. `validation`: a split's name, a fraction of `train`, or
    None."""

    def __init__(
        self, path: str, subset: str | None = None, train: str = "train", validation="validation", seed: int = 42,
        format: str | None = None,
    ):  # fmt: skip
        with from_hub("data.dataset", path):
            loaded = datasets.load_dataset(path, subset)
        for name in [train] + ([validation] if isinstance(validation, str) else []):
            if name not in loaded:
                raise ValueError(
                    f"{path} has the splits {', '.join(loaded)}, not {name!r}; set data.args.train and "
                    "data.args.validation (a split, or a fraction as 0.05)"
                )
        rows = {name: formats.Rows([formats.File(f"{path} {name}", loaded[name])], format) for name in loaded}
        if isinstance(validation, str):
            self.formatted_ds = {"train": rows[train], "validation": rows[validation]}
        else:
            self.formatted_ds = split_rows(rows[train], validation, seed)
        self.task_spec = TaskDataSpec(path)


BUILT_IN = {"squad": Squad, "openassistant": OpenAssistant}


class Entry(NamedTuple):
    """A dataset of the run; `weight`: passes over its training split per epoch; `splits`: those that are read."""

    name: str
    dataset: object
    weight: float
    splits: list[str]


def load_entries(config, scoring: bool = False) -> list[Entry]:
    """The datasets that a `config.Config` asks for, each under a unique name. Of a run, the training split is read,
    unless its weight is 0, and the validation split, unless the run never validates; for `scoring`, the validation
    split alone. Raises ValueError where there is nothing to read."""
    named = {"dataset": config.data.dataset, "args": config.data.args}
    entries, validated = [], scoring or config.validation.every is not None
    for asked in config.data.dataset if isinstance(config.data.dataset, list) else [named]:
        weight = float(asked.get("weight", 1))
        dataset = load_dataset_class(asked["dataset"], asked.get("args", {}))
        splits = [] if scoring or weight == 0 else ["train"]
        if validated and dataset.formatted_ds.get("validation") is not None:  # one of a mixture need not have it
            splits.append("validation")
        for split in splits:
            check_split(asked["dataset"], dataset.formatted_ds, split)
        if validated and not splits and not scoring:
            raise ValueError(f"data.dataset = {asked['dataset']!r} has weight 0 and no validation split: leave it out")
        name = dataset.task_spec.task_name
        taken = {other.name for other in entries}
        free = next(n for n in itertools.chain([name], (f"{name}_{k}" for k in itertools.count(2))) if n not in taken)
        entries.append(Entry(free, dataset, weight, splits))
    if validated and not any("validation" in entry.splits for entry in entries):
        raise ValueError(
            f"data.dataset = {config.data.dataset!r} has no validation split: set data.args.validation (in a class of "
            "your own: formatted_ds['validation'])" + ("" if scoring else ", or validation.every=null to train without")
        )
    return [entry for entry in entries if entry.splits]


def check_split(name: str, splits: Mapping, split: str):
    """Raises ValueError unless a dataset has this split, with rows in it."""
    rows = splits.get(split)
    if rows is None:
        there = ", ".join(map(repr, splits)) or "none"
        raise ValueError(f"data.dataset = {name!r} has no split {split!r}; it has {there}")
    by_number = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
    if not by_number or isinstance(rows, Mapping) or hasattr(rows, "iloc"):  # (pandas: columns by name)
        raise ValueError(
            f"data.dataset = {name!r}: the split {split!r} is a {type(rows).__name__}; it must be a list, or have a "
            "length and rows by number, as a datasets.Dataset has"
        )
    if len(rows) == 0:
        raise ValueError(f"data.dataset = {name!r}: the split {split!r} is empty")


def load_dataset_class(name: str, args: dict):
    """The dataset that `data.dataset` names, made with `data.args`. Raises ValueError where there is none."""
    path, _, class_name = name.rpartition(":")
    if name in BUILT_IN:
        make = BUILT_IN[name]
    elif path.endswith(".py"):
        if not Path(path).is_file():
            raise ValueError(f"data.dataset = {name!r}: there is no file {path}")
        module_name = f"dataset_{Path(path).stem}"  # (a user's data.py is not this one)
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # so that worker processes find its functions
        spec.loader.exec_module(module)
        if not callable(getattr(module, class_name, None)):
            raise ValueError(f"data.dataset = {name!r}: {path} has no class {class_name}")
        make = getattr(module, class_name)
    elif formats.is_path(name):
        make = functools.partial(Chats, name)
    elif Path(name).is_file():
        raise ValueError(
            f"data.dataset = {name!r}: a file of chats ends in {', '.join(formats.ENDINGS)}; for another kind of file "
            "write a class, as docs/forking.md does for a spreadsheet"
        )
    elif name.count("/") == 1 and not name.startswith((".", "/")):
        make = functools.partial(HubChats, name)
    else:
        raise ValueError(
            f"data.dataset = {name!r} must be squad, openassistant, my_data.py:MyDataset, a file, glob or folder of "
            f"chats ({', '.join(formats.ENDINGS)}), or the id of a data set on the Hub (owner/name)"
        )
    try:
        dataset = make(**args)
    except TypeError as error:
        if "argument" in str(error):
            raise ValueError(f"data.args = {args} does not fit data.dataset = {name!r}: {error}") from None
        raise
    except OSError as error:
        raise ValueError(f"data.dataset = {name!r} could not be read: {error}") from error
    splits = getattr(dataset, "formatted_ds", None)
    if not isinstance(splits, Mapping) or not hasattr(getattr(dataset, "task_spec", None), "task_name"):
        raise ValueError(
            f"data.dataset = {name!r}: a dataset class sets formatted_ds, a dict of splits, and task_spec, a "
            "TaskDataSpec; see the README"
        )
    return dataset


# ---- splits, and what the Hub answers -----------------------------------------------------------------------------


def validation_indices(count: int, fraction: float | None, seed: int) -> np.ndarray:
    """Which of `count` are held out; None: none."""
    if fraction is None:
        return np.zeros(0, dtype=np.int64)
    if not (isinstance(fraction, float) and 0 < fraction < 1):
        raise ValueError(f"data.args.validation = {fraction} must be a file, a fraction between 0 and 1, or null")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"data.args.seed = {seed!r} must be a whole number, at least 0")
    return np.random.default_rng(seed).permutation(count)[: max(1, round(count * fraction))]


def split_rows(rows: formats.Rows, fraction: float | None, seed: int) -> dict:
    if fraction is None:
        return {"train": rows}
    held_out = np.zeros(len(rows), dtype=bool)
    held_out[validation_indices(len(rows), fraction, seed)] = True
    return {
        "train": formats.Part(rows, np.flatnonzero(~held_out)),
        "validation": formats.Part(rows, np.flatnonzero(held_out)),
    }


@contextlib.contextmanager
def from_hub(key: str, name: str):
    """An OSError while reading `name` becomes a ValueError with the key, where it was looked for and the mend."""
    constants = huggingface_hub.constants
    try:
        yield
    except (OSError, ValueError, SafetensorError, huggingface_hub.errors.StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        if Path(name).exists():
            raise ValueError(f"{key} = {name!r} cannot be read as a model's folder: {reason}") from error
        if not isinstance(error, OSError):
            raise ValueError(f"{key} = {name!r}: {reason}") from error
        offline = " (HF_HUB_OFFLINE is set: only the cache is looked at)" if constants.HF_HUB_OFFLINE else ""
        raise ValueError(
            f"{key} = {name!r} could not be read: there is no such folder, and neither {constants.ENDPOINT}{offline} "
            f"nor the cache {constants.HF_HOME} gives it. Check the name and the connection; where it is private or "
            f"gated, accept its licence on its page, then `hf auth login` or set HF_TOKEN. ({reason})"
        ) from error


def read_row(rows, i: int) -> dict:
    """Row i of a split. Raises ValueError with the reason if it is not a conversation that can be trained on."""
    row = rows[i]
    if isinstance(rows, datasets.Dataset):  # of a user's class; formats.py does it for its own
        row = formats.drop_none(row)
    check_row(row)
    return row


def check_row(row):
    row = row if isinstance(row, dict) else {}
    formats.refuse_other_than_text(row)
    messages = row.get("messages")
    try:
        json.dumps([messages, row.get("tools")], ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"has half a character ({error.object[error.start]!r}): a text was cut inside it") from None
    if not isinstance(messages, list) or not messages:
        found = 'has no "messages"' if messages is None else f'"messages" is a {type(messages).__name__}, not a list'
        found = '"messages" is empty' if messages == [] else found
        raise ValueError(f'{found}: a row is {{"messages": [{{"role": ..., "content": ...}}, ...]}}')
    if not are_objects(row.get("tools")):
        raise ValueError(f"tools is {str(row['tools'])[:60]!r}, not a list of descriptions of functions")
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise ValueError(f"messages[{i}]: the role {role!r} is unknown; it must be one of {', '.join(ROLES)}")
        if not are_objects(message.get("tool_calls")):
            raise ValueError(f"messages[{i}]: tool_calls is {str(message['tool_calls'])[:60]!r}, not a list of calls")
        content = message.get("content")
        kinds = [b.get("type") for b in content if isinstance(b, dict)] if isinstance(content, list) else []
        if other := [str(kind) for kind in kinds if kind != "text"]:
            raise ValueError(
                f"messages[{i}]: the content has a block of type {other[0]!r}: only text is trained here; leave such "
                "rows out"
            )
        blocks = isinstance(content, list) and all(
            isinstance(block, dict) and block.get("type") == "text" and isinstance(block.get("text"), str)
            for block in content
        )
        called = content is None and (message.get("tool_calls") or message.get("reasoning_content"))
        if not (isinstance(content, str) or blocks or called):
            raise ValueError(f"messages[{i}]: the content is {str(content)[:60]!r}, neither text nor text blocks")
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("has no assistant turn, so there is nothing to train")


def are_objects(value) -> bool:
    """Whether it is a list of JSON objects, or None."""
    return value is None or isinstance(value, list) and all(isinstance(item, dict) for item in value)


def answers_of(row: dict) -> list[str] | None:
    """All right answers to the last question of a row, if it lists them; None: only the reference is right."""
    answers = row.get("answers")
    listed = isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers)
    return answers if listed else None


# ---- tokenised once, memory-mapped ---------------------------------------------------------------------------------


def load_tokenizer(config):
    """The tokenizer that a `config.Config` names."""
    key, name, revision = "model.name", config.model.name, config.model.revision
    if config.tokenizer.name:
        key, name, revision = "tokenizer.name", config.tokenizer.name, None
    with from_hub(key, name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    if not tokenizer.is_fast:
        raise ValueError(f"{key} = {name!r} has no fast tokenizer (tokenizer.json)")
    return tokenizer


def choose_template(config, tokenizer, entries) -> str:
    """The chat template that is trained and saved: the configuration's, else the datasets', else the tokenizer's."""
    asked = config.tokenizer.chat_template
    if asked and asked.endswith(".jinja"):
        if not Path(asked).is_file():
            raise ValueError(f"tokenizer.chat_template = {asked!r}: there is no such file")
        path = asked
        try:
            asked = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"tokenizer.chat_template = {path!r} cannot be read: {error}") from None
        if not asked.strip():
            raise ValueError(f"tokenizer.chat_template = {path!r}: the file is empty")
    brought = {entry.dataset.task_spec.custom_template for entry in entries}
    if not asked and len(brought) > 1:
        raise ValueError(
            f"the datasets {', '.join(entry.name for entry in entries)} bring different chat templates, but a "
            "model has one; set tokenizer.chat_template"
        )
    chat_template = asked or brought.pop() or tokenizer.chat_template
    if not isinstance(chat_template, str):
        raise ValueError(
            f"the tokenizer of {config.model.name!r} brings no chat template (or several), nor does the dataset; "
            "set tokenizer.chat_template to Jinja text or the path of a .jinja file"
        )
    if "{" not in chat_template:
        raise ValueError(
            f"the chat template {chat_template[:200]!r} is neither Jinja text nor the path of a .jinja file "
            "(tokenizer.chat_template takes either, a class's custom_template the text)"
        )
    try:
        templates.compile_template(chat_template)
    except ValueError as error:
        where = f"tokenizer.chat_template = {config.tokenizer.chat_template!r}: " if asked else ""
        raise ValueError(f"{where}{error}") from None
    return templates.with_bos(tokenizer, chat_template)


def tokenise_splits(config, tokenizer, entries: list[Entry]) -> dict:
    """Tokenises the datasets of a configuration, or finds them in the cache. Returns plain values that can be sent to
    another process: the `chat_template` and, for `open_split`, the `names`, `weights` and folders of the datasets."""
    chat_template = choose_template(config, tokenizer, entries)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    cache = Path(huggingface_hub.constants.HF_HOME) / "sft-tokens"
    prepared = {
        "chat_template": chat_template,
        "names": [entry.name for entry in entries],
        "weights": [entry.weight for entry in entries],
    }
    prepared |= {split: [None] * len(entries) for split in ("train", "validation")}
    for k, split, rows, name in rows_of(entries):
        folder = tokenise(rows, tokenizer, chat_template, config.data.train_on, cache, name, workers)
        prepared[split][k] = str(folder)
    for split in ("train", "validation"):
        open_split(prepared, split, config.data)  # makes what the other processes open
    return prepared


def rows_of(entries: list[Entry]):
    """(dataset index, split, rows, name for messages) of all that is read."""
    for split in ("train", "validation"):
        for k, entry in enumerate(entries):
            if split in entry.splits:
                yield k, split, entry.dataset.formatted_ds[split], f"{entry.name} {split}"


def open_split(prepared: dict, split: str, config) -> "Examples | None":
    """A split of what `tokenise_splits` returned; None where it is not read. `config`: a `config.Data`."""
    parts = zip(prepared[split], prepared["names"], prepared["weights"], strict=True)
    parts = [part for part in parts if part[0]]
    if not parts:
        return None
    folders, names, weights = zip(*parts, strict=True)
    return Examples([Path(folder) for folder in folders], config.max_seq_length, config.overlong, names, weights)


def find_stop_ids(tokenizer, examples) -> list[int]:
    """Ids at which generation stops: those that end the trained turns, then the tokenizer's EOS."""
    ends = []
    for i in examples.first(1000):
        _, labels = examples[i]
        last = int(labels[np.flatnonzero(labels != templates.IGNORE_INDEX)[-1]])
        if last in templates.special_ids(tokenizer) and last not in ends:
            ends.append(last)
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return list(dict.fromkeys([*ends, *eos]))


class Examples:
    """Tokenised conversations in memory-mapped files, so that no process holds them in memory. For each conversation:
    `lengths` and `supervised` in tokens, int32, and `rows`, its row in the split, int64. Datasets follow one another:
    `names`, `weights`, `counts` and `totals` of each; `part_of(i)` is the dataset of conversation i. `digest`: of all
    tokens and labels. Raises ValueError for an overlong conversation if `overlong` is error."""

    def __init__(self, folders: list[Path], max_seq_length: int, overlong: str, names=("",), weights=(1.0,)):
        self.names, self.weights = names, weights
        self.tokens = [
            tuple(mapped(folder / name, np.int32) for name in ("input_ids", "labels")) for folder in folders
        ]  # fmt: skip
        digests = [(folder / "digest").read_text(encoding="utf-8") for folder in folders]
        self.digest = digests[0] if len(folders) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
        chosen = [
            choose_examples(folder, max_seq_length, overlong, n) for folder, n in zip(folders, names, strict=True)
        ]
        self.totals = [json.loads((folder / "totals.json").read_text(encoding="utf-8")) for folder in chosen]
        self.counts = [total["conversations"] for total in self.totals]
        self.ends = np.cumsum(self.counts)
        index = chosen[0] if len(folders) == 1 else join_folders(chosen)
        self.starts, self.rows = (mapped(index / name, np.int64) for name in ("starts", "rows"))
        self.lengths, self.supervised = (mapped(index / name, np.int32) for name in ("lengths", "supervised"))

    def check(self, split: str):
        """Raises ValueError where nothing is left to train."""
        for name, total in zip(self.names, self.totals, strict=True):
            if total["conversations"] == 0:
                raise ValueError(
                    f"the split {split!r} of data.dataset ({name}) has nothing to train: {total['overlong']} "
                    f"conversations are longer than data.max_seq_length, {total['nothing_to_train']} have no trained "
                    "turn"
                )

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        place = slice(self.starts[i], self.starts[i] + self.lengths[i])
        input_ids, labels = self.tokens[self.part_of(i)]
        return input_ids[place], labels[place]

    def part_of(self, i: int) -> int:
        return int(np.searchsorted(self.ends, i, side="right"))

    def parts(self) -> list[range]:
        """The conversations of each dataset."""
        return [range(end - count, end) for count, end in zip(self.counts, self.ends.tolist(), strict=True)]

    def first(self, count: int | None) -> list[int]:
        """The first `count` of each dataset; None: all."""
        return [i for part in self.parts() for i in part[:count]]


def join_folders(chosen: list[Path]) -> Path:
    """A folder with the files of these folders of `choose_examples`, one after the other: made now, or found."""
    name = hashlib.sha256(" ".join(f"{folder.parent.name}/{folder.name}" for folder in chosen).encode()).hexdigest()

    def write(temporary: Path):
        for file in ("starts", "rows", "lengths", "supervised"):
            with open(temporary / file, "wb") as joined:
                for folder in chosen:
                    with open(folder / file, "rb") as part:
                        shutil.copyfileobj(part, joined)

    folder = chosen[0].parent.parent / f"joined-{name[:32]}"
    return folder if folder.is_dir() else make_folder(folder, write)


def mapped(path: Path, dtype) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype=dtype)


def choose_examples(folder: Path, max_seq_length: int, overlong: str, name: str) -> Path:
    """A folder in `folder` with files for the conversations that are trained: made now, or found. It reads them
    a part at a time, so that memory does not grow with their number."""
    chosen = folder / f"{overlong}-{max_seq_length}"
    if chosen.is_dir():
        return chosen
    all_lengths, labels = mapped(folder / "lengths", np.int32), mapped(folder / "labels", np.int32)
    names, types = ("starts", "rows", "lengths", "supervised"), (np.int64, np.int64, np.int32, np.int32)
    totals = {"conversations": 0, "tokens": 0, "supervised": 0, "overlong": 0, "nothing_to_train": 0}

    def write(temporary: Path):
        at = 0  # in the tokens
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(temporary / name, "wb")) for name in names]
            for first in range(0, len(all_lengths), 100_000):
                lengths = all_lengths[first : first + 100_000].astype(np.int64)
                ends = at + np.cumsum(lengths)
                starts, too_long = ends - lengths, lengths > max_seq_length
                if overlong == "error" and too_long.any():
                    worst = int(np.flatnonzero(too_long)[0])
                    raise ValueError(
                        f"{name}: row {first + worst} has {lengths[worst]} tokens, more than data.max_seq_length = "
                        f"{max_seq_length}; raise it, or set data.overlong=drop or truncate"
                    )
                if overlong == "truncate":
                    lengths = np.minimum(lengths, max_seq_length)
                trained = labels[at : ends[-1]] != templates.IGNORE_INDEX
                trained[starts - at] = False  # the first token of a document is never predicted
                sums = np.concatenate([[0], np.cumsum(trained, dtype=np.int64)])
                supervised = sums[starts - at + lengths] - sums[starts - at]
                kept = (supervised > 0) & (lengths <= max_seq_length)
                rows = first + np.flatnonzero(kept)
                for file, values, dtype in zip(
                    files, (starts[kept], rows, lengths[kept], supervised[kept]), types, strict=True
                ):
                    values.astype(dtype).tofile(file)
                totals["conversations"] += int(kept.sum())
                totals["tokens"] += int(lengths[kept].sum())
                totals["supervised"] += int(supervised[kept].sum())
                totals["overlong"] += int(too_long.sum())
                totals["nothing_to_train"] += int(((supervised == 0) & (lengths <= max_seq_length)).sum())
                at = int(ends[-1])
        (temporary / "totals.json").write_text(json.dumps(totals), encoding="utf-8")

    return make_folder(chosen, write)


def make_folder(folder: Path, write) -> Path:
    """Make a folder that is either complete or absent: `write` fills it under a temporary name."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix="unfinished-"))
    except OSError as error:
        raise ValueError(
            f"HF_HOME = {huggingface_hub.constants.HF_HOME} cannot be written to ({error.strerror}), and tokens are "
            "kept there; set it to a folder that can"
        ) from None
    try:
        write(temporary)
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # before the rename, so that a complete folder has its data on disk
        os.chmod(temporary, 0o755)  # others may share the cache
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def tokenise(rows, tokenizer, chat_template: str, train_on: str, cache: Path, name: str, workers: int) -> Path:
    """The folder with the tokens of these rows, made now or found in `cache`: any change to rows, template, tokenizer,
    options or the code makes another folder. Raises ValueError with file, line and reason for a bad row.
    """
    key = hashlib.sha256()
    vocabulary = tokenizer.backend_tokenizer.to_str()
    special = [str(tokenizer.special_tokens_map), str(tokenizer.init_kwargs.get("add_bos_token"))]
    code = [
        Path(module.__file__).read_text(encoding="utf-8")
        for module in (sys.modules[__name__], formats, templates, templates.tracing)
    ]
    for part in [fingerprint(rows), chat_template, vocabulary, *special, train_on, *code]:
        key.update(hashlib.sha256(part.encode()).digest())
    if "strftime_now" in chat_template:
        key.update(templates.datetime.now().strftime("%Y-%m-%d").encode())
    folder = cache / key.hexdigest()[:32]
    if folder.is_dir():
        return folder
    write = functools.partial(write_tokens, rows, tokenizer, chat_template, train_on, name, workers)
    return make_folder(folder, write)


def write_tokens(rows, tokenizer, chat_template, train_on, name: str, workers: int, folder: Path):
    if format := format_of(rows):  # in the workers too, as it is asked for here
        name += f" ({format})"
    size = 256
    chunks = [range(i, min(i + size, len(rows))) for i in range(0, len(rows), size)]
    encode_chunk = functools.partial(encode_rows, rows, tokenizer, chat_template, train_on, name)
    digest = hashlib.sha256()
    with (
        open(folder / "input_ids", "wb") as ids_file,
        open(folder / "labels", "wb") as labels_file,
        open(folder / "lengths", "wb") as lengths_file,
        tqdm(
            total=len(rows), desc=f"tokenising {name}", unit=" rows", mininterval=0.5 if sys.stderr.isatty() else 30
        ) as bar,
    ):
        # fork: rows and tokenizer are shared with the workers as they are; macOS and Windows go without
        if sys.platform != "linux" or workers == 1 or len(chunks) < 4:
            results = map(encode_chunk, chunks)
            write_results(results, (ids_file, labels_file, lengths_file), digest, bar)
        else:
            global forked
            forked = encode_chunk
            context = multiprocessing.get_context("fork")
            with concurrent.futures.ProcessPoolExecutor(workers, context, end_with_parent) as processes:
                results = in_order(processes, chunks)
                write_results(results, (ids_file, labels_file, lengths_file), digest, bar)
    (folder / "digest").write_text(digest.hexdigest(), encoding="utf-8")


forked = None  # what the workers of a pool call: inherited by fork, never pickled


def in_order(processes, chunks):
    """What `call_forked` makes of each chunk; some chunks ahead are in work, so that memory does not grow."""
    ahead = collections.deque()
    try:
        for chunk in chunks:
            ahead.append(processes.submit(call_forked, chunk))
            if len(ahead) > 64:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except concurrent.futures.process.BrokenProcessPool:
        raise ValueError(
            "a process that tokenises ended without a word, as a killed process does (out of memory?); the same "
            "command starts again"
        ) from None
    finally:
        for future in ahead:
            future.cancel()


def end_with_parent():
    """Linux kills this worker when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of <linux/prctl.h>


def call_forked(chunk):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return forked(chunk)


def write_results(results, files, digest, bar):
    for parts in results:  # ids, labels, lengths
        for part, file in zip(parts, files, strict=True):
            file.write(part.tobytes())
            digest.update(part.tobytes())
        bar.update(len(parts[2]))


def encode_rows(rows, tokenizer, chat_template, train_on, name, chunk):
    encoded = []
    for i in chunk:
        with at_row(rows, name, i):
            row = read_row(rows, i)
            tools = row.get("tools") or None
            encoded.append(templates.encode(tokenizer, row["messages"], tools, chat_template, train_on))
    ids = np.array([token for example in encoded for token in example.input_ids], dtype=np.int32)
    labels = np.array([token for example in encoded for token in example.labels], dtype=np.int32)
    return ids, labels, np.array([len(example.input_ids) for example in encoded], dtype=np.int32)


def format_of(rows) -> str | None:
    """The format of rows of files, known from then on. Raises ValueError where it cannot be told."""
    return rows.format if isinstance(rows, (formats.Rows, formats.Part)) else None


@contextlib.contextmanager
def at_row(rows, name: str, i: int):
    """A ValueError gets the place of row i in front."""
    try:
        yield
    except ValueError as error:
        where = rows.where(i) if isinstance(rows, (formats.Rows, formats.Part)) else f"{name} row {i}"
        raise ValueError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None


def fingerprint(rows) -> str:
    """Changes when any row does."""
    if isinstance(rows, datasets.Dataset):
        return rows._fingerprint
    if isinstance(rows, (formats.Rows, formats.Part)):
        return rows.fingerprint
    digest = hashlib.sha256()
    for i in range(len(rows)):  # (what is no row is an error when it is its turn)
        digest.update(json.dumps(rows[i], ensure_ascii=False, default=repr).encode(errors="replace") + b"\n")
    return digest.hexdigest()


# ---- a packed row ----------------------------------------------------------------------------------------------------


def collate(examples: Examples, row: list[int], device="cpu", part: int = 0, parts: int = 1) -> dict:
    """A packed row: documents one after the other, each up to the position that predicts its last trained token (what
    follows changes no loss).

    input_ids, position_ids (1, tokens) int64, positions that start at 0 in each document; documents: an
    `attention.Documents`; positions (supervised,) int64: where in the row a trained token has to be predicted; targets
    (supervised,) int64: that token. The first token of a document is never predicted. A row without documents is one
    token that trains nothing: one target of -100. Where `parts` ranks share the row, tokens and positions are those in
    the `part`-th slice of it.
    """
    documents = []
    for input_ids, labels in (examples[i] for i in row):
        predicted = np.append(labels[1:], templates.IGNORE_INDEX)  # at each position
        end = np.flatnonzero(predicted != templates.IGNORE_INDEX)[-1] + 1
        documents.append((input_ids[:end], predicted[:end]))
    missing = max(1, parts) - sum(len(ids) for ids, _ in documents)  # each rank has a token at least
    documents += [(np.zeros(1, dtype=np.int32), np.array([templates.IGNORE_INDEX]))] * max(0, missing)
    lengths = [len(ids) for ids, _ in documents]
    ends = np.cumsum(lengths).tolist()
    mine = packing.slice_of(ends[-1], part, parts)
    input_ids = np.concatenate([ids for ids, _ in documents])[mine]
    position_ids = np.concatenate([np.arange(length) for length in lengths])[mine]
    predicted = np.concatenate([predicted for _, predicted in documents])[mine]
    positions = np.flatnonzero(predicted != templates.IGNORE_INDEX)
    positions = positions if len(positions) else np.zeros(1, dtype=np.int64)

    def tensor(array, dtype=torch.int64):
        made = torch.from_numpy(np.asarray(array)).to(dtype)
        # (from pinned memory a GPU copies while the host goes on)
        return made.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else made

    return {
        "input_ids": tensor(input_ids)[None],  # (1, tokens)
        "position_ids": tensor(position_ids)[None],  # (1, tokens)
        "documents": attention.Documents(ends, tensor([0, *ends], torch.int32)),
        "positions": tensor(positions),  # (supervised,)
        "targets": tensor(predicted[positions]),  # (supervised,)
    }
