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

GOSSAMER_BUILD_JOBS=$(nproc) GOSSAMER_CUDA=1 GOSSAMER_CUDA_ARCHS=90a pip install --no-build-isolation --no-deps .

# Each step runs whatever became of the ones before, and none may hang: a wrong layer is not timed anyway.
failed=()
step() {
  local name=$1
  shift
  printf '\n+ %s\n' "$name"
  timeout -k 5 "$@" || failed+=("$name")
}

step resources 120 python3 tests/cuda_resources.py
step "tests of the kernels" 150 python3 -m pytest -q --timeout 60 tests/test_hopper_logic.py tests/test_hopper_kernels.py
step "tests of the primitives" 100 python3 -m pytest -q --timeout 60 -k cuda tests/test_grouped_matmul.py tests/test_expert_mlp.py
peers=$(python3 -c 'import importlib.util as u; print("SonicMoE" if u.find_spec("sonicmoe") else "none")')
for shape in olmoe fine-grained qwen3-30b-a3b mixtral; do
  step "layer, $shape" 100 gossamer bench moe --shape "$shape" --dtype bf16 --device cuda --peers "$peers" \
    --json "$out/moe-hopper-$shape-$device.json"
done
if command -v compute-sanitizer > /dev/null; then
  # Without torch's cache every tensor ends where its allocation does.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    step "$tool" 80 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      python3 -m pytest -q --timeout 70 tests/test_hopper_kernels.py -k "small_products or small_layers"
  done
else
  failed+=("memory and race checks: compute-sanitizer is not there")
fi
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
