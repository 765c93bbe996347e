// A top-k router's choice, the dispatch and the experts' layer of one call without gradients.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/quantized_experts.h"
#include "cpu/topk_routing.h"

namespace gossamer {

// What stays the same from call to call. The router has no logits, ids and weights yet, and the experts no groups, tokens, x, weights
// and y.
struct RoutedExperts {
  TopkRoutingArgs router;
  QuantizedMlpArgs experts;
  bool quantized;
};

struct RoutedCall {
  const float* logits;  // (T, E) contiguous
  int64_t tokens;
  FloatMatrix x;  // (T, H), column stride 1
  void* y;        // (T, O) contiguous
};

// Runs topk_routing, dispatch and expert_mlp, or quantized_expert_mlp, one after the other. Returns false without a result if a logit
// is NaN or +inf, or the bias of the scores NaN.
bool routed_experts(const RoutedExperts& layer, const RoutedCall& call, int num_threads);

}  // namespace gossamer
