"""Files and their rows: JSON, spreadsheets, parquet and saved datasets, each row as it stands there."""

import csv
import glob
import gzip
import hashlib
import io
import json
import re
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow.parquet
from datasets.data_files import SPLIT_KEYWORDS
from huggingface_hub.utils.sha import sha_fileobj

LINES, TABLES = (".jsonl", ".ndjson"), (".csv", ".tsv")
ENDINGS = (*(kind + packed for kind in (*LINES, ".json", *TABLES) for packed in ("", ".gz", ".zst")), ".parquet")
SPLITS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}  # {"dev": "validation", ...}
FILE_ROWS = datasets.Features({"place": datasets.Value("string"), "json": datasets.Value("binary")})


def split_files(path: str) -> tuple[list[str], list[str], list[str]]:
    """The files to train on, to validate on, and to leave out. In a folder the first word of their names, or of the
    names of their subfolders, that is in `SPLITS` decides; files without one are trained on if none says train."""
    splits, path = {}, str(Path(path))
    for file in find_files(path):
        words = re.findall("[a-z]+", file.removeprefix(path).lower()) if Path(path).is_dir() else []
        words = [word.removesuffix("set") for word in words]  # "testset"
        splits.setdefault(next((SPLITS[word] for word in words if word in SPLITS), None), []).append(file)
    train, validation = splits.pop("train", None) or splits.pop(None, []), splits.pop("validation", [])
    return train, validation, sum(splits.values(), [])


def find_files(path: str) -> list[str]:
    """A file, or those that a glob or a folder holds, by name, without the hidden files of a folder."""
    path = str(Path(path))  # without "./", as those below it are named
    found = {path, *glob.glob(f"{glob.escape(path)}/**/*" if Path(path).is_dir() else path, recursive=True)}
    saved = {str(Path(file).with_name("state.json")) for file in found if Path(file).name == "dataset_info.json"}
    files = [file for file in found - saved if file.lower().endswith(ENDINGS) and Path(file).is_file()]
    files = [file for file in files if not Path(file).name.startswith(("dataset_info", "dataset_dict"))]  # of the Hub
    for state in saved & found:  # of a dataset that was saved to disk
        shards = json.loads(Path(state).read_bytes())["_data_files"]
        files += [str(Path(state).with_name(shard["filename"])) for shard in shards]
    if not files:
        raise ValueError(f"data: {path} is not there, or names no file that ends in {', '.join(ENDINGS)}")
    return sorted(files, key=Path)


def read_table(files: list[str]) -> datasets.Dataset:
    """The rows of these files, kept as JSON text in a memory-mapped table that is made once for the same content.

    In the types of Arrow rows do not stay as they are: keys are filled in, numbers rounded, "42" becomes a number."""
    key = hashlib.sha256(Path(__file__).read_bytes())
    for file in files:
        with open(file, "rb") as opened:
            key.update(f"{file}\0".encode() + sha_fileobj(opened))
    try:
        folder = f"{huggingface_hub.constants.HF_HOME}/sft-rows"
        options = {"cache_dir": folder, "gen_kwargs": {"files": files}, "fingerprint": key.hexdigest()[:32]}
        return datasets.Dataset.from_generator(iterate_rows, features=FILE_ROWS, **options)
    except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(error.__cause__ or f"data: {files[:3]} have no rows, or delete {folder}: {error}") from None


def iterate_rows(files: list[str]):
    """Yields each row with its place: the line of JSON lines or the row of a spreadsheet, from 1; else from 0."""
    for file in files:
        try:
            for n, row in numbered_rows(file):
                if not isinstance(row, bytes):  # bytes inside are texts, as some programs write them
                    row = json.dumps(row, default=lambda x: x.decode() if isinstance(x, bytes) else str(x)).encode()
                yield {"place": f"{file}:{n}", "json": row}
        except Exception as error:
            fix = ": save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
            raise ValueError(f"{file}: {error}{fix}") from None


def numbered_rows(file: str):
    """Pairs of a number and a row, which is bytes where it is a line of JSON."""
    ending = next(ending for ending in (*ENDINGS, ".arrow") if file.lower().endswith(ending))
    if ending in (".parquet", ".arrow"):
        stream = pyarrow.memory_map(file)
        parquet, saved = pyarrow.parquet.ParquetFile, pyarrow.ipc.open_stream
        batches = saved(stream) if ending == ".arrow" else parquet(stream).iter_batches()
        tables = (datasets.Dataset(pyarrow.Table.from_batches([batch])) for batch in batches)
        return enumerate(without_filled_in(row, table.features) for table in tables for row in table)
    lines = gzip.open(file) if ending.endswith(".gz") else io.BufferedReader(pyarrow.input_stream(file))
    if ending.startswith(LINES) and not (encoding := json.detect_encoding(lines.peek(4))).startswith("utf-8"):
        raise ValueError(f"is {encoding.upper()}, but lines of JSON are read as UTF-8: save it as UTF-8")
    if not ending.startswith(LINES):
        text = lines.read()
        text = text.decode(json.detect_encoding(text))  # of UTF-8 or, by its BOM, of UTF-16
        if ending.startswith(TABLES):
            return csv_rows(text, "\t" if ending.startswith(".tsv") else ",;\t")
        rows, end = DECODER.raw_decode(text := text.strip())
        if end == len(text):
            return enumerate(rows if isinstance(rows, list) else [rows])
        lines = io.BytesIO(text.encode())  # what follows makes it JSON lines
    return ((n, line.rstrip(b"\n")) for n, line in enumerate(lines, 1) if line.strip())


def csv_rows(text: str, separators: str):
    """Yields (number, row) as a spreadsheet counts them. The first names the columns; an empty cell is null."""
    csv.field_size_limit(2**31 - 1)
    separator = max(separators, key=text.partition("\n")[0].count)
    header, *table = [*csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)] or [[]]
    for number, cells in enumerate(table, 2):
        if len(cells) not in (0, len(header)):
            raise ValueError(f"row {number} has {len(cells)} cells, but the header has {len(header)}")
        if any(cells):
            yield number, unique_keys([(name, cell or None) for name, cell in zip(header, cells, strict=True)])


def unique_keys(pairs: list[tuple]) -> dict:
    """Build a JSON object; a duplicate key is an error."""
    if len(there := dict(pairs)) < len(pairs):
        names = ", ".join(name for name, _ in pairs)
        raise ValueError(f"duplicate key in an object with the keys {names}: {str(there)[:80]}")
    return there


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


def from_json(value, name: str):
    """A value that may be JSON text, as a list in a spreadsheet is. `name`: of the value, for errors."""
    try:
        return DECODER.decode(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{name} cannot be read as JSON: {error}: {value[:60]!r}") from None


def without_filled_in(value, feature):
    """A value of an Arrow table without the None that stands where another row has a key (a Json column has none)."""
    if isinstance(feature, dict) and isinstance(value, dict):
        kept = {"content"} if "role" in value else ()  # null in a message that only calls tools
        kept = value if isinstance(feature, datasets.Features) else kept  # the columns of a row
        there = {name: item for name, item in value.items() if item is not None or name in kept}
        return {name: without_filled_in(item, feature.get(name)) for name, item in there.items()}
    if isinstance(value, list) and hasattr(feature, "feature"):
        return [without_filled_in(item, feature.feature) for item in value]
    return value
