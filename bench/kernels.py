"""What a GPU did in the steps of `train.profile`: the time of each kind of kernel, the longest kernels, and the gaps.

python bench/kernels.py OUTPUT_DIR/profile.json
"""

import collections
import json
import sys

KINDS = {  # by a part of the kernel's name, the first that fits
    "matrix products": ("nvjet", "gemm", "cutlass", "cublas", "xmma", "splitK"),
    "attention": ("flash", "fmha", "attention"),
    "optimizer": ("FusedAdam", "fused_adam", "kOptimizer", "multi_tensor_apply"),
    "compiled": ("triton",),
    "copies": ("Memcpy", "Memset", "direct_copy", "CatArray"),
}


def main(path: str):
    with open(path, encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    steps = max(1, sum("Optimizer.step" in e.get("name", "") for e in events if e.get("cat") == "user_annotation"))
    if not kernels:
        sys.exit(f"{path} has no kernels of a GPU")
    kernels.sort(key=lambda e: e["ts"])
    busy, end, gaps = 0.0, kernels[0]["ts"], []
    for e in kernels:  # microseconds
        if e["ts"] > end + 20:
            gaps.append(e["ts"] - end)
        busy += max(0.0, e["ts"] + e["dur"] - max(end, e["ts"]))
        end = max(end, e["ts"] + e["dur"])
    span = end - kernels[0]["ts"]
    print(f"{steps} steps of {span / steps / 1000:.1f} ms; kernels {busy / span:.1%} of it; ", end="")
    print(f"{len(gaps)} gaps of over 20 us, {sum(gaps) / steps / 1000:.1f} ms a step\n")
    by_kind, by_name = collections.Counter(), collections.defaultdict(list)
    for e in kernels:
        kind = next((kind for kind, parts in KINDS.items() if any(part in e["name"] for part in parts)), "others")
        by_kind[kind] += e["dur"]
        by_name[kind, e["name"][:110]].append(e["dur"])
    print("| kind | ms a step | share |\n|---|---|---|")
    for kind, total in by_kind.most_common():
        print(f"| {kind} | {total / steps / 1000:.2f} | {total / span:.1%} |")
    print("\n| kernel | kind | calls a step | ms a step |\n|---|---|---|---|")
    for (kind, name), times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:40]:
        print(f"| `{name}` | {kind} | {len(times) / steps:.1f} | {sum(times) / steps / 1000:.2f} |")


if __name__ == "__main__":
    main(sys.argv[1])
