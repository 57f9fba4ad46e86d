"""train_sft.py with a fault of one rank: FAULT=RANK:N:WHAT does WHAT in that rank's N-th optimizer step."""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_sft  # noqa: E402

rank, left, what = os.environ["FAULT"].split(":")
left, clip = int(left), train_sft.clip


def clip_with_fault(*arguments):
    global left
    left -= 1
    if left == 0 and rank == os.environ.get("RANK", "0"):
        if what == "raise":
            raise IndexError("a mistake in the code")
        elif what == "hang":
            time.sleep(1000)
        elif what.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, what))
            time.sleep(0.2)  # until it is heard
        elif what == "STOP":
            output_dir = next(a for a in sys.argv if a.startswith("output_dir=")).removeprefix("output_dir=")
            (Path(output_dir) / "STOP").touch()
    return clip(*arguments)


train_sft.clip = clip_with_fault
if __name__ == "__main__":
    train_sft.main()
    sys.stdout.flush()
    os._exit(0)
