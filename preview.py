"""Show what a configuration would train: conversations with the trained text marked, metrics, memory, problems.

python preview.py configs/squad.yaml [KEY=VALUE ...] [--world-size 64] [--html preview.html] [--json]

It needs no GPU and runs the code that trains. The exit code is 1 if there are problems, which would stop the run.
"""

import argparse
import collections
import contextlib
import html
import json
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import checkpoint
import config
import lora
import model as models
import packing
from data import load_mixture, splits_of
from templates import IGNORE_INDEX, special_ids
from tokens import choose_template, encode_row, find_stop_ids, load_tokenizer, open_split, tokenize_splits

GIB = 2**30


def main():
    usage, raw = "preview.py [CONFIG.yaml] [KEY=VALUE ...] [options]", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=raw)
    parser.add_argument("--world-size", type=int, help="ranks of the run; default: those of `cluster`, else 1")
    parser.add_argument("--gpu-memory", type=float, help="GiB of each GPU; default: of the GPU here, else 80")
    parser.add_argument("--samples", type=int, default=3, help="conversations of the first step to show (default 3)")
    parser.add_argument("--ids", action="store_true", help="list their tokens with their ids")
    parser.add_argument("--html", metavar="FILE", help="also write the report as an HTML page")
    parser.add_argument("--json", action="store_true", help="print metrics and problems as JSON and nothing else")
    options, arguments = parser.parse_known_args()
    report, samples = {"problems": [], "notes": []}, []
    with problem(report):
        preview(config.from_command_line(arguments), options, report, samples)
    if options.html:
        with problem(report):
            spans = "".join(f'<span class="{style}">{html.escape(text)}</span>' for text, style in samples)
            Path(options.html).write_text(HTML % (spans, html.escape(report_text(report))), encoding="utf-8")
    print(json.dumps(report, indent=2) if options.json else "".join(t for t, _ in samples) + report_text(report))
    raise SystemExit(1 if report["problems"] else 0)


@contextlib.contextmanager
def problem(report: dict):
    """An error that would stop the run becomes a line of the report."""
    try:
        yield
    except (ValueError, OSError) as error:
        report["problems"].append(" ".join(str(error).split()))


def preview(cfg, options, report: dict, samples: list[tuple[str, str]]):
    """Fill `report`, and `samples` with pieces of text and their styles (see `sample_pieces`)."""
    cfg.model.name = checkpoint.find_model(cfg.model.name, finished_only=True)
    report["world_size"] = options.world_size or (cfg.cluster.num_nodes or 1) * (cfg.cluster.gpus_per_node or 1)
    with problem(report):
        newest, finished = checkpoint.find_resume_checkpoint(config.to_dict(cfg))
        if newest or finished:
            report["notes"].append(f"{cfg.output_dir} holds the run, {'finished' if finished else f'at {newest.name}'}")
    cfg.tokenizer.date = checkpoint.date_of_run(cfg, time.time())
    tokenizer, entries, splits, hashes = load_tokenizer(cfg), [], {}, {}
    try:
        entries = load_mixture(cfg)
        prepared = tokenize_splits(cfg, tokenizer, entries)
    except (ValueError, OSError) as error:
        report["problems"] += bad_rows(cfg, tokenizer, entries) or [" ".join(str(error).split())]
    else:
        tokenizer.chat_template = prepared["chat_template"]
        files = [path.stat() for path in Path(prepared["cache"]).glob("*.arrow")]
        if unused := [file.st_size for file in files if time.time() - file.st_atime > 30 * 24 * 3600]:
            size = f"{len(unused):,} files of tokens, {sum(unused) / GIB:.2f} GiB"
            report["notes"].append(f"{prepared['cache']}: {size}, not used for a month; see README.md")
        for split in ("train", "validation"):
            with problem(report):
                if (examples := open_split(prepared, split, cfg.data)) is not None:
                    report[split], hashes[split] = split_metrics(cfg, tokenizer, examples)
                    report["notes"] += [f"{split}: {note}" for note in examples.notes]
                    splits[split] = examples
    if examples := splits.get("train"):
        report["stop_tokens"] = tokenizer.convert_ids_to_tokens(find_stop_ids(tokenizer, examples))
        report["batches"] = batch_metrics(cfg, examples, report["world_size"])
        report["notes"] += packing.notes_on_length(cfg.train, report["batches"]["steps"])
        first = packing.step_examples(examples.counts, 1, cfg.seed, cfg.train.global_batch_size, examples.weights)
        for i in first[: options.samples].tolist():
            samples += sample_pieces(tokenizer, examples, i, options.ids)
    if len(splits) == 2:
        seen, found = hashes["train"], hashes["validation"]
        report["overlap"] = {key: sum(n for h, n in found[key].items() if h in seen[key]) for key in seen}
    with problem(report):
        longest = max((int(examples.lengths.max()) for examples in splits.values()), default=0)
        try:
            report["memory"] = needed = memory(cfg, tokenizer, options.gpu_memory, longest, report)
            if needed["total_gib"] > needed["gpu_gib"]:
                fix = "model.activation_checkpointing=true, a lower max_tokens_per_micro_batch, or fsdp on more GPUs"
                report["problems"].append("a GPU needs {total_gib:,} of {gpu_gib:,} GiB: try ".format(**needed) + fix)
        except (RuntimeError, AttributeError, TypeError) as error:  # Some models need tensors with numbers in them.
            reason = " ".join(str(error).split())[:200]
            report["notes"].append(f"the memory that {cfg.model.name} needs cannot be predicted: {reason}")


def bad_rows(cfg, tokenizer, entries) -> list[str]:
    """The first 20 reasons why rows cannot be trained on, each with its first row; none if the data cannot be read."""
    places = collections.defaultdict(list)  # By reason.
    with contextlib.suppress(ValueError, OSError):
        chat_template = choose_template(cfg, tokenizer, entries) if entries else None
        for _, _, rows, name in splits_of(entries):
            for i in range(len(rows)):
                try:
                    encode_row(rows, i, name, tokenizer, chat_template, cfg.data.train_on, cfg.tokenizer.date)
                except ValueError as error:
                    place, _, reason = str(error).partition(": ")
                    places[reason].append(place)
                    if len(places) == 20 or len(places[reason]) == 1000:  # Enough to start with.
                        break
    more = {reason: f" (and in {len(found) - 1:,} more)" if found[1:] else "" for reason, found in places.items()}
    return [f"{found[0]}: {reason}{more[reason]}" for reason, found in places.items()]


# ---- metrics of the data ---------------------------------------------------------------------------------------------
def split_metrics(cfg, tokenizer, examples) -> tuple[dict, dict[str, collections.Counter]]:
    """The metrics of a split; and the number of each conversation and each prompt (before a trained token), by hash."""
    last_ids, conversations, prompts = (collections.Counter() for _ in range(3))
    for i in range(len(examples)):
        input_ids, labels = examples[i]
        edges = np.flatnonzero(np.diff(labels != IGNORE_INDEX, prepend=False, append=False))
        last_ids.update(input_ids[edges[1::2] - 1].tolist())  # edges: starts and ends of the trained turns
        conversations[hash(input_ids.tobytes())] += 1
        if edges[0]:
            prompts[hash(input_ids[: edges[0]].tobytes())] += 1
    metrics = {name: sum(total[name] for total in examples.totals) for name in examples.totals[0]}
    trained = metrics.pop("trained_tokens")
    metrics |= {
        "trained_turns": last_ids.total(),
        "supervised_tokens": trained,
        "supervised_share": round(trained / metrics["tokens"], 4),
        "tokens_per_conversation": {f"{q}%": int(np.percentile(examples.lengths, q)) for q in (0, 50, 90, 99, 100)},
        "overlong_are": {"drop": "dropped", "truncate": "truncated", "error": "an error"}[cfg.data.overlong],
        "duplicates": len(examples) - len(conversations),
        "turns_without_end_token": sum(n for last, n in last_ids.items() if last not in special_ids(tokenizer)),
    }
    return metrics, {"conversations": conversations, "prompts": prompts}


def batch_metrics(cfg, examples, world_size: int) -> dict:
    """Steps of the run, and how full and how even the packed rows of 100 of them are, spread evenly over the run."""
    groups = max(1, world_size // cfg.parallel.context)  # Each group of ranks shares its rows.
    max_tokens = cfg.parallel.context * cfg.train.max_tokens_per_micro_batch
    steps_per_epoch, steps = packing.steps_of_run(examples.counts, examples.weights, cfg.train)
    lengths, sizes, idle, busy = examples.lengths, [], 0.0, 0.0
    for step in np.unique(np.linspace(1, steps, min(steps, 100)).astype(int)).tolist():
        chosen = packing.step_examples(examples.counts, step, cfg.seed, cfg.train.global_batch_size, examples.weights)
        plan = packing.pack(chosen, lengths, groups, max_tokens)
        costs = np.array([[packing.cost(row, lengths) for row in rows] for rows in plan])  # (groups, rows of each)
        idle, busy = idle + (costs.max(0) - costs).sum(), busy + costs.sum()  # Ranks wait for each other at each row.
        sizes += [(lengths[row].sum(), examples.trained_tokens[row].sum()) for rows in plan for row in rows]
    tokens, trained_tokens = map(int, max(sizes))
    metrics = {"steps_per_epoch": steps_per_epoch, "steps": steps, "epochs": round(steps / steps_per_epoch, 3)}
    metrics["rows_filled"] = round(float(np.sum(sizes, axis=0)[0]) / (len(sizes) * max_tokens), 4)
    metrics["ranks_wait"] = round(idle / (idle + busy), 4)
    return metrics | {"largest_row_tokens": tokens, "largest_row_supervised": trained_tokens}


def memory(cfg, tokenizer, gpu_gib: float | None, longest: int, report: dict) -> dict:
    """What a GPU holds at the fullest moment, in GiB, from the sizes of the tensors that the run's own model makes of
    its largest row under FakeTensorMode. A tenth of the GPU is set aside for the CUDA context and the allocator's gaps.
    `longest`: tokens of the longest conversation, 0: unknown."""
    here = torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else 80
    gpu_gib, world_size, batches = gpu_gib or here, report["world_size"], report.get("batches", {})
    dtype, context = getattr(torch, cfg.model.dtype), cfg.parallel.context
    tokens = math.ceil(batches.get("largest_row_tokens", context * cfg.train.max_tokens_per_micro_batch) / context)
    trained_tokens = min(batches.get("largest_row_supervised", tokens), tokens)
    model = models.load_model(cfg.model, torch.device("cuda"), True, len(tokenizer) if cfg.tokenizer.add_tokens else 0)
    report.setdefault("notes", []).extend(models.notes_of(model, cfg, tokenizer, None))
    with FakeTensorMode(allow_non_fake_inputs=True):  # The inputs are the meta model's, to be made fake here.
        model.to_empty(device="cpu")
        model.tie_weights()
        compiled = models.is_compiled(model, cfg.model.compile)
        if model.config._attn_implementation == "per_document_varlen":
            model.set_attn_implementation("per_document")  # It keeps tensors of the same sizes, and needs no GPU.
        report.setdefault("notes", []).extend(models.check_model(model, cfg, world_size, tokenizer, longest))
        params, head = [*model.parameters()], model.get_output_embeddings().weight
        trained = [p for p in params if p.requires_grad]
        with models.cast_params(model, dtype):
            copies = sum(p.nbytes for p in {*model.parameters()} - {*params})
            row = tokens, trained_tokens, longest or tokens
            activations = saved_bytes(model, *row)
            if cfg.model.activation_checkpointing:  # The backward pass computes those of one block again.
                getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
                activations += saved_bytes(model, *row) // len(models.blocks(model))
            elif compiled:  # Fused kernels keep less: 0.65 to 0.73 of it was measured (bench/README.md).
                activations = int(0.7 * activations)
        # HeadLoss: a chunk's logits and their logarithms in float32, and the gradient of the output layer in `dtype`.
        loss_gradient = 8 * min(trained_tokens * len(head), models.HeadLoss.LOGITS)
        loss_gradient += dtype.itemsize * head.numel() if head.requires_grad else 0
        weights, gradients = (sum(p.nbytes for p in each) for each in (params, trained))
        # Two moments of 4 bytes each, or of 1 with scales for each 256 of them; small parameters' stay in 4.
        sizes, in_8_bits = [p.numel() for p in trained], cfg.train.optimizer == "adamw_8bit"
        optimizer = sum(2 * n + 8 * math.ceil(n / 256) if in_8_bits and n >= 4096 else 8 * n + 4 for n in sizes)
        parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer, "copies": copies}
        parts |= {"activations": activations, "loss_gradient": loss_gradient}
    if cfg.model.lora.base == "nf4":  # A byte holds two weights, and another byte is the scale of 64.
        linear = [m.weight for m in model.modules() if isinstance(m, lora.LoraLinear)]
        linear += [layer.weight for layer in lora.linear_layers(model).values()]
        parts["weights"] -= sum(weight.nbytes - weight.numel() * (1 / 2 + 1 / 64) for weight in linear)
        parts["copies"] += max(weight.nbytes for weight in linear)  # One at a time, for its products.
    strategy = models.choose_strategy(cfg.parallel.strategy, model, world_size, gpu_gib * GIB)
    if strategy == "fsdp" and world_size > 1:
        # What FSDP gathers, in `dtype`: the root (what is in no block) and a block, while the next one is gathered, and
        # a block's gradients; and the gradients of one that are reduced in float32.
        block, root = {*models.blocks(model)[0].parameters()}, {*params} - {*models.blocks(model).parameters()}
        in_block, in_root = (sum(p.numel() for p in part if p.requires_grad) for part in (block, root))
        gathered = 2 * sum(p.numel() for p in block | root) + in_block
        parts["copies"] = dtype.itemsize * gathered + 4 * max(in_block, in_root)
        for name in ("weights", "gradients", "optimizer"):
            parts[name] *= 0 if cfg.parallel.cpu_offload else cfg.parallel.replicas / world_size
    counts = {"model_weights": sum(p.numel() for p in params), "trained_weights": sum(sizes)}
    gib = {f"{name}_gib": round(count / GIB, 2) for name, count in parts.items()}
    gib |= {"total_gib": round(sum(parts.values()) / GIB, 2), "gpu_gib": round(0.9 * gpu_gib, 1)}
    return counts | {"strategy": strategy, "row_tokens": tokens} | gib


def saved_bytes(model, tokens: int, trained_tokens: int, longest: int) -> int:
    """Bytes that a row's forward pass keeps for the backward pass, without parameters; `longest`: of a document."""
    saved = {}  # By storage, which views share. The tensor is held so that no later one gets its address.

    def save(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    positions = torch.zeros(max(1, trained_tokens), dtype=torch.long)
    ends = [*range(longest, tokens, longest), tokens]
    documents = packing.Documents(ends, torch.tensor([0, *ends], dtype=torch.int32))
    row = {"input_ids": ids, "position_ids": ids, "documents": documents}
    row |= {"loss_positions": positions, "targets": positions}
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        models.PackedLoss(model, plain_head=True)(row)
    params = {p.untyped_storage()._cdata for p in model.parameters()}
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in saved.items() if storage not in params)


# ---- the report ------------------------------------------------------------------------------------------------------
SPLIT = """{name}: {conversations:,} conversations, {trained_turns:,} trained turns
    {tokens:,} tokens, {supervised_tokens:,} of them trained ({supervised_share:.1%})
    {overlong:,} overlong ({overlong_are}), {nothing_to_train:,} with nothing to train, {duplicates:,} duplicates
    tokens per conversation: {tokens_per_conversation[0%]:,} to {tokens_per_conversation[100%]:,}
    half have up to {tokens_per_conversation[50%]:,} tokens, 99% have up to {tokens_per_conversation[99%]:,}"""
LINES = {  # of the report, by key
    "train": SPLIT,
    "validation": SPLIT,
    "overlap": "validation in train: {conversations:,} conversations, {prompts:,} prompts",
    "batches": """steps: {steps:,} ({epochs} epochs of {steps_per_epoch:,}) on {world_size:,} rank(s)
    packing efficiency {rows_filled:.1%}, straggler time {ranks_wait:.1%}, largest row {largest_row_tokens:,} tokens""",
    "memory": """expected memory per GPU: {total_gib:,} of {gpu_gib:,} GiB, with {strategy}
    a row of {row_tokens:,} tokens, {model_weights:,} parameters, {trained_weights:,} of them trained
    parameters {weights_gib:,}, gradients {gradients_gib:,}, optimizer {optimizer_gib:,}, copies {copies_gib:,}
    activations {activations_gib:,}, loss gradient {loss_gradient_gib:,}""",
}


def report_text(report: dict) -> str:
    lines = [text.format(name=key, **(report | report[key])) for key, text in LINES.items() if key in report]
    if "stop_tokens" in report:
        lines.append(f"generation stops at: {' '.join(report['stop_tokens'])}")
    for title in [title for title in ("notes", "problems") if report[title]]:
        lines += [f"{title}:", *(f"    {text}" for text in report[title])]
    return "\n".join(lines if report["problems"] else [*lines, "no problems"])


def sample_pieces(tokenizer, examples, i: int, list_ids: bool) -> list[tuple[str, str]]:
    """An example as it is trained, as pieces of (text, style): trained text is in ⟦ ⟧ and has the style "trained",
    special tokens have the style "special"."""
    ids, labels = examples[i]
    trained, special = labels != IGNORE_INDEX, np.isin(ids, sorted(special_ids(tokenizer)))
    trained[0] = False  # The first token of a document is never predicted.
    place = f"row {examples.row_ids[i]} of {examples.names[examples.dataset_index(i)]} train"
    pieces = [(f"--- {place}, {len(ids):,} tokens, {trained.sum():,} trained; the trained text is in ⟦ ⟧\n", "")]
    edges, before = np.flatnonzero(np.diff(trained) | np.diff(special)) + 1, ""
    for start, end in zip([0, *edges], [*edges, len(ids)], strict=True):
        # What the tokens add to the text before them: decoded alone, some tokenizers would drop their first space.
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        added = re.sub(r"(?m)^ +| +$| {2,}", lambda found: "·" * len(found[0]), text[len(before) :])
        added = added.replace("\t", "→").replace("\r", "␍").replace("\n", "⏎\n")  # What one would overlook.
        opening = "⟦" if trained[start] and not trained[start - 1] else ""
        closing = "⟧" if trained[start] and not trained[end : end + 1].any() else ""
        style = ["trained"] * int(trained[start]) + ["special"] * int(special[start])
        pieces.append((f"{opening}{added}{closing}", " ".join(style)))
        before = text
    pieces.append(("\n", ""))
    for k, token in enumerate(tokenizer.convert_ids_to_tokens(ids.tolist()) if list_ids else []):
        pieces.append((f"{k:>6} {ids[k]:>8} {'trained' if trained[k] else '-':>8}  {token!r}\n", ""))
    return pieces


HTML = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Preview</title><style>
body{font-family:sans-serif;max-width:70em;margin:2em auto} pre{white-space:pre-wrap;background:#f6f6f6;padding:1em}
.trained{background:#b8ecb8} .special{color:#a0209a;font-weight:bold}
</style><body><h1>What will be trained</h1><p><span class="trained">Trained</span>,
<span class="special">special token</span>; · space, → tab, ⏎ line end.</p><pre>%s%s</pre></body></html>
"""


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # A character that the terminal cannot show is no error.
    main()
