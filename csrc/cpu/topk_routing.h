// The experts of each token and their weights, from a router's logits.
#pragma once

#include <cstdint>

namespace gossamer {

// The most experts of a token, and groups that it may use, as ops/topk_routing.py says: each takes a look at all.
constexpr int64_t kMostChosen = 64;

// The rules of gossamer.nn.softmax_topk and sigmoid_topk.
struct RouterArgs {
  const float* logits;  // (T, E), rows of row_stride
  int64_t row_stride, tokens, experts, top_k;
  bool sigmoid, renormalize;
  float scale;
};

struct TopkRoutingArgs : RouterArgs {
  int64_t n_group, topk_group;
  const float* bias;  // (E,) or null, of sigmoid scores
  int64_t* ids;       // (T, K)
  float* weights;     // (T, K)
};

struct TopkRoutingBackwardArgs : RouterArgs {
  const int64_t* ids;               // (T, K), as the forward gave them
  const float *weights, *dweights;  // (T, K)
  float* dlogits;                   // (T, E)
};

void topk_routing(const TopkRoutingArgs& args, int num_threads);
void topk_routing_backward(const TopkRoutingBackwardArgs& args, int num_threads);

}  // namespace gossamer
