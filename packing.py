"""Step k: which conversations it trains on, in which packed row of which rank, and the rows as tensors.

All of it is a function of (seed, step): there is no data loader whose state a resumed run would have to restore.
"""

import functools
import heapq
import math

import numpy as np
import torch

from templates import IGNORE_INDEX


def epoch_sizes(counts, weights) -> list[int]:
    """How many conversations of each dataset an epoch has: `weight` times as many as there are, at least one."""
    sizes = [round(count * weight) for count, weight in zip(counts, weights, strict=True)]
    return [max(size, min(count, 1)) if w else 0 for size, count, w in zip(sizes, counts, weights, strict=True)]


def steps_of_run(counts, weights, train_cfg) -> tuple[int, int]:
    """(optimizer steps of an epoch, of the run) for a `config.Train`; `counts` and `weights` as in `step_examples`."""
    per_epoch = math.ceil(sum(epoch_sizes(counts, weights)) / train_cfg.global_batch_size)
    limits = train_cfg.max_steps, train_cfg.max_epochs and train_cfg.max_epochs * per_epoch
    return per_epoch, min(limit for limit in limits if limit)


def notes_on_length(train_cfg, steps: int) -> list[str]:
    """What may surprise in a run of so many steps."""
    notes, ends = [], "max_steps" if steps == train_cfg.max_steps else "max_epochs"
    if train_cfg.max_steps and train_cfg.max_epochs:
        notes.append(f"train.{ends} = {getattr(train_cfg, ends)} ends the run")
    if train_cfg.warmup_steps >= steps:
        notes.append(f"train.warmup_steps = {train_cfg.warmup_steps}: the run ends before the full learning rate")
    return notes


def step_examples(counts, step: int, seed: int, global_batch_size: int, weights=(1.0,)) -> np.ndarray:
    """Indices (int64) of the examples of step `step`, from 1: a shuffled order per epoch, cut into global batches.

    The last batch of an epoch may be smaller. `counts`: examples of each dataset; `weights`: its passes per epoch."""
    counts = (counts,) if isinstance(counts, int) else tuple(counts)
    size = sum(epoch_sizes(counts, weights))
    epoch, batch = divmod(step - 1, math.ceil(size / global_batch_size))
    return epoch_order(counts, tuple(weights), seed, epoch)[batch * global_batch_size : (batch + 1) * global_batch_size]


@functools.lru_cache(maxsize=2)
def epoch_order(counts: tuple[int, ...], weights: tuple[float, ...], seed: int, epoch: int) -> np.ndarray:
    """The examples of an epoch (from 0) in the order in which they are trained, int64."""
    chosen = []
    for k, (count, size) in enumerate(zip(counts, epoch_sizes(counts, weights), strict=True)):
        if size == 0:
            continue
        index = (epoch * size + np.arange(size)) % count
        if size % count:
            # A fraction of the dataset: the epochs take turns, in an order that is not the file's.
            index = np.random.default_rng([seed, k, 1]).permutation(count)[index]
        chosen.append(sum(counts[:k]) + index)
    return np.random.default_rng([seed, epoch]).permutation(np.concatenate(chosen))


def pack(indices, lengths, world_size: int, max_tokens: int) -> list[list[list[int]]]:
    """Packed rows per rank: `rows[rank][i]` is a list of indices, empty where a rank has nothing to compute.

    Every rank gets the same number of rows. A row holds one example, however long, or several of at most `max_tokens`
    tokens in all; `lengths[index]` is in tokens. The examples go, longest first, each into the emptiest row, so that
    rows are even. The i-th rows of all ranks are similar in cost, because ranks wait for each other there."""
    sizes = np.asarray(lengths[np.asarray(indices, dtype=np.int64)], dtype=np.int64)
    longest_first = np.argsort(-sizes, kind="stable")
    # Two examples of more than half a row share none. At most, each example has a row of its own, however long it is.
    needed = max(math.ceil(int(sizes.sum()) / max_tokens), int((2 * sizes > max_tokens).sum()))
    per_rank = max(1, math.ceil(min(needed, len(sizes)) / world_size))
    while True:
        rows = [[] for _ in range(per_rank * world_size)]
        emptiest = [(0, row) for row in range(len(rows))]
        for place in longest_first:
            tokens, row = emptiest[0]
            if tokens and tokens + sizes[place] > max_tokens:
                break  # Not even the emptiest row has room: try again with more rows.
            rows[row].append(int(indices[place]))
            heapq.heapreplace(emptiest, (tokens + int(sizes[place]), row))
        else:
            break
        per_rank += 1 + per_rank // 64
    rows.sort(key=lambda row: -cost(row, lengths))
    turns = [rows[i : i + world_size] for i in range(0, len(rows), world_size)]
    # Every other turn is reversed, so that no rank gets the largest row of every turn.
    turns = [turn if n % 2 == 0 else turn[::-1] for n, turn in enumerate(turns)]
    return [[sorted(turn[rank]) for turn in turns] for rank in range(world_size)]


def cost(row: list[int], lengths) -> float:
    """Work of a row in tokens: attention grows with the square of a document and equals the rest at about 8k tokens."""
    return sum(float(lengths[i]) * (1 + float(lengths[i]) / 8192) for i in row)


def plan_step(lengths, step: int, seed: int, global_batch_size: int, world_size: int, max_tokens: int):
    """The rows per rank of step `step`, from 1, for a single dataset whose examples have these lengths in tokens."""
    lengths = np.asarray(lengths)
    return pack(step_examples(len(lengths), step, seed, global_batch_size), lengths, world_size, max_tokens)


class Documents:
    """Where the documents of a packed row are: `ends`, a list of their ends; `starts`, 0 and the ends, int32
    (documents + 1,), on the model's device; `lengths` and the `longest` of them, in tokens.

    Neither a tuple nor a tensor: FSDP would move the ends to the GPU, where reading them waits for all queued work, and
    torch.compile would compile a block again for each number of documents."""

    def __init__(self, ends: list[int], starts: torch.Tensor):
        self.ends, self.starts = ends, starts
        self.lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        self.longest = max(self.lengths)


def cp_slice(tokens: int, cp_rank: int, cp_size: int) -> slice:
    """The tokens of a row of `tokens` that rank `cp_rank` computes, of the `cp_size` ranks that share the row."""
    return slice(tokens * cp_rank // cp_size, tokens * (cp_rank + 1) // cp_size)


def collate(examples, row: list[int], device="cpu", cp_rank: int = 0, cp_size: int = 1, multiple: int = 1) -> dict:
    """A packed row as tensors: its documents one after the other, each up to where its last trained token is predicted.

    Returns input_ids and position_ids, (1, tokens) int64, where positions start at 0 in each document; documents, a
    `Documents`; loss_positions, (trained,) int64, the places in the row where a trained token is predicted; targets,
    (trained,) int64, those tokens. A row without documents is one token with one target of -100. If `cp_size` ranks
    share the row, all but `documents` is this rank's slice of it. With `multiple`, a document of padding makes the
    tokens a multiple of it, and targets of -100 there make the targets a multiple of 64."""
    documents = []
    for input_ids, labels in (examples[i] for i in row):
        predicted = np.append(labels[1:], IGNORE_INDEX)  # (tokens,): the label of the next token
        end = np.flatnonzero(predicted != IGNORE_INDEX)[-1] + 1
        documents.append((input_ids[:end], predicted[:end]))
    tokens = sum(len(ids) for ids, _ in documents)
    padding = max(0, cp_size - tokens) if multiple == 1 else multiple - tokens % multiple  # Each rank has a token.
    if padding:
        documents.append((np.zeros(padding, dtype=np.int32), np.full(padding, IGNORE_INDEX)))
    ends = np.cumsum([len(ids) for ids, _ in documents]).tolist()
    mine = cp_slice(ends[-1], cp_rank, cp_size)
    predicted = np.concatenate([predicted for _, predicted in documents])[mine]
    loss_positions = np.flatnonzero(predicted != IGNORE_INDEX)
    if not len(loss_positions):
        loss_positions = np.zeros(1, dtype=np.int64)
    if multiple > 1 and cp_size == 1:
        loss_positions = np.append(loss_positions, np.full(-len(loss_positions) % 64, ends[-1] - 1))

    def tensor(array, dtype=torch.int64):
        result = torch.from_numpy(np.asarray(array)).to(dtype)
        # From pinned memory a GPU copies while the host goes on.
        return result.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else result

    return {
        "input_ids": tensor(np.concatenate([ids for ids, _ in documents])[mine])[None],  # (1, tokens)
        "position_ids": tensor(np.concatenate([np.arange(len(ids)) for ids, _ in documents])[mine])[None],
        "documents": Documents(ends, tensor([0, *ends], torch.int32)),
        "loss_positions": tensor(loss_positions),  # (trained,)
        "targets": tensor(predicted[loss_positions]),  # (trained,)
    }
