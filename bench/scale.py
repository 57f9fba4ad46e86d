"""What the plan of a step costs for up to 10^8 conversations, and how long 1,024 ranks wait for the slowest of them.

python bench/scale.py            # about 5 minutes on 2 CPU cores; 2 GB of disk for the while
python bench/scale.py plan       # or: ranks, tokenise

Lengths are synthetic: log-normal around what SQuAD and OpenAssistant have with Llama's tokenizer.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import packing  # noqa: E402

LIKE = {  # median and spread (of the logarithm) of the tokens of a conversation, and the longest
    "SQuAD": (180, 0.4, 900),
    "OpenAssistant": (450, 0.8, 8192),
}


def lengths_like(name: str, count: int, seed: int = 0) -> np.ndarray:
    median, spread, longest = LIKE[name]
    drawn = np.random.default_rng(seed).lognormal(np.log(median), spread, count)
    return np.clip(drawn, 16, longest).astype(np.int32)


def main():
    parts = {"plan": plan, "ranks": ranks, "tokenise": tokenise}
    if sys.argv[1:2] == ["plan-of"]:
        return plan_of(Path(sys.argv[2]), int(sys.argv[3]))
    for name in sys.argv[1:] or parts:
        parts[name]()


def plan():
    """Each in a process of its own, so that its memory is its own."""
    print("| conversations | first step's plan | another step's plan | memory of the process, above imports |")
    print("|---|---|---|---|")
    for count in (10**5, 10**6, 10**7, 10**8):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lengths"
            with open(path, "wb") as file:
                for part in range(0, count, 10**7):
                    lengths_like("SQuAD", min(10**7, count - part), part).tofile(file)
            done = subprocess.run(
                [sys.executable, __file__, "plan-of", str(path), str(count)], check=True, capture_output=True, text=True
            )
            first, another, memory = json.loads(done.stdout)
            print(f"| {count:,} | {first * 1000:.1f} ms | {another * 1000:.1f} ms | {memory:.0f} MiB |", flush=True)


def plan_of(path: Path, count: int):
    """Prints seconds of the first plan and of another one (512 conversations, 8 ranks, 8,192 tokens), and MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lengths = np.memmap(path, dtype=np.int32, mode="r")
    steps = packing.steps_per_epoch(count, 512)
    took = []
    for step in np.linspace(1, 2 * steps, 41).astype(int).tolist():  # over two epochs
        began = time.perf_counter()
        chosen = packing.step_examples(count, step, 42, 512)
        packing.pack(chosen, lengths, 8, 8192)
        took.append(time.perf_counter() - began)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps([took[0], float(np.median(took[1:])), memory]))


def ranks(world_size: int = 1024, steps: int = 10):
    """Share of the ranks' time that goes in waiting, by `packing.cost`: at the end of a step (DDP), and after each row
    (FSDP, whose ranks gather each layer together). In order: conversation i goes to rank i mod 1,024. At best: the rank
    that has the longest conversation has nothing else to do."""
    print(f"\n{world_size:,} ranks, rows of 8,192 tokens; waiting, with the plan / in order:\n")
    print("| lengths like | global batch | at the end of a step | after each row | at best | plan of a step |")
    print("|---|---|---|---|---|---|")
    for name in LIKE:
        lengths = lengths_like(name, 10**6)
        for batch in (1024, 4096, 16384, 65536):
            waits, took = [], []
            for step in range(1, steps + 1):
                chosen = packing.step_examples(len(lengths), step, 42, batch)
                began = time.perf_counter()
                planned = packing.pack(chosen, lengths, world_size, 8192)
                took.append(time.perf_counter() - began)
                work = packing.cost(chosen, lengths) / world_size  # of a rank, on average
                longest = max(packing.cost([i], lengths) for i in chosen)  # one rank has to do it
                ordered = in_order(chosen, lengths, world_size)
                waits.append([*waiting(planned, lengths), *waiting(ordered, lengths), 1 - work / max(work, longest)])
            step_end, row, step_end_in_order, row_in_order, best = np.mean(waits, axis=0)
            print(
                f"| {name} | {batch:,} | {step_end:.1%} / {step_end_in_order:.1%} | {row:.1%} / {row_in_order:.1%} | "
                f"{best:.1%} | {np.median(took) * 1000:.0f} ms |",
                flush=True,
            )


def in_order(chosen, lengths, world_size: int, max_tokens: int = 8192):
    """Each rank fills its rows with what it is dealt, as it comes."""
    dealt = []
    for rank in range(world_size):
        rows, tokens = [[]], 0
        for i in chosen[rank::world_size]:
            if rows[-1] and tokens + lengths[i] > max_tokens:
                rows.append([])
                tokens = 0
            rows[-1].append(int(i))
            tokens += int(lengths[i])
        dealt.append(rows)
    most = max(len(rows) for rows in dealt)
    return [rows + [[]] * (most - len(rows)) for rows in dealt]


def waiting(rows_of_ranks, lengths) -> tuple[float, float]:
    costs = np.array([[packing.cost(row, lengths) for row in rows] for rows in rows_of_ranks])  # (ranks, rows)
    work = costs.sum() / len(costs)  # of a rank, on average
    return 1 - work / costs.sum(axis=1).max(), 1 - work / costs.max(axis=0).sum()


def tokenise():
    """From a .jsonl file of chats to examples, with the tokenizer and template of the quickstart."""
    import config
    import data

    print("\n| conversations | worker processes | tokenising | conversations/s | second start |\n|---|---|---|---|---|")
    words = np.random.default_rng(0).choice(["one", "two", "red", "blue", "house", "tree", "river", "when"], 200_000)
    cores = len(os.sched_getaffinity(0))
    for count in (22_000, 44_000, 88_000):
        for workers in sorted({1, cores}):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "chats.jsonl"
                with open(path, "w", encoding="utf-8") as file:
                    for i in range(count):
                        said = [" ".join(words[(i * 7 + k) % 199_000 :][:length]) for k, length in ((0, 120), (1, 10))]
                        roles = ("user", "assistant")
                        messages = [{"role": r, "content": s} for r, s in zip(roles, said, strict=True)]
                        file.write(json.dumps({"messages": messages}) + "\n")
                data.huggingface_hub.constants.HF_HOME = folder
                os.sched_setaffinity(0, list(range(workers)))
                overrides = [f"data.dataset={path}", f"output_dir={folder}/run"]
                cfg = config.load("configs/quickstart.yaml", [*overrides, "data.args={validation: 0.01}"])
                took = []
                for _ in range(2):
                    tokenizer = data.load_tokenizer(cfg)
                    began = time.perf_counter()
                    prepared = data.tokenise_splits(cfg, tokenizer, data.load_entries(cfg))
                    for split in ("train", "validation"):
                        data.open_split(prepared, split, cfg.data)
                    took.append(time.perf_counter() - began)
                os.sched_setaffinity(0, list(range(cores)))
            print(f"| {count:,} | {workers} | {took[0]:.1f} s | {count / took[0]:,.0f} | {took[1]:.2f} s |", flush=True)


if __name__ == "__main__":
    main()
