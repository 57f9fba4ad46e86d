"""Which conversations are in step k, and in which row of which rank: pure functions of numbers."""

import heapq
import math

import numpy as np

ROUNDS = 6  # of the Feistel network; four already pass as random (Luby and Rackoff, 1988)


def steps_per_epoch(examples: int, global_batch_size: int) -> int:
    return math.ceil(examples / global_batch_size)


def steps_of_run(counts: list[int], weights: list[float], train) -> tuple[int, int]:
    """(optimizer steps of an epoch, of the run), by a `config.Train`; `counts`, `weights`: see `step_examples`."""
    per_epoch = steps_per_epoch(sum(epoch_sizes(counts, weights)), train.global_batch_size)
    steps = train.max_epochs * per_epoch
    return per_epoch, steps if train.max_steps is None else min(steps, train.max_steps)


def epoch_sizes(counts: list[int], weights: list[float]) -> list[int]:
    """How many conversations of each dataset an epoch has: `weight` times as many as there are."""
    return [
        max(round(count * weight), min(count, 1)) if weight else 0
        for count, weight in zip(counts, weights, strict=True)
    ]


def step_examples(counts, step: int, seed: int, global_batch_size: int, weights=(1.0,)) -> np.ndarray:
    """Indices (int64) of the conversations of step `step`, from 1: a shuffled order per epoch, cut into batches.

    The last batch of an epoch may be smaller. The result depends only on the seed and the step, not on the machine.
    `counts`: the number of conversations, one per dataset for a mixture; `weights`: passes over each dataset per epoch.
    With a fractional weight, an epoch continues in the dataset where the epoch before stopped.
    """
    counts = [counts] if isinstance(counts, int) else counts
    sizes = epoch_sizes(counts, weights)
    epoch, batch = divmod(step - 1, steps_per_epoch(sum(sizes), global_batch_size))
    places = np.arange(batch * global_batch_size, min((batch + 1) * global_batch_size, sum(sizes)))
    drawn = shuffled(places, sum(sizes), seed, epoch)
    chosen = np.empty_like(drawn)
    for part, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        begin = sum(sizes[:part])
        mine = (begin <= drawn) & (drawn < begin + size)
        nth = drawn[mine] - begin + epoch * size  # counted over all epochs
        index = nth % max(count, 1)
        if size % max(count, 1):  # epochs take parts of it in turn: not in the order of the file
            index = shuffled(index, count, seed, 2**32 + part)
        chosen[mine] = sum(counts[:part]) + index
    return chosen


def shuffled(places: np.ndarray, examples: int, seed: int, epoch: int) -> np.ndarray:
    """The indices at these places of the epoch's order: a permutation of range(examples) that is never stored.

    A Feistel network permutes 0..4^half_bits-1; a number that falls outside the range goes through it again ("cycle
    walking", Black and Rogaway, 2002). So a step costs the same for a thousand and for 10^8 conversations.
    """
    half_bits = max(1, math.ceil(math.log2(max(examples, 2)) / 2))
    mask = np.uint64((1 << half_bits) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS, np.uint64)
    result = places.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        left, right = result[outside] >> np.uint64(half_bits), result[outside] & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        result[outside] = (left << np.uint64(half_bits)) | right
        outside = result >= examples
    return result.astype(np.int64)


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every input bit changes every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def pack(indices, lengths, world_size: int, max_tokens: int) -> list[list[list[int]]]:
    """Rows of conversations per rank: `rows[rank][i]` is a list of indices, empty where a rank has nothing to do.

    Every rank gets the same number of rows. A row holds one conversation at least, however long, and otherwise at most
    `max_tokens` tokens. `lengths[index]` is in tokens. Longest first, each into the emptiest row, makes the rows even;
    the i-th rows of all ranks are the most alike, because that is where ranks wait for each other.
    """
    sizes = np.asarray(lengths[np.asarray(indices, dtype=np.int64)], dtype=np.int64)
    longest_first = np.argsort(-sizes, kind="stable")
    # a conversation may be longer than max_tokens: never more rows than conversations
    rounds = max(1, min(math.ceil(int(sizes.sum()) / (max_tokens * world_size)), math.ceil(len(sizes) / world_size)))
    while True:
        rows = [[] for _ in range(rounds * world_size)]
        emptiest = [(0, row) for row in range(len(rows))]
        for place in longest_first:
            tokens, row = emptiest[0]
            if tokens and tokens + sizes[place] > max_tokens:
                break  # not even the emptiest row has room
            rows[row].append(int(indices[place]))
            heapq.heapreplace(emptiest, (tokens + int(sizes[place]), row))
        else:
            break
        rounds += 1
    rows.sort(key=lambda row: -cost(row, lengths))
    turns = [rows[i : i + world_size] for i in range(0, len(rows), world_size)]
    # There and back again, so that no rank gets the largest row of every turn
    turns = [turn if n % 2 == 0 else turn[::-1] for n, turn in enumerate(turns)]
    return [[sorted(turn[rank]) for turn in turns] for rank in range(world_size)]


def slice_of(tokens: int, part: int, parts: int) -> slice:
    """Which tokens of a row of `tokens` are the `part`-th rank's of the `parts` that share it, from 0."""
    return slice(tokens * part // parts, tokens * (part + 1) // parts)


def cost(row: list[int], lengths) -> float:
    """Work of a row in tokens: attention grows with the square of a document and equals the rest at about 8k tokens."""
    return sum(float(lengths[i]) * (1 + float(lengths[i]) / 8192) for i in row)


def plan_step(lengths, step: int, seed: int, global_batch_size: int, world_size: int, max_tokens: int):
    """Rows per rank for step `step`, from 1: see `step_examples` and `pack`. `lengths`: tokens of each conversation."""
    lengths = np.asarray(lengths)
    return pack(step_examples(len(lengths), step, seed, global_batch_size), lengths, world_size, max_tokens)
