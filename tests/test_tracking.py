import json
import sys
import types

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tracking import Tracker, peak_flops

STEP = {
    **{"train/loss": 2.5, "train/grad_norm": 1.25, "train/learning_rate": 1e-4, "train/tokens_per_second": 1234.5},
    **{"train/epoch": 0.5, "train/seconds": 2.0, "train/mfu": 0.375, "train/peak_memory_gib": 3.0},
}


def launch(output_dir, steps, start=0, tensorboard=False, wandb=False, loss=2.5):
    """One launch of a run: it resumes after step `start` and logs the steps up to `steps`."""
    logger = {"tensorboard": {"enabled": tensorboard}, "wandb": {"enabled": wandb, "project": "p", "name": "n"}}
    tracker = Tracker(output_dir, {"seed": 7, "logger": logger, "train": {"profile": None}}, start, 6)
    for step in range(start + 1, steps + 1):
        tracker.log(step, STEP | {"train/loss": loss})
    tracker.close()


def logged(output_dir):
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["train/loss"]) for line in map(json.loads, lines)]


def test_log_writes_one_object_a_line_with_the_step_and_all_metrics(tmp_path, capsys):
    tracker = Tracker(
        tmp_path,
        {"logger": {"tensorboard": {"enabled": False}, "wandb": {"enabled": False}}, "train": {"profile": None}},
        0,
        20,
    )
    tracker.log(0, {"val/loss": 3.0, "val/supervised_tokens": 1200})
    tracker.log(1, STEP)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]  # before any flush
    assert lines[0] == {"step": 0, "val/loss": 3.0, "val/supervised_tokens": 1200}
    assert lines[1] == {"step": 1, **STEP, "train/seconds_left": lines[1]["train/seconds_left"]}
    validation, step = capsys.readouterr().out.splitlines()
    assert all(shown in validation for shown in ("0/20", "3.0000", "1,200"))
    assert all(shown in step for shown in ("1/20", "2.5000", "1.250", "1.00e-04", "1,234", "0.50", "37.5%", "left"))
    tracker.close()


def test_a_resumed_run_has_each_step_once(tmp_path):
    launch(tmp_path, 5)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "train/lo')  # killed within a line
    launch(tmp_path, 6, start=3, loss=1.5)
    assert logged(tmp_path) == [(1, 2.5), (2, 2.5), (3, 2.5), (4, 1.5), (5, 1.5), (6, 1.5)]


def test_a_run_that_begins_again_drops_all_earlier_metrics(tmp_path):
    launch(tmp_path, 3)
    launch(tmp_path, 1, loss=1.5)
    assert logged(tmp_path) == [(1, 1.5)]


def test_tensorboard_shows_the_steps_of_the_last_launch(tmp_path):
    launch(tmp_path, 4, tensorboard=True)
    launch(tmp_path, 5, start=2, tensorboard=True, loss=1.5)  # within the same second
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 2.5), (2, 2.5), (3, 1.5), (4, 1.5), (5, 1.5)
    ]  # fmt: skip
    assert b"seed: 7" in events.Tensors("config/text_summary")[-1].tensor_proto.string_val[0]


def test_tensorboard_shows_texts_with_their_line_breaks(tmp_path, capsys):
    tracker = Tracker(
        tmp_path,
        {"logger": {"tensorboard": {"enabled": True}, "wandb": {"enabled": False}}, "train": {"profile": None}},
        0,
        6,
    )
    tracker.text(2, "samples/1", "question\nanswer")
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (text,) = events.Tensors("samples/1/text_summary")
    assert (text.step, text.tensor_proto.string_val[0]) == (2, b"question  \nanswer")
    assert capsys.readouterr().out == "question\nanswer\n"


@pytest.fixture
def wandb(monkeypatch):
    """A module that stands in for wandb and keeps what it is given."""
    runs, logged = [], []

    def init(project, name, config, id, resume):
        assert (project, name, config["seed"], resume) == ("p", "n", 7, "allow")
        runs.append(id or f"new{len(runs)}")
        return types.SimpleNamespace(id=runs[-1], log=lambda metrics, step: logged.append(step), finish=lambda: None)

    module = types.SimpleNamespace(init=init, runs=runs, logged=logged, Html=str)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_all_launches_of_a_run_are_one_run_of_wandb(tmp_path, wandb):
    for start in (0, 2, 4, 0):
        launch(tmp_path, start + 1, start=start, wandb=True)
    assert wandb.runs == ["new0", "new0", "new0", "new3"]
    assert wandb.logged == [1, 3, 5, 1]


def test_texts_reach_wandb(tmp_path, wandb):
    logger = {"tensorboard": {"enabled": False}, "wandb": {"enabled": True, "project": "p", "name": "n"}}
    Tracker(tmp_path, {"seed": 7, "logger": logger, "train": {"profile": None}}, 0, 6).text(2, "samples/1", "a <b>")
    assert wandb.logged == [2]


def test_a_missing_wandb_is_an_error_with_the_key(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="logger.wandb.enabled"):
        launch(tmp_path, 1, wandb=True)


@pytest.mark.parametrize("name, tera", [("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("NVIDIA L4", 121)])
def test_a_gpu_is_known_by_its_own_name(monkeypatch, name, tera):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == tera * 1e12
