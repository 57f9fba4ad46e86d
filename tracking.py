"""Where a run's figures go: console, metrics.jsonl, TensorBoard, Weights & Biases."""

import json
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm


class Tracker:
    """Used on rank 0. `start`: the step that the run resumes from; later figures, of a lost attempt, are dropped."""

    def __init__(self, config, config_dict: dict, config_text: str, output_dir: Path, start: int, steps: int):
        self.path = output_dir / "metrics.jsonl"
        if self.path.exists():
            whole = [line for line in self.path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in whole if start and json.loads(line)["step"] <= start]
            rewritten = self.path.with_name(".metrics.jsonl.tmp")
            rewritten.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(rewritten, self.path)  # killed here, the figures so far are still there
        self.file = open(self.path, "a", encoding="utf-8", buffering=1)
        self.tensorboard = self.wandb = None
        if config.tensorboard.enabled:
            from torch.utils.tensorboard import SummaryWriter

            # it reads its files in the order of their names, which begin with the second of the start, then the process
            while [*(output_dir / "tensorboard").glob(f"events.out.tfevents.{int(time.time())}.*")]:
                time.sleep(0.1)
            self.tensorboard = SummaryWriter(str(output_dir / "tensorboard"), purge_step=start + 1 if start else 0)
            self.tensorboard.add_text("config", f"```yaml\n{config_text}```", start)
        if config.wandb.enabled:
            self.wandb = start_wandb(config.wandb, config_dict, output_dir / "wandb_id", start)
        self.bar = tqdm(total=steps, initial=start, desc="training", unit=" steps", disable=not sys.stderr.isatty())
        self.steps = steps

    def log(self, step: int, figures: dict):
        """Write figures of step `step`: names to numbers."""
        self.file.write(json.dumps({"step": step, **figures}) + "\n")
        for name, value in figures.items():
            if self.tensorboard:
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(figures, step=step)
        if "train/loss" in figures:
            self.bar.set_postfix_str(
                f"loss {figures['train/loss']:.4f}, {figures['train/tokens_per_second']:,.0f} tokens/s", refresh=False
            )
            self.bar.update(1)
            if self.bar.disable:
                self.say(
                    f"step {step}/{self.steps}  loss {figures['train/loss']:.4f}  "
                    f"grad_norm {figures['train/grad_norm']:.3f}  lr {figures['train/learning_rate']:.2e}  "
                    f"{figures['train/tokens_per_second']:,.0f} tokens/s"
                )
        else:
            shown = (f"{name} {value:{',' if isinstance(value, int) else '.4f'}}" for name, value in figures.items())
            self.say(f"step {step}/{self.steps}  {'  '.join(shown)}")

    def text(self, step: int, name: str, text: str):
        self.say(text)
        if self.tensorboard:
            self.tensorboard.add_text(name, text.replace("\n", "  \n"), step)

    def say(self, line: str):
        self.bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def flush(self):
        """Put all figures so far on disk, so that no whole checkpoint is ahead of them."""
        os.fsync(self.file.fileno())
        if self.tensorboard:
            self.tensorboard.flush()

    def close(self):
        self.bar.close()
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def start_wandb(config, config_dict: dict, id_file: Path, start: int):
    """One run there for all starts of a run here: its id is kept in `id_file`."""
    try:
        import wandb
    except ImportError:
        raise ValueError("logger.wandb.enabled needs wandb: run `pip install wandb`, or set it to false") from None
    id = id_file.read_text(encoding="utf-8") if start and id_file.is_file() else None
    try:
        run = wandb.init(project=config.project, name=config.name, config=config_dict, id=id, resume="allow")
    except wandb.errors.Error as error:
        gone = f"; if its run {id} is gone, delete {id_file}" if id else ""
        raise ValueError(f"wandb did not start: run `wandb login`, or set WANDB_MODE=offline{gone} ({error})") from None
    id_file.write_text(run.id, encoding="utf-8")
    return run
