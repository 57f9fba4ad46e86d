"""Conversations tokenized once, cached on disk, and read from memory-mapped files."""

import collections
import contextlib
import datetime
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import datasets
import huggingface_hub
import multiprocess  # with which the datasets library starts processes
import numpy as np
import pyarrow.compute
from transformers import AutoTokenizer

import data
import files
import spans
import templates
import tracing

IDS, NOTES = datasets.List(datasets.Value("int32")), datasets.List(datasets.Value("string"))
FEATURES = datasets.Features(input_ids=IDS, labels=IDS, trained_tokens=datasets.Value("int32"), notes=NOTES)
FEATURES.update(digest=datasets.Value("binary"), is_text=datasets.Value("bool"))  # a text may be cut into pieces


def load_tokenizer(cfg):
    """The tokenizer that a `config.Config` names."""
    for path in Path(cfg.model.name).glob("*.*"):
        if path.is_file() and path.open("rb").read(26) == b"version https://git-lfs.gi":
            raise ValueError(f"{path} is a pointer of Git LFS, not the file: run `git lfs pull` there")
    name, revision = (cfg.tokenizer.name, None) if cfg.tokenizer.name else (cfg.model.name, cfg.model.revision)
    adapter = Path(name, "adapter_config.json")
    if adapter.is_file() and not adapter.with_name("tokenizer_config.json").is_file():  # PEFT itself saves none.
        settings = json.loads(adapter.read_text(encoding="utf-8"))
        name, revision = settings["base_model_name_or_path"], settings.get("revision")
    tokenizer = open_native(AutoTokenizer, name, revision)
    tokenizer.add_tokens(cfg.tokenizer.add_tokens, special_tokens=True)
    return tokenizer


def open_native(auto_class, name: str, revision: str | None):
    """`auto_class.from_pretrained`, without code of the model's own."""
    try:
        return auto_class.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:  # What the Hub answers need not name the model.
        if "trust_remote_code" in str(error):
            error = "needs code of its own (auto_map), which is not run here: name a model that transformers has"
            raise ValueError(f"{name} {error}") from None
        raise ValueError(f"{name}: {error}") from error


def choose_template(cfg, tokenizer, entries: list[data.MixtureEntry]) -> str | None:
    """The chat template that is trained: the configuration's, else the datasets', else the tokenizer's, if any."""
    chat_template = cfg.tokenizer.chat_template
    brought = {entry.dataset.task_spec.custom_template for entry in entries}
    if not chat_template and len(brought) > 1:
        raise ValueError("the datasets bring different chat templates: set tokenizer.chat_template")
    chat_template = chat_template or brought.pop() or "tokenizer"
    if chat_template.endswith(".jinja"):
        chat_template = Path(chat_template).read_text(encoding="utf-8-sig")
    elif chat_template == "tokenizer":
        chat_template = tokenizer.chat_template
    if chat_template is None:  # An error where a row is a chat.
        return None
    if not isinstance(chat_template, str) or "{" not in chat_template:
        raise ValueError(f"chat template {str(chat_template)[:99]!r} is not Jinja text; see tokenizer.chat_template")
    for name, value in cfg.tokenizer.template_arguments.items():  # Saved with the template, as defaults of a server.
        default = f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}{{{{ '' }}}}"
        chat_template = default + chat_template  # (`{{ '' }}` keeps a line break behind it.)
    tracing.compile_template(chat_template)
    return templates.with_bos(tokenizer, chat_template)


def find_stop_ids(tokenizer, examples: "TokenizedDataset") -> list[int]:
    """Ids at which generation stops: those that end each conversation's last trained turn, then the tokenizer's EOS."""
    special = templates.special_ids(tokenizer)
    labels = [examples[i][1] for i in examples.first(1000) if examples.lengths[i] < examples.max_seq_length]  # not cut
    ends = [int(each[each != templates.IGNORE_INDEX][-1]) for each in labels]
    if not (stop_ids := list(dict.fromkeys(end for end in [*ends, tokenizer.eos_token_id] if end in special))):
        raise ValueError("no trained turn ends in a special token, and tokenizer_config.json has no eos_token: set it")
    return stop_ids


# ---- tokenized once --------------------------------------------------------------------------------------------------
def tokenize_splits(cfg, tokenizer, entries: list[data.MixtureEntry]) -> dict:
    """Tokenize the datasets of a configuration, or find them in the cache. Returns plain values that can be sent to
    other ranks: the `chat_template` and, for `open_split`, `names`, `weights` and what `tokenize` returned for each."""
    chat_template = choose_template(cfg, tokenizer, entries)
    prepared = {"chat_template": chat_template, "train": [None] * len(entries), "validation": [None] * len(entries)}
    cache = Path(cfg.data.cache or f"{huggingface_hub.constants.HF_HOME}/sft-tokens")
    prepared |= {"names": [e.name for e in entries], "weights": [e.weight for e in entries], "cache": str(cache)}
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    options = chat_template, cfg.data.train_on, cache, workers, cfg.tokenizer.date
    for k, split, rows, name in data.splits_of(entries):
        prepared[split][k] = tokenize(rows, name, tokenizer, *options)
    return prepared


def open_split(prepared: dict, split: str, data_cfg) -> "TokenizedDataset | None":
    """A split of what `tokenize_splits` returned; None: it is not read. ValueError: nothing of it can be trained."""
    parts = [part for part in zip(prepared[split], prepared["names"], prepared["weights"], strict=True) if part[0]]
    if not parts:
        return None
    examples = TokenizedDataset(*zip(*parts, strict=True), data_cfg.max_seq_length, data_cfg.overlong)
    for name, total in zip(examples.names, examples.totals, strict=True):
        if total["conversations"] == 0:
            raise ValueError(f"{split!r} of {name} has nothing to train: {total}; see data.max_seq_length")
    return examples


job = None  # What the workers encode: inherited by fork and never pickled, so that rows may be any object.


def tokenize(rows, name: str, tokenizer, chat_template: str, train_on: str, cache: Path, workers: int, date=None):
    """The files with the tokens of all rows, in order, made now or found in `cache`. Any change to rows, template,
    tokenizer, options or the code makes other files. `date`: see `templates.encode`. ValueError: as `encode_row`."""
    global job
    modules = sys.modules[__name__], data, files, templates, spans, tracing
    code = [Path(module.__file__).read_text("utf-8") for module in modules]
    today = date or str(datetime.date.today()) if "strftime_now" in (chat_template or "") else ""
    made_by = [tokenizer.backend_tokenizer.to_str(), str(tokenizer.special_tokens_map), *code]
    each = (hashlib.sha256(json.dumps(rows[i], default=repr).encode()).hexdigest() for i in range(len(rows)))
    content = rows._fingerprint if type(rows) is datasets.Dataset else "".join(each)
    parts = [content, chat_template or "", train_on, today, *made_by]
    key = hashlib.sha256(b"".join(hashlib.sha256(part.encode()).digest() for part in parts)).hexdigest()[:32]
    cache.mkdir(parents=True, exist_ok=True)
    if parallel := sys.platform == "linux" and workers > 1 and len(rows) > 1000:
        multiprocess.set_start_method("fork", force=True)
    job = rows, name, tokenizer, chat_template, train_on, date
    dataset = datasets.Dataset.from_dict({"i": np.arange(len(rows))}).map(
        tokenize_row, remove_columns=["i"], features=FEATURES, num_proc=workers if parallel else None,
        cache_file_name=str(cache / f"{key}.arrow"), new_fingerprint=key, desc=f"tokenizing {name}",
    )  # fmt: skip
    paths = [file["filename"] for file in dataset.cache_files]
    for path in paths:
        with contextlib.suppress(OSError):  # Only their owner may. Many disks do not record when a file is read.
            os.utime(path, ns=(time.time_ns(), os.stat(path).st_mtime_ns))
    return paths


def encode_row(rows, i: int, name: str, tokenizer, chat_template: str, train_on: str, date: str | None):
    """Row i of a split, as (`templates.Encoded`, notes, whether it is a text). Raises ValueError with the row's place
    and what is wrong with it."""
    row = data.read_conversation(rows, i, name)
    notes = [f"nothing reads the column {column!r}" for column in row.get("unread") or []]
    with data.at_row(rows, i, name):
        if "text" in row:
            ids = tokenizer(row["text"]).input_ids  # with BOS and EOS where the tokenizer puts them
            return templates.Encoded(ids, ids), notes, True
        if "input_ids" in row:
            ids, labels = row["input_ids"], row["labels"]
            for k, (id, label) in enumerate(zip(ids, labels, strict=True)):
                if not 0 <= id < len(tokenizer):
                    raise ValueError(f"input_ids[{k}] is {id}, which is no token of the tokenizer")
                if label not in (id, -100):
                    raise ValueError(f"labels[{k}] is {label!r}, but must be input_ids[{k}] = {id} or -100")
            return templates.Encoded(ids, labels), notes, False
        messages, tools = row["messages"], row.get("tools")
        encoded, found = templates.encode_with_notes(tokenizer, messages, tools, chat_template, train_on, date)
    return encoded, notes + found, False


def tokenize_row(row: dict) -> dict:
    """Row i of the split that is tokenized. `row`: its number, as {"i": i}."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # One thread for each worker.
    rows, *options = job
    encoded, notes, is_text = encode_row(rows, row["i"], *options)
    input_ids, labels = np.array(encoded, dtype=np.int32)
    digest = hashlib.sha256(input_ids.tobytes() + labels.tobytes()).digest()
    trained = np.count_nonzero(labels[1:] != templates.IGNORE_INDEX)  # A document's first token is never predicted.
    found = {"trained_tokens": trained, "digest": digest, "notes": notes, "is_text": is_text}
    return {"input_ids": input_ids, "labels": labels, **found}


class TokenizedDataset:
    """Tokenized conversations in memory-mapped files, so that no rank holds the tokens in memory.

    For each example: `lengths` and `trained_tokens`, int32 (examples,), and `row_ids`, its row in the split, and
    `starts`, its first token there, int64. A document of format text is cut into as many examples as it takes.
    Datasets follow one another: `names`, `weights`, `counts` and `totals` of each. `digest`: of all tokens and labels.
    `notes`: what may surprise in the rows, one line of each kind with its number of rows.
    `files`: of each, what `tokenize` returned. Raises ValueError for an overlong example if `overlong` is error."""

    def __init__(self, files, names=("",), weights=(1.0,), max_seq_length: int = 2**31, overlong: str = "drop"):
        self.names, self.weights, self.max_seq_length = names, weights, max_seq_length
        self.columns, self.totals, self.notes, kept = [], [], [], []
        digest = hashlib.sha256()
        for name, paths in zip(names, files, strict=True):
            table = datasets.concatenate_datasets([datasets.Dataset.from_file(path) for path in paths]).data
            input_ids, labels = table.column("input_ids"), table.column("labels")
            lengths = pyarrow.compute.list_value_length(input_ids).to_numpy().astype(np.int64)
            digest.update(b"".join(table.column("digest").to_pylist()))
            rows = collections.defaultdict(list)  # by kind of note: the rows that have it, as "17: example"
            for row, notes in enumerate(table.column("notes").to_pylist()):
                for kind, example in {note.partition(": ")[0]: note.partition(": ")[2] for note in notes}.items():
                    rows[kind].append(f"{row}: {example}" if example else f"{row}")
            self.notes += [f"{kind} ({len(r):,} rows of {name}; row {r[0]})" for kind, r in rows.items()]
            is_text = table.column("is_text").to_numpy()
            pieces = np.where(is_text, np.maximum(1, -(-lengths // max_seq_length)), 1)  # of each row
            row_ids = np.repeat(np.arange(len(lengths)), pieces)
            starts = (np.arange(len(row_ids)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * max_seq_length
            lengths = lengths[row_ids] - starts
            lengths = np.where(is_text[row_ids], np.minimum(lengths, max_seq_length), lengths).astype(np.int32)
            trained = np.where(is_text[row_ids], lengths - 1, table.column("trained_tokens").to_numpy()[row_ids])
            too_long = lengths > max_seq_length
            if overlong == "error" and too_long.any():
                i, rule = too_long.argmax(), f"data.max_seq_length = {max_seq_length} or data.overlong = error"
                raise ValueError(f"{name}: row {row_ids[i]} has {lengths[i]} tokens: change {rule}")
            if overlong == "truncate":
                lengths = np.minimum(lengths, max_seq_length)
                for i in np.flatnonzero(too_long).tolist():
                    kept_labels = labels[int(row_ids[i])].values.to_numpy()[1:max_seq_length]
                    trained[i] = np.count_nonzero(kept_labels != templates.IGNORE_INDEX)
            fits = lengths <= max_seq_length
            chosen = fits & (trained > 0)
            self.columns.append((input_ids, labels))
            kept.append((row_ids[chosen], starts[chosen], lengths[chosen], trained[chosen]))
            total = {"conversations": chosen, "tokens": lengths[chosen], "trained_tokens": trained[chosen]}
            total |= {"overlong": too_long, "nothing_to_train": fits & (trained <= 0)}
            self.totals.append({key: int(values.sum(dtype=np.int64)) for key, values in total.items()})
        self.row_ids, self.starts, self.lengths, self.trained_tokens = map(np.concatenate, zip(*kept, strict=True))
        self.counts = [total["conversations"] for total in self.totals]
        self.ends, self.digest = np.cumsum(self.counts), digest.hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, labels) of example i, int32 (tokens,), read-only."""
        row, start, end = int(self.row_ids[i]), self.starts[i], self.starts[i] + self.lengths[i]
        return tuple(column[row].values.to_numpy()[start:end] for column in self.columns[self.dataset_index(i)])

    def dataset_index(self, i: int) -> int:
        return int(np.searchsorted(self.ends, i, side="right"))

    def ranges(self) -> list[range]:
        """The examples of each dataset."""
        return [range(end - count, end) for count, end in zip(self.counts, self.ends.tolist(), strict=True)]

    def first(self, count: int | None) -> list[int]:
        """The first `count` examples of each dataset; None: all."""
        return [i for examples in self.ranges() for i in examples[:count]]
