"""What the ranks of a launch do together: process group, collectives, stop signals, failures.

A single process is rank 0 of 1: a sum or a broadcast gives back the value. torchrun ends the other ranks when one has
failed, and the process group's timeout ends a hang; this file sees to it that the reason is printed first.
"""

import datetime
import functools
import json
import os
import signal
import sys
import threading
import time
import traceback

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler


@functools.cache
def store() -> dist.Store:
    """torchrun's key-value store, where ranks meet without the timeout of a collective."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    tcp = dist.TCPStore(address, port, is_master=False, timeout=datetime.timedelta(days=7))
    return dist.PrefixStore(f"sft/{os.environ['TORCHELASTIC_RESTART_COUNT']}", tcp)


def init_process_group(timeout: float):
    """Join the other ranks of the launch; a collective that takes longer than `timeout` seconds is an error."""
    if dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1:
        store().set(f"process/{os.environ['RANK']}", f"{os.environ['GROUP_RANK']} {os.getpid()}")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))


def rank_and_world_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_all(place: str):
    """Wait until all ranks have reached this place, however long it takes: unlike a barrier, it has no timeout."""
    if dist.is_initialized():
        if store().add(f"{place}/ranks", 1) == dist.get_world_size():
            store().set(place, "")
        while not store().check([place]):  # Not `get`, during which no signal handler can run.
            progress()
            time.sleep(0.1)


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def start_copy(tensor: torch.Tensor):
    """Copy a tensor to the host while the GPU goes on. Returns a function that waits for the copy and for nothing that
    the GPU is given to do after it; the function returns the values as a list."""
    copy = tensor.to("cpu", non_blocking=True)
    if not tensor.is_cuda:
        return copy.tolist
    arrived = torch.cuda.current_stream().record_event()
    return lambda: arrived.synchronize() or copy.tolist()


def broadcast_object(value):
    """Rank 0's value, on all ranks."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def all_gather_object(value) -> list:
    """Each rank's value, on all ranks."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def broadcast_modules(modules, device: torch.device):
    """Give all ranks rank 0's parameters and buffers of these modules (not of their children), on this device."""
    for module in modules:
        if dist.get_rank() == 0:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
        else:
            module.to_empty(device=device, recurse=False)
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            dist.broadcast(tensor.detach(), src=0)


def hard_exit(code: int = 0):
    """End this process at once: threads of the process group that outlive the interpreter have aborted processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---- signals, hangs, failures ----------------------------------------------------------------------------------------
last_progress = time.monotonic()
STOP_SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP


def catch_stop_signals(record_reason) -> list[str]:
    """From here on SIGTERM, SIGINT, SIGUSR1 and SIGHUP request a stop instead of ending the process: the names of those
    received are appended to the list that is returned. A second Ctrl-C (or SIGTERM) ends the process. `record_reason`
    is called with the reason where torchrun ends this rank because another one has failed."""
    received, interrupted = [], []

    def handler(number, _):
        if dist.is_torchelastic_launched() and store().check(["failed"]):
            record_reason(json.loads(store().get("failed"))[1])
            os._exit(1)
        name = signal.Signals(number).name
        if interrupted and name in ("SIGINT", "SIGTERM") and time.monotonic() - interrupted[0] > 0.5:
            os._exit(130)
        if name == "SIGINT":  # One Ctrl-C may arrive twice: from the terminal and from torchrun.
            interrupted.append(time.monotonic())
        received.append(name)

    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP.
            signal.signal(number, handler)
    return received


def progress():
    """Note that this rank is making progress, for `report_stalls`."""
    global last_progress
    last_progress = time.monotonic()


def report_stalls(rank: int, timeout: float):
    """Print where the main thread of this rank is whenever it has made no progress for `timeout` seconds. That ends
    nothing: a run that was suspended and continued is not hung. The process group's timeout ends a hang."""

    def watch():
        while True:
            time.sleep(timeout / 50)
            if time.monotonic() - last_progress > timeout:
                stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
                places = " > ".join(f"{os.path.basename(f.filename)}:{f.lineno} in {f.name}" for f in stack[-8:])
                print(f"rank {rank}: no progress for {timeout:g} s, at {places}", file=sys.stderr, flush=True)
                progress()

    progress()
    threading.Thread(target=watch, daemon=True).start()


def fail(error: Exception, record_reason):
    """End this rank with exit code 1, and torchrun the others. The first rank to fail prints why, and each calls
    `record_reason` with that. A user error (ValueError, OSError) is one line, another error a traceback."""
    for number in STOP_SIGNALS:  # This rank ends in a moment, once it has said why.
        signal.signal(number, signal.SIG_IGN)
    rank, reason, details = int(os.environ.get("RANK", 0)), " ".join(str(error).split()), ""
    if not isinstance(error, (ValueError, OSError, FloatingPointError, MemoryError)) or os.environ.get("SFT_TRACEBACK"):
        reason, details = f"rank {rank}: {type(error).__name__}: {reason}", "".join(traceback.format_exception(error))
    if dist.is_torchelastic_launched():
        if isinstance(error, RuntimeError) and dist.is_initialized() and os.path.exists("/proc/self"):
            time.sleep(1)  # If this rank has lost another one, torchrun notices by now that it is gone.
            places = [store().get(f"process/{other}").decode().split() for other in range(dist.get_world_size())]
            here = {str(other): pid for other, (node, pid) in enumerate(places) if node == os.environ["GROUP_RANK"]}
            if killed := [other for other, pid in here.items() if not os.path.exists(f"/proc/{pid}")]:
                reason, details = f"rank {', '.join(killed)} was killed (out of memory?)", ""
        first_rank, reason = json.loads(store().compare_set("failed", "", json.dumps([rank, reason])))
    if not dist.is_torchelastic_launched() or first_rank == rank:
        get_error_handler().record_exception(error)
        print(f"{details}error: {reason}", file=sys.stderr, flush=True)
    record_reason(reason)
    hard_exit(1)
