"""The scripts as a user runs them, or in forks of this process, and what a run left behind."""

import contextlib
import faulthandler
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import torch
import torch.distributed as dist
import torch.utils.tensorboard  # noqa: F401 (for the forks)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parent.parent
TEMPORARY = tempfile.TemporaryDirectory()
HOME = Path(TEMPORARY.name)  # HF_HOME of all runs, so that the same conversations are tokenized once


def gpus() -> list[str]:
    """What may be in CUDA_VISIBLE_DEVICES, without a call that would keep forks of this process from them."""
    visible, there = os.environ.get("CUDA_VISIBLE_DEVICES"), len([*Path("/dev").glob("nvidia[0-9]*")])
    return [name for name in visible.split(",") if name] if there and visible is not None else [*map(str, range(there))]


GPUS = gpus()


def script(name, *arguments, processes=1, expect=0, said=None, **environment):
    """(standard output, standard error) of a script, from the repository's folder, one thread a process, without a Hub.
    `said`: its standard input."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*(command if processes > 1 else [sys.executable]), name, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, input=said, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout, done.stderr


def call(main, *arguments, expect=0, said="", home=None):
    """As `script` of one process, but in this one, which has everything loaded: `main` is the script's."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    constants = huggingface_hub.constants
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", [main.__module__, *map(str, arguments)]),
        mock.patch.object(sys, "stdin", io.StringIO(said)),
        mock.patch.object(constants, "HF_HUB_OFFLINE", True),
        mock.patch.object(constants, "HF_HOME", str(home or constants.HF_HOME)),
    ):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
    assert code == expect, out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()


def run_as_user(*arguments, processes=1, expect=0, fault=None, **environment):
    """All that a training says, started by torchrun if there is more than one process; `fault`: see
    train_with_fault.py."""
    name, fault = ("tests/train_with_fault.py", fault) if fault else ("train_sft.py", "-1:0:")
    environment |= {"HF_HOME": str(HOME), "FAULT": fault}
    return "".join(script(name, *arguments, processes=processes, expect=expect, **environment))


def run(*arguments, processes=1, expect=0, fault=None, name="tests/train_with_fault.py"):
    """The same, in forks of this process, which have everything loaded and torchrun's environment variables: takes
    seconds less. `name`: of the script."""
    environments = [{}]
    if processes > 1:
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        group = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "GROUP_RANK": 0}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
        group |= {"TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_USE_AGENT_STORE": True}
        environments = [group | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        pids = [start_in_fork(arguments, HOME, log, fault, name=name, **environment) for environment in environments]
        if processes > 1:  # after the forks: its thread may hold a lock of the C library, which they would never get
            store = dist.TCPStore(  # noqa: F841 (as long as the ranks live)
                "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
            )
        codes = [wait_for(pid) for pid in pids]
        said = log.read_text()
    assert max(codes) == expect and {*codes} <= {0, expect}, said
    return said


def metrics(output_dir, name="train/loss"):
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def start_in_fork(
    arguments, home: Path, log: Path, fault=None, kill_at_event=None, name="tests/train_with_fault.py", root=ROOT,
    new_session=False, **environment,
) -> int:  # fmt: skip
    """A training in a fork of this process. Returns its pid. `home`: HF_HOME; `kill_at_event`: (folder, n), -9 at the
    n-th change of a file there; `name`: the script, in the folder `root`, whose files it imports; `new_session`: it
    leads a process group of its own, as the foreground of a terminal does."""
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.stdout = sys.stderr = open(1, "w", closefd=False)
        faulthandler.dump_traceback_later(200, exit=True)  # where it hangs
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
        torch.set_num_threads(1)
        if new_session:
            os.setsid()
        os.chdir(root)
        if root != ROOT:
            sys.path.insert(0, str(root))
            for file in root.glob("*.py"):
                sys.modules.pop(file.stem, None)
        os.environ.update({name: str(value) for name, value in environment.items()}, FAULT=fault or "-1:0:")
        huggingface_hub.constants.HF_HOME, huggingface_hub.constants.HF_HUB_OFFLINE = str(home), True
        sys.argv = [name, *map(str, arguments)]
        if kill_at_event:
            sys.addaudithook(killer(*kill_at_event))
        runpy.run_path(str(root / name), run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.stdout.flush()
        os._exit(code)


def killer(folder: Path, left: int):
    def hook(event, arguments):
        nonlocal left
        if event in ("open", "os.rename", "os.mkdir", "os.remove") and str(arguments[0]).startswith(str(folder)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def wait_for(pid: int) -> int:
    """Its exit code, within five minutes."""
    for _ in range(6000):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    raise TimeoutError(f"process {pid} has not ended; killed")


def state(output_dir):
    return json.loads((output_dir / "status.json").read_text())


def assert_same_run(output_dir, other):
    """Equal parameters to the last bit, equal metrics, each step there once."""
    a, b = (AutoModelForCausalLM.from_pretrained(folder / "model").state_dict() for folder in (output_dir, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)
    for name in ("train/loss", "train/grad_norm", "train/learning_rate", "val/loss"):
        assert metrics(output_dir, name) == metrics(other, name)
    steps = [json.loads(line)["step"] for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in (other / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(output_dir / "tensorboard"), purge_orphaned_data=True).Reload()
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert len(events.Scalars("train/loss")) == len(shown)
    assert shown == pytest.approx(metrics(other), rel=1e-6)
