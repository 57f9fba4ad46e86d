"""The same losses on any machine: 50 steps of SQuAD, two epochs, float32 on the CPU, over ranks and strategies.

python tests/same_curve.py        # about 5 minutes on 2 CPU cores; SQuAD comes from the Hub

Each run is compared with one rank: the largest relative difference of train/loss, train/grad_norm and val/loss over
all steps (to be at most 1e-5), and the distance of the last parameters in parts of the whole update (at most 1e-4).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import config  # noqa: E402
import data  # noqa: E402
import model as modeling  # noqa: E402

RUNS = {  # ranks, overrides
    "1 rank": (1, []),
    "2 ranks, DDP": (2, ["parallel.strategy=ddp"]),
    "4 ranks, DDP": (4, ["parallel.strategy=ddp"]),
    "2 ranks, FSDP": (2, ["parallel.strategy=fsdp"]),
    "4 ranks, FSDP": (4, ["parallel.strategy=fsdp"]),
    "4 ranks, FSDP, 2 x 2": (4, ["parallel.strategy=fsdp", "parallel.replicas=2"]),
    "2 ranks share rows": (2, ["parallel.context=2"]),
    "4 ranks, FSDP, 2 share rows": (4, ["parallel.context=2", "parallel.strategy=fsdp"]),
    "rows of 300 tokens": (1, ["train.max_tokens_per_micro_batch=300"]),
    "rows of 1,024 tokens": (1, ["train.max_tokens_per_micro_batch=1024"]),
    "rows of 300 tokens, 4 ranks, FSDP": (4, ["train.max_tokens_per_micro_batch=300", "parallel.strategy=fsdp"]),
    "one document a row": (1, ["train.max_tokens_per_micro_batch=1"]),
    "activation checkpointing": (1, ["model.activation_checkpointing=true"]),
    "activation checkpointing, 2 ranks, FSDP": (
        2,
        ["model.activation_checkpointing=true", "parallel.strategy=fsdp"],
    ),
    "1 rank again": (1, []),
}


def main():
    folder = ROOT / "results/same_curve"
    subprocess.run(["rm", "-rf", folder], check=True)
    folder.mkdir(parents=True)
    rows = data.Squad().formatted_ds
    for split, count in (("train", 196), ("validation", 40)):  # 25 steps an epoch, the last of 4 conversations
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"messages": rows[split][i]["messages"]}) + "\n" for i in range(count))
    (folder / "squad.jinja").write_text(data.Squad.custom_template)
    worst, finished = 0.0, {}
    for name, (ranks, overrides) in RUNS.items():
        finished[name] = train(folder, folder / name.replace(" ", "_").replace(",", ""), ranks, overrides)
        differences = compare(finished["1 rank"], finished[name])
        print(f"{name:45}" + "  ".join(f"{key} {value:.1e}" for key, value in differences.items()), flush=True)
        worst = max(worst, *(value / (1e-4 if key == "weights" else 1e-5) for key, value in differences.items()))
    raise SystemExit(f"FAILED: {worst:.1f} times what is allowed" if worst > 1 else 0)


def train(folder: Path, output_dir: Path, ranks: int, overrides: list[str]) -> Path:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = (command if ranks > 1 else [sys.executable]) + [
        "train_sft.py", "configs/quickstart.yaml", f"output_dir={output_dir}", f"data.dataset={folder}/train.jsonl",
        f"data.args.validation={folder}/validation.jsonl", f"tokenizer.chat_template={folder}/squad.jinja",
        "data.max_seq_length=1024", "train.global_batch_size=8", "train.max_epochs=2", "train.max_steps=50",
        "train.learning_rate=1.0e-3", "validation.every=10", "validation.samples=0", "validation.exact_match=0",
        "checkpoint.every=null", "logger.tensorboard.enabled=false", *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1" if ranks > 1 else "2"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{output_dir.name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return output_dir


def compare(one: Path, other: Path) -> dict[str, float]:
    differences = {}
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        a, b = ([line[name] for line in lines(folder) if name in line] for folder in (one, other))
        differences[name] = max(abs(x - y) / x for x, y in zip(a, b, strict=True))
    torch.manual_seed(42)
    start = modeling.load_model(config.load(str(one / "config.yaml"), []).model, torch.device("cpu")).state_dict()
    a, b = (AutoModelForCausalLM.from_pretrained(folder / "model").state_dict() for folder in (one, other))
    update = torch.cat([(a[name] - start[name]).flatten() for name in a]).norm()
    differences["weights"] = float(torch.cat([(a[name] - b[name]).flatten() for name in a]).norm() / update)
    return differences


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
