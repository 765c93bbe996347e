// The vector kernels, which each isa_*.cpp includes after it has set its target. A kernel's header includes what it uses
// and opens namespace gossamer::GOSSAMER_ISA itself, and within it an unnamed one: nothing is shared between targets.
#pragma once

#include "cpu/isa_target.h"
#include "cpu/vec.h"
#include "cpu/tile_kernel.h"
#include "cpu/gather_reduce_kernel.h"
#include "cpu/panel.h"
#include "cpu/gemm.h"
#include "cpu/tile_gemm.h"
#include "cpu/rows_product.h"
#include "cpu/outer_product.h"
#include "cpu/quantized_kernel.h"
#include "cpu/grouped_matmul_kernel.h"
#include "cpu/activation_kernel.h"
#include "cpu/expert_update_kernel.h"
#include "cpu/expert_mlp_kernel.h"
#include "cpu/expert_mlp_backward_kernel.h"
#include "cpu/quantized_experts_kernel.h"
#include "cpu/philox_kernel.h"
#include "cpu/low_rank_kernel.h"
#include "cpu/block_sparse_kernel.h"
#include "cpu/block_rectangle_kernel.h"
#if !GOSSAMER_AMX
#include "cpu/step_kernel.h"
#include "cpu/sparse_update_kernel.h"
#include "cpu/multi_low_rank_kernel.h"
#include "cpu/activate_kernel.h"
#include "cpu/topk_routing_kernel.h"
#include "cpu/product_key_topk_kernel.h"
#include "cpu/causal_conv1d_kernel.h"
#include "cpu/delta_rule_tile_kernel.h"
#include "cpu/delta_rule_channel_kernel.h"
#include "cpu/delta_rule_kernel.h"
#include "cpu/delta_rule_backward_kernel.h"
#include "cpu/delta_rule_step_kernel.h"
#include "cpu/self_referential_kernel.h"

// The entries of an instruction set's table, by designated initialisers in the order of Kernels; its name comes first.
#define GOSSAMER_KERNEL_TABLE \
  .pairs = GOSSAMER_BF16_DOT, \
  .tiles = false, \
  .gather_reduce = gather_reduce, \
  .gather_max = gather_max, \
  .gather_dot = gather_dot, \
  .sum_pieces = sum_pieces, \
  .update_rows = update_rows, \
  .grouped_matmul = grouped_matmul, \
  .grouped_matmul_dweight = grouped_matmul_dweight, \
  .multi_low_rank = multi_low_rank, \
  .multi_low_rank_backward = multi_low_rank_backward, \
  .expert_mlp = expert_mlp, \
  .expert_mlp_backward = expert_mlp_backward, \
  .quantized_grouped_matmul = quantized_grouped_matmul, \
  .quantized_expert_mlp = quantized_expert_mlp, \
  .rank_product = rank_product, \
  .low_rank_matmul = low_rank_matmul, \
  .block_product = block_product, \
  .sampled_product = sampled_product, \
  .rectangle_product = rectangle_product, \
  .outer_rectangles = outer_rectangles, \
  .sampled_rectangles = sampled_rectangles, \
  .activate = activate_rows, \
  .activate_backward = activate_backward_rows, \
  .topk_routing = topk_routing, \
  .topk_routing_backward = topk_routing_backward, \
  .causal_conv1d = causal_conv1d, \
  .causal_conv1d_backward = causal_conv1d_backward, \
  .causal_conv1d_step = causal_conv1d_step, \
  .delta_rule = delta_rule, \
  .delta_rule_backward = delta_rule_backward, \
  .delta_rule_step = delta_rule_step, \
  .gate_backward = gate_backward, \
  .self_referential = self_referential, \
  .self_referential_backward = self_referential_backward, \
  .product_key_topk = product_key_topk, \
  .product_key_topk_backward = product_key_topk_backward, \
  .product_key_search = product_key_search
#endif
