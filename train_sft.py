"""Fine-tune a causal language model on chats: configuration, data, model, loop, validation, saving.

torchrun --nproc_per_node 8 train_sft.py configs/squad.yaml train.learning_rate=1e-5
python train_sft.py                     # one process; configs/squad.yaml where no file is named
"""

import contextlib
import copy
import fcntl
import functools
import gc
import json
import math
import os
import signal
import socket
import sys
import textwrap
import time
import traceback
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C in the seconds that the imports take: no traceback

# ruff: noqa: E402
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import config as configuration
import data
import evaluate
import lora
import model as modelling
import packing
import ranks
from tracking import Tracker
from watchdog import Watchdog

USAGE = "usage: train_sft.py [CONFIG.yaml | --config CONFIG.yaml] [KEY=VALUE ...]   (none: configs/squad.yaml)"


# ---- start -----------------------------------------------------------------------------------------------------------


def main():
    began = time.monotonic()
    asked_for_at = float(os.environ.get("SFT_STARTED", time.time()))  # slurm/train.sbatch sets it: before any waiting
    cfg = read_command_line(sys.argv[1:])
    rank, local_rank, world_size = launch(cfg)
    output_dir = Path(cfg.output_dir)
    watchdog = Watchdog(rank, world_size, cfg.cluster.hang_timeout)
    try:
        _, finished = checkpoint.where_to_start(configuration.to_dict(cfg))
        if finished:
            if rank == 0:
                print(
                    f"{output_dir} holds a finished run; its model is in {output_dir / 'model'}. To train again, name "
                    "another output_dir or delete this one; to train further, raise train.max_steps."
                )
                if (output_dir / "model/adapter_config.json").is_file():
                    print(f"To add the adapter to its base: python checkpoint.py {output_dir / 'model'} A-FOLDER")
            watchdog.close()
            return
        device = modelling.take_device(local_rank)
        watchdog.at("preparing the data")
        prepared = prepare(cfg, rank, local_rank)
        ranks.start_group()
        check_same_start(cfg, prepared)
        lock = take_output_dir(cfg, output_dir, rank)
        # From here on nobody else writes there, and all ranks resume from the checkpoint that rank 0 sees
        folder = checkpoint.where_to_start(configuration.to_dict(cfg))[0] if rank == 0 else None
        folder, to_score = ranks.from_rank_0((folder, prepared.to_score))
        prepared = prepared._replace(to_score=to_score)
        start = check_checkpoint(cfg, folder, prepared.train_set)
        ranks.barrier()
        watchdog.output_dir, watchdog.step = output_dir, start
        if rank == 0:
            for line in checkpoint.clear_leftovers(output_dir):
                print(line)
            checkpoint.write_atomically(output_dir / "config.yaml", configuration.dump(cfg))
            checkpoint.write_status(output_dir, "running", start)
            stop = output_dir / "STOP"
            if stop.exists() and stop.stat().st_mtime < asked_for_at:
                stop.unlink()
                print(f"{stop} was there before this start, and is gone: it was meant for an earlier one")
        ranks.barrier()
        train(cfg, device, prepared, folder, watchdog, began)
        watchdog.close()
        del lock
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("SFT_TRACEBACK"):
            raise
        watchdog.fail(f"error: {' '.join(str(error).split())}", error)
    except Exception as error:  # a mistake in the code, or a rank that has lost another
        watchdog.fail(f"{traceback.format_exc()}error: rank {rank}: {type(error).__name__}: {error}", error)


def read_command_line(arguments: list[str]) -> configuration.Config:
    if "--help" in arguments or "-h" in arguments:
        print(f"{__doc__}\n{USAGE}\n\nKeys, their types and defaults:\n\n{configuration.describe()}")
        raise SystemExit(0)
    try:
        return configuration.from_command_line(arguments)
    except ValueError as error:
        configuration_error(str(error))


def configuration_error(message: str):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def launch(cfg) -> tuple[int, int, int]:
    """(rank, local_rank, world_size) as torchrun set them; without torchrun, start it if more than one is asked for."""
    processes, nodes = cfg.cluster.gpus_per_node, cfg.cluster.num_nodes
    if not ranks.from_torchrun():
        if (nodes or 1) > 1:
            configuration_error(f"cluster.num_nodes = {nodes} needs torchrun on each machine; see slurm/ or the README")
        if (processes or 1) > 1:
            raise SystemExit(start_processes(processes, Path(cfg.output_dir)))
        return 0, 0, 1
    rank, local_rank, world_size, local_world_size = (
        int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    )
    for name, asked, there in [
        ("gpus_per_node", processes, local_world_size),
        ("num_nodes", nodes, world_size // local_world_size),
    ]:
        if asked is not None and asked != there:
            configuration_error(
                f"cluster.{name} = {asked}, but torchrun started {there}; leave it out or make them equal"
            )
    return rank, local_rank, world_size


def start_processes(processes: int, output_dir: Path) -> int:
    """What `torchrun --nproc_per_node` does, in this process. Returns the exit code: 0 if the run was asked to stop
    and has saved, where torchrun itself would exit with 1 and a traceback."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    flags = ["--standalone", "--nproc_per_node", str(processes), "--shutdown-timeout", "300"]
    try:
        run.run(run.parse_args([*flags, "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", *sys.argv]))
    except SignalException:
        return 0 if checkpoint.read_state(output_dir) == "stopped" else 1
    except ChildFailedError:  # it has said why
        return 1
    return 0


def check_same_start(cfg, prepared):
    """Raises ValueError where a machine's files are not those of the first: each reads its own."""
    mine = configuration.to_dict(cfg) | {"chat template": prepared.tokenizer.chat_template}
    mine["data"] |= {"dataset": None, "args": None}  # where data and model are may differ, but not what is there
    mine["model"] |= {"name": None}
    mine |= {"cluster": None, "logger": None}
    for name, examples in [("training split", prepared.train_set), ("validation split", prepared.validation_set)]:
        mine[name] = examples and examples.digest
    first = ranks.from_rank_0(mine)
    if differing := [name for name in mine if mine[name] != first[name]]:
        raise ValueError(
            f"{socket.gethostname()} differs from the first machine in: {', '.join(differing)}. Let both read the same "
            "configuration and files (and a dataset class give the same rows each time)"
        )


def take_output_dir(cfg, output_dir: Path, rank: int):
    """Rank 0 makes the folder and locks it; the others check that they see the same one. Returns the lock."""
    lock = lock_output_dir(cfg, output_dir) if rank == 0 else None
    mark = f"{socket.gethostname()} {os.getpid()} {time.time()}"
    if lock:
        lock.truncate(0)
        lock.write(mark)
        lock.flush()
        os.fsync(lock.fileno())
    mark, path = ranks.from_rank_0(mark), output_dir / ".lock"
    for _ in range(60):  # a network file system may take its time to show a new file to another machine
        if path.is_file() and path.read_text(encoding="utf-8") == mark:
            ranks.barrier()
            return lock
        time.sleep(1)
    raise ValueError(
        f"output_dir = {cfg.output_dir!r} on {socket.gethostname()} is not the folder that the first machine writes "
        "to; name one on storage that all machines share"
    )


def lock_output_dir(cfg, output_dir: Path):
    """Two runs that write into one folder would harm each other. The lock lasts as long as the file is open, and ends
    with the process, however that ends."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = open(output_dir / ".lock", "a", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"output_dir = {cfg.output_dir!r} cannot be written: {error.strerror}; name another") from None
    for second in range(60):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if second == 2:
                print(f"waiting for another process that is writing to {output_dir} to end", flush=True)
            time.sleep(1)
        except OSError:
            return lock  # a file system without locks
    raise ValueError(f"output_dir = {cfg.output_dir!r}: another process is training there; name another folder")


def check_checkpoint(cfg, folder: Path | None, train_set) -> int:
    """The step of a checkpoint, 0 for None. Raises ValueError where this run ends before it, or it was trained on other
    conversations."""
    if folder is None:
        return 0
    start = checkpoint.step_of(folder)
    _, steps = packing.steps_of_run(train_set.counts, train_set.weights, cfg.train)
    if steps < start:
        raise ValueError(
            f"train.max_steps (or max_epochs) ends the run at step {steps}, and {folder} is past it; raise it, or name "
            "another output_dir"
        )
    if checkpoint.read_figures(folder).get("data") != train_set.digest:
        raise ValueError(
            f"{folder} was trained on other conversations (or tokens) than data.dataset gives now; name another "
            "output_dir, or bring back the data as they were"
        )
    return start


def check_base(folder: Path, name: str, base: str | None):
    """Raises ValueError if the base weights of a checkpoint's adapter have changed since it was saved."""
    before = checkpoint.read_figures(folder).get("base")
    if before != base:
        raise ValueError(
            f"{folder} holds an adapter that was trained on model.name = {name!r} at {before}, and that is now "
            f"{base}: bring back the weights as they were (from the Hub: model.revision={before})"
        )


# ---- data, before any process group ----------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """`validation_set`: None where the run never validates; `stop_ids`: tokens that end a turn; `to_score`: questions
    scored at the first and the last validation."""

    tokenizer: object
    train_set: data.Examples
    validation_set: data.Examples | None
    stop_ids: list[int]
    to_score: list[evaluate.Question] | None


def prepare(cfg, rank: int, local_rank: int) -> Prepared:
    """One process per machine reads and tokenises the data; the others wait at torchrun's own store, which has no
    collective's timeout."""
    from huggingface_hub import constants

    if rank == 0 and "HF_HOME" not in os.environ:
        print(f"HF_HOME is not set: downloads and tokens are kept in {constants.HF_HOME}")
    store = None
    if ranks.from_torchrun():
        store = ranks.store()
        name = f"prepared/{os.environ['TORCHELASTIC_RESTART_COUNT']}/{os.environ['GROUP_RANK']}"
    tokenizer = data.load_tokenizer(cfg)
    if local_rank == 0:
        entries = data.load_entries(cfg)
        prepared = data.tokenise_splits(cfg, tokenizer, entries)
        if store:
            store.set(name, json.dumps(prepared))
    else:
        prepared = json.loads(store.get(name))
    tokenizer.chat_template = prepared["chat_template"]
    sets = []
    for split in ("train", "validation"):
        examples = data.open_split(prepared, split, cfg.data)
        sets.append(examples)
        if examples is None:
            continue
        for name, weight, total in zip(examples.names, examples.weights, examples.totals, strict=True):
            if rank == 0:
                mixed = f" of {name}" + (f" (weight {weight:g})" if split == "train" else "")
                print(
                    f"{split}: {total['conversations']:,} conversations{mixed if len(examples.names) > 1 else ''}, "
                    f"{total['tokens']:,} tokens, {total['supervised']:,} supervised; {total['overlong']:,} overlong "
                    f"({cfg.data.overlong}), {total['nothing_to_train']:,} with nothing to train left out"
                )
        examples.check(split)
    stop_ids, to_score = data.find_stop_ids(tokenizer, sets[0]), None
    if rank == 0:  # the others are told later: they may be too many for the store
        entries = [entry for entry in entries if "validation" in entry.splits]
        to_score, _ = evaluate.make_questions(
            entries, tokenizer, tokenizer.chat_template, stop_ids, cfg.validation.exact_match, True
        )
    return Prepared(tokenizer, *sets, stop_ids, to_score)


# ---- the loop --------------------------------------------------------------------------------------------------------


def train(cfg, device, prepared: Prepared, folder: Path | None, watchdog, began: float):
    """`folder`: the checkpoint to go on from, or None; `began`: when this process started, for `must_save_by`."""
    rank, world_size = ranks.rank_and_size()
    context = cfg.parallel.context  # ranks that share a row, neighbours
    tokenizer, train_set, validation_set, stop_ids, to_score = prepared
    output_dir, batch_size = Path(cfg.output_dir), cfg.train.global_batch_size
    start = checkpoint.step_of(folder) if folder else 0
    steps_per_epoch, steps = packing.steps_of_run(train_set.counts, train_set.weights, cfg.train)

    watchdog.at("loading the model")
    model, parallel_model, optimizer, strategy, can_pack, base = build(cfg, device, prepared, folder)
    dtype, adapter = modelling.compute_dtype(cfg), getattr(model, "adapter_config", None)
    precision = functools.partial(modelling.computing_in, dtype, model)
    empty = modelling.skeleton(model.config, model.generation_config, dtype, adapter)
    writer = checkpoint.Writer(
        output_dir, cfg.checkpoint.keep, cfg.checkpoint.async_save, rank, empty, copy.deepcopy(tokenizer), stop_ids
    )

    def rows_of(chosen, lengths) -> list[list[int]]:
        """This rank's rows for these conversations; the ranks that share rows get the same."""
        max_tokens = context * cfg.train.max_tokens_per_micro_batch if can_pack else 1
        return packing.pack(chosen, lengths, world_size // context, max_tokens)[rank // context]

    def collate(examples, row) -> dict:
        return data.collate(examples, row, device, rank % context, context)

    tracker = None
    if rank == 0:
        print(
            f"{cfg.model.name}: {sum(p.numel() for p in model.parameters()):,} weights, "
            f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} of them trained, {strategy} over "
            f"{world_size} process(es) on {device.type}; {steps} steps, {steps_per_epoch} an epoch"
            + (f"; going on from step {start}" if start else "")
        )
        tracker = Tracker(cfg.logger, configuration.to_dict(cfg), configuration.dump(cfg), output_dir, start, steps)

    if validation_set:
        # Each dataset in rows of its own, so that it has a loss of its own
        parts = [part[: cfg.validation.max_examples] for part in validation_set.parts()]
        validation_rows = [
            (k, row) for k, part in enumerate(parts) for row in rows_of(np.array(part), validation_set.lengths)
        ]
        to_answer = [
            evaluate.question_of(tokenizer, *validation_set[i], stop_ids, None, validation_set.part_of(i))
            for i in validation_set.first(cfg.validation.samples)
        ]

    def answers_to(questions) -> list[str]:
        max_tokens = cfg.train.max_tokens_per_micro_batch
        return evaluate.answer_all(
            model, tokenizer, questions, stop_ids, max_tokens, cfg.data.max_seq_length, 64, watchdog.at, watchdog.alive
        )

    def validate(step: int):
        model.eval()
        sums, scores = torch.zeros(len(parts), dtype=torch.float64, device=device), {}
        with torch.no_grad(), precision():
            for i, (k, row) in enumerate(validation_rows):
                watchdog.at(f"validation row {i + 1} of {len(validation_rows)}")
                sums[k] += parallel_model(collate(validation_set, row))
            model.train()
            watchdog.at("answering")
            if to_score and step in (0, steps):
                scores = evaluate.score(to_score, answers_to(to_score), validation_set.names)
            answers = answers_to(to_answer) if to_answer else []
        sums = ranks.all_sum(sums).tolist()
        tokens = [int(validation_set.supervised[part.start : part.stop].sum()) for part in parts]
        loss = sum(sums) / sum(tokens)
        figures = {"val/loss": loss, "val/perplexity": math.exp(min(loss, 700)), "val/supervised_tokens": sum(tokens)}
        if len(parts) > 1:
            figures |= {f"val/loss/{n}": s / t for n, s, t in zip(validation_set.names, sums, tokens, strict=True)}
        figures |= {f"val/{name}": value for name, value in scores.items()}
        if tracker:
            tracker.log(step, figures)
            show_samples(to_answer, answers, tokenizer, tracker, step)
        return {"val/loss": loss}

    def wait_for_writer():
        while not writer.done(0.2):
            watchdog.alive()  # it may be a slow disk

    watchdog.watching = True
    if not start and cfg.validation.at_start and cfg.validation.every:
        validate(0)

    model.train()
    if isinstance(parallel_model, DistributedDataParallel):
        # DDP rebuilds its buckets after its first backward pass, and sums then round differently. So make a pass over
        # an empty row, which changes nothing: the first step after a start is then computed as in the middle of a run
        with precision():
            forward_backward(parallel_model, [[]], functools.partial(collate, train_set), 1.0)
        optimizer.zero_grad(set_to_none=True)
    watchdog.may_stop_at_once = False
    gc.collect()
    gc.freeze()  # what is here by now stays: collecting garbage would look through it, a tenth of a second each time
    slowest = 0.0  # seconds of a step, with its validation and saving
    for step in range(start + 1, steps + 1):
        clock = time.perf_counter()
        writer.done()  # raises where the disk is full
        # Which conversations, and in which rows: the same plan on every rank, from (seed, step) alone
        chosen = packing.step_examples(train_set.counts, step, cfg.seed, batch_size, train_set.weights)
        rows = rows_of(chosen, train_set.lengths)
        supervised = int(train_set.supervised[chosen].sum())
        tokens = int(train_set.lengths[chosen].sum())
        torch.manual_seed(((cfg.seed * 1_000_003 + step) * 65_537 + rank) % 2**63)  # dropout: from (seed, step, rank)

        # Gradients are averaged over ranks, so their sum over the global count needs the factor world_size
        with precision():
            losses = forward_backward(
                parallel_model, rows, functools.partial(collate, train_set), world_size / supervised, watchdog.at
            )
        norm = clip(model, cfg.train.clip_grad_norm)

        watchdog.at("summing up")
        reason = (
            watchdog.asked[0] if watchdog.asked else stop_reason(cfg, output_dir, began, 2 * slowest + writer.slowest)
        )
        total, stops = ranks.all_sum(torch.stack([losses.sum(), losses.new_tensor(float(reason is not None))])).tolist()
        step_loss, grad_norm = total / supervised, float(norm)
        if not (math.isfinite(step_loss) and math.isfinite(grad_norm)):
            name_the_broken(step, step_loss, grad_norm, rows, losses, train_set)
        for group in optimizer.param_groups:
            group["lr"] = modelling.learning_rate(cfg.train, step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watchdog.step = step

        if tracker:
            tracker.log(
                step,
                {
                    "train/loss": step_loss,
                    "train/grad_norm": grad_norm,
                    "train/learning_rate": optimizer.param_groups[0]["lr"],
                    "train/supervised_tokens": supervised,
                    "train/tokens": tokens,
                    "train/tokens_per_second": tokens / (time.perf_counter() - clock),
                },
            )
        kept_with_it = {"data": train_set.digest, "base": base}
        if cfg.validation.every and (step % cfg.validation.every == 0 or step == steps):
            kept_with_it |= validate(step)
        if stops or step == steps or (cfg.checkpoint.every and step % cfg.checkpoint.every == 0):
            watchdog.at("waiting for the checkpoint before to be written")
            wait_for_writer()
            watchdog.at("saving")
            if tracker:
                tracker.flush()
                checkpoint.write_status(output_dir, "running", step)
            writer.save(step, model, optimizer, kept_with_it)
        slowest = max(slowest, time.perf_counter() - clock)
        if stops and step < steps:
            break

    watchdog.at("waiting for the last checkpoint to be written")
    wait_for_writer()
    watchdog.watching = False  # rank 0 may take its time
    if rank == 0 and watchdog.step < steps:
        reason = reason or "another rank was asked to stop"
        checkpoint.write_status(output_dir, "stopped", step, reason)
        tracker.say(f"stopped after step {step} ({reason}); the same command goes on from there")
        (output_dir / "STOP").unlink(missing_ok=True)
    elif rank == 0:
        checkpoint.put_model(output_dir, cfg.model.lora.merge)
        tracker.say(f"finished: {output_dir / 'model'} holds the model (reloaded, equal to the trained weights)")
        checkpoint.write_status(output_dir, "finished", steps)
    if tracker:
        tracker.close()
    ranks.barrier()


class Built(NamedTuple):
    """`model` holds the weights; `parallel_model` is called: its loss, in DDP or sharded by FSDP. `can_pack`: whether
    the documents of a row do not see each other. `base`: which weights are below an adapter; None: there is none."""

    model: torch.nn.Module
    parallel_model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    strategy: str
    can_pack: bool
    base: str | None


def build(cfg, device, prepared: Prepared, folder: Path | None) -> Built:
    """Model and optimizer, as they were in the checkpoint `folder` if there is one; measured before they train."""
    rank, world_size = ranks.rank_and_size()
    context, dtype = cfg.parallel.context, modelling.compute_dtype(cfg)
    model, strategy, can_pack = load_model(cfg, device, prepared)
    modelling.check_context(cfg, model.config, world_size)
    context_group = dist.new_subgroups(context, timeout=ranks.TIMEOUT)[0] if context > 1 else None
    parallel_model, model = modelling.parallelise(model, cfg, strategy, world_size, device, context_group)
    optimizer = modelling.make_optimizer(model, cfg.train)
    base = ranks.from_rank_0(lora.identity(cfg.model) if lora.has_adapter(model) and rank == 0 else None)
    if folder:
        check_base(folder, cfg.model.name, base)
        checkpoint.load(folder, model, optimizer)
    with modelling.computing_in(dtype, model):
        can_pack &= modelling.keeps_documents_apart(model, device, dtype)
        if context_group:
            modelling.check_shared_row(model, device, context_group, dtype)
    can_pack = ranks.from_rank_0(can_pack)  # ranks may measure differently, by rounding
    if rank == 0 and not can_pack:
        print("packed documents would see each other in this model: each row holds one document")
    return Built(model, parallel_model, optimizer, strategy, can_pack, base)


def load_model(cfg, device, prepared: Prepared):
    """(the model on the CPU, or without weights where rank 0 will share its own; "ddp" or "fsdp"; what rank 0 finds of
    `Built.can_pack`)."""
    rank, world_size = ranks.rank_and_size()
    outline, strategy = None, "ddp"  # one process has nothing to shard
    modelling.check_parallel(cfg, world_size)
    if world_size > 1 and cfg.parallel.strategy != "ddp":
        outline = modelling.load(cfg.model, device, outline=True)
        gpu_bytes = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        strategy = modelling.choose_strategy(cfg.parallel.strategy, outline, world_size, gpu_bytes)
    torch.manual_seed(cfg.seed)
    model = outline if strategy == "fsdp" and rank > 0 else modelling.load(cfg.model, device)
    sets = [split for split in (prepared.train_set, prepared.validation_set) if split]
    modelling.check_vocabulary(model, prepared.tokenizer)
    modelling.check_positions(model, *(int(split.lengths.max()) for split in sets))
    can_pack = modelling.check_attention(model, cfg.model) if rank == 0 else True
    return model, strategy, can_pack


def forward_backward(parallel_model, rows, collate, scale: float, note_place=lambda place: None):
    """Add the gradients of `scale` times the token losses of this rank's rows, which `collate` makes batches of.
    Returns the summed token losses of each row, float64 (rows,). `note_place` is told which row comes next."""
    losses = []
    for i, row in enumerate(rows):
        note_place(f"row {i + 1} of {len(rows)}")
        more = isinstance(parallel_model, DistributedDataParallel) and i < len(rows) - 1
        with parallel_model.no_sync() if more else contextlib.nullcontext():
            loss = parallel_model(collate(row))
            (loss * scale).backward()
        losses.append(loss.detach().double())
    return torch.stack(losses)


def clip(model, max_norm: float | None) -> torch.Tensor:
    """The norm of all gradients before clipping, over all ranks, float64 (); they are clipped where `max_norm` is set.
    (A tensor: the loop waits for the GPU once a step.)"""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    mesh = getattr(gradients[0], "device_mesh", None)
    if mesh is not None:
        gradients = [gradient.to_local() for gradient in gradients]
    # Row by row, and summed in float64: over a million numbers in float32 the norm is off by 1e-5 on a CPU
    squares = sum(torch.linalg.vector_norm(g, dim=-1).double().square().sum() for g in gradients)
    if mesh is not None:
        dist.all_reduce(squares, group=mesh.get_group("shard"))
    norm = squares.sqrt()
    if max_norm is not None:
        torch._foreach_mul_(gradients, (max_norm / norm).clamp(max=1.0).float())
    return norm


def name_the_broken(step, loss, grad_norm, rows, losses, train_set):
    """Raise on all ranks, naming the conversations whose loss is not finite (or all of the step's)."""
    broken = [i for row, value in zip(rows, losses, strict=True) if not torch.isfinite(value) for i in row]
    everything = [i for row in rows for i in row]
    gathered = ranks.from_all((broken, everything))
    named = {i for part, _ in gathered for i in part} or {i for _, part in gathered for i in part}
    names = [
        f"{train_set.names[train_set.part_of(i)]} " if len(train_set.names) > 1 else "" for i in sorted(named)[:20]
    ]
    numbers = ", ".join(f"{name}{train_set.rows[i]}" for name, i in zip(names, sorted(named), strict=False))
    raise FloatingPointError(
        f"step {step}: the loss is {loss} and the gradient norm {grad_norm}; the weights are as after step {step - 1}. "
        f"Rows of the training split in this step: {numbers}. Lower train.learning_rate, or look at these rows"
    )


def stop_reason(cfg, output_dir: Path, began: float, needed: float) -> str | None:
    """Why the run is to stop after this step; `needed`: seconds that another step and the saving take."""
    if cfg.checkpoint.must_save_by:
        days, hours, minutes, seconds = map(int, cfg.checkpoint.must_save_by.split(":"))
        if time.monotonic() - began + needed >= ((days * 24 + hours) * 60 + minutes) * 60 + seconds:
            return f"checkpoint.must_save_by = {cfg.checkpoint.must_save_by}"
    return f"{output_dir / 'STOP'}" if (output_dir / "STOP").exists() else None


# ---- answers ---------------------------------------------------------------------------------------------------------


def show_samples(asked, answers, tokenizer, tracker, step: int):
    """The first validation prompts, with what was expected and what the model said."""
    for n, (question, answer) in enumerate(zip(asked, answers, strict=True)):
        prompt = tokenizer.decode(question.prompt, skip_special_tokens=True).strip()
        prompt = prompt if len(prompt) <= 400 else f"...{prompt[-400:]}"
        answer = answer if len(answer) <= 400 else f"{answer[:400]}..."
        text = f"--- sample {n + 1}\n{textwrap.indent(prompt, ' ' * 8)}"
        tracker.text(step, f"samples/{n + 1}", f"{text}\n    expected: {question.reference}\n    answered: {answer}")


if __name__ == "__main__":
    main()
    ranks.leave()
