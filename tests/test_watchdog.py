"""Two processes of which one fails, hangs, is killed or is asked to stop."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from running import ROOT, assert_same_run, metrics, run, run_as_user, state

import checkpoint


@pytest.mark.parametrize(
    "fault, said",
    [
        ("1:3:raise", "error: rank 1: IndexError: a mistake in the code"),
        ("1:3:SIGKILL", r"error: rank 1 \(process \d+ on .*\) at .*: ended without a word"),
        ("0:3:SIGKILL", r"error: rank 0 \(process \d+ on .*\) at .*: ended without a word"),
        (
            "1:3:hang",
            r"error: no progress for 4 s .*: rank 1 \(.*\) at row 1 of 1 after 2 steps, .* in clip_with_fault",
        ),
        ("1:3:SIGSTOP", r"error: rank 1 \(.*\) at .*: no sign of life for \d+ s"),
    ],
)
def test_a_rank_that_fails_hangs_or_is_gone_ends_all_within_seconds_and_is_named(tmp_path, two_epochs, fault, said):
    arguments, undisturbed = two_epochs
    out, began = tmp_path / "out", time.monotonic()
    arguments = [*arguments, f"output_dir={out}", "cluster.hang_timeout=4"]
    output = run_as_user(out, *arguments, processes=2, expect=1, fault=fault)
    assert time.monotonic() - began < 45
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and re.match(said, errors[0]), output
    assert state(out)["state"] == "failed" and re.match(said, f"error: {state(out)['reason']}")
    assert state(out)["step"] == 2 and checkpoint.newest_whole(out).name in ("step_00000001", "step_00000002")
    if fault == "1:3:SIGKILL":  # and nothing is lost
        run(out, *arguments, processes=2)
        assert metrics(out) == pytest.approx(metrics(undisturbed), rel=1e-5)


def test_a_single_process_that_hangs_ends_too(tmp_path, two_epochs):
    arguments, _ = two_epochs
    out = tmp_path / "out"
    output = run_as_user(out, *arguments, f"output_dir={out}", "cluster.hang_timeout=3", expect=1, fault="0:3:hang")
    assert re.search(r"error: no progress for 3 s .*: at row 1 of 1 after 2 steps, .* in clip_with_fault", output)
    assert state(out)["state"] == "failed"


def test_two_threads_of_a_rank_that_end_the_run_say_one_thing(tmp_path):
    code = f"""
import threading, time, watchdog
dog = watchdog.Watchdog(0, 1, 100)
dog.output_dir, quietly = {str(tmp_path)!r}, dog.quietly
dog.quietly = lambda *arguments: (time.sleep(0.3), quietly(*arguments))
threading.Thread(target=dog.end, args=(1, "failed", "error: a rank is gone")).start()
time.sleep(0.1)
dog.end(1, "failed", "error: a consequence")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr == "error: a rank is gone\n"
    assert state(tmp_path)["reason"] == "a rank is gone"


def test_a_signal_to_any_rank_saves_the_step_of_all_and_ends_with_0(tmp_path, two_epochs):
    arguments, _ = two_epochs
    out, other = tmp_path / "out", tmp_path / "other"
    run(other, *arguments, f"output_dir={other}", processes=2)
    for step, fault in enumerate(["1:1:SIGUSR1", "0:1:SIGTERM", "1:1:SIGINT", "0:1:STOP"], start=1):
        said = run_as_user(out, *arguments, f"output_dir={out}", processes=2, fault=fault)
        assert f"stopped after step {step} (" in said and "the same command goes on from there" in said
        assert state(out)["state"] == "stopped" and state(out)["step"] == step
    run(out, *arguments, f"output_dir={out}", processes=2)
    assert_same_run(out, other)


def test_ctrl_c_stops_and_saves_and_a_second_one_ends_at_once(tmp_path, two_epochs):
    arguments, _ = two_epochs
    out = tmp_path / "out"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}

    def started(*more, **environment_too):
        command = [sys.executable, "tests/train_with_fault.py", *arguments, "cluster.gpus_per_node=2", *more]
        return subprocess.Popen(
            command, cwd=ROOT, env={**environment, **environment_too}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def at_step(process, step):
        for line in process.stdout:
            if line.startswith(f"step {step}/"):
                return

    more = [f"output_dir={out}", "train.max_epochs=200"]
    process = started(*more, FAULT="-1:0:")
    at_step(process, 3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the launcher and to both workers
    assert process.wait(60) == 0, process.stdout.read()
    assert state(out)["state"] == "stopped" and state(out)["step"] >= 3

    process = started(*more, FAULT=f"1:{3}:hang")  # there is no step after which it could save
    at_step(process, state(out)["step"] + 2)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(3)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    began = time.monotonic()
    assert process.wait(60) != 0
    assert time.monotonic() - began < 10
    assert checkpoint.newest_whole(out) is not None
