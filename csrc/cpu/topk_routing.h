// The experts of each token and their weights, from a router's logits.
#pragma once

#include <cstdint>

namespace gossamer {

// The most experts of a token, and groups that it may use, as ops/topk_routing.py says: they are found by insertion.
constexpr int64_t kMostChosen = 64;

// The rules of gossamer.nn.softmax_topk and sigmoid_topk.
struct TopkRoutingArgs {
  const float* logits;  // (T, E), rows of row_stride
  int64_t row_stride, tokens, experts, top_k, n_group, topk_group;
  bool sigmoid, renormalize;
  float scale;
  const float* bias;  // (E,) or null, of sigmoid scores
  int64_t* ids;       // (T, K)
  float* weights;     // (T, K)
};

void topk_routing(const TopkRoutingArgs& args, int num_threads);

}  // namespace gossamer
