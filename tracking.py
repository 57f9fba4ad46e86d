"""Writes a run's metrics to the console, metrics.jsonl, TensorBoard and Weights & Biases. Takes plain values."""

import html
import json
import os
import resource
import sys
import time
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from lora import count


class Tracker:
    """Used on rank 0. `config`: the resolved configuration. `start`: the step that the run resumes from; the metrics of
    later steps, which an interrupted launch left, are dropped. `steps`: the number of steps that the run has."""

    def __init__(self, output_dir: Path, config: dict, start: int, steps: int):
        self.path, self.start, self.steps = output_dir / "metrics.jsonl", start, steps
        self.val_losses, self.began = [], time.monotonic()  # `val_losses`: of all validations so far
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            complete = [line for line in lines if line.endswith("}")]  # a killed run may leave half a line
            kept = [line for line in complete if start and json.loads(line)["step"] <= start]
            self.val_losses = [loss for line in kept if (loss := json.loads(line).get("val/loss")) is not None]
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
            self.wandb_html = wandb.Html
            self.wandb = wandb.init(project=wanted["project"], name=name, config=config, id=id, resume="allow")
            id_file.write_text(self.wandb.id, encoding="utf-8")
        self.profiled, self.profiler = config["train"]["profile"] or [0, 0], None  # first and last step
        self.bar = tqdm(total=steps, initial=start, desc="training", unit=" steps", disable=not sys.stderr.isatty())

    def begin(self, step: int):
        """Call it as a step begins: the profiler's trace has the steps of `train.profile`."""
        if step == self.profiled[0]:
            self.profiler = torch.profiler.profile()
            self.profiler.start()

    def log(self, step: int, metrics: dict[str, float]):
        """Write the metrics of a training step (with "train/loss" among them) or of a validation."""
        if "train/loss" in metrics:
            left = (time.monotonic() - self.began) / (step - self.start) * (self.steps - step)
            metrics = {**metrics, "train/seconds_left": round(left)}
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items() if self.tensorboard else ():
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(metrics, step=step)
        if "train/loss" not in metrics:
            shown = (f"{name} {value:{',' if isinstance(value, int) else '.4f'}}" for name, value in metrics.items())
            self.say(f"step {step}/{self.steps}  {'  '.join(shown)}")
            return
        if self.profiler and step == self.profiled[1]:
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(self.path.with_name("profile.json")))
        line = (
            "loss {train/loss:.4f}  grad_norm {train/grad_norm:.3f}  lr {train/learning_rate:.2e}  "
            "epoch {train/epoch:.2f}  {train/seconds:.2f} s  {train/tokens_per_second:,.0f} tokens/s  "
            "MFU {train/mfu:.1%}  {train/peak_memory_gib:.1f} GiB"
        ).format(**metrics)
        self.bar.update(1)
        self.say(f"step {step}/{self.steps}  {line}  {tqdm.format_interval(metrics['train/seconds_left'])} left")

    def text(self, step: int, name: str, text: str):
        """Print a text, such as a sample, and show it in TensorBoard and W&B under `name`."""
        self.say(text)
        if self.wandb:
            self.wandb.log({name: self.wandb_html(f"<pre>{html.escape(text)}</pre>")}, step=step)
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


# ---- what the machine does -------------------------------------------------------------------------------------------
PEAKS = {  # dense bfloat16 operations a second of NVIDIA's data sheets, by a part of the device's name
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12,
}  # fmt: skip


class Meter:
    """Measures speed and memory of steps, beside the most that `world_size` such devices could do (MFU)."""

    def __init__(self, model, device: torch.device, dtype: torch.dtype, world_size: int):
        self.device, self.peak = device, world_size * peak_flops(device, dtype)
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        experts = getattr(model.config, "num_experts_per_tok", None)

        def flops(p) -> float:  # forward and backward passes, per token; of fused experts (3-D) a token needs only some
            used = experts / len(p) if experts and p.ndim == 3 else 1
            return count(p) * used * (6 if p.requires_grad else 4)

        self.flops = sum(flops(p) for p in model.parameters() if p is not head and p is not embedding)
        self.head_flops = flops(head)  # only trained tokens need the output layer

    def measure(self, tokens: int, trained_tokens: int, seconds: float) -> dict[str, float]:
        """Metrics of a step over all ranks, and the most memory that this one has used: of its GPU, else in all."""
        mfu = (self.flops * tokens + self.head_flops * trained_tokens) / seconds / self.peak
        unit = 2**30 if sys.platform == "darwin" else 2**20  # ru_maxrss is in bytes there, else in KiB
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        memory = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else host
        speed = {"train/seconds": seconds, "train/tokens_per_second": tokens / seconds, "train/mfu": mfu}
        return {**speed, "train/peak_memory_gib": memory}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a device: of a GPU that `PEAKS` knows; else of a matrix product in `dtype`, measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if known := [flops for part, flops in PEAKS.items() if part in name]:
        return known[0]
    measured = []
    for size in (8192,) if name else (64, 256, 512, 1024):
        a = torch.ones(size, size, device=device, dtype=dtype)
        for _ in range(4):
            began = time.perf_counter()
            (a @ a)[0, 0].item()
            measured.append(2 * size**3 / (time.perf_counter() - began))
        if time.perf_counter() - began > 0.1:  # A CPU without bfloat16 takes 3 s for a larger product in it.
            break
    return max(measured)
