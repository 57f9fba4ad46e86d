"""Checkpoints: written under another name, flushed, renamed; found, loaded, rotated. A `step_*` folder is whole."""

import json
import os
import shutil
import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

# What may change between two starts of one run: it changes neither the batches nor the model.
MAY_CHANGE = (
    "output_dir", "train.max_steps", "train.max_epochs", "train.max_tokens_per_micro_batch", "validation.", "parallel.",
    "checkpoint.", "logger.", "cluster.", "model.attention", "model.compile", "model.activation_checkpointing",
)  # fmt: skip


def find(output_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in (output_dir / "checkpoints").glob("step_*") if path.name[5:].isdigit())


def step_of(folder: Path) -> int:
    return int(folder.name[5:])


def where_to_start(config: dict) -> tuple[int, bool]:
    """(the step of the newest whole checkpoint or 0, whether the run is finished) of `config["output_dir"]`.

    Raises ValueError where another run is there, or what is no run: it is never overwritten.
    """
    name = config["output_dir"]
    output_dir = Path(name)
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return 0, False
    if not (output_dir / "config.yaml").is_file():
        raise ValueError(f"output_dir = {name!r} is not empty and holds no run; name another folder")
    if config["checkpoint"]["resume"] == "never":
        raise ValueError(f"output_dir = {name!r} holds a run already, and checkpoint.resume is never")
    old = yaml.safe_load((output_dir / "config.yaml").read_text(encoding="utf-8"))
    differing = differing_keys(old, config)
    if differing:
        raise ValueError(
            f"output_dir = {name!r} holds a run with another configuration: {'; '.join(differing)}; "
            "name another output_dir, or set the keys as they were"
        )
    found = find(output_dir)
    start = step_of(found[-1]) if found else 0
    status = output_dir / "status.json"
    state = json.loads(status.read_text(encoding="utf-8")) if status.is_file() else {}
    same_length = all(old["train"][key] == config["train"][key] for key in ("max_steps", "max_epochs"))
    return start, state.get("state") == "finished" and same_length


def write_atomically(path: Path, text: str):
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def flush(folder: Path):
    """Everything below the folder on the disk, folders too."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save(output_dir: Path, step: int, model, optimizer, write_model, metrics: dict, rank: int, barrier) -> Path:
    """Write `checkpoints/step_*/{state,model,metrics.json}`. Every rank calls it; `write_model(folder)` too, `barrier`
    waits for all ranks. A checkpoint of that step that is there already is left as it is.
    """
    final = output_dir / "checkpoints" / f"step_{step:08d}"
    unfinished = final.with_name(f"unfinished_{final.name}")
    if final.is_dir():
        return final
    if rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    barrier()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")  # one process is a good number
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=unfinished / "state")
    write_model(unfinished / "model")
    barrier()
    if rank == 0:
        write_atomically(unfinished / "metrics.json", json.dumps({"step": step, **metrics}))
        flush(unfinished)
        os.rename(unfinished, final)
        flush(final.parent)
    barrier()
    return final


def load(folder: Path, model, optimizer):
    """Read the state back, on any number of ranks, DDP or FSDP."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")
        dcp.load(state, checkpoint_id=folder / "state")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def rotate(output_dir: Path, keep: int):
    """Keep the newest checkpoint and the `keep` best by validation loss; clear what was never finished."""
    for leftover in (output_dir / "checkpoints").glob("unfinished_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    older = find(output_dir)[:-1]
    older.sort(key=lambda folder: (loss_of(folder), -step_of(folder)))
    for folder in older[keep:]:
        doomed = folder.with_name(f"unfinished_{folder.name}")
        os.rename(folder, doomed)  # so that no half-deleted folder is called step_*
        shutil.rmtree(doomed, ignore_errors=True)


def loss_of(folder: Path) -> float:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8")).get("val/loss", float("inf"))


def differing_keys(old: dict, new: dict, prefix="") -> list[str]:
    """Dotted names, with both values, of what must not change between two starts of one run and did."""
    found = []
    for name in sorted({*old, *new}):
        full_name = f"{prefix}{name}"
        if full_name.startswith(MAY_CHANGE):
            continue
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differing_keys(a, b, f"{full_name}.")
        elif a != b:
            found.append(f"{full_name} ({a!r} there, {b!r} now)")
    return found
