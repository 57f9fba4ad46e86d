"""train_sft.py with a fault of one rank: FAULT=RANK:N:WHAT does WHAT at the start of that rank's N-th step."""

import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import packing  # noqa: E402
import train_sft  # noqa: E402

rank, left, fault = os.environ["FAULT"].split(":")
left, step_examples = int(left), packing.step_examples


def step_examples_with_fault(*arguments):
    """Every step begins with this call."""
    global left
    left -= 1
    if left == 0 and rank == os.environ.get("RANK", "0"):
        if fault == "raise":
            raise IndexError("a mistake in the code")
        elif fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        elif fault == "hang":
            time.sleep(1000)
        elif fault.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, fault))
        elif fault == "STOP":
            output_dir = next(a for a in sys.argv if a.startswith("output_dir=")).removeprefix("output_dir=")
            (Path(output_dir) / "STOP").touch()
    return step_examples(*arguments)


packing.step_examples = step_examples_with_fault
if __name__ == "__main__":
    train_sft.main()
    train_sft.distributed.hard_exit()
