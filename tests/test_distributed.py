"""Ranks of which one fails, hangs, is killed, is suspended, or is requested to stop."""

import os
import re
import signal
import time

import pytest
from running import HOME, assert_same_run, metrics, run, run_as_user, start_in_fork, state, wait_for

import checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("1:5:raise", "error: rank 1: IndexError: a mistake in the code"),
        ("1:5:SIGKILL", "error: rank 1 was killed"),
        ("0:5:SIGKILL", "error: rank 0 was killed"),
    ],
)
def test_a_rank_that_fails_or_is_killed_ends_all_with_its_reason(tmp_path, two_epochs, fault, reason):
    arguments, undisturbed = two_epochs
    out, began = tmp_path / "out", time.monotonic()
    arguments = [*arguments, f"output_dir={out}"]
    start = run if "raise" in fault else run_as_user
    output = start(*arguments, processes=2, expect=1, fault=fault)
    assert time.monotonic() - began < 60  # Of which the imports of a busy machine take most.
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and errors[0].startswith(reason), output
    assert state(out)["state"] == "failed" and f"error: {state(out)['reason']}".startswith(reason)
    assert 1 <= checkpoint.step_of(checkpoint.newest_complete(out)) <= 4
    if fault == "1:5:SIGKILL":  # and nothing is lost
        run(*arguments, processes=2)
        assert metrics(out) == pytest.approx(metrics(undisturbed), rel=1e-5)


def test_a_hang_ends_the_run_and_shows_where_each_rank_stands(tmp_path, two_epochs):
    arguments, _ = two_epochs
    out = tmp_path / "out"
    output = run_as_user(*arguments, f"output_dir={out}", "cluster.hang_timeout=6", processes=2, expect=1,
                         fault="1:3:hang")  # fmt: skip
    assert re.search(r"^rank 1: no progress for 5.4 s, at .* in step_examples_with_fault", output, re.MULTILINE), output
    assert re.search(r"^rank 0: no progress for 5.4 s, at .*train_sft.py:\d+ in ", output, re.MULTILINE), output
    assert output.count("\nerror:") == 1 and state(out)["state"] == "failed"


def test_a_run_that_was_suspended_and_continued_finishes(tmp_path, two_epochs):
    arguments, undisturbed = two_epochs
    out = tmp_path / "out"
    arguments = [*arguments, f"output_dir={out}", "cluster.hang_timeout=2"]
    pid = start_in_fork(arguments, HOME, tmp_path / "log", "0:3:SIGSTOP")
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    time.sleep(5)
    os.kill(pid, signal.SIGCONT)
    assert wait_for(pid) == 0 and state(out)["state"] == "finished", (tmp_path / "log").read_text()
    assert_same_run(out, undisturbed)


def test_a_signal_to_any_rank_saves_the_step_of_all_and_exits_with_0(tmp_path, two_epochs):
    arguments, _ = two_epochs
    out, other = tmp_path / "out", tmp_path / "other"
    run(*arguments, f"output_dir={other}", processes=2)
    for step, fault in enumerate(["1:1:SIGUSR1", "0:1:SIGTERM", "1:1:SIGINT", "0:1:SIGHUP"], start=1):
        output = run(*arguments, f"output_dir={out}", processes=2, fault=fault)
        assert f"stopped after step {step} (" in output
        assert state(out)["state"] == "stopped" and state(out)["step"] == step
    run(*arguments, f"output_dir={out}", processes=2)
    assert_same_run(out, other)


def test_ctrl_c_saves_and_stops_and_a_second_one_ends_at_once(tmp_path, two_epochs):
    arguments, _ = two_epochs
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = [*arguments, f"output_dir={out}", "train.max_epochs=200", "cluster.gpus_per_node=2"]
    environment = {"HF_HOME": HOME, "HF_HUB_OFFLINE": 1, "OMP_NUM_THREADS": 1}  # of the ranks

    def at_step(step):
        for _ in range(1200):
            if log.exists() and f"\nstep {step}/" in log.read_text():
                return
            time.sleep(0.05)

    pid = start_in_fork(arguments, HOME, log, new_session=True, **environment)
    at_step(3)
    os.killpg(pid, signal.SIGINT)  # As a terminal does.
    assert wait_for(pid) == 0, log.read_text()
    assert state(out)["state"] == "stopped" and state(out)["step"] >= 3

    # A rank hangs, so there is no step after which it could save.
    pid = start_in_fork(arguments, HOME, log, "1:3:hang", new_session=True, **environment)
    at_step(state(out)["step"] + 2)
    os.killpg(pid, signal.SIGINT)
    time.sleep(3)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.killpg(pid, signal.SIGINT)
    began = time.monotonic()
    assert wait_for(pid) != 0
    assert time.monotonic() - began < 10
    assert checkpoint.newest_complete(out) is not None
