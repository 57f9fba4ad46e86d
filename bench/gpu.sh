#!/usr/bin/env bash
# All that needs a GPU, in one command that goes on where it was stopped: speed beside TRL's, a profile, the tests, memory.
#
#   bash bench/gpu.sh FOLDER [SECONDS] [ROUNDS]    # begin nothing that may end later than SECONDS from now (540)
#
# FOLDER holds the data and gets the results. Where there is no Hub, make the data elsewhere before:
#   python bench/bench.py --data-only --folder FOLDER
# $PYTHON (python3) has TRL and liger-kernel too. Without flash-attn TRL gets the flash attention that torch brings.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$1 limit=${2:-540} rounds=${3:-1} python=${PYTHON:-python3}
mkdir -p "$folder"

step() { # name, the seconds that it may take, command: its output is kept in FOLDER/NAME.txt
    [ -e "$folder/$1.txt" ] && return
    [ $((SECONDS + $2)) -gt "$limit" ] && echo "left for the next call: $1" && return
    echo "== $1, after $SECONDS s"
    if "${@:3}" >"$folder/$1.log" 2>&1; then mv "$folder/$1.log" "$folder/$1.txt"; else echo "$1 failed"; fi
    tail -n 12 "$folder/$1".* | cut -c1-300
}
bench() { $python bench/bench.py --folder "$folder" --trl-python "$python" --rounds "$rounds" --seconds "$@"; }
worker() { $python bench/bench.py worker "$1" "$folder" "${@:2}"; }
profiled() {
    worker "$1" "train.profile=[14,16]" train.max_steps=17 && $python bench/kernels.py "$folder/run/profile.json"
}

bench $((limit - SECONDS - 50)) ours_8192 trl_liger_8192 ours_16384 trl_liger_16384 ours_4096 trl_liger_4096 ours_8192_uncompiled
step profile_8192 60 profiled ours_8192
step tests 420 $python -m pytest -v -rs tests/test_gpu.py
short="train.max_steps=4"
step memory_checkpointing 45 worker ours_16384 $short model.activation_checkpointing=true
step memory_lora 45 worker ours_8192 $short model.lora.rank=16
step memory_nf4 45 worker ours_8192 $short model.lora.rank=16 model.lora.base=nf4
step memory_adamw_8bit 45 worker ours_8192 $short train.optimizer=adamw_8bit
