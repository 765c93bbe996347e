// The dispatch and the experts' layer of one call without gradients, and the router's choice before them.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/quantized_experts.h"
#include "cpu/topk_routing.h"

namespace gossamer {

// An expert layer without what changes from call to call: groups, tokens, top_k, x, weights and y.
struct PreparedExperts {
  QuantizedMlpArgs args;
  int64_t num_experts;
  bool quantized;
};

struct ExpertCall {
  int64_t tokens, top_k;
  FloatMatrix x;  // (T, H), column stride 1
  void* y;        // (T, O) contiguous
};

// (T, K) expert ids, int64 when wide, else int32, and their weights.
struct ChosenExperts {
  const void* ids;
  bool wide;
  int64_t token_stride, slot_stride;
  FloatMatrix weights;
};

// expert_mlp or quantized_expert_mlp of rows that are dispatched already; `weights` are (T, K).
void dispatched_experts(const PreparedExperts& layer, const ExpertCall& call, const Groups& groups, const FloatMatrix& weights,
                        int num_threads);

// dispatch, then dispatched_experts. Returns false without a result if an id is negative.
bool chosen_experts(const PreparedExperts& layer, const ExpertCall& call, const ChosenExperts& chosen, int num_threads);

// topk_routing, then chosen_experts. `router` has no ids and weights yet. Returns false without a result if a logit is NaN or +inf, or
// the bias of the scores NaN.
bool routed_experts(const PreparedExperts& layer, const ExpertCall& call, const TopkRoutingArgs& router, int num_threads);

}  // namespace gossamer
