#!/usr/bin/env bash
# All that needs a GPU, in one command that goes on where it was stopped: the tests, the speed of ours and TRL's, profiles
# of ours, and preview's memory beside what was measured.
#
#   bash bench/gpu.sh FOLDER [SECONDS]     # begin nothing later than that; default: 540
#
# FOLDER keeps model, data and results (tests.txt, NAME.ROUND.json, table.md, NAME.kernels.md, memory.txt). Without a Hub, bring the
# data there: `python bench/bench.py --data-only --folder FOLDER` makes them, on any machine. TRL and liger-kernel are expected beside torch; where
# flash-attn is not installed, TRL gets the flash attention that torch brings. On a CPU it runs the small settings.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1 seconds=${2:-540}
python=${PYTHON:-python3}
mkdir -p "$folder"
if ! grep -qs " passed\| skipped" "$folder/tests.txt"; then
    $python -m pytest -q -rs tests/test_gpu.py 2>&1 | tee "$folder/tests.running" && mv "$folder/tests.running" "$folder/tests.txt"
fi
$python bench/bench.py --folder "$folder" --trl-python "$python" --seconds $((seconds - SECONDS)) | tee "$folder/table.md"
