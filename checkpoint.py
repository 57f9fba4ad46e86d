"""Checkpoints: write, find, load, rotate, export; the run folder. What is called `step_*` is complete: it was renamed.

python checkpoint.py FOLDER/step_00000010 DIR  # makes a model folder of its state/ (a LoRA adapter is merged)
python checkpoint.py FOLDER DIR                # merges the LoRA adapter of a run, or of a folder, into its base
python checkpoint.py FOLDER --push OWNER/NAME [--private]  # uploads the model of a run, or a folder of one, to the Hub
"""

import contextlib
import datetime
import fcntl
import functools
import itertools
import json
import operator
import os
import re
import shutil
import sys
import threading
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

import config
from distributed import progress, rank_and_world_size
from export import export, meta_model, repair_generation, verify_export
from lora import merge_adapter, open_adapter
from model import is_sharded, stop_ids_of

warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")  # A single process is fine.

# What may change between two launches of one run: it changes neither the batches nor the model.
RESUME_SAFE_KEYS = (
    "output_dir", "train.max_steps", "train.max_epochs", "train.max_tokens_per_micro_batch", "validation.every",
    "validation.at_start", "validation.samples", "validation.exact_match", "validation.patience", "checkpoint.",
    "parallel.", "logger.", "cluster.", "model.attention", "model.compile", "model.activation_checkpointing",
    "model.lora.merge", "train.profile", "data.cache", "tokenizer.date",
)  # fmt: skip
# What decides where a run ends and what its model/ is: after a change a finished run is not finished.
END_KEYS = "train.max_steps", "train.max_epochs", "validation.patience", "checkpoint.final", "model.lora.merge"
LOWER_RATE = "the same command with a lower train.learning_rate resumes from the newest checkpoint"
FILE_BYTES = 2**32  # of a rank's files in state/, about: safetensors copies a file in memory before it is written


def find(output_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first. Each is complete, because that is when it gets its name."""
    return sorted(path for path in (output_dir / "checkpoints").glob("step_*") if path.name[5:].isdigit())


def step_of(folder: Path) -> int:
    return int(folder.name[5:])


def read_info(folder: Path) -> dict:
    """Return what was written with a checkpoint: `step`, `val/loss` if it was validated, what it was trained on."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def newest_complete(output_dir: Path) -> Path | None:
    return next(reversed(find(output_dir)), None)


def best(output_dir: Path) -> Path | None:
    """Return the checkpoint with the lowest `val/loss`, the newest of equal ones; None: none was validated."""
    losses = {folder: read_info(folder).get("val/loss") for folder in reversed(find(output_dir))}
    return min((folder for folder, loss in losses.items() if loss is not None), key=losses.get, default=None)


def run_state(output_dir: Path, key: str = "state"):
    """Return the state in status.json (running, stopped, finished or failed), or another `key`; None: there is none."""
    path = output_dir / "status.json"
    return json.loads(path.read_bytes())[key] if path.is_file() else None


def find_model(name: str, finished_only: bool = False) -> str:
    """Return the model that a folder holds: a run's newest, or only that of its end; a checkpoint's; or the folder."""
    folder = Path(name)
    if not folder.exists() and (name.count("/") > 1 or name.startswith((".", "/"))):
        raise ValueError(f"{name} does not exist")
    if not folder.is_dir() or any(folder.glob("*config.json")):  # not a folder: a name on the Hub
        return name
    checkpoints = [] if finished_only else find(folder)
    places = [*checkpoints, folder] if run_state(folder) == "finished" else [folder, *checkpoints]
    found = [path / "model" for path in places if (path / "model").is_dir()]
    if not found:
        raise ValueError(f"{name} holds no model/: has its run finished?")
    return str(found[-1])


# ---- the run folder --------------------------------------------------------------------------------------------------
def find_resume_checkpoint(cfg: dict) -> tuple[Path | None, bool]:
    """Return (the newest complete checkpoint, whether the run is finished) of `cfg["output_dir"]`. Raises ValueError if
    the folder holds something else, or another run that has trained a step: neither is ever overwritten."""
    output_dir, place = Path(cfg["output_dir"]), f"output_dir = {cfg['output_dir']!r}"
    names = [path.name for path in output_dir.iterdir()] if output_dir.exists() else []
    if all(name in (".lock", ".launch", "STOP", "status.json") or name.endswith(".tmp") for name in names):
        return None, False
    if "config.yaml" not in names:
        raise ValueError(f"{place} is not empty and holds no run; name another folder")
    log, newest = output_dir / "metrics.jsonl", newest_complete(output_dir)
    has_trained = log.is_file() and '"train/loss"' in log.read_text(encoding="utf-8")
    if run_state(output_dir) and not (has_trained or newest or "model" in names):
        return None, False  # a run that ended before its first step has nothing to lose
    if cfg["checkpoint"]["resume"] == "never":
        raise ValueError(f"{place} holds a run already, and checkpoint.resume is never")
    old = config.to_dict(config.load(str(output_dir / "config.yaml"), []))
    if run_state(output_dir) == "failed" and LOWER_RATE in (run_state(output_dir, "reason") or ""):
        old["train"]["learning_rate"] = cfg["train"]["learning_rate"]
    if differing := differing_keys(old, cfg):
        raise ValueError(f"{place} holds another run: {'; '.join(differing)}. Change it back, or name another folder")
    return newest, not differing_keys(old, cfg, END_KEYS) and run_state(output_dir) == "finished" and "model" in names


def date_of_run(cfg, launched: float) -> str:
    """Return the date that a run's template prints: its first launch's, where a checkpoint is left, else today's."""
    path = Path(cfg.output_dir) / "config.yaml"
    first = config.load(str(path), []).tokenizer.date if path.is_file() and newest_complete(path.parent) else None
    return cfg.tokenizer.date or first or str(datetime.date.fromtimestamp(launched))


def differing_keys(old: dict, new: dict, names=None) -> list[str]:
    """Return which keys of `names` differ, with both values; None: of all that may not between two launches."""
    safe = (*RESUME_SAFE_KEYS, "model.revision") if new["model"]["lora"]["rank"] else RESUME_SAFE_KEYS  # see `load`
    found = []
    for name in names or [name for name in config.KEYS if not name.startswith(safe)]:
        a, b = (functools.reduce(operator.getitem, name.split("."), cfg) for cfg in (old, new))
        found += [f"{name} ({a!r} there, {b!r} now)"] if a != b else []
    return found


def open_run_folder(cfg: dict, launched: float):
    """Make the run folder, lock it (or wait for that), and remove what a killed run left and a STOP file older than
    `launched` (epoch seconds). Returns (the open lock; the token for `wait_for_run_folder`; the newest checkpoint)."""
    output_dir = Path(cfg["output_dir"])
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = open(output_dir / ".lock", "a", encoding="utf-8")
    with contextlib.suppress(OSError):  # a file system without locks
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that trains in {output_dir} to end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
    resume_from, _ = find_resume_checkpoint(cfg)  # now nobody else writes there
    token = str(time.time_ns())
    write_atomically(output_dir / ".launch", token)
    for leftover in [*output_dir.glob("checkpoints/unfinished_*"), *output_dir.glob("unfinished_*")]:
        shutil.rmtree(leftover)
    stop = output_dir / "STOP"
    if stop.exists() and stop.stat().st_mtime < launched:
        stop.unlink()
        print(f"{stop} was older than this launch and has been removed")
    return lock, token, resume_from


def wait_for_run_folder(output_dir: Path, token: str):
    """Return once this node sees what rank 0 has written; raise ValueError if it does not within a minute."""
    for _ in range(60):  # a network file system may take its time to show a new file to another node
        with contextlib.suppress(OSError):
            if (output_dir / ".launch").read_text(encoding="utf-8") == token:
                return
        time.sleep(1)
    raise ValueError(f"output_dir = {output_dir}: {os.uname().nodename} does not see rank 0's files; share the folder")


# ---- write -----------------------------------------------------------------------------------------------------------
def write_atomically(path: Path, text: str):
    """Replace a file: at any moment it has either the old text or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    os.replace(temporary, path)


def write_status(output_dir: Path, state: str, step: int | None, reason: str | None = None):
    """Write status.json; `step`: None keeps the step that is there."""
    step = run_state(output_dir, "step") if step is None else step
    write_atomically(output_dir / "status.json", json.dumps({"state": state, "step": step, "reason": reason}) + "\n")


def replace(unfinished: Path, final: Path):
    """Give a folder its final name once all of it is on the disk. An older model/ of that name is deleted."""
    for path in [*unfinished.rglob("*"), unfinished]:
        flush(path)
    if final.is_dir():
        delete(final)
    os.rename(unfinished, final)
    flush(final.absolute().parent)


def flush(path: Path):
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def delete(folder: Path):
    """Delete a folder, renamed first, so that no half-deleted one has the name of a complete one."""
    stale = folder.rename(folder.with_name(f"unfinished_deletion_of_{folder.name}"))
    shutil.rmtree(stale, ignore_errors=True)


def cause(error: BaseException) -> BaseException:
    """Return what one of the ranks has raised, of an error that DCP raises for all of them."""
    return next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error


def state_of(model, optimizer) -> dict[str, torch.Tensor]:
    """Return parameters, buffers and optimizer state by name ("model.NAME", "optimizer.NAME.exp_avg"), not copied; of a
    LoRA model the adapter alone. Optimizer state is made where there is none yet, to read a checkpoint into."""
    persistent = model.state_dict().keys()  # first: it has FSDP free the parameters that a forward pass gathered
    kept = trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not hasattr(model, "adapter_config"):
        kept = dict(model.named_parameters()) | {n: buffer for n, buffer in model.named_buffers() if n in persistent}
    state = {f"model.{name}": tensor.detach() for name, tensor in kept.items()}
    for name, p in trained.items():
        if p not in optimizer.state:
            if hasattr(optimizer, "init_state"):  # bitsandbytes
                optimizer.init_state(optimizer.param_groups[0], p, 0, 0)
            else:  # as fused AdamW does
                moments = {key: torch.zeros_like(p.detach()) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device), **moments}
        tensors = {key: value for key, value in optimizer.state[p].items() if torch.is_tensor(value)}
        state |= {f"optimizer.{name}.{key}": value for key, value in tensors.items() if not key.startswith("qmap")}
    return state


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time; every rank has one. `cfg`: a `config.Checkpoint`; with `async_save`
    the loop waits for a copy in host memory alone. `meta_model`: see `export.meta_model`."""

    def __init__(self, output_dir: Path, cfg, meta_model, tokenizer, stop_ids: list[int]):
        self.output_dir, self.keep, self.async_save = output_dir, cfg.keep, cfg.async_save
        self.meta_model, self.tokenizer, self.stop_ids = meta_model, tokenizer, stop_ids
        self.rank, self.world_size = rank_and_world_size()
        self.thread, self.error, self.seconds = None, None, 0.0  # seconds that the slowest checkpoint took to write
        # A stream of the thread's own: in the default one it would wait for the training's kernels.
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        # A group of its own: its messages run beside the loop's.
        self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(1)) if dist.is_initialized() else None

    def save(self, step: int, model, optimizer, info: dict):
        """Start to write a checkpoint with `info` in metrics.json. Every rank calls it, once the last one is `done`."""
        state = state_of(model, optimizer)
        ends = itertools.accumulate(tensor.nbytes for tensor in state.values())
        file_of = {name: 1 + end // (FILE_BYTES * self.world_size) for name, end in zip(state, ends, strict=True)}
        if self.group and not is_sharded(model):
            # Every rank has all of it: each copies and writes its share, so that host memory does not multiply.
            share = sorted(state, key=lambda name: state[name].nbytes)[self.rank :: self.world_size]
            state = {name: state[name] for name in share}
        if self.async_save:
            state = {name: tensor.to("cpu", copy=True, non_blocking=True) for name, tensor in state.items()}  # pinned
        if self.stream:
            torch.cuda.synchronize()
        arguments = (self.output_dir / f"checkpoints/step_{step:08d}", state, file_of, {"step": step, **info})
        self.thread = threading.Thread(target=self.write, args=arguments, daemon=True)
        self.thread.start()
        if not self.async_save:
            self.thread.join()

    def done(self, seconds: float = 0.0) -> bool:
        """Return whether nothing is being written, after at most so many seconds. Raises OSError if a write failed."""
        if self.thread:
            self.thread.join(seconds)
        if self.error:
            raise self.error
        return not (self.thread and self.thread.is_alive())

    def wait(self):
        """Wait until nothing is being written; a slow disk counts as progress."""
        while not self.done(0.2):
            progress()

    def write(self, final: Path, state: dict, file_of: dict[str, int], info: dict):
        """Write and publish a checkpoint, in the thread; an error is kept for `done`."""
        unfinished, began = final.with_name(f"unfinished_{final.name}"), time.monotonic()
        try:
            storage = dcp.HuggingFaceStorageWriter(unfinished / "state", file_of, save_distributed=True)
            if self.stream:
                torch.cuda.set_device(self.stream.device)  # A thread begins on the first GPU.
            with torch.cuda.stream(self.stream):
                # Each rank flushes its own files; an error on one is raised on all.
                dcp.save(state, storage_writer=storage, process_group=self.group, no_dist=self.group is None)
            if self.rank == 0:
                self.finish(unfinished, final, info)
            if self.group:
                dist.barrier(group=self.group)  # The others are not `done` before rank 0 has exported the model.
            self.seconds = max(self.seconds, time.monotonic() - began)
        except (Exception, dcp.CheckpointException) as error:
            if self.rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
            self.error = OSError(f"{final} could not be written: {cause(error)}; the same command resumes")

    def finish(self, unfinished: Path, final: Path, info: dict):
        """Export the model of a checkpoint whose state/ is there, give it its name, and delete those not kept."""
        write_atomically(unfinished / "metrics.json", json.dumps(info))
        try:
            params = read_parameters(unfinished, self.meta_model)
            export(self.meta_model, params, self.tokenizer, self.stop_ids, unfinished / "unfinished_model")
            write_card(unfinished / "unfinished_model", self.output_dir, info)
            os.rename(unfinished / "unfinished_model", unfinished / "model")
        except Exception as error:
            raise OSError(f"{final}/model: {error} ({final}/state is complete)") from error
        finally:  # state/ is complete, and is kept where the export fails
            replace(unfinished, final)
        losses = {folder: read_info(folder).get("val/loss", float("inf")) for folder in find(self.output_dir)[:-1]}
        for folder in sorted(reversed(losses), key=losses.get)[self.keep :]:  # of equal ones the newer is kept
            delete(folder)


# ---- read ------------------------------------------------------------------------------------------------------------
def load(folder: Path, model, optimizer, base: str | None = None):
    """Read a checkpoint into model and optimizer, on any number of ranks. `base`: what its adapter must belong to."""
    if (adapted := read_info(folder).get("base")) != base:
        raise ValueError(f"{folder} adapts another base ({adapted}, not {base}): restore it, or set model.revision")
    read_state(folder, state_of(model, optimizer), no_dist=not dist.is_initialized())
    for state in optimizer.state.values():
        if isinstance(state.get("step"), int):  # bitsandbytes
            state["step"] = step_of(folder)


def read_parameters(folder: Path, meta_model=None) -> dict[str, torch.Tensor]:
    """Return a checkpoint's parameters and buffers by name, as those of `meta_model`; None: as they were saved."""
    metadata = dcp.HuggingFaceStorageReader(folder / "state").read_metadata().state_dict_metadata
    like = {f"model.{name}": tensor for name, tensor in meta_model.state_dict().items()} if meta_model else {}
    for name, entry in metadata.items():
        if name.startswith("model."):
            like.setdefault(name, torch.empty(entry.size, dtype=entry.properties.dtype, device="meta"))
    state = {name: torch.empty_like(like[name], device="cpu") for name in metadata if name in like}
    read_state(folder, state, no_dist=True)
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def read_state(folder: Path, state: dict[str, torch.Tensor], no_dist: bool):
    """Read tensors of a checkpoint in place. Raises ValueError where one is not all there, which DCP lets pass."""
    reader = dcp.HuggingFaceStorageReader(folder / "state")
    try:
        metadata = reader.read_metadata().state_dict_metadata
        for name, tensor in state.items():
            if sum(chunk.sizes.numel() for chunk in metadata[name].chunks) != tensor.numel():
                raise ValueError(f"a part of {name} is missing")
        dcp.load(state, storage_reader=reader, no_dist=no_dist)
    except (Exception, dcp.CheckpointException) as error:
        raise ValueError(f"{reader.path} cannot be read: {cause(error)}. Move {folder} away to do without it") from None


def make_model_folder(folder: Path, target: Path, merge: bool):
    """Make a model folder of a checkpoint's state/ or of an adapter's folder, and verify it. `merge`: the adapter."""
    is_checkpoint = (folder / "state").is_dir()
    # Configuration and tokenizer: of the checkpoint's model/, or of another one's where its export has failed.
    models = [folder / "model", *folder.parent.glob("step_*/model")] if is_checkpoint else []
    source = next(filter(Path.is_dir, models), folder)
    is_adapter = (source / "adapter_config.json").is_file()
    if not (is_checkpoint or is_adapter):
        raise ValueError(f"{folder} holds no adapter and no state/: name a run with LoRA, an adapter or a step_*")
    params = read_parameters(folder) if is_adapter and is_checkpoint else None
    unfinished = target.with_name(f"unfinished_{target.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    if is_adapter and not merge:
        shutil.copytree(source, unfinished)
    else:
        if is_adapter:
            model = open_adapter(source, "auto", params=params)
            merge_adapter(model)
            meta, params = meta_model(model.config, model.generation_config, model.dtype), model.state_dict()
            for note in repair_generation(meta.generation_config):
                print(f"{source}/generation_config.json: {note}")
        else:
            hf_config, generation_config = AutoConfig.from_pretrained(source), GenerationConfig.from_pretrained(source)
            meta = meta_model(hf_config, generation_config, hf_config.dtype)
            params = read_parameters(folder, meta)
        tokenizer = AutoTokenizer.from_pretrained(source)
        export(meta, params, tokenizer, stop_ids_of(meta, tokenizer), unfinished)
    verify_export(unfinished, params)
    if is_checkpoint:
        write_card(unfinished, folder.absolute().parent.parent, read_info(folder))
    elif (source / "README.md").is_file():
        shutil.copy(source / "README.md", unfinished)
    replace(unfinished, target)


def write_card(folder: Path, run: Path, info: dict):
    """Write a model's README.md from the config.yaml of its run and the `info` of its checkpoint; of paths, the end."""
    if not (run / "config.yaml").is_file():
        return
    cfg = config.load(str(run / "config.yaml"), [])
    mixture = cfg.data.dataset if isinstance(cfg.data.dataset, list) else [{"dataset": cfg.data.dataset}]
    names = [cfg.model.name, *(entry["dataset"] for entry in mixture)]
    on_hub = {name for name in names if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not Path(name).exists()}
    base, *data = [name if name in on_hub else Path(name).name for name in names]
    known = {"base_model": base if base in on_hub and not cfg.model.from_scratch else None}
    known["datasets"] = [name for name in data if name in on_hub] or None
    metadata = ModelCardData(library_name="transformers", pipeline_tag="text-generation", **known)
    rows = {"base model": f"{base}{' (random parameters)' * cfg.model.from_scratch}", "data": ", ".join(data)}
    rows["chat template"] = "chat_template.jinja" if (folder / "chat_template.jinja").is_file() else "none"
    rows |= {name: value for name, value in info.items() if name not in ("data", "base")} | vars(cfg.train)
    rows |= {"seed": cfg.seed, "max_seq_length": cfg.data.max_seq_length, "LoRA rank": cfg.model.lora.rank}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    text = f"---\n{metadata}\n---\n\n# {base}, fine-tuned on chats\n\n| | |\n|---|---|\n{table}\n"
    ModelCard(text).save(folder / "README.md")


def push(folder: Path, repo: str, private: bool, api) -> str:
    """Upload the newest model of a run, or a folder of a model, with a `huggingface_hub.HfApi`. Returns where it is."""
    model = Path(find_model(str(folder)))
    there, index = {path.name for path in model.glob("*")}, model / "model.safetensors.index.json"
    prefix = "adapter_" if "adapter_config.json" in there else ""
    needed = {f"{prefix}config.json", f"{prefix}model.safetensors", "tokenizer_config.json"}
    if index.is_file():
        needed = needed - {"model.safetensors"} | {*json.loads(index.read_bytes())["weight_map"].values()}
    if needed - there:
        raise ValueError(f"{model} is not a complete model: it has no {', '.join(sorted(needed - there))}")
    url = api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.model_info(url.repo_id).private:  # One that exists stays as public as it is.
        raise ValueError(f"{url} exists and is public: nothing was uploaded")
    api.upload_folder(repo_id=url.repo_id, folder_path=model)
    return f"{model} is at {url}"


def main(arguments: list[str]):
    is_push = arguments[1:2] == ["--push"] and len(arguments) > 2 and arguments[3:] in ([], ["--private"])
    if not is_push and (len(arguments) != 2 or arguments[1].startswith("-")):
        sys.exit(__doc__)
    folder, target = map(Path, arguments[:2])
    if target.exists():
        sys.exit(f"error: {target} exists; name a new folder")
    try:
        if is_push:
            return print(push(folder, arguments[2], "--private" in arguments, HfApi()))
        folder = folder if (folder / "state").is_dir() else Path(find_model(str(folder)))
        make_model_folder(folder, target, merge=True)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{target} holds the model of {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
