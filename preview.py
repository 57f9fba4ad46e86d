"""Show, before the run, what a configuration trains: conversations, trained parts marked; figures, memory, problems.

python preview.py configs/squad.yaml [KEY=VALUE ...] [--world-size 64] [--html preview.html] [--json]

Needs no GPU. The exit code is 1 if something would stop the run; each such thing is a line under "problems".
"""

import argparse
import contextlib
import html
import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

import attention
import checkpoint
import config as configuration
import data
import model as modelling
import packing
import templates

GIB = 2**30
PLANNED_STEPS = 100  # as many steps, evenly over the run, are packed for the figures
COMPARED_ROWS = 200  # as many of each dataset are looked at for what the chat template leaves out


def main():
    parser = argparse.ArgumentParser(
        prog="preview.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arguments", nargs="*", help="as train_sft.py takes them: CONFIG.yaml, KEY=VALUE")
    parser.add_argument("--config", help="the configuration file")
    parser.add_argument("--world-size", type=positive, help="processes of the run; default: those of `cluster`, else 1")
    parser.add_argument("--gpu-memory", type=float, help="GiB of each GPU; default: of the GPU here, else 80")
    parser.add_argument("--samples", type=int, default=3, help="conversations of the first step to show (default 3)")
    parser.add_argument("--ids", action="store_true", help="list their tokens with their ids")
    parser.add_argument("--html", metavar="FILE", help="also write the report as an HTML page")
    parser.add_argument("--json", action="store_true", help="print figures and problems as JSON and nothing else")
    options = parser.parse_intermixed_args()
    arguments = options.arguments + (["--config", options.config] if options.config else [])

    report, samples = {"problems": [], "notes": []}, []
    with problem(report):
        preview(configuration.from_command_line(arguments), options, report, samples)
    if options.html:
        with problem(report):
            Path(options.html).write_text(page(report, samples), encoding="utf-8")
    if options.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print("\n".join([*(terminal(sample, colour, options.ids) for sample in samples), *lines(report)]))
    raise SystemExit(1 if report["problems"] else 0)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


@contextlib.contextmanager
def problem(report: dict):
    """An error that would stop the run is noted instead of raised."""
    try:
        yield
    except (ValueError, OSError) as error:
        report["problems"].append(" ".join(str(error).split()))


def preview(cfg, options, report: dict, samples: list):
    report["world_size"] = options.world_size or (cfg.cluster.num_nodes or 1) * (cfg.cluster.gpus_per_node or 1)
    with problem(report):
        newest, finished = checkpoint.where_to_start(configuration.to_dict(cfg))
        if finished:
            report["notes"].append(f"{cfg.output_dir} holds this run, finished: it would not start again")
        elif newest:
            step = checkpoint.step_of(newest)
            report["notes"].append(f"{cfg.output_dir} holds this run: it would go on from step {step}")
    with problem(report):
        check_surroundings(cfg, report["world_size"])

    tokenizer = data.load_tokenizer(cfg)
    entries, prepared = [], None
    try:
        entries = data.load_entries(cfg)
        prepared = data.tokenise_splits(cfg, tokenizer, entries)
    except ValueError as error:
        report["problems"] += bad_rows(cfg, tokenizer, entries) or [str(error)]
    sets, hashes = {}, {}
    if prepared:
        tokenizer.chat_template = prepared["chat_template"]
        for split in ("train", "validation"):
            with problem(report):
                examples = data.open_split(prepared, split, cfg.data)
                if examples is None:
                    continue
                examples.check(split)
                runs = trained_runs(examples)
                hashes[split] = hashes_of(examples, runs)
                report[split] = figures(examples, runs, hashes[split][0], tokenizer, cfg)
                sets[split] = examples
    if "train" in sets:
        train = sets["train"]
        with problem(report):
            report["left_out"] = left_out(entries, tokenizer)
        report["trained_header"] = templates.trained_header(tokenizer.chat_template, **tokenizer.special_tokens_map)
        report["stop_tokens"] = tokenizer.convert_ids_to_tokens(data.find_stop_ids(tokenizer, train))
        if "validation" in sets:
            report["overlap"] = overlap(hashes["train"], hashes["validation"])
        report["batches"] = batches(cfg, train, report["world_size"])
        first = packing.step_examples(train.counts, 1, cfg.seed, cfg.train.global_batch_size, train.weights)
        samples += [Sample(tokenizer, train, int(i)) for i in first[: options.samples]]
    row = {
        "largest_row_tokens": cfg.parallel.context * cfg.train.max_tokens_per_micro_batch,
        **report.get("batches", {}),
    }
    here = torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else 80
    with problem(report):
        longest = [int(examples.lengths.max()) for examples in sets.values()] or [0]
        try:
            report["memory"] = memory(cfg, tokenizer, report["world_size"], options.gpu_memory or here, row, longest)
        except (RuntimeError, AttributeError, TypeError) as error:  # tensors without numbers are too little for some
            reason = " ".join(str(error).split())[:200]
            report["notes"].append(f"the memory that {cfg.model.name} needs cannot be told in advance: {reason}")
        else:
            if report["memory"]["total_gib"] > report["memory"]["gpu_gib"]:
                raise ValueError(too_large(cfg, report["memory"]))
    report["notes"] += notes(cfg, report)


# ---- what would stop the run -----------------------------------------------------------------------------------------


def check_surroundings(cfg, world_size: int):
    asked = (cfg.cluster.num_nodes or 1) * (cfg.cluster.gpus_per_node or 1)
    if cfg.cluster.gpus_per_node and asked != world_size:
        raise ValueError(f"`cluster` asks for {asked} processes, --world-size for {world_size}; make them equal")
    modelling.check_parallel(cfg, world_size)
    if cfg.logger.wandb.enabled and not importlib.util.find_spec("wandb"):
        raise ValueError("logger.wandb.enabled needs `pip install wandb`")
    folder = Path(cfg.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"output_dir = {cfg.output_dir!r}: {folder} cannot be written to")


def bad_rows(cfg, tokenizer, entries, most: int = 20) -> list[str]:
    """What is wrong with the rows that cannot be trained on, where the data can be read at all: the first `most`
    reasons, each with the first row that has it."""
    places = {}  # by reason
    with contextlib.suppress(ValueError, OSError):
        chat_template = data.choose_template(cfg, tokenizer, entries) if entries else None
        for _, _, rows, name in data.rows_of(entries):
            data.format_of(rows)
            for i in range(len(rows)):
                try:
                    data.encode_rows(rows, tokenizer, chat_template, cfg.data.train_on, name, [i])
                except ValueError as error:
                    place, _, reason = str(error).partition(": ")
                    places.setdefault(reason, []).append(place)
                    if len(places) == most or len(places[reason]) == 1000:  # enough to go on with
                        break
    return [
        f"{first}: {reason}" + (f" (and in {len(others):,} more)" if others else "")
        for reason, (first, *others) in places.items()
    ]


# ---- figures ---------------------------------------------------------------------------------------------------------


def trained_runs(examples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(example, where in it the first token is, id of the last token) of each run of trained tokens, i.e. of each
    trained turn; int64 (turns,)."""
    runs = []
    for (input_ids, labels), part in zip(examples.tokens, examples.parts(), strict=True):
        starts, lengths = (array[part.start : part.stop] for array in (examples.starts, examples.lengths))
        trained = labels != templates.IGNORE_INDEX
        edges = np.zeros(len(trained) + 1, dtype=bool)  # where one document ends and the next begins
        edges[starts], edges[starts + lengths] = True, True
        first = np.flatnonzero(trained & (edges[:-1] | ~np.concatenate([[False], trained[:-1]])))
        last = np.flatnonzero(trained & (edges[1:] | ~np.concatenate([trained[1:], [False]])))
        example = np.searchsorted(starts, first, side="right") - 1
        inside = (example >= 0) & (first < (starts + lengths)[example])  # the others were dropped
        example, first, last = example[inside], first[inside], last[inside]
        runs.append((part.start + example, first - starts[example], input_ids[last]))
    return tuple(np.concatenate(arrays) for arrays in zip(*runs, strict=True))


def hashes_of(examples, runs) -> tuple[list[int], list[int]]:
    """A hash of each conversation's tokens, and of those in front of its first trained one."""
    example, first, _ = runs
    _, where = np.unique(example, return_index=True)  # the first run of each
    whole = [hash(examples[i][0].tobytes()) for i in range(len(examples))]
    prompts = [hash(examples[i][0][:end].tobytes()) for i, end in enumerate(first[where])]
    return whole, prompts


def figures(examples, runs, hashes: list[int], tokenizer, cfg) -> dict:
    lengths, tokens = examples.lengths, int(examples.lengths.sum())
    example, _, last_ids = runs
    special = np.isin(last_ids, sorted(templates.special_ids(tokenizer)))
    shortest, longest = int(lengths.min()), int(lengths.max())
    ends = np.linspace(shortest - 1, longest, min(10, longest - shortest + 1) + 1).round().astype(int)[1:]
    counts, _ = np.histogram(lengths, bins=[0, *(ends + 1)])
    return {
        "conversations": len(examples),
        "trained_turns": len(example),
        "tokens": tokens,
        "supervised_tokens": int(examples.supervised.sum()),
        "supervised_share": round(int(examples.supervised.sum()) / tokens, 4),
        "tokens_per_conversation": {f"{q}%": int(np.percentile(lengths, q)) for q in (0, 50, 90, 99, 100)},
        "length_histogram": [[int(end), int(n)] for end, n in zip(ends, counts, strict=True)],
        "overlong": sum(total["overlong"] for total in examples.totals),
        "overlong_are": {"drop": "dropped", "truncate": "truncated", "error": "an error"}[cfg.data.overlong],
        "nothing_to_train": sum(total["nothing_to_train"] for total in examples.totals),
        "duplicates": len(hashes) - len(set(hashes)),
        "datasets": {
            name: {"weight": weight, **total}
            for name, weight, total in zip(examples.names, examples.weights, examples.totals, strict=True)
        },
        "turns_without_end_token": int((~special).sum()),
    }


def overlap(train, validation) -> dict:
    """How many validation conversations are in the training split, whole or up to the first trained token: from the
    `hashes_of` both."""
    names = ("conversations", "prompts")
    return {
        name: sum(found in seen for found in there)
        for name, seen, there in zip(names, map(set, train), validation, strict=True)
    }


def left_out(entries, tokenizer) -> dict:
    """For some rows of each training split, by `templates.left_out`: name to [times left out, times there]."""
    found, variables = {}, tokenizer.special_tokens_map
    for _, split, rows, name in data.rows_of(entries):
        if split == "train":
            found[name] = {}
            count = min(len(rows), COMPARED_ROWS)
            for i in np.random.default_rng(0).choice(len(rows), count, replace=False).tolist():
                with data.at_row(rows, name, i):
                    row = data.read_row(rows, i)
                tools = row.get("tools") or None
                for what, missing in templates.left_out(tokenizer.chat_template, row["messages"], tools, **variables):
                    times, there = found[name].get(what, (0, 0))
                    found[name][what] = [times + missing, there + 1]
    return found


def batches(cfg, examples, world_size: int) -> dict:
    """Steps, and how full and even the rows of some of them are."""
    batch_size, context = cfg.train.global_batch_size, cfg.parallel.context
    groups, max_tokens = max(1, world_size // context), context * cfg.train.max_tokens_per_micro_batch
    per_epoch, steps = packing.steps_of_run(examples.counts, examples.weights, cfg.train)
    tokens = rows = waited = work = 0
    largest = (0, 0)
    for step in np.unique(np.linspace(1, steps, min(steps, PLANNED_STEPS)).astype(int)).tolist():
        chosen = packing.step_examples(examples.counts, step, cfg.seed, batch_size, examples.weights)
        plan = packing.pack(chosen, examples.lengths, groups, max_tokens)
        for at_once in zip(*plan, strict=True):  # the rows that all ranks compute at the same time
            costs = [packing.cost(row, examples.lengths) for row in at_once]
            waited, work = waited + max(costs) * groups - sum(costs), work + max(costs) * groups
            for row in at_once:
                count, supervised = int(examples.lengths[row].sum()), int(examples.supervised[row].sum())
                tokens, rows = tokens + count, rows + 1
                largest = max(largest, (count, supervised))
    return {
        "steps_per_epoch": per_epoch,
        "steps": steps,
        "epochs": round(steps / per_epoch, 3),
        "rows_filled": round(tokens / (rows * max_tokens), 4),
        "ranks_wait": round(waited / work, 4),
        "largest_row_tokens": largest[0],
        "largest_row_supervised": largest[1],
    }


def notes(cfg, report: dict) -> list[str]:
    """What does not stop the run, but is worth knowing."""
    found = []
    for split in ("train", "validation"):
        part = report.get(split, {})
        if part.get("turns_without_end_token"):
            found.append(
                f"{split}: {part['turns_without_end_token']:,} of {part['trained_turns']:,} trained turns end in no "
                "special token: the model does not learn to stop there"
            )
        if part.get("overlong"):
            found.append(
                f"{split}: {part['overlong']:,} conversations are longer than {cfg.data.max_seq_length:,} tokens: "
                f"{part['overlong_are']} (data.overlong)"
            )
    for name, of_it in report.get("left_out", {}).items():
        parts = [f"{what} {times:,} times of {there:,}" for what, (times, there) in of_it.items() if times]
        if parts:
            found.append(
                f"{name}: in up to {COMPARED_ROWS} conversations looked at, the chat template leaves out, wholly or in "
                f"part, {', '.join(parts)}: what the model does not see, it does not learn"
            )
    if header := report.get("trained_header"):
        found.append(
            f"the chat template has no generation prompt (add_generation_prompt), so the header {header!r} of each "
            "answer is trained: the model writes it itself"
        )
    if cfg.train.warmup_steps >= report.get("batches", {}).get("steps", math.inf):
        found.append(
            f"train.warmup_steps = {cfg.train.warmup_steps}: the run ends before train.learning_rate is reached"
        )
    if report.get("overlap", {}).get("prompts"):
        found.append(
            f"{report['overlap']['prompts']:,} validation prompts are in the training split, "
            f"{report['overlap']['conversations']:,} of them with the same answers"
        )
    if cfg.train.global_batch_size * cfg.parallel.context < report["world_size"]:
        found.append(f"train.global_batch_size = {cfg.train.global_batch_size} leaves processes idle")
    return found


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory(cfg, tokenizer, world_size: int, gpu_gib: float, row: dict, longest: list[int]) -> dict:
    """What a GPU holds at the fullest moment, in GiB, by the sizes of the tensors that autograd keeps for the largest
    row: measured on a model of fake tensors, which have shapes and no memory. The CUDA context and the gaps of the
    allocator come on top; a tenth of the GPU is set aside for them."""
    with data.from_hub("model.name", cfg.model.name):
        model_config = AutoConfig.from_pretrained(cfg.model.name, revision=cfg.model.revision)
    modelling.check_context(cfg, model_config, world_size)
    tokens = max(1, math.ceil(row["largest_row_tokens"] / cfg.parallel.context))  # a rank's
    supervised = min(row.get("largest_row_supervised", tokens), tokens)
    implementation = attention.choose(cfg.model, modelling.class_of(cfg.model, model_config), torch.device("cuda"))
    if implementation == "per_document_varlen":
        implementation = "per_document"  # keeps the same tensors, and runs without a GPU

    with FakeTensorMode(), no_init_weights():  # some look at the numbers that they draw
        base_dtype = modelling.base_dtype(cfg.model)
        model = AutoModelForCausalLM.from_config(model_config, dtype=base_dtype, attn_implementation=implementation)
        model.tie_weights()  # which is left out with the numbers
        modelling.prepare_for_training(model, cfg.model)
        modelling.check_vocabulary(model, tokenizer)
        modelling.check_positions(model, *longest)
        vocabulary = model.get_input_embeddings().num_embeddings
        weights, trained = counts(model)
        (in_block, trained_in_block), in_blocks = counts(modelling.blocks(model)[0]), counts(modelling.blocks(model))
        head = model.get_output_embeddings().weight
        trained_head = head.numel() if head.requires_grad else 0
        root, trained_root = weights - in_blocks[0], trained - in_blocks[1]
        strategy = modelling.choose_strategy(cfg.parallel.strategy, model, world_size, gpu_gib * GIB)
        sharded = strategy == "fsdp" and world_size > 1
        dtype = modelling.compute_dtype(cfg)
        size = dtype.itemsize  # bytes a number in forward and backward
        with modelling.computing_in(dtype, model):
            activations = saved_bytes(model, tokens, supervised, max(longest) or tokens)

    shards = modelling.mesh_shape(cfg.parallel.replicas, world_size)[1] if sharded else 1
    held = 0 if sharded and cfg.parallel.cpu_offload else 1
    parts = {
        "weights": held * (base_dtype.itemsize * (weights - trained) + 4 * trained) / shards,
        "gradients": held * 4 * trained / shards,
        "optimizer": held * 8 * trained / shards,
        # of the weights, in the dtype of forward and backward; FSDP makes a block's while the one before runs, and
        # reduces a block's gradients in float32
        "copies": (
            2 * size * (root + in_block) + size * trained_in_block + 4 * max(trained_root, trained_in_block)
            if sharded
            else size * ((dtype != base_dtype) * (weights - trained) + (dtype != torch.float32) * trained)
        ),
        "activations": activations,
        # a chunk's logits and their logarithms in float32, and what it adds to the output layer's gradient
        "loss_gradient": 8 * min(supervised * vocabulary, modelling.HeadLoss.LOGITS) + size * trained_head,
    }
    gib = {name: round(count / GIB, 2) for name, count in parts.items()}
    return {
        "model_weights": weights,
        "trained_weights": trained,
        "strategy": strategy,
        "row_tokens": tokens,
        **{f"{name}_gib": amount for name, amount in gib.items()},
        "total_gib": round(sum(parts.values()) / GIB, 2),
        "gpu_gib": round(0.9 * gpu_gib, 1),
    }


def counts(module) -> tuple[int, int]:
    """(weights, trained weights)."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def saved_bytes(model, tokens: int, supervised: int, longest: int) -> int:
    """Bytes that the forward pass of one row keeps for the backward pass, without the weights themselves. `longest`:
    tokens of the longest document."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}  # by storage: views share one; the tensor is held so that no other gets its address

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        positions = torch.zeros(max(1, supervised), dtype=torch.long)
        ends = [*range(longest, tokens, longest), tokens]
        documents = attention.Documents(ends, torch.tensor([0, *ends], dtype=torch.int32))
        batch = {"input_ids": ids, "position_ids": ids, "documents": documents}
        batch |= {"positions": positions, "targets": positions}
        modelling.PackedLoss(model, plain_head=True)(batch)
    return sum(count for count, _ in kept.values())


def too_large(cfg, needs: dict) -> str:
    mends = []
    if needs["activations_gib"] + needs["loss_gradient_gib"] > needs["total_gib"] / 3:
        if not cfg.model.activation_checkpointing:
            mends.append("model.activation_checkpointing=true")
        if cfg.train.max_tokens_per_micro_batch > cfg.data.max_seq_length:
            mends.append(f"train.max_tokens_per_micro_batch={cfg.data.max_seq_length}")
        if not mends:
            mends.append(f"parallel.context={2 * cfg.parallel.context}")
    if needs["optimizer_gib"] > needs["total_gib"] / 4:
        mends.append("parallel.strategy=fsdp over more GPUs" if needs["strategy"] == "ddp" else "more GPUs")
    return (
        f"a GPU would need {needs['total_gib']:,} GiB for {needs['model_weights']:,} weights and rows of "
        f"{needs['row_tokens']:,} tokens, but may use {needs['gpu_gib']:,}; try {', '.join(mends) or 'larger GPUs'}"
    )


# ---- the report ------------------------------------------------------------------------------------------------------


def lines(report: dict) -> list[str]:
    """The figures as text."""
    out = []
    for split in ("train", "validation"):
        part = report.get(split)
        if not part:
            continue
        quantiles = ", ".join(f"{name} {count:,}" for name, count in part["tokens_per_conversation"].items())
        out += [
            "",
            f"{split}: {part['conversations']:,} conversations, {part['trained_turns']:,} trained turns, "
            f"{part['tokens']:,} tokens, {part['supervised_tokens']:,} supervised ({part['supervised_share']:.1%})",
            f"    {part['overlong']:,} overlong ({part['overlong_are']}), {part['nothing_to_train']:,} with nothing to "
            f"train, {part['duplicates']:,} duplicates",
            f"    tokens per conversation: {quantiles}",
        ]
        if len(part["datasets"]) > 1:
            out += [
                f"    {name}: {of_it['conversations']:,} conversations, {of_it['tokens']:,} tokens, "
                f"{of_it['supervised']:,} supervised" + (f", weight {of_it['weight']:g}" if split == "train" else "")
                for name, of_it in part["datasets"].items()
            ]
        most = max((n for _, n in part["length_histogram"]), default=0)
        for edge, n in part["length_histogram"]:
            out.append(f"    up to {edge:>7,} {n:>9,} {'#' * math.ceil(40 * n / most)}")
    if "overlap" in report:
        both = report["overlap"]
        out += ["", f"validation in train: {both['conversations']:,} conversations, {both['prompts']:,} prompts"]
    if "stop_tokens" in report:
        out.append(f"generation stops at: {' '.join(report['stop_tokens'])}")
    if "batches" in report:
        part = report["batches"]
        out += [
            f"steps: {part['steps']:,} ({part['epochs']} epochs of {part['steps_per_epoch']:,}); over "
            f"{report['world_size']:,} process(es) rows are {part['rows_filled']:.1%} full, ranks wait for "
            f"{part['ranks_wait']:.1%} of the time; the largest row has {part['largest_row_tokens']:,} tokens",
        ]
    if "memory" in report:
        part = report["memory"]
        names = ("weights", "gradients", "optimizer", "copies", "activations", "loss_gradient")
        parts = ", ".join(f"{name.replace('_', ' ')} {part[f'{name}_gib']:,}" for name in names)
        out += [
            f"memory per GPU, expected: {part['total_gib']:,} of {part['gpu_gib']:,} GiB "
            f"({part['strategy']}, {part['model_weights']:,} weights, {part['trained_weights']:,} of them trained, a "
            f"row of {part['row_tokens']:,} tokens)",
            f"    GiB: {parts}",
        ]
    for title in ("notes", "problems"):
        if report[title]:
            out += ["", f"{title}:", *(f"    {text}" for text in report[title])]
    if not report["problems"]:
        out += ["", "no problems"]
    return out


class Sample:
    """A conversation as it is trained: `pieces` of (text, trained, special), and its tokens."""

    def __init__(self, tokenizer, examples, i: int):
        ids, labels = examples[i]
        trained, special = labels != templates.IGNORE_INDEX, np.isin(ids, sorted(templates.special_ids(tokenizer)))
        trained[0] = False  # the first token of a document is never predicted
        of = f"{examples.names[examples.part_of(i)]} " if len(examples.names) > 1 else ""
        self.title = f"row {int(examples.rows[i])} of {of}train, {len(ids):,} tokens, {int(trained.sum()):,} trained"
        self.tokens = list(
            zip(ids.tolist(), tokenizer.convert_ids_to_tokens(ids.tolist()), trained.tolist(), strict=True)
        )
        changes = np.flatnonzero((np.diff(trained) != 0) | (np.diff(special) != 0)) + 1
        edges = [0, *changes.tolist(), len(ids)]
        self.pieces, before = [], ""
        for start, end in zip(edges, edges[1:], strict=False):
            # what the tokens add to the text before them: alone, some tokenizers would drop their first space
            text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            self.pieces.append((text[len(before) :], bool(trained[start]), bool(special[start])))
            before = text


def visible(text: str) -> str:
    """White space that one would overlook: line ends, tabs, spaces at an edge or in a row."""
    text = re.sub(r"^ +| +$| {2,}|(?<=\n) +| +(?=\n)", lambda found: "·" * len(found[0]), text)
    return text.replace("\t", "→").replace("\r", "␍").replace("\n", "⏎\n")


def terminal(sample: Sample, colour: bool, ids: bool) -> str:
    """Trained parts stand in ⟦ ⟧, green where there is colour; special tokens are magenta."""
    out, open_ = [f"--- {sample.title}; the trained text is in ⟦ ⟧\n"], False
    for text, trained, special in sample.pieces:
        if trained != open_:
            out.append("⟦" if trained else "⟧")
            open_ = trained
        text = visible(text)
        code = ("1;32" if trained else "") + (";35" if special else "")
        # colour ends with the line, as pagers expect
        out.append(
            "\n".join(f"\033[{code.strip(';')}m{line}\033[0m" for line in text.split("\n")) if colour and code else text
        )
    out.append("⟧\n" if open_ else "\n")
    if ids:
        for i, (number, token, trained) in enumerate(sample.tokens):
            out.append(f"{i:>6} {number:>8} {'trained' if trained else '-':>8}  {token!r}\n")
    return "".join(out)


def page(report: dict, samples: list) -> str:
    """One HTML page that stands alone."""
    body = []
    for sample in samples:
        body.append(f"<h2>{html.escape(sample.title)}</h2><pre>")
        for text, trained, special in sample.pieces:
            kind = " ".join(name for name, on in (("trained", trained), ("special", special)) if on)
            body.append(f'<span class="{kind}">{html.escape(visible(text))}</span>')
        body.append("</pre>")
    style = (
        "body{font-family:sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
        "pre{white-space:pre-wrap;background:#f6f6f6;padding:1em}"
        ".trained{background:#b8ecb8}.special{color:#a0209a;font-weight:bold}"
    )
    figures_text = html.escape("\n".join(lines(report)))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Preview</title><style>{style}</style><body>'
        '<h1>What will be trained</h1><p><span class="trained">Trained</span>, '
        '<span class="special">special token</span>; · space, → tab, ⏎ line end.</p>'
        f"{''.join(body)}<h2>Figures</h2><pre>{figures_text}</pre></body></html>\n"
    )


if __name__ == "__main__":
    main()
