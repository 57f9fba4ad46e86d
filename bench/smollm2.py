"""The same losses as TRL, in less time: SmolLM2-135M-Instruct on the SQuAD conversations of configs/smollm2.yaml.

python bench/smollm2.py               # 8 steps of 16 conversations with each; bench/README.md has the table

TRL's SFTTrainer is given the tokens and labels of the conversations that ours takes at each step, in the same order. It
gets an environment of its own, as in bench.py. Prints a table of the losses of each step, and the ratio of the speeds.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from bench import ROOT, machine, make_environment

BATCH = 16
OVERRIDES = [f"train.global_batch_size={BATCH}", "train.schedule=constant", "train.warmup_steps=0"]


def main():
    if sys.argv[1:2] == ["worker"]:
        return train_trl(Path(sys.argv[2]), json.loads(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="of each; the first is not timed (8)")
    parser.add_argument("--trl-python", help="a Python that has TRL; none: bench/.venv is made")
    parser.add_argument("--folder", type=Path, default=ROOT / "results/bench-smollm2", help="for data and runs")
    options = parser.parse_args()
    trl_python, folder = options.trl_python or make_environment(), options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    settings = write_batches(folder, options.steps)
    ours = train_ours(folder, options.steps)
    command = [trl_python, Path(__file__).absolute(), "worker", folder, json.dumps(settings)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    trl = [json.loads(line) for line in (folder / "trl.jsonl").open()]
    print("\n| step | tokens | ours: loss | TRL: loss | ours: norm | TRL: norm | ours: s | TRL: s |")
    print("|---" * 8 + "|")
    for step, (a, b) in enumerate(zip(ours, trl, strict=True), 1):
        print(f"| {step} | {a['train/tokens']:,} | {a['train/loss']:.5f} | {b['loss']:.5f} ", end="")
        print(f"| {a['train/grad_norm']:.4f} | {b['grad_norm']:.4f} ", end="")
        print(f"| {a['train/seconds']:.1f} | {b['seconds']:.1f} |")
    tokens, seconds, seconds_trl = (
        sum(row[key] for row in rows[1:])
        for rows, key in ((ours, "train/tokens"), (ours, "train/seconds"), (trl, "seconds"))
    )
    farthest = max(abs(a["train/loss"] / b["loss"] - 1) for a, b in zip(ours, trl, strict=True))
    speed, speed_trl = tokens / seconds, tokens / seconds_trl
    print(f"\nours {speed:,.0f} tokens/s, TRL {speed_trl:,.0f}: {speed / speed_trl:.2f} times as fast")
    print(f"largest relative difference of the losses: {farthest:.1e}; {machine()}, TRL {trl[0]['version']}")


def configuration(folder: Path, steps: int) -> list[str]:
    return [
        "configs/smollm2.yaml", f"output_dir={folder}/run", *OVERRIDES, f"train.max_steps={steps}",
        "checkpoint.every=null", "checkpoint.resume=never", "validation.every=null", "validation.exact_match=0",
        "logger.tensorboard.enabled=false",
    ]  # fmt: skip


def write_batches(folder: Path, steps: int) -> dict:
    """batches.jsonl, the conversations of each step as tokens and labels; returns the settings that both get."""
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    import config
    import data
    import packing
    import tokens

    cfg = config.from_command_line(configuration(folder, steps))
    prepared = tokens.tokenize_splits(cfg, tokens.load_tokenizer(cfg), data.load_mixture(cfg))
    examples = tokens.open_split(prepared, "train", cfg.data)
    with (folder / "batches.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            for i in packing.step_examples(examples.counts, step, cfg.seed, BATCH, examples.weights).tolist():
                input_ids, labels = (array.tolist() for array in examples[i])
                file.write(json.dumps({"input_ids": input_ids, "labels": labels}) + "\n")
    return {"model": cfg.model.name, "steps": steps} | {
        name: getattr(cfg.train, name) for name in ("learning_rate", "weight_decay", "betas", "eps", "clip_grad_norm")
    }


def train_ours(folder: Path, steps: int) -> list[dict]:
    """The metrics of each step."""
    (folder / "run/metrics.jsonl").unlink(missing_ok=True)
    command = [sys.executable, "train_sft.py", *configuration(folder, steps)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)
    return [row for row in map(json.loads, (folder / "run/metrics.jsonl").open()) if "train/loss" in row]


def train_trl(folder: Path, settings: dict):
    """trl.jsonl: loss, norm and seconds of each step."""
    import trl
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds = time.perf_counter() - self.began

        def on_log(self, args, state, control, logs, **__):
            if "loss" in logs:
                row = {"loss": logs["loss"], "grad_norm": logs["grad_norm"], "seconds": self.seconds}
                print(json.dumps(row | {"version": trl.__version__}), file=file, flush=True)

    with (folder / "trl.jsonl").open("w") as file:
        config = trl.SFTConfig(
            output_dir=str(folder / "trl"), report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
            per_device_train_batch_size=1, gradient_accumulation_steps=BATCH, train_sampling_strategy="sequential",
            max_steps=settings["steps"], max_length=None, gradient_checkpointing=False, bf16=False,
            learning_rate=settings["learning_rate"], lr_scheduler_type="constant", adam_beta1=settings["betas"][0],
            adam_beta2=settings["betas"][1], adam_epsilon=settings["eps"], weight_decay=settings["weight_decay"],
            max_grad_norm=settings["clip_grad_norm"],
        )  # fmt: skip
        trl.SFTTrainer(
            AutoModelForCausalLM.from_pretrained(settings["model"], dtype="float32"),
            config,
            train_dataset=load_dataset("json", data_files=str(folder / "batches.jsonl"), split="train"),
            processing_class=AutoTokenizer.from_pretrained(settings["model"]),
            callbacks=[Clock()],
        ).train()


if __name__ == "__main__":
    main()
