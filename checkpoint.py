"""Checkpoints: written under another name, flushed, renamed; found, loaded, rotated. A `step_*` folder is whole.

python checkpoint.py results/squad             # what is there, which is best, and whether each is whole
python checkpoint.py FOLDER/step_00000010 DIR  # makes a model folder of its state/
"""

import contextlib
import itertools
import json
import os
import pickle
import shutil
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

import config as configuration
import lora
import model as modelling
import ranks

# A single process is fine. For all threads, because a filter cannot be set for one
warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")

# What may change between two starts of one run: it changes neither the batches nor the model.
MAY_CHANGE = (
    "output_dir", "train.max_steps", "train.max_epochs", "train.max_tokens_per_micro_batch", "validation.every",
    "validation.at_start", "validation.samples", "validation.exact_match", "parallel.",
    "checkpoint.", "logger.", "cluster.", "model.attention", "model.compile", "model.activation_checkpointing",
    "model.lora.merge",
)  # fmt: skip


# ---- find ------------------------------------------------------------------------------------------------------------


def find(output_dir: Path) -> list[Path]:
    """The folders `step_*` of a run, oldest first."""
    return sorted(path for path in (output_dir / "checkpoints").glob("step_*") if path.name[5:].isdigit())


def step_of(folder: Path) -> int:
    return int(folder.name[5:])


def read_figures(folder: Path) -> dict:
    """What was written with a checkpoint: `step`, `val/loss` if it was validated, sizes and checksums of its `files`,
    what it was trained on."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def newest_whole(output_dir: Path) -> Path | None:
    """Skips folders damaged after they were written: resuming from an older one repeats the same steps."""
    return next((folder for folder in reversed(find(output_dir)) if damage(folder) is None), None)


def find_model(name: str) -> str:
    """The model that a folder holds: a run's newest, a checkpoint's, or the folder's own. What is no folder is returned
    as it is: a name on the Hub. Raises ValueError where a folder holds none."""
    folder = Path(name)
    if not folder.is_dir() or (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return name
    newest = newest_whole(folder)
    if (folder / "model").is_dir() and (newest is None or read_state(folder) == "finished"):
        return str(folder / "model")
    if newest is None:
        raise ValueError(f"{name} holds no model and no whole checkpoint")
    return str(newest / "model")


def damage(folder: Path, thorough: bool = False) -> str | None:
    """What is damaged in a checkpoint, by the sizes of its files and the checksums of the small ones (`thorough`: of
    all of them); None: nothing."""
    try:
        files = read_figures(folder)["files"]
        for name, (size, checksum) in files.items():
            there = (folder / name).stat().st_size
            if there != size:
                return f"{name} has {there:,} bytes of {size:,}"
            if (thorough or size < 2**20) and crc32(folder / name) != checksum:
                return f"{name} has changed since it was written"
    except Exception as error:  # whatever a damaged file brings about
        return f"{type(error).__name__}: {error}"
    return None


def crc32(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            checksum = zlib.crc32(block, checksum)
    return checksum


def checksums(folder: Path, names: list[str]) -> dict[str, tuple[int, int]]:
    """(bytes, CRC-32) of each of these files of a folder."""
    return {name: ((folder / name).stat().st_size, crc32(folder / name)) for name in names}


class MetadataReader(pickle.Unpickler):
    """torch.distributed.checkpoint keeps its list of contents as a pickle: nothing but such lists is read here."""

    ALLOWED = {
        "torch.distributed.checkpoint.metadata": (
            # (not BytesStorageMetadata: torch unpickles what it describes, whatever that is)
            "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
            "MetadataIndex", "StorageMeta",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
        "torch.serialization": ("_get_layout",),
        "torch": ("Size", "device"),
        "collections": ("OrderedDict",),
        "pathlib": ("PosixPath",),
    }  # fmt: skip

    def find_class(self, module, name):
        if module == "pathlib._local":  # as Python 3.13 calls it
            module = "pathlib"
        if name in self.ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if f"{module}.{name}" == "builtins.getattr":  # so Python 3.11.0 to 3.11.3 pickle a member of an enum
            return memory_format
        if module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout)):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"state/.metadata names {module}.{name}, which is no part of a checkpoint")


def memory_format(enum, name: str):
    """The member of torch's list of memory formats, and no attribute of anything else."""
    if enum is not torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"state/.metadata asks for {name} of {enum}, which is no part of a checkpoint")
    return enum[name]


def read_metadata(state: Path):
    """What a checkpoint's `state/` holds. Raises ValueError where that cannot be read."""
    with reading(state), open(state / ".metadata", "rb") as file:
        return MetadataReader(file).load()


@contextlib.contextmanager
def reading(state: Path):
    """Whatever a damaged `state/` brings about becomes a ValueError that names it."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        reason = " ".join(str(reason_of(error)).split())[:200]
        raise ValueError(f"{state} cannot be read: {reason}. Move {state.parent} away to go on without it") from error


def where_to_start(config: dict) -> tuple[Path | None, bool]:
    """(the newest whole checkpoint, whether the run is finished) of `config["output_dir"]`.

    Raises ValueError if the folder holds another run that has trained a step, or something else: neither is ever
    overwritten.
    """
    name = config["output_dir"]
    output_dir = Path(name)
    # What may be there before a run is (and .tmp: one was killed while it wrote its first file)
    ours = (".lock", "STOP")
    if not output_dir.exists() or all(p.name in ours or p.name.endswith(".tmp") for p in output_dir.iterdir()):
        return None, False
    if not (output_dir / "config.yaml").is_file():
        raise ValueError(f"output_dir = {name!r} is not empty and holds no run; name another folder")
    if read_state(output_dir) and not has_trained(output_dir):
        return None, False  # a run that ended before its first step has nothing to lose
    if config["checkpoint"]["resume"] == "never":
        raise ValueError(f"output_dir = {name!r} holds a run already, and checkpoint.resume is never")
    old = configuration.to_dict(configuration.load(str(output_dir / "config.yaml"), []))
    differing = differing_keys(old, config)
    if differing:
        raise ValueError(
            f"output_dir = {name!r} holds a run with another configuration: {'; '.join(differing)}; "
            "name another output_dir, or set the keys as they were"
        )
    same_length = all(old["train"][key] == config["train"][key] for key in ("max_steps", "max_epochs"))
    finished = read_state(output_dir) == "finished" and (output_dir / "model").is_dir()
    return newest_whole(output_dir), finished and same_length


def has_trained(output_dir: Path) -> bool:
    """Whether there is a checkpoint, a model, or a step in metrics.jsonl."""
    path = output_dir / "metrics.jsonl"
    if find(output_dir) or (output_dir / "model").exists():
        return True
    return path.is_file() and '"train/loss"' in path.read_text(encoding="utf-8")


def read_state(output_dir: Path) -> str | None:
    """Of status.json: running, stopped, finished or failed; None where there is none."""
    try:
        return json.loads((output_dir / "status.json").read_text(encoding="utf-8"))["state"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def differing_keys(old: dict, new: dict, prefix="") -> list[str]:
    """Dotted names, with both values, of what must not change between two starts of one run and did."""
    found = []
    for name in sorted({*old, *new}):
        full_name = f"{prefix}{name}"
        if full_name.startswith(MAY_CHANGE):
            continue
        if full_name == "model.revision" and new.get("lora", {}).get("rank"):
            continue  # the weights below an adapter are compared themselves
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differing_keys(a, b, f"{full_name}.")
        elif a != b:
            found.append(f"{full_name} ({a!r} there, {b!r} now)")
    return found


def clear_leftovers(output_dir: Path) -> list[str]:
    """Delete what was never finished, and move aside what was damaged since. Returns lines to print."""
    for leftover in [*(output_dir / "checkpoints").glob("unfinished_*"), *output_dir.glob("unfinished_*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in output_dir.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    said = []
    for folder in find(output_dir):
        if reason := damage(folder):
            names = (folder.with_name(f"damaged_{folder.name}{'_again' * n}") for n in itertools.count())
            aside = next(name for name in names if not name.exists())
            os.rename(folder, aside)
            said.append(f"{folder} was damaged after it was written ({reason}): now {aside.name}")
    return said


# ---- write -----------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, text: str):
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error.strerror}; what was there is as it was") from error


def write_status(output_dir: Path, state: str, step: int | None, reason: str | None = None):
    write_atomically(output_dir / "status.json", json.dumps({"state": state, "step": step, "reason": reason}) + "\n")


def flush(folder: Path):
    """Everything below the folder on the disk, folders too."""
    for path in [*folder.rglob("*"), folder]:
        flush_one(path)


def flush_one(path: Path):
    """A file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason_of(error: BaseException) -> BaseException:
    """What lies behind an error of torch.distributed.checkpoint."""
    while isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return error


def state_of(model, optimizer) -> dict:
    """Weights, buffers and optimizer state by the parameter's name, as they are and not copied. The optimizer's state
    is made where it has none yet, so that a checkpoint can be read into it."""
    # First: it makes FSDP reshard the weights that a forward pass left gathered
    kept = model.state_dict().keys()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}  # tied weights once
    if lora.has_adapter(model):  # its base is where it was read from
        weights = {name: p.detach() for name, p in trained.items()}
    else:
        weights = {name: p.detach() for name, p in model.named_parameters()}
        weights |= {name: buffer for name, buffer in model.named_buffers() if name in kept}
    moments = {}
    for name, p in trained.items():
        if p not in optimizer.state:
            optimizer.state[p] = modelling.first_state(p)
        moments[name] = optimizer.state[p]
    return {"model": weights, "optimizer": moments}


class Writer:
    """Writes a run's checkpoints, one at a time, in a thread: the loop waits only for a copy in memory. Every rank has
    one. `skeleton`: `modelling.skeleton` of the model; `figures` are kept with the checkpoint (`val/loss` ranks them).
    """

    def __init__(self, output_dir: Path, keep: int, asynchronous: bool, rank: int, skeleton, tokenizer, stop_ids):
        self.folder, self.keep, self.rank = output_dir / "checkpoints", keep, rank
        self.skeleton, self.tokenizer, self.stop_ids = skeleton, tokenizer, stop_ids
        self.thread, self.error, self.slowest = None, None, 0.0  # seconds that a checkpoint took to write
        self.stager = (
            DefaultStager(StagingOptions(torch.cuda.is_available(), False, False, False)) if asynchronous else None
        )
        if self.stager:  # small tensors share pages, which can be pinned but once
            self.stager._state_dict_stager.pin_memory_min_bytes = 2**20
        # the thread's, or what it does would wait for the training's, and take memory of the machine's first GPU
        self.stream = torch.cuda.Stream() if asynchronous and torch.cuda.is_available() else None
        # a group of its own: its messages run beside the loop's
        self.group = dist.new_group(backend="gloo", timeout=ranks.TIMEOUT) if dist.is_initialized() else None

    def save(self, step: int, model, optimizer, figures: dict):
        """Every rank calls it, once the previous checkpoint is `done`."""
        state = state_of(model, optimizer)
        if dist.is_initialized() and not modelling.is_sharded(model):
            # Every rank has all of it: each copies and writes its share
            share = slice(self.rank, None, dist.get_world_size())
            state = {kind: dict([*part.items()][share]) for kind, part in state.items()}
        if self.stager:
            state = self.stager.stage(state)
            self.thread = threading.Thread(target=self.try_to_write, args=(step, state, figures), daemon=True)
            self.thread.start()
        else:
            self.try_to_write(step, state, figures)

    def done(self, seconds: float = 0.0) -> bool:
        """Whether nothing is being written, after waiting up to `seconds`. Raises OSError if a write has failed."""
        if self.thread:
            self.thread.join(seconds)
            if self.thread.is_alive():
                return False
            self.thread = None
        if self.error:
            raise self.error
        return True

    def try_to_write(self, step, state, figures):
        if self.stager and sys.platform == "linux":
            # of this thread alone: it runs when training leaves a core idle
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        final, began = self.folder / f"step_{step:08d}", time.monotonic()
        try:
            with torch.cuda.stream(self.stream):
                self.write(step, state, figures, final)
            self.slowest = max(self.slowest, time.monotonic() - began)
        except (Exception, CheckpointException) as error:
            free = "unknown"
            with contextlib.suppress(OSError):
                free = f"{shutil.disk_usage(self.folder).free / 2**30:.2f} GiB"
            if self.rank == 0:
                shutil.rmtree(final.with_name(f"unfinished_{final.name}"), ignore_errors=True)
            self.error = OSError(
                f"the checkpoint of step {step} could not be written below {self.folder} (free there: {free}; "
                f"is the disk full?): {reason_of(error)}. What was written before is whole; make room, and the same "
                "command goes on from there"
            )

    def write(self, step, state, figures, final: Path):
        unfinished = final.with_name(f"unfinished_{final.name}")
        if self.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        if self.group:
            dist.barrier(group=self.group)
        # each rank flushes its own files; an error on one is raised on all
        dcp.save(state, checkpoint_id=unfinished / "state", process_group=self.group, no_dist=self.group is None)
        mine = checksums(unfinished, [f"state/{p.name}" for p in (unfinished / "state").glob(f"__{self.rank}_*")])
        parts = [mine]
        if self.group:
            parts = [None] * dist.get_world_size() if self.rank == 0 else None
            dist.gather_object(mine, parts, group=self.group)
        if self.rank == 0:
            export_state(unfinished / "state", self.skeleton, self.tokenizer, self.stop_ids, unfinished / "model")
            others = ["state/.metadata", *(f"model/{path.name}" for path in (unfinished / "model").iterdir())]
            files = {name: entry for part in [*parts, checksums(unfinished, others)] for name, entry in part.items()}
            write_atomically(unfinished / "metrics.json", json.dumps({"step": step, **figures, "files": files}))
            flush(unfinished)
            os.rename(unfinished, final)
            flush_one(self.folder)
            rotate(self.folder.parent, self.keep)


def rotate(output_dir: Path, keep: int):
    """Keep the newest checkpoint and the `keep` best by validation loss."""
    older = find(output_dir)[:-1]
    older.sort(key=lambda folder: (loss_of(folder), -step_of(folder)))
    for folder in older[keep:]:
        doomed = folder.with_name(f"unfinished_{folder.name}")
        os.rename(folder, doomed)  # so that no half-deleted folder is called step_*
        shutil.rmtree(doomed, ignore_errors=True)


def loss_of(folder: Path) -> float:
    """A checkpoint's val/loss; infinite if it was not validated or cannot be read."""
    try:
        return read_figures(folder).get("val/loss", float("inf"))
    except (OSError, ValueError, AttributeError):
        return float("inf")


# ---- read ------------------------------------------------------------------------------------------------------------


def load(folder: Path, model, optimizer):
    """Read the state back in place, on any number of ranks, DDP or FSDP. Raises ValueError where it cannot be read."""
    read(folder / "state", state_of(model, optimizer), no_dist=not dist.is_initialized())


def read(state: Path, into: dict, no_dist: bool):
    read_metadata(state)
    with reading(state):
        dcp.load(into, checkpoint_id=state, no_dist=no_dist)


def export_state(state: Path, skeleton, tokenizer, stop_ids: list[int], folder: Path):
    """A model folder from a checkpoint's `state/`, in the skeleton's dtype, compared with the state after writing."""
    kept = read_metadata(state).state_dict_metadata
    weights = {
        name: torch.empty(p.shape, dtype=p.dtype)  # read straight into the exported dtype
        for name, p in [*skeleton.named_parameters(), *skeleton.named_buffers()]
        if f"model.{name}" in kept
    }
    read(state, {"model": weights}, no_dist=True)
    modelling.export(skeleton, weights, tokenizer, stop_ids, folder)


def put_model(output_dir: Path, merge: bool):
    """`output_dir/model`, from the newest checkpoint; opened as a user opens it, and compared with the state. `merge`:
    a LoRA adapter is added to its base."""
    newest, target, unfinished = find(output_dir)[-1], output_dir / "model", output_dir / "unfinished_model"
    shutil.rmtree(unfinished, ignore_errors=True)
    if merge and (newest / "model/adapter_config.json").is_file():
        modelling.compare(newest / "model", read_weights(newest))
        merge_model(newest / "model", None, unfinished)
    else:
        shutil.copytree(newest / "model", unfinished)
        modelling.compare(unfinished, read_weights(newest))
    flush(unfinished)
    if target.is_dir():
        os.rename(target, output_dir / "unfinished_old_model")
    os.rename(unfinished, target)
    flush_one(output_dir)
    shutil.rmtree(output_dir / "unfinished_old_model", ignore_errors=True)


# ---- the command -----------------------------------------------------------------------------------------------------


def main(arguments: list[str]):
    if len(arguments) not in (1, 2) or "--help" in arguments or "-h" in arguments:
        print(__doc__)
        raise SystemExit(0 if {"--help", "-h"} & {*arguments} else 2)
    folder = Path(arguments[0])
    try:
        if len(arguments) == 2:
            make_model_folder(folder, Path(arguments[1]))
        elif not list_checkpoints(folder):
            raise SystemExit(1)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


def list_checkpoints(output_dir: Path) -> bool:
    """Prints a line for each checkpoint, and for the final model. Returns whether all are whole."""
    found = find(output_dir)
    if not found:
        raise ValueError(f"{output_dir}/checkpoints holds no checkpoint")
    status = output_dir / "status.json"
    if status.is_file():
        print(f"{output_dir}: {status.read_text(encoding='utf-8').strip()}")
    whole = {}
    for folder in found:
        problem = damage(folder, thorough=True)
        whole[folder] = problem is None
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        loss = loss_of(folder) if whole[folder] else float("inf")
        shown = f"val/loss {loss:.4f}" if loss < float("inf") else "not validated"
        print(
            f"{folder.name}  {size / 2**20:,.1f} MiB  {shown}  {'whole' if problem is None else f'DAMAGED: {problem}'}"
        )
    good = [folder for folder in found if whole[folder]]
    if good:
        best = min(good, key=lambda folder: (loss_of(folder), -step_of(folder)))
        named = f"best: {best.name}, " if loss_of(best) < float("inf") else ""
        print(f"{named}newest whole: {good[-1].name}")
    model, problem = output_dir / "model", None
    if model.is_dir():
        try:
            for name in modelling.weight_files(model):
                modelling.check_size(model / name)
        except (OSError, ValueError) as error:
            problem = f"{error}; delete it, and the same command as before writes it again"
        print("model  whole" if problem is None else f"model  DAMAGED: {problem}")
    return len(good) == len(found) and problem is None


def read_weights(folder: Path) -> dict:
    """A checkpoint's weights by name, float32."""
    metadata = read_metadata(folder / "state").state_dict_metadata
    weights = {
        name.removeprefix("model."): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if name.startswith("model.")
    }
    read(folder / "state", {"model": weights}, no_dist=True)
    return weights


def merge_model(adapter: Path, weights: dict | None, target: Path):
    """A model folder of a LoRA adapter's folder, in the dtype that its base is stored in. `weights`: the adapter's, in
    place of those that the folder has."""
    model = lora.open_adapter(Path(adapter), "auto", weights=weights)
    lora.merge_adapter(model)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(target)
    modelling.check_files(target)
    modelling.compare(target, model.state_dict())


def make_model_folder(folder: Path, target: Path):
    """`folder`: a checkpoint, whose model/ may be gone or damaged but for its configuration and tokenizer; or the
    folder of a LoRA adapter, which is added to its base."""
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; name another folder")
    is_checkpoint = (folder / "state").is_dir()
    if not is_checkpoint and not (folder / "adapter_config.json").is_file():
        newest = newest_whole(folder)
        mend = f"; name a checkpoint, as {newest}" if newest else ""
        mend = "; it is a plain model already" if (folder / "config.json").is_file() else mend
        raise ValueError(f"{folder} is neither a checkpoint (step_*) nor the folder of a LoRA adapter{mend}")
    beside = [f / "model" for f in [folder, *reversed(find(folder.resolve().parent.parent))]]
    source = next((f for f in (beside if is_checkpoint else [folder]) if (f / "tokenizer.json").is_file()), None)
    if source is None:
        raise ValueError(
            f"{folder} has no model/ with configuration and tokenizer, nor has another checkpoint beside it"
        )
    unfinished = target.with_name(f"unfinished_{target.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    adapted = (source / "adapter_config.json").is_file()
    if adapted:
        merge_model(source, read_weights(folder) if is_checkpoint else None, unfinished)
    else:
        export_plain(folder, source, unfinished)
    flush(unfinished)
    os.replace(unfinished, target)  # (an empty folder may be there)
    flush_one(target.absolute().parent)
    print(f"{target} holds the model of {folder}" + (", with its adapter added to the weights" if adapted else ""))


def export_plain(folder: Path, source: Path, target: Path):
    model_config = AutoConfig.from_pretrained(source)
    skeleton = modelling.skeleton(model_config, GenerationConfig.from_pretrained(source), model_config.dtype)
    tokenizer = AutoTokenizer.from_pretrained(source)
    export_state(folder / "state", skeleton, tokenizer, modelling.stop_ids_of(skeleton, tokenizer), target)


if __name__ == "__main__":
    main(sys.argv[1:])
