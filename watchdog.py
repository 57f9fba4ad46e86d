"""A thread on each rank that receives signals, and ends the run within seconds if a rank fails, hangs or is gone."""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import torch.distributed as dist

import checkpoint
import ranks

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
GONE_AFTER = 60  # seconds without a sign of life from a process: stopped, swapped out, or its machine is dead
GONE = "ended without a word, as a killed process does (out of memory?)"
CONSEQUENCE = re.compile(
    r"\b(gloo|nccl|connection (closed|reset|refused)|broken pipe|socket|tcpstore)\b", re.IGNORECASE
)


class Watchdog:
    """`asked`: the signals that asked this rank to stop. `may_stop_at_once`: there is nothing to save yet, so that a
    signal ends the run. `output_dir`: where a failure is written down, once the folder is this run's. `step`: the
    optimizer steps done. All ranks call `at` with the same places in the same order.
    """

    def __init__(self, rank: int, world_size: int, hang_timeout: float):
        self.rank, self.world_size, self.hang_timeout = rank, world_size, hang_timeout
        self.asked, self.may_stop_at_once, self.output_dir, self.step = [], True, None, None
        self.count, self.place, self.since, self.watching = 0, "start", time.monotonic(), False
        self.main_thread, self.parent = threading.get_ident(), os.getppid()
        self.lock, self.closed, self.ending = threading.Lock(), False, threading.Lock()
        self.store = None
        if ranks.from_torchrun():
            run, attempt = os.environ["TORCHELASTIC_RUN_ID"], os.environ["TORCHELASTIC_RESTART_COUNT"]
            self.prefix = f"sft/{run}/{attempt}/"
            self.store = ranks.store()
            self.give_beat(self.store)
            threading.Thread(target=self.watch, daemon=True).start()
        else:
            threading.Thread(target=self.watch_alone, daemon=True).start()
        self.hear_signals()

    # ---- what the main thread calls ----

    def at(self, place: str):
        """Note what this rank is about to do, as "row 3 of 8": the hung rank is the one that got least far."""
        self.count, self.place, self.since = self.count + 1, place, time.monotonic()

    def alive(self):
        """Note progress that `at` does not see, as while waiting for the disk."""
        self.since = time.monotonic()

    def fail(self, message: str, error: BaseException):
        """End the run on all ranks with this message, exit code 1; the first rank to call it is the one that speaks."""
        if self.store and CONSEQUENCE.search(f"{type(error).__name__} {error}"):
            message = self.cause() or message  # this rank lost another one: its reason comes first
        self.end(1, "failed", message)

    def close(self):
        """This rank is done; its silence means nothing any more."""
        with self.lock:
            self.watching, self.closed = False, True
        if self.store:
            self.quietly(self.give_beat, self.store)

    # ---- the end ----

    def end(self, code: int, state: str, message: str):
        self.ending.acquire()  # never released: one thread ends the process, and the others wait for that
        mine = json.dumps({"code": code, "by": self.rank})
        if self.store:
            said = self.quietly(self.store.compare_set, f"{self.prefix}end", "", mine)
            if said is not None and said.decode() != mine:
                time.sleep(1)  # the other one writes down why
                os._exit(json.loads(said)["code"])
        print(message, file=sys.stderr if code else sys.stdout, flush=True)
        if self.output_dir is not None:
            reason = message.strip().splitlines()[-1].removeprefix("error: ")
            self.quietly(checkpoint.write_status, Path(self.output_dir), state, self.step, reason)
        os._exit(code)

    def quietly(self, function, *arguments):
        try:
            return function(*arguments)
        except (OSError, RuntimeError):  # the launcher's store is gone, or the disk: what is left is to end
            return None

    def cause(self) -> str | None:
        """What a rank that lost its connection can say about why: another's message, or who is silent."""
        before = [self.beat_of(rank) for rank in range(self.world_size)]
        for _ in range(20):
            if self.quietly(self.store.check, [f"{self.prefix}end"]):
                return None
            time.sleep(0.25)
        silent = [rank for rank in range(self.world_size) if before[rank] == self.beat_of(rank) != {}]
        if not silent:
            return None
        names = "; ".join(describe(rank, before[rank]) for rank in silent if rank != self.rank)
        return f"error: {names}: {GONE}"

    # ---- threads ----

    def hear_signals(self):
        """Through a pipe, so that they are heard while the main thread waits inside a collective."""
        pipe, write = os.pipe()
        os.set_blocking(write, False)
        for name in SIGNALS:
            signal.signal(getattr(signal, name), lambda *_: None)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=forget_signals)
        threading.Thread(target=self.listen, args=(pipe,), daemon=True).start()

    def listen(self, pipe: int):
        interrupted = None
        while True:
            for number in os.read(pipe, 64):
                name = signal.Signals(number).name
                # A second Ctrl-C, which torchrun passes on as SIGTERM (the first may come twice, from the terminal too)
                if name in ("SIGINT", "SIGTERM") and interrupted and time.monotonic() - interrupted > 0.5:
                    os._exit(130)
                if name == "SIGINT":
                    interrupted = interrupted or time.monotonic()
                if name in SIGNALS:
                    self.asked.append(name)
                    if self.may_stop_at_once:
                        self.end(0, "stopped", f"stopped by {name} at step {self.step or 0}, with nothing to save")

    def watch(self):
        store, neighbour = ranks.store(), (self.rank + 1) % self.world_size
        seen, seen_at, last = None, time.monotonic(), time.monotonic()
        while True:
            time.sleep(0.5)
            if os.getppid() != self.parent:
                os._exit(1)  # torchrun is gone: somebody may start the run again beside this process
            try:
                now = time.monotonic()
                if store.check([f"{self.prefix}end"]):
                    said = json.loads(store.get(f"{self.prefix}end"))
                    if said["by"] != self.rank:
                        time.sleep(1)  # so that the message is the first thing to be read
                        os._exit(said["code"])
                self.give_beat(store)
                beat = self.beat_of(neighbour, store)
                if beat != seen or now - last > 10:  # (this process slept itself)
                    seen, seen_at = beat, now
                last = now
                ours = beat and beat["node"] == os.environ["GROUP_RANK"]  # started by the same torchrun
                if ours and not is_running(beat["pid"]):
                    self.end(1, "failed", f"error: {describe(neighbour, beat)}: {GONE}")
                patience = min(GONE_AFTER, self.hang_timeout) * (1 if self.watching else 10)  # reading data is one call
                if self.world_size > 1 and beat and now - seen_at > patience:
                    if ours:
                        self.quietly(os.kill, beat["pid"], signal.SIGKILL)  # torchrun would wait for it
                    silence = f"no sign of life for {now - seen_at:.0f} s; is it stopped, or its machine gone?"
                    self.end(1, "failed", f"error: {describe(neighbour, beat)}: {silence}")
                if self.hangs():
                    self.name_the_hung(store)
            except (dist.DistError, RuntimeError, OSError):
                time.sleep(5)  # torchrun's store is gone, and torchrun with it; on its own machine that is seen above
                self.store = None
                self.end(1, "failed", "error: the connection to torchrun on the first machine is lost")

    def watch_alone(self):
        while True:
            time.sleep(0.5)
            if self.hangs():
                beat = self.beat()
                self.end(1, "failed", f"error: {self.no_progress()}: at {beat['place']}, {beat['line']}")

    def hangs(self) -> bool:
        return self.watching and time.monotonic() - self.since > self.hang_timeout

    def no_progress(self) -> str:
        return f"no progress for {self.hang_timeout:.0f} s (cluster.hang_timeout)"

    def give_beat(self, store):
        with self.lock:  # nothing is said after "done"
            store.set(f"{self.prefix}beat/{self.rank}", "done" if self.closed else json.dumps(self.beat()))

    def beat(self) -> dict:
        """A sign of life: where this rank is, since when, and in which line."""
        now = time.monotonic()
        frames = traceback.extract_stack(sys._current_frames().get(self.main_thread))
        folder = str(Path(__file__).parent)
        ours = [f for f in frames if os.path.dirname(f.filename) == folder]
        lines = [f"{os.path.basename(f.filename)}:{f.lineno} in {f.name}" for f in (*ours[-1:], *frames[-1:])]
        return {
            "at": now,
            "host": socket.gethostname(),
            "node": os.environ.get("GROUP_RANK"),
            "pid": os.getpid(),
            "count": self.count,
            "place": self.place if self.step is None else f"{self.place} after {self.step} steps",
            "stalled": round(now - self.since, 1) if self.watching else 0,
            "line": " > ".join(dict.fromkeys(lines)),
        }

    def beat_of(self, rank: int, store=None) -> dict:
        """The last sign of life of a rank; {} where it never gave one, or is done."""
        store, name = store or self.store, f"{self.prefix}beat/{rank}"
        text = store.get(name).decode() if store.check([name]) else "done"
        return {} if text == "done" else json.loads(text)

    def name_the_hung(self, store):
        beats = {rank: beat for rank in range(self.world_size) if (beat := self.beat_of(rank, store))}
        least = min(beat["count"] for beat in beats.values())
        behind = [rank for rank, beat in beats.items() if beat["count"] == least]
        if any(beats[rank]["stalled"] < self.hang_timeout for rank in behind):
            return  # slow, but not hung
        names = "; ".join(f"{describe(rank, beats[rank])}, {beats[rank]['line']}" for rank in behind[:8])
        others = "" if len(behind) == len(beats) else "; the others wait for it"
        self.end(1, "failed", f"error: {self.no_progress()}: {names}{others}")


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def describe(rank: int, beat: dict) -> str:
    return f"rank {rank} (process {beat['pid']} on {beat['host']}) at {beat['place']}"


def forget_signals():
    """In a forked child: its signals are not the run's, nor is the pipe."""
    signal.set_wakeup_fd(-1)
    for name in SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
