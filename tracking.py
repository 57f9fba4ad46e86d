"""Writes a run's metrics to the console, metrics.jsonl, TensorBoard and Weights & Biases. Takes plain values."""

import json
import os
import sys
import time
from pathlib import Path

import yaml
from tqdm import tqdm


class Tracker:
    """Used on rank 0. `config`: the resolved configuration. `start`: the step that the run resumes from; the metrics of
    later steps, which an interrupted launch left, are dropped. `steps`: the number of steps that the run has."""

    def __init__(self, output_dir: Path, config: dict, start: int, steps: int):
        self.path, self.steps = output_dir / "metrics.jsonl", steps
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            complete = [line for line in lines if line.endswith("}")]  # a killed run may leave half a line
            kept = [line for line in complete if start and json.loads(line)["step"] <= start]
            temporary = self.path.with_name(".metrics.jsonl.tmp")
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(temporary, self.path)  # atomic: killed at any moment, the earlier metrics are still there
        self.file = open(self.path, "a", encoding="utf-8", buffering=1)  # line by line
        self.tensorboard = self.wandb = None
        if config["logger"]["tensorboard"]["enabled"]:
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard orders its files by second and process id, so each launch needs a second of its own.
            while [*(output_dir / "tensorboard").glob(f"events.out.tfevents.{int(time.time())}.*")]:
                time.sleep(0.1)
            self.tensorboard = SummaryWriter(str(output_dir / "tensorboard"), purge_step=start + 1 if start else 0)
            text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
            self.tensorboard.add_text("config", f"```yaml\n{text}```", start)
        if config["logger"]["wandb"]["enabled"]:
            try:
                import wandb
            except ImportError:
                raise ValueError("logger.wandb.enabled needs `pip install wandb`; or set it to false") from None
            # All launches of a run are one run of W&B, whose id is kept in a file.
            id_file, wanted = output_dir / "wandb_id", config["logger"]["wandb"]
            id, name = id_file.read_text(encoding="utf-8") if start and id_file.is_file() else None, wanted["name"]
            self.wandb = wandb.init(project=wanted["project"], name=name, config=config, id=id, resume="allow")
            id_file.write_text(self.wandb.id, encoding="utf-8")
        self.bar = tqdm(total=steps, initial=start, desc="training", unit=" steps", disable=not sys.stderr.isatty())

    def log(self, step: int, metrics: dict[str, float]):
        """Write the metrics of a training step (with "train/loss" among them) or of a validation."""
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items() if self.tensorboard else ():
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(metrics, step=step)
        if "train/loss" not in metrics:
            shown = (f"{name} {value:{',' if isinstance(value, int) else '.4f'}}" for name, value in metrics.items())
            self.say(f"step {step}/{self.steps}  {'  '.join(shown)}")
            return
        loss, speed = f"loss {metrics['train/loss']:.4f}", f"{metrics['train/tokens_per_second']:,.0f} tokens/s"
        self.bar.set_postfix_str(f"{loss}, {speed}", refresh=False)
        self.bar.update(1)
        if self.bar.disable:  # not a terminal: a line per step
            norm, rate = f"grad_norm {metrics['train/grad_norm']:.3f}", f"lr {metrics['train/learning_rate']:.2e}"
            self.say(f"step {step}/{self.steps}  {loss}  {norm}  {rate}  {speed}")

    def text(self, step: int, name: str, text: str):
        """Print a text, such as a sample, and show it in TensorBoard under `name`."""
        self.say(text)
        if self.tensorboard:
            self.tensorboard.add_text(name, text.replace("\n", "  \n"), step)  # Markdown's line breaks

    def say(self, line: str):
        self.bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def flush(self):
        """Put all metrics so far on disk, so that no complete checkpoint is ahead of them."""
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
