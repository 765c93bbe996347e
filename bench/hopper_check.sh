#!/usr/bin/env bash
# The CUDA kernels for Hopper on a GPU, in one command of under ten minutes: build, tests, memory and race checks on
# small shapes, then the layer at four large shapes, Triton and CUDA kernels taking turns beside an equal-FLOP dense layer
# and SonicMoE where it is installed.
# Usage: bench/hopper_check.sh [FOLDER for the JSON files, default bench/results]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python3 - <<'PYTHON'
import sys, torch
if not torch.cuda.is_available():
    sys.exit("no CUDA device is visible to torch")
if torch.cuda.get_device_capability() != (9, 0):
    sys.exit(f"{torch.cuda.get_device_name()} is no Hopper GPU")
PYTHON
out=${1:-bench/results}
mkdir -p "$out"
device=$(python3 -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))')

GOSSAMER_CUDA=1 GOSSAMER_CUDA_ARCHS=90a pip install --no-build-isolation --no-deps .
python3 tests/cuda_resources.py
# A kernel that hangs would hold the machine: no test takes a minute.
timeout 200 pytest -q -x --timeout 60 tests/test_hopper_logic.py tests/test_hopper_kernels.py
timeout 120 pytest -q --timeout 60 -k cuda tests/test_grouped_matmul.py tests/test_expert_mlp.py

if command -v compute-sanitizer > /dev/null; then
  # Without torch's cache every tensor ends where its allocation does.
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 90 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      python3 -m pytest -q --timeout 80 tests/test_hopper_kernels.py \
      -k "(small_products and bfloat16 and False-False) or (small_layers and bfloat16 and False-False)"
  done
else
  echo "compute-sanitizer is not there: no memory and race checks"
fi

peers=$(python3 -c 'import importlib.util as u; print("SonicMoE" if u.find_spec("sonicmoe") else "none")')
status=0
for shape in olmoe fine-grained qwen3-30b-a3b mixtral; do
  timeout 120 gossamer bench moe --shape "$shape" --dtype bf16 --device cuda --peers "$peers" \
    --json "$out/moe-hopper-$shape-$device.json" || status=$?
done
exit "$status"
