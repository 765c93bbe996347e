#!/usr/bin/env bash
# Runs everything that needs a GPU, in one command: the tests on CUDA, then benchmarks against baselines and installed peers:
# the expert layer on four large shapes, with quantised weights on three and with few tokens; its routers, its activation and
# other expert layers; linear attention; low-rank updates on five shapes; static, compressed and dynamic embedding layers and
# the hash table over uniform and skewed ids; and block-sparse linear layers at four sparsities.
# Usage: bench/gpu_check.sh [FOLDER for the JSON files, default bench/results]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python3 -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "no CUDA device is visible to torch")'
out=${1:-bench/results}
mkdir -p "$out"
device=$(python3 -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))')

pip install --no-build-isolation --no-deps .
pytest -q tests/test_backend.py tests/ops tests/kernels/test_expert_mlp_descriptors.py \
  tests/nn/moe/test_*.py tests/nn/moe/*/test_*.py tests/nn/embeddings/test_*.py tests/nn/linear/test_*.py \
  tests/nn/test_delta_rule_layers.py tests/nn/test_conversions.py tests/integrations/test_compress.py \
  tests/integrations/test_linear_attention.py tests/integrations/test_quantize_experts.py tests/integrations/test_peft.py
for shape in fine-grained olmoe qwen3-30b-a3b mixtral; do
  gossamer bench moe --shape "$shape" --dtype bf16 --device cuda --json "$out/moe-$shape-$device.json"
done
for shape in olmoe qwen3-30b-a3b mixtral; do
  gossamer bench quantized_experts --shape "$shape" --dtype bf16 --device cuda --json "$out/quantized-$shape-$device.json"
done
# Decoding, whose time is bounded below by reading the touched experts.
for tokens in 1 16 64; do
  gossamer bench quantized_experts --shape "$tokens,2048,768,128,8" --dtype bf16 --device cuda \
    --json "$out/quantized-decode-$tokens-$device.json"
done
gossamer bench topk_routing --device cuda --json "$out/topk_routing-$device.json"
gossamer bench tree_routing --device cuda --json "$out/tree_routing-$device.json"
for family in multi_low_rank expert_mlp_lora activate mixture_of_attention top_p_moe causal_conv1d delta_rule; do
  gossamer bench "$family" --dtype bf16 --device cuda --json "$out/$family-$device.json"
done
gossamer bench delta_rule --shape 1,8192,96,96,128,1,1 --dtype bf16 --device cuda --json "$out/delta_rule-96-heads-$device.json"
for family in product_key_experts compressed_embedding; do
  gossamer bench "$family" --dtype fp32 --device cuda --json "$out/$family-$device.json"
done
for shape in square square-rank-64 wide square-2048 square-64; do
  gossamer bench low_rank --shape "$shape" --dtype bf16 --device cuda --json "$out/low-rank-$shape-$device.json"
done
for skew in uniform 1.05 1.15; do
  for shape in bag-64 bag-128 lookup tables; do
    for dtype in fp32 fp16; do
      gossamer bench embedding --shape "$shape" --skew "$skew" --dtype "$dtype" --device cuda \
        --json "$out/embedding-$shape-$skew-$dtype-$device.json"
    done
  done
done
for skew in uniform 1.05 1.15; do
  gossamer bench hash_table --skew "$skew" --dtype fp32 --device cuda --json "$out/hash_table-$skew-$device.json"
  for dtype in fp32 fp16; do
    gossamer bench dynamic_embedding --skew "$skew" --dtype "$dtype" --device cuda \
      --json "$out/dynamic_embedding-$skew-$dtype-$device.json"
  done
done
for shape in 4096-128-75 4096-64-75 8192-128-90; do
  gossamer bench block_sparse --shape "$shape" --sweep sparsity=50,75,90,97 --dtype bf16 --device cuda \
    --json "$out/block-sparse-$shape-$device.json"
done
