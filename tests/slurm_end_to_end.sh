#!/usr/bin/env bash
# On a real Slurm with two nodes: a run that is requeued, signalled, timed out, cancelled or loses a worker ends in the
# parameters of an undisturbed one. PYTHON: an environment with the requirements.
# usage: tests/slurm_end_to_end.sh [requeue] [signal] [early] [limit] [kill] [cancel] [error]     none named: all
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1 # the nodes may be one machine
out=${OUT:-results/slurm-test}
steps=${STEPS:-300}
rm -rf "$out" && mkdir -p "$out"

submit() { # NAME [sbatch flags]: the job's id
    local name=$1
    shift
    sbatch --parsable --nodes 2 --output "$out/$name.log" "$@" slurm/train.sbatch configs/quickstart.yaml \
        "output_dir=$out/$name" "train.max_steps=$steps" validation.exact_match=0 validation.every=50 \
        checkpoint.every=10 logger.tensorboard.enabled=false
}
step() { "$PYTHON" -c "import json; print(json.loads(open('$out/$1/metrics.jsonl').readlines()[-1])['step'])" 2>/dev/null || echo 0; }
at_step() { until [ "$(step "$1")" -ge "$2" ]; do sleep 0.5; done; }
state() { grep -oP '"state": "\K\w+' "$out/$1/status.json" 2>/dev/null || echo none; }
gone() { while [ -n "$(squeue -h -j "$1" 2>/dev/null)" ]; do sleep 1; done; }
fail() { echo "FAILED: $1: $2"; tail -n 30 "$out/$1.log"; scancel -u "$USER"; exit 1; }
finished() { # NAME JOB: waits until the run has finished, and holds it against the undisturbed one
    for _ in $(seq 400); do
        [ "$(state "$1")" = finished ] && break
        sleep 1
    done
    [ "$(state "$1")" = finished ] || fail "$1" "is $(state "$1")"
    gone "$2"
    "$PYTHON" - "$out/plain" "$out/$1" "$steps" <<'PY' || fail "$1" "differs"
import json, sys
import torch
from safetensors.torch import load_file
plain, other, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
a, b = (load_file(f"{folder}/model/model.safetensors") for folder in (plain, other))
assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), "the parameters differ"
shown = [json.loads(line)["step"] for line in open(f"{other}/metrics.jsonl") if "train/loss" in line]
assert shown == list(range(1, steps + 1)), "a step is missing or there twice"
PY
    local starts requeued
    starts=$(grep -c ' queued ' "$out/$1.log") requeued=$(scontrol show job "$2" | grep -oP 'Restarts=\K\d+')
    [ "$1" = plain ] || [ $((starts - 1 + requeued)) -gt 0 ] || fail "$1" "was not disturbed: nothing was tested"
    echo "ok: $1: $starts starts, queued again $requeued time(s), parameters equal"
}

USER=${USER:-$(id -un)}
job=$(submit plain)
finished plain "$job"
[ $# -gt 0 ] || set -- requeue signal early limit kill cancel error
for name in "$@"; do
    case $name in
        requeue | kill | signal)
            job=$(submit "$name")
            at_step "$name" 25
            case $name in
                requeue) scontrol requeue "$job" ;;
                signal) scancel --signal=USR1 "$job" ;;
                kill) pkill -9 -n -f "train_sft.py configs/quickstart.yaml output_dir=$out/kill" ;;
            esac
            ;;
        early) # requested to stop before the run has begun
            job=$(submit early)
            until squeue -h -j "$job" -t RUNNING | grep -q .; do sleep 0.5; done
            sleep 2
            scancel --batch --signal=USR1 "$job"
            ;;
        limit) # one minute, and signalled 45 seconds before
            job=$(submit limit --time 1 --signal B:USR1@45)
            ;;
        cancel)
            job=$(submit cancel)
            at_step cancel 25
            scancel "$job"
            gone "$job"
            [ "$(state cancel)" = stopped ] || fail cancel "is $(state cancel)"
            job=$(submit cancel)
            ;;
        error) # ends at once, and is not queued again
            job=$(sbatch --parsable --nodes 2 --output "$out/error.log" slurm/train.sbatch configs/quickstart.yaml train.lr=1)
            gone "$job"
            grep -q "no key 'train.lr'" "$out/error.log" || fail error "does not say why"
            scontrol show job "$job" | grep -q 'JobState=FAILED.*' || fail error "has not failed"
            echo "ok: error: the job failed and says why"
            continue
            ;;
    esac
    finished "$name" "$job"
done
