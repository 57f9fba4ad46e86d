"""Fine-tune a causal language model on chat data: the whole run, from top to bottom.

usage: [torchrun --nproc_per_node 8] train_sft.py [CONFIG.yaml | --config CONFIG.yaml] [KEY=VALUE ...]
The default configuration is configs/squad.yaml. Without torchrun: one process, or cluster.gpus_per_node of them.
"""

import copy
import functools
import json
import math
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

import attention
import checkpoint
import config
import data
import distributed
import evaluate
import lora
import packing
import tokens
from export import meta_model, repair_generation, try_export
from model import cast_params, check_model, choose_strategy, load_model, notes_of, parallelize, take_device
from tracking import Meter, Tracker


def main():
    # ---- configuration, and which rank this process is ----
    # slurm/train.sbatch sets SFT_STARTED when its job starts: a STOP file older than that is ignored.
    started, launched = time.monotonic(), float(os.environ.get("SFT_STARTED", time.time()))
    if {"--help", "-h"} & {*sys.argv}:
        print(f"{__doc__}\nKeys, their types and defaults:\n\n{config.describe()}")
        return
    try:
        cfg = config.from_command_line(sys.argv[1:])
        cfg.model.name = checkpoint.find_model(cfg.model.name, finished_only=True)
        rank, local_rank = launch(cfg)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    output_dir, opened, dataset = Path(cfg.output_dir), False, None
    record_reason = functools.partial(checkpoint.write_status, output_dir, "failed", None)
    try:
        # ---- device and process group; tokenizer, datasets, tokens ----
        device = take_device(local_rank)
        distributed.init_process_group(cfg.cluster.hang_timeout)
        cfg.tokenizer.date = distributed.broadcast_object(checkpoint.date_of_run(cfg, launched))
        _, finished = checkpoint.find_resume_checkpoint(config.to_dict(cfg)) if rank == 0 else (None, None)
        if distributed.broadcast_object(finished):
            if rank == 0:
                print(f"{output_dir} holds a finished run; raise train.max_steps, .max_epochs or validation.patience")
            return
        dataset = load_data(cfg, rank, local_rank)

        # ---- the run folder, and where the run resumes ----
        # Rank 0 decides for all ranks where the run resumes, and holds the lock as long as `lock` lives.
        lock, *found = checkpoint.open_run_folder(config.to_dict(cfg), launched) if rank == 0 else [None] * 3
        distributed.wait_for_all("run folder")
        launch_id, resume_from = distributed.broadcast_object(found)
        checkpoint.wait_for_run_folder(output_dir, launch_id)  # Until this node sees what rank 0 has written there.
        train_set, start = dataset.train_set, 0
        steps_per_epoch, steps = packing.steps_of_run(train_set.counts, train_set.weights, cfg.train)
        if resume_from and (start := checkpoint.step_of(resume_from)) > steps:
            raise ValueError(f"{resume_from} is past the end of the run: raise train.max_steps or train.max_epochs")
        if resume_from and checkpoint.read_info(resume_from)["data"] != train_set.digest:
            raise ValueError(f"{resume_from} was trained on other data: restore it, or name another output_dir")
        if rank == 0:
            checkpoint.write_status(output_dir, "running", start)
            checkpoint.write_atomically(output_dir / "config.yaml", config.dump(cfg))
            length = f"{steps - start} steps from step {start + 1}, {steps_per_epoch} per epoch"
            print("; ".join([length, *packing.notes_on_length(cfg.train, steps)]))
        opened = True
        train(cfg, device, dataset, start, steps, resume_from, started, record_reason)
    except Exception as error:  # Prints and records it, and exits with 1, upon which torchrun ends the other ranks.
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
            error = MemoryError(memory_advice(cfg, dataset)).with_traceback(error.__traceback__)
        distributed.fail(error, record_reason if opened else lambda reason: None)


def train(cfg, device, dataset: "Data", start: int, steps: int, resume_from, started: float, record_reason):
    """Train from step `start` + 1 to `steps`, or until a stop is requested. `resume_from`: the checkpoint of step
    `start` or None; `started`: when this process did, for `checkpoint.must_save_by`; `record_reason`: see `fail`."""
    rank, world_size = distributed.rank_and_world_size()
    output_dir, dtype, train_set = Path(cfg.output_dir), getattr(torch, cfg.model.dtype), dataset.train_set

    # ---- model, DDP or FSDP, optimizer; restored from the checkpoint ----
    model, parallel_model, optimizer, strategy, can_pack = build_model(cfg, device, dataset)
    adapter = getattr(model, "adapter_config", None)
    base = distributed.broadcast_object(adapter and (adapter["revision"] or getattr(model, "digest", None)))
    info = {"data": train_set.digest, "base": base}
    if resume_from:
        checkpoint.load(resume_from, model, optimizer, info["base"])
    # Neighboring ranks that share a row (context parallelism) get the same rows, and each its slice of them. A row has
    # at least one document, so with max_tokens = 1 it has exactly one.
    cp_size = cfg.parallel.context
    max_tokens = cp_size * cfg.train.max_tokens_per_micro_batch if can_pack else 1

    def my_rows(indices, lengths) -> list[list[int]]:
        return packing.pack(indices, lengths, world_size // cp_size, max_tokens)[rank // cp_size]

    # For each new length of a row a GPU's library takes milliseconds to choose its kernels, so there are few lengths.
    multiple = 128 if can_pack and device.type == "cuda" else 1
    options = {"device": device, "cp_rank": rank % cp_size, "cp_size": cp_size, "multiple": multiple}
    collate = functools.partial(packing.collate, **options)

    # ---- what the run writes ----
    repaired = repair_generation(model.generation_config)
    meta = meta_model(model.config, model.generation_config, dtype, adapter)
    tokenizer = copy.deepcopy(dataset.tokenizer)  # The writer's thread uses it while the loop does.
    writer = checkpoint.CheckpointWriter(output_dir, cfg.checkpoint, meta, tokenizer, dataset.stop_ids)
    tracker = None
    if rank == 0:
        for note in repaired:
            print(f"generation_config.json of {cfg.model.name}: {note}")
        if not resume_from:
            try_export(meta, tokenizer, dataset.stop_ids, output_dir)
        total, trained = sum(map(lora.count, model.parameters())), model.num_parameters(only_trainable=True)
        print(f"{total:,} parameters, {trained:,} trainable, {strategy} over {world_size} rank(s) on {device.type}")
        tracker = Tracker(output_dir, config.to_dict(cfg), start, steps)
        meter = Meter(model, device, dtype, world_size)
        steps_per_epoch, _ = packing.steps_of_run(train_set.counts, train_set.weights, cfg.train)
    distributed.wait_for_all("export tried")  # Rank 0 may take long to write on a slow disk.
    val_losses = distributed.broadcast_object(tracker and tracker.val_losses)
    stop_signals = distributed.catch_stop_signals(record_reason)  # torchrun sends one, too, if a rank has failed.
    distributed.report_stalls(rank, 0.9 * cfg.cluster.hang_timeout)
    validation = functools.partial(validate, cfg, model, parallel_model, dataset, my_rows, collate, tracker, val_losses)
    if dataset.val_set and not start and cfg.validation.at_start:
        validation(0, score=True)
    if out_of_patience(val_losses, cfg.validation.patience):  # The launch before was killed at its very end.
        steps = start

    # ---- the loop ----
    step, slowest, stop = start, 0.0, None  # `slowest`: seconds of the slowest step, with its validation and saving.
    for step in range(start + 1, steps + 1):
        clock = time.perf_counter()
        writer.done()  # Raises here if the last checkpoint could not be written.
        if tracker:
            tracker.begin(step)
        # Which examples, and in which rows of which rank: every rank computes the same plan from (seed, step).
        chosen = packing.step_examples(train_set.counts, step, cfg.seed, cfg.train.global_batch_size, train_set.weights)
        batches = [collate(train_set, row) for row in my_rows(chosen, train_set.lengths)]
        step_tokens, trained_tokens = int(train_set.lengths[chosen].sum()), int(train_set.trained_tokens[chosen].sum())
        torch.manual_seed(((cfg.seed * 1_000_003 + step) * 65_537 + rank) % 2**63)  # Dropout: (seed, step, rank).

        # loss = sum of token losses over all ranks and rows / trained tokens of the global batch. DDP and FSDP average
        # gradients over ranks, so each rank's sum is multiplied by the number of ranks.
        with cast_params(model, dtype):
            losses = forward_backward(parallel_model, batches, world_size / trained_tokens)
        norm = clip_grad_norm(model, cfg.train.clip_grad_norm)

        stop = stop_signals[0] if stop_signals else stop_reason(cfg, started, 2 * slowest + writer.seconds)
        sums = distributed.all_reduce_sum(torch.stack([losses.sum(), losses.new_tensor(float(stop is not None))]))
        values = distributed.start_copy(torch.cat([sums, norm[None].to(sums.device)]))
        rate = learning_rate(cfg.train, step, steps)
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Here, once a step, the loop waits for the GPU, while the optimizer's kernels run. On errors nothing is saved.
        loss, ranks_stopping, grad_norm = values()
        loss /= world_size
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise FloatingPointError(f"step {step}: loss {loss}, gradient norm {grad_norm}; {checkpoint.LOWER_RATE}")

        if tracker:
            metrics = {"train/loss": loss, "train/grad_norm": grad_norm, "train/learning_rate": rate}
            metrics |= {"train/supervised_tokens": trained_tokens, "train/tokens": step_tokens}
            metrics |= meter.measure(step_tokens, trained_tokens, time.perf_counter() - clock)
            tracker.log(step, metrics | {"train/epoch": step / steps_per_epoch})
        validates = dataset.val_set and (step % cfg.validation.every == 0 or step == steps)
        val_loss = validation(step, score=step == steps) if validates else {}
        if out_of_patience(val_losses, cfg.validation.patience):
            steps = step
        saved_losses = val_losses[cfg.validation.at_start :]  # Before the first step there is no checkpoint.
        is_best = cfg.checkpoint.final == "best" and validates and saved_losses[-1] == min(saved_losses)
        is_due = cfg.checkpoint.every and step % cfg.checkpoint.every == 0
        if ranks_stopping or step == steps or is_best or is_due:
            writer.wait()
            if tracker:
                tracker.flush()
                checkpoint.write_status(output_dir, "running", step)  # To be read by people: a resume does not.
            writer.save(step, model, optimizer, info | {"train/loss": loss} | val_loss)
        slowest = max(slowest, time.perf_counter() - clock)
        if ranks_stopping or step == steps:
            break

    # ---- the end ----
    writer.wait()
    if tracker:
        end_run(cfg, tracker, step, steps, stop)
    distributed.wait_for_all("end")


def end_run(cfg, tracker: Tracker, step: int, steps: int, stop: str | None):
    """On rank 0: make model/ of a finished run; of one that has stopped, say why."""
    output_dir = Path(cfg.output_dir)
    if step < steps:
        stop = stop or "requested on another rank"
        checkpoint.write_status(output_dir, "stopped", step, stop)
        tracker.say(f"stopped after step {step} ({stop}); the same command resumes from there")
        (output_dir / "STOP").unlink(missing_ok=True)
    else:
        best = checkpoint.best(output_dir)
        final = (cfg.checkpoint.final == "best" and best) or checkpoint.newest_complete(output_dir)
        checkpoint.make_model_folder(final, output_dir / "model", cfg.model.lora.merge)
        tracker.say(f"finished: {output_dir / 'model'} holds the model of {final.name}, reloaded and verified")
        if best:
            tracker.say(f"the best checkpoint: {best}, val/loss {checkpoint.read_info(best)['val/loss']:.4f}")
        checkpoint.write_status(output_dir, "finished", step)
    tracker.close()


# ---- phases of `main` and `train`, in their order --------------------------------------------------------------------
def launch(cfg) -> tuple[int, int]:
    """(rank, local rank) as torchrun has set them. Without torchrun: launch several ranks if they are requested."""
    if not dist.is_torchelastic_launched():
        if (cfg.cluster.num_nodes or 1) > 1:
            raise ValueError("cluster.num_nodes > 1 needs torchrun on each node; see slurm/README.md")
        if (cfg.cluster.gpus_per_node or 1) > 1:
            raise SystemExit(launch_ranks(cfg.cluster.gpus_per_node, Path(cfg.output_dir)))
        return 0, 0
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    rank, local_rank, world_size, local_world_size = (int(os.environ[name]) for name in names)
    for key, there in (("gpus_per_node", local_world_size), ("num_nodes", world_size // local_world_size)):
        if getattr(cfg.cluster, key) not in (None, there):
            raise ValueError(f"cluster.{key} must be {there} (torchrun's value) or null")
    return rank, local_rank


def launch_ranks(count: int, output_dir: Path) -> int:
    """Do what `torchrun --nproc_per_node` does, in this process. Returns the exit code: 0 if the run was asked to
    stop and has saved, where torchrun itself would exit with 1 and a traceback."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # As torchrun does, which warns of it.
    flags = ["--standalone", "--nproc_per_node", str(count), "--shutdown-timeout", "300"]
    try:
        run.run(run.parse_args([*flags, "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1,SIGHUP", *sys.argv]))
    except SignalException:
        return 0 if checkpoint.run_state(output_dir) in ("stopped", "finished") else 1
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


class Data(NamedTuple):
    """`stop_ids`: tokens that end a turn; `to_score`: examples that are answered before and after training."""

    tokenizer: object
    train_set: tokens.TokenizedDataset
    val_set: tokens.TokenizedDataset | None  # None where the run never validates.
    stop_ids: list[int]
    to_score: list[evaluate.EvalExample] | None

    def longest(self) -> int:  # in tokens
        return max(int(split.lengths.max()) for split in (self.train_set, self.val_set) if split is not None)


def load_data(cfg, rank: int, local_rank: int) -> Data:
    """One rank per node tokenizes the datasets; the others wait for it on torchrun's store, which has no timeout."""
    tokenizer = tokens.load_tokenizer(cfg)
    key = f"tokens/{os.environ.get('GROUP_RANK')}"
    if local_rank == 0:
        mixture = data.load_mixture(cfg)
        prepared = tokens.tokenize_splits(cfg, tokenizer, mixture)
        if dist.is_torchelastic_launched():
            distributed.store().set(key, json.dumps(prepared))
    else:
        prepared = json.loads(distributed.store().get(key))
    tokenizer.chat_template = prepared["chat_template"]
    splits = {split: tokens.open_split(prepared, split, cfg.data) for split in ("train", "validation")}
    for split, examples in splits.items():
        if examples is None:
            continue
        if rank == 0:
            for name, weight, total in zip(examples.names, examples.weights, examples.totals, strict=True):
                print(
                    f"{split}: {total['conversations']:,} conversations of {name} (weight {weight:g}), "
                    f"{total['tokens']:,} tokens, {total['trained_tokens']:,} of them trained; {total['overlong']:,} "
                    f"overlong ({cfg.data.overlong}), {total['nothing_to_train']:,} skipped (nothing to train)"
                )
            if examples.notes:
                print(f"{split}: {'; '.join(examples.notes)}; see preview.py")
    stop_ids, to_score, count = tokens.find_stop_ids(tokenizer, splits["train"]), None, cfg.validation.exact_match
    if rank == 0 and count:
        template, date = tokenizer.chat_template, cfg.tokenizer.date
        to_score, _ = evaluate.eval_examples(mixture, tokenizer, template, stop_ids, count, date)
    distributed.wait_for_all("tokens")
    check_same_data(cfg, tokenizer.chat_template, *splits.values())
    return Data(tokenizer, *splits.values(), stop_ids, distributed.broadcast_object(to_score))


def check_same_data(cfg, chat_template: str, train_set, val_set):
    """Raises ValueError where a node reads another configuration or other data than the first one does."""
    mine = config.to_dict(cfg) | {"chat template": chat_template, "cluster": None, "logger": None}
    mine["training split"], mine["validation split"] = train_set.digest, val_set and val_set.digest
    # The paths of data and model may differ between nodes, but not what is there.
    mine["data"] |= {"dataset": None, "args": None, "cache": None}
    mine["model"] |= {"name": None}
    first = distributed.broadcast_object(mine)
    if different := [name for name in mine if mine[name] != first[name]]:
        raise ValueError(f"{os.uname().nodename} differs from the first node in: {', '.join(different)}")


def build_model(cfg, device, dataset: Data):
    """(the model; the `PackedLoss`, or DDP around it; the optimizer; ddp or fsdp; whether documents may share a row)"""
    rank, world_size = distributed.rank_and_world_size()
    dtype, strategy, meta = getattr(torch, cfg.model.dtype), "ddp", None  # One rank has nothing to shard.
    rows = len(dataset.tokenizer) if cfg.tokenizer.add_tokens else 0
    if world_size > 1 and cfg.parallel.strategy != "ddp":
        meta = load_model(cfg.model, device, meta=True, rows=rows)
        gpu_bytes = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        strategy = choose_strategy(cfg.parallel.strategy, meta, world_size, gpu_bytes)
    torch.manual_seed(cfg.seed)  # Random parameters and adapters are the same on all ranks.
    model = meta if strategy == "fsdp" and rank > 0 else load_model(cfg.model, device, rows=rows)
    longest = dataset.longest()
    notes = check_model(model, cfg, world_size, dataset.tokenizer, longest)
    notes += notes_of(model, cfg, dataset.tokenizer, dataset.train_set) if rank == 0 else []
    if unused := getattr(model, "unused_names", []):
        notes.append(f"{cfg.model.name}: {len(unused)} parameter(s) in its files are not used: {', '.join(unused[:3])}")
    with cast_params(model, model.config.dtype):  # Trained embeddings are float32, above a frozen base in bfloat16.
        can_pack = attention.check_packing(model, cfg.model.name, model.dtype, longest) if rank == 0 else True
    distributed.wait_for_all("model")  # Rank 0 may take long to load the model.

    cp_group = dist.new_subgroups(cfg.parallel.context)[0] if cfg.parallel.context > 1 else None
    parallel_model, model = parallelize(model, cfg, strategy, world_size, device, cp_group)
    # Before any forward pass, after which FSDP may leave gathered parameters in place of its shards.
    optimizer = make_optimizer(model, cfg.train)
    with cast_params(model, dtype):
        can_pack &= attention.isolates_documents(model, device, dtype, longest=longest)
    can_pack = distributed.broadcast_object(can_pack)  # Ranks may measure differently, by rounding: rank 0 decides.
    if cp_group and not (can_pack and model.config._attn_implementation.startswith("per_document")):
        # Only our attention knows the other ranks of the row. Where it isolates documents, nothing else mixes tokens.
        raise ValueError("parallel.context > 1: this model mixes tokens outside our attention; set parallel.context=1")
    if not can_pack:
        notes.append("documents in a packed row would change each other in this model: each row holds one document")
    if rank == 0 and notes:
        print("\n".join(notes))
    return model, parallel_model, optimizer, strategy, can_pack


def memory_advice(cfg, dataset: Data | None) -> str:
    """What to change, the most helpful first, where the memory is not enough."""
    limit, longest = cfg.train.max_tokens_per_micro_batch, dataset.longest() if dataset else 0
    helps = [f"train.max_tokens_per_micro_batch={max(limit // 2, longest)}"] if limit > longest else []
    helps += [] if cfg.model.activation_checkpointing else ["model.activation_checkpointing=true"]
    helps += ["parallel.strategy=fsdp over more GPUs"] + ([] if cfg.model.lora.rank else ["model.lora.rank=16"])
    rows = f"a row has at most {max(limit, longest):,} tokens, the longest conversation {longest:,}"
    return f"out of memory with train.max_tokens_per_micro_batch = {limit}: {rows}; try {', '.join(helps)}"


def make_optimizer(model, train_cfg) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": train_cfg.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},  # Norms and biases.
    ]
    options = {"betas": tuple(train_cfg.betas), "eps": train_cfg.eps}  # lr: at each step.
    if train_cfg.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, **options, fused=True)


# ---- parts of a step -------------------------------------------------------------------------------------------------
def forward_backward(parallel_model, batches: list[dict], scale: float) -> torch.Tensor:
    """Add the gradients of `scale` times the losses of these packed rows. Returns that of each row, float64 (rows,)."""
    losses = []
    for i, batch in enumerate(batches):
        distributed.progress()
        # DDP all-reduces the gradients once per step, with the last row. (FSDP, which ignores this, does so with each.)
        parallel_model.require_backward_grad_sync = i == len(batches) - 1
        loss = parallel_model(batch, scale)
        loss.backward()
        losses.append(loss.detach().double())
    return torch.stack(losses)


def clip_grad_norm(model, max_norm: float | None) -> torch.Tensor:
    """Clip the gradients. Returns their norm before, over all ranks, as a float64 tensor: nothing waits for a GPU."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    mesh = getattr(gradients[0], "device_mesh", None)
    if mesh is not None:
        gradients = [gradient.to_local() for gradient in gradients]
    # By rows, and summed in float64: in float32 the norm of a million numbers is off by 1e-5 on a CPU.
    squares = sum(torch.linalg.vector_norm(g, dim=-1).double().square().sum() for g in gradients)
    if mesh is not None:
        dist.all_reduce(squares, group=mesh.get_group("shard"))
    norm = squares.sqrt()
    if max_norm is not None:
        torch._foreach_mul_(gradients, (max_norm / norm).clamp(max=1.0).float())
    return norm


def learning_rate(train_cfg, step: int, steps: int) -> float:
    """The learning rate at `step`, from 1, of `steps`: linear warm-up to the peak, then the schedule."""
    if step <= train_cfg.warmup_steps:
        return train_cfg.learning_rate * step / train_cfg.warmup_steps
    done = (step - train_cfg.warmup_steps - 1) / max(1, steps - train_cfg.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[train_cfg.schedule]
    return train_cfg.min_learning_rate + (train_cfg.learning_rate - train_cfg.min_learning_rate) * factor


def stop_reason(cfg, started: float, needed: float) -> str | None:
    """Why the run has to stop after this step, or None. `needed`: seconds that another step and saving may take."""
    if cfg.checkpoint.must_save_by:
        days, hours, minutes, seconds = map(int, cfg.checkpoint.must_save_by.split(":"))
        if time.monotonic() - started + needed >= ((days * 24 + hours) * 60 + minutes) * 60 + seconds:
            return f"checkpoint.must_save_by = {cfg.checkpoint.must_save_by}"
    stop_file = Path(cfg.output_dir) / "STOP"
    return str(stop_file) if stop_file.exists() else None


def out_of_patience(val_losses: list[float], patience: int | None) -> bool:
    """Whether the last `patience` validations have brought no better loss than those before."""
    return bool(patience and val_losses[:-patience]) and min(val_losses[-patience:]) >= min(val_losses[:-patience])


@torch.no_grad()
def validate(cfg, model, parallel_model, dataset, my_rows, collate, tracker, val_losses, step: int, score: bool):
    """Log the token-weighted mean loss over the validation examples, the answers to the sample prompts and, with
    `score` or where the run ends with it, the scores of answers. Adds the loss to `val_losses`, and returns it as
    {"val/loss": ...}. Raises FloatingPointError where it is not finite."""
    tokenizer, _, examples, stop_ids, to_score = dataset
    # The same examples each time. Each dataset is in rows of its own, so that it has a loss of its own.
    ranges = [examples_of[: cfg.validation.max_examples] for examples_of in examples.ranges()]
    sums = torch.zeros(len(ranges), dtype=torch.float64, device=model.device)
    limits = {"max_tokens": cfg.train.max_tokens_per_micro_batch, "max_prompt": cfg.data.max_seq_length}
    answer = functools.partial(evaluate.answer_all, model, tokenizer, stop_ids=stop_ids, **limits)
    first = ((*examples[i], stop_ids, None, examples.dataset_index(i)) for i in examples.first(cfg.validation.samples))
    samples = [evaluate.eval_example(tokenizer, *example) for example in first]
    samples = [sample for sample in samples if sample.prompt]  # A document has none.
    model.eval()
    cast = functools.partial(cast_params, model, getattr(torch, cfg.model.dtype))
    with cast():
        for k, indices in enumerate(ranges):
            for row in my_rows(indices, examples.lengths):
                distributed.progress()
                sums[k] += parallel_model(collate(examples, row))
    sums = distributed.all_reduce_sum(sums).tolist()
    trained_tokens = [int(examples.trained_tokens[indices.start : indices.stop].sum()) for indices in ranges]
    loss = sum(sums) / sum(trained_tokens)
    if not math.isfinite(loss):
        fix = checkpoint.LOWER_RATE if step else "try model.dtype=float32"
        raise FloatingPointError(f"step {step}: val/loss is {loss}; {fix}")
    val_losses.append(loss)
    score |= out_of_patience(val_losses, cfg.validation.patience)
    with cast():
        scores = evaluate.score(to_score, answer(to_score), examples.names) if score and to_score else {}
        answers = answer(samples) if samples else []
    model.train()
    perplexity, trained = math.exp(min(loss, 700)), sum(trained_tokens)
    metrics = {"val/loss": loss, "val/perplexity": perplexity, "val/supervised_tokens": trained}
    if len(ranges) > 1:
        metrics |= {f"val/loss/{n}": s / t for n, s, t in zip(examples.names, sums, trained_tokens, strict=True)}
    if tracker:
        tracker.log(step, metrics | {f"val/{name}": value for name, value in scores.items()})
        for n, (sample, text) in enumerate(zip(samples, answers, strict=True), start=1):
            prompt = textwrap.indent(tokenizer.decode(sample.prompt).strip()[-400:], " " * 8)
            lines = f"--- sample {n}\n{prompt}\n    expected: {sample.reference}\n    answered: {text[:400]}"
            tracker.text(step, f"samples/{n}", lines)
    return {"val/loss": loss}


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # A character that the terminal cannot show is no error.
    main()
    distributed.hard_exit()
