#!/usr/bin/env bash
# Checks the CUDA kernels for Hopper on a GPU, in one command: build; tests; the layer at four large shapes, with Triton and CUDA
# kernels in alternation, against a dense layer of equal FLOPs; memory and race checks on small shapes of these kernels and of
# those around them; and, if SonicMoE is installed, the layer against it. All but the last takes at most ten minutes after the
# build.
# Usage: bench/hopper_check.sh [FOLDER for the JSON files, default bench/results]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python3 - <<'PYTHON'
import sys, torch
if not torch.cuda.is_available():
    sys.exit("no CUDA device is visible to torch")
if torch.cuda.get_device_capability() != (9, 0):
    sys.exit(f"{torch.cuda.get_device_name()} is not a Hopper GPU")
PYTHON
out=${1:-bench/results}
mkdir -p "$out"
device=$(python3 -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))')

GOSSAMER_BUILD_JOBS=$(nproc) GOSSAMER_CUDA=1 GOSSAMER_CUDA_ARCHS=90a pip install --no-build-isolation --no-deps .

# A step runs even if earlier ones failed, since a wrong layer is not timed anyway. Each is stopped after the seconds that it is
# given, or at the deadline.
failed=()
deadline=600
SECONDS=0
step() {
  local name=$1 limit=$2
  shift 2
  local left=$((deadline - SECONDS))
  if ((left <= 0)); then
    failed+=("$name: no time was left")
    return
  fi
  printf '\n+ %s\n' "$name"
  timeout -k 5 "$((limit < left ? limit : left))" "$@" || failed+=("$name")
}

# Not python3 -m pytest, which puts this folder on sys.path, where its triton_kernels shadows another distribution's.
pytest=(python3 "$(command -v pytest)" -q)
shapes=(olmoe fine-grained qwen3-30b-a3b mixtral)

step resources 60 python3 tests/support/cuda_resources.py
step "tests of the kernels" 120 "${pytest[@]}" tests/native/test_hopper_logic.py tests/native/test_hopper_kernels.py
step "tests of the primitives" 90 "${pytest[@]}" -k cuda tests/ops/test_grouped_matmul.py tests/ops/test_expert_mlp.py \
  tests/ops/test_expert_mlp_layouts.py
step "tests of the sort and of launches" 60 "${pytest[@]}" tests/ops/test_dispatch.py tests/nn/moe/test_moe_launches.py
for shape in "${shapes[@]}"; do
  step "layer, $shape" 75 gossamer bench moe --shape "$shape" --dtype bf16 --device cuda --peers none \
    --json "$out/moe-hopper-$shape-$device.json"
done
# The other kernels that a layer launches (sorting, routing, sums of rows, decoding, quantised weights, tiles by Triton), and the
# hash table, whose kernels are CUDA too.
around=(
  tests/ops/test_dispatch.py::test_around_tile_edges
  tests/ops/test_topk_routing.py::test_many_tokens_and_strided_logits
  tests/ops/test_gather_reduce.py::test_few_bags
  tests/ops/test_quantized_experts.py::test_decoding_dense_weights_in_parts
  tests/ops/test_quantized_experts.py::test_one_quantised_weight_and_lora
  tests/ops/test_expert_mlp.py::test_sides_of_one
  tests/ops/test_activate.py::test_large_gates
  tests/ops/test_hash_table.py::test_lru_within_one_large_batch
)
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    # Without torch's cache each tensor has an allocation of its own, so that reads past its end are found.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "${pytest[@]}" tests/native/test_hopper_kernels.py -k "small_products or small_layers"
    step "$tool, around" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 "${pytest[@]}" "${around[@]}"
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
  done
else
  failed+=("memory and race checks: compute-sanitizer is not there")
fi
# The same layer without pairs of blocks that share weights, to show what pairing gains.
alone='import sys; from gossamer import _C, cli; _C.set_hopper_paired_from(2**62); sys.argv[0] = "gossamer"; cli.main()'
for shape in olmoe mixtral; do
  step "layer, $shape, blocks alone" 75 env PYTHONSAFEPATH=1 python3 -c "$alone" bench moe --shape "$shape" --dtype bf16 --device cuda \
    --peers none --json "$out/moe-hopper-alone-$shape-$device.json"
done
# Last, because its search for tiles may take longer than everything above.
deadline=$((SECONDS + 600))
if python3 -c 'import importlib.util as u, sys; sys.exit(u.find_spec("sonicmoe") is None)'; then
  for shape in "${shapes[@]}"; do
    step "layer beside SonicMoE, $shape" 120 gossamer bench moe --shape "$shape" --dtype bf16 --device cuda \
      --peers SonicMoE --json "$out/moe-hopper-sonicmoe-$shape-$device.json"
  done
fi
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
