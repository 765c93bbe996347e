// The expert products with quantised weights of one instruction set.
#pragma once

#include "cpu/expert_mlp_kernel.h"
#include "cpu/quantized_experts.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

void quantized_grouped_matmul(const QuantizedMatmulArgs& args, void* shared, int num_threads, Team team) {
  visit_values(args.dtype, [&](auto tag) {
    grouped_product<typename decltype(tag)::type>(args, shared, num_threads, team, [&](int64_t expert) {
      return QuantizedMatrix{&args.weights, expert, args.transposed};
    });
  });
}

void quantized_expert_mlp(const QuantizedMlpArgs& args, void* shared, int num_threads, Team team) {
  visit_values(args.dtype, [&](auto tag) {
    expert_mlp_forward_typed<typename decltype(tag)::type>(
        args, shared, num_threads, team, [&](int64_t expert) { return QuantizedMatrix{&args.gate_up_weights, expert, false}; },
        [&](int64_t expert) { return QuantizedMatrix{&args.down_weights, expert, false}; });
  });
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
