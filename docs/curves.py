r"""The loss curves of runs, one upon the other, as a picture: SVG, with nothing to install.

python docs/curves.py docs/curves.svg "1 rank=results/1" "2 ranks=results/2" "4 ranks=results/4"

Those there were made, for 1, 2 and 4 ranks, by
python train_sft.py configs/quickstart.yaml train.max_steps=60 train.learning_rate=2e-3 validation.every=null \
    validation.exact_match=0 train.max_tokens_per_micro_batch=600 cluster.gpus_per_node=2 output_dir=results/2

The first run is drawn widest, so that each is seen where the curves coincide. The title says how far they are apart.
"""

import json
import sys
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 340, 52, 20, 40, 40
STYLES = [("#9ecae9", 9), ("#f58518", 4.5), ("#1b3a57", 1.5)]  # color and width of each run


def main(picture: str, *runs: str):
    curves = {}  # name: the loss of each step
    for run in runs:
        name, _, folder = run.partition("=")
        rows = map(json.loads, (Path(folder) / "metrics.jsonl").open())
        curves[name] = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    first, *others = curves.values()
    apart = max(abs(other[step] / first[step] - 1) for other in others for step in first)
    last, top = max(first), max(first.values())

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(loss: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * loss / top

    title = f"train/loss with {', '.join(curves)}: relative difference at most {apart:.0e}"
    lines = [f'<text x="{LEFT}" y="24" font-size="16">{title}</text>']
    for loss in range(int(top) + 1):
        lines.append(f'<path d="M{LEFT} {y(loss):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss}</text>')
    for step in range(0, last + 1, max(1, last // 6)):
        lines.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 18}" text-anchor="middle">{step}</text>')
    for k, ((name, losses), (color, width)) in enumerate(zip(curves.items(), STYLES, strict=False)):
        points = " ".join(f"{x(step):.1f},{y(loss):.2f}" for step, loss in losses.items())
        lines.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="{width}"/>')
        lines.append(f'<path d="M{WIDTH - 140} {64 + 22 * k}h40" stroke="{color}" stroke-width="{width}"/>')
        lines.append(f'<text x="{WIDTH - 90}" y="{68 + 22 * k}">{name}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
    lines = [head + 'font-size="13">', '<rect width="100%" height="100%" fill="white"/>', *lines, "</svg>", ""]
    Path(picture).write_text("\n".join(lines))
    print(title)


if __name__ == "__main__":
    main(*sys.argv[1:])
