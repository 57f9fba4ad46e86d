import time

import numpy as np
import pytest

import config
import packing

LENGTHS = np.random.default_rng(0).integers(5, 400, 101)


@pytest.mark.parametrize("examples", [1, 2, 3, 64, 1000])
def test_an_epoch_has_each_example_once_in_an_order_of_its_own(examples):
    orders = [packing.step_examples(examples, step, 42, examples).tolist() for step in (1, 2)]
    assert all(sorted(order) == list(range(examples)) for order in orders)
    if examples > 10:
        assert orders[0] != orders[1] != list(range(examples))
        assert orders[0] != packing.step_examples(examples, 1, 43, examples).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
@pytest.mark.parametrize("max_tokens", [1, 300, 8192])
def test_each_step_has_the_same_conversations_on_any_machine(world_size, max_tokens):
    for step in (1, 7, 8):
        rows = packing.plan_step(LENGTHS, step, 42, 16, world_size, max_tokens)
        assert len(rows) == world_size and len({len(rank) for rank in rows}) == 1
        planned = sorted(i for rank in rows for row in rank for i in row)
        assert planned == sorted(packing.step_examples(101, step, 42, 16).tolist())
        assert all(len(row) <= 1 or LENGTHS[row].sum() <= max_tokens for rank in rows for row in rank)


def test_the_last_batch_of_an_epoch_is_smaller_and_used():
    train = config.Train(global_batch_size=16, max_epochs=2, max_steps=None)
    assert packing.steps_of_run([101], [1.0], train) == (7, 14)
    assert len(packing.step_examples(101, 7, 42, 16)) == 5
    seen = np.concatenate([packing.step_examples(101, step, 42, 16) for step in range(1, 8)])
    assert sorted(seen.tolist()) == list(range(101))


def test_the_shorter_of_steps_and_epochs_ends_the_run_and_is_named():
    for epochs, limit, steps, ends in (
        (2, None, 14, ""),
        (None, 60, 60, ""),
        (2, 60, 14, "epochs"),
        (9, 60, 60, "steps"),
    ):
        train = config.Train(global_batch_size=16, max_epochs=epochs, max_steps=limit, warmup_steps=14)
        assert packing.steps_of_run([101], [1.0], train) == (7, steps)
        notes = " ".join(packing.notes_on_length(train, steps))
        assert f"train.max_{ends}" in notes if ends else "ends the run" not in notes
        assert ("warmup_steps" in notes) == (steps == 14)


def test_rows_are_filled_evenly():
    lengths = np.random.default_rng(1).integers(20, 1000, 5000)
    rows = packing.pack(np.arange(5000), lengths, 8, 8192)
    tokens = [sum(int(lengths[row].sum()) for row in rank) for rank in rows]
    assert max(tokens) / min(tokens) < 1.01
    assert sum(tokens) / (8192 * sum(len(rank) for rank in rows)) > 0.95


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_there_are_never_more_rows_than_conversations_need(world_size):
    rows = packing.pack(np.arange(101), LENGTHS, world_size, 1)
    assert len(rows[0]) == -(-101 // world_size)


def test_many_conversations_of_which_few_share_a_row_are_packed_at_once():
    lengths = np.full(6000, 4200)
    began = time.monotonic()
    assert len(packing.pack(np.arange(6000), lengths, 2, 8192)[0]) == 3000  # none shares a row
    assert len(packing.pack(np.arange(6000), lengths - 1400, 2, 8192)[0]) < 1.02 * 1500  # two share one
    assert time.monotonic() - began < 5  # with one more row at each trial: a minute


def test_a_mixture_has_each_dataset_as_often_as_its_weight_says():
    counts, weights = [10, 7, 5], [2, 0.5, 0]
    assert packing.epoch_sizes(counts, weights) == [20, 4, 0]
    steps, _ = packing.steps_of_run(counts, weights, config.Train(global_batch_size=5))
    drawn = [
        np.concatenate(
            [packing.step_examples(counts, epoch * steps + step, 3, 5, weights) for step in range(1, steps + 1)]
        )
        for epoch in range(7)
    ]
    for epoch in drawn:
        assert np.bincount(epoch, minlength=22)[:10].tolist() == [2] * 10 and len(epoch) == 24 and epoch.max() < 17
        assert len({*epoch[epoch >= 10].tolist()}) == 4
    over_all = np.bincount(np.concatenate(drawn), minlength=22)[10:17]  # 28 of 7: each four times
    assert over_all.tolist() == [4] * 7
    halves = [{*epoch[epoch >= 10].tolist()} for epoch in drawn]
    assert halves[0] != {10, 11, 12, 13}  # not as the file is sorted
    again = packing.step_examples(counts, 9, 3, 5, weights)
    assert again.tolist() == packing.step_examples(counts, 9, 3, 5, weights).tolist()


def test_one_dataset_of_weight_one_is_no_mixture():
    assert (packing.step_examples([101], 9, 42, 16, [1.0]) == packing.step_examples(101, 9, 42, 16)).all()
