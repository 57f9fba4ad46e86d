"""What the ranks of a run do together. A process on its own is rank 0 of 1: a barrier returns at once, and a sum or a
broadcast gives back the value.

torchrun starts the ranks; until they have a process group they meet at its store.
"""

import datetime
import os
import sys

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(days=1)  # of a group: hangs are the watchdog's business, which names the rank


def from_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def store() -> dist.TCPStore:
    """A connection to torchrun's store. One per thread: a get that waits blocks its connection."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=datetime.timedelta(days=7))


def start_group():
    """The process group of all ranks."""
    if from_torchrun() and int(os.environ["WORLD_SIZE"]) > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)


def rank_and_size() -> tuple[int, int]:
    """(rank, number of ranks) of the process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def all_sum(value: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def from_rank_0(value):
    """Rank 0's value, on all ranks."""
    told = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    return told[0]


def from_all(value) -> list:
    """Each rank's value, on all ranks."""
    told = [value]
    if dist.is_initialized():
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, value)
    return told


def leave():
    """End this process, which has written everything. (Threads of the process group that outlive the interpreter have
    aborted processes that were done.)"""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
