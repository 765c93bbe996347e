// The experts of each token and their weights, from a router's logits.
#pragma once

#include <cstdint>

namespace gossamer {

// The maximum number of experts per token and of groups, as in ops/topk_routing.py: each choice scans all scores.
constexpr int64_t kMostChosen = 64;

// The rules of gossamer.nn.softmax_topk and sigmoid_topk.
struct RouterArgs {
  const float* logits;  // (T, E), rows of row_stride
  int64_t row_stride, tokens, experts, top_k;
  bool sigmoid, renormalize;
  float scale;
};

// A choice of experts until their probabilities reach a sum, by gossamer.nn.softmax_top_p (exceed) and softmax_threshold. The
// router's `experts` then counts a token's logits, including those of null experts, and `top_k` slots suffice for any token.
struct MassRule {
  int64_t num_experts;  // logits from here on belong to null experts, which get no slot
  int64_t max_ranks;    // choices per token, including null experts
  float mass;
  bool exceed;  // whether the sum must pass the mass, or may equal it
};

struct TopkRoutingArgs : RouterArgs {
  int64_t n_group, topk_group;
  const float* bias;  // (E,) or null, of sigmoid scores
  int64_t* ids;       // (T, K)
  float* weights;     // (T, K)
  // Null for top_k experts per token. Otherwise groups and bias are not used, and slots without an expert have the id
  // num_experts.
  const MassRule* until = nullptr;
};

struct TopkRoutingBackwardArgs : RouterArgs {
  const int64_t* ids;               // (T, K), as the forward gave them; any where the weight is 0
  const float *weights, *dweights;  // (T, K)
  float* dlogits;                   // (T, E)
};

void topk_routing(const TopkRoutingArgs& args, int num_threads);
void topk_routing_backward(const TopkRoutingBackwardArgs& args, int num_threads);

}  // namespace gossamer
