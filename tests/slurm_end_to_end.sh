#!/usr/bin/env bash
# On a real Slurm with two nodes: a run that is requeued, signalled, timed out or loses a worker ends in the weights of an
# undisturbed one. PYTHON: an environment with the requirements; RENDEZVOUS_HOST where both nodes are one machine.
# usage: tests/slurm_end_to_end.sh [plain requeue signal limit kill]
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-.venv/bin/python} OMP_NUM_THREADS=1
out=${OUT:-results/slurm-test}
rm -rf "$out" && mkdir -p "$out"
steps=${STEPS:-150}

submit() { # NAME [sbatch flags]: the job's id
    local name=$1; shift
    sbatch --parsable --nodes 2 --output "$out/$name.log" "$@" slurm/train.sbatch configs/quickstart.yaml \
        "output_dir=$out/$name" "train.max_steps=$steps" validation.exact_match=0 validation.every=50 \
        checkpoint.every=10 logger.tensorboard.enabled=false
}
step() { "$PYTHON" -c "import json;print(json.loads(open('$out/$1/metrics.jsonl').readlines()[-1])['step'])" 2>/dev/null || echo 0; }
at_step() { until [ "$(step "$1")" -ge "$2" ]; do sleep 0.5; done; }
state() { "$PYTHON" -c "import json;print(json.load(open('$out/$1/status.json'))['state'])" 2>/dev/null || echo none; }
finished() { # NAME JOB
    for _ in $(seq 600); do [ "$(state "$1")" = finished ] && break; sleep 1; done
    [ "$(state "$1")" = finished ] || { echo "FAILED: $1 is $(state "$1")"; tail -30 "$out/$1.log"; scancel "$2"; exit 1; }
    while [ -n "$(squeue -h -j "$2" 2>/dev/null)" ]; do sleep 1; done
    "$PYTHON" - "$out/plain/model/model.safetensors" "$out/$1/model/model.safetensors" "$out/$1/metrics.jsonl" "$steps" <<'PY'
import json, sys
import torch
from safetensors.torch import load_file
a, b = load_file(sys.argv[1]), load_file(sys.argv[2])
assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), "the weights differ"
shown = [json.loads(line)["step"] for line in open(sys.argv[3]) if "train/loss" in line]
assert shown == list(range(1, int(sys.argv[4]) + 1)), "a step is missing or there twice"
PY
    echo "ok: $1 ($(grep -c '^job .* start' "$out/$1.log") starts)"
}

job=$(submit plain); finished plain "$job"
for name in "${@:-requeue signal limit kill}"; do
    for name in $name; do
        flags=(); [ "$name" = limit ] && flags=(--time 1 --signal B:USR1@45)
        job=$(submit "$name" "${flags[@]}")
        at_step "$name" 25
        case $name in
            requeue) scontrol requeue "$job" ;;
            signal) scancel --signal=USR1 "$job" ;;
            kill) pkill -9 -f -o "train_sft.py configs/quickstart.yaml output_dir=$out/kill" -x || pkill -9 -n -f "output_dir=$out/kill" ;;
        esac
        finished "$name" "$job"
    done
done
