// Gates of experts by products of smooth steps, down soft trees or over the bits of codes, and the experts that they choose.
#pragma once

#include <cstdint>

namespace gossamer {

// The rules of gossamer.nn.tree_gates and selector_gates.
struct TreeForm {
  // (T, C), rows of row_stride. For each tree `experts` - 1 splits in heap order, then `experts` scores of leaves. If coded: the bits
  // of each part, highest first, then one score for each part.
  const float* scores;
  int64_t row_stride, tokens, parts, experts;
  float gamma;  // width of the smooth step
  bool coded;

  // ⌈log₂ experts⌉, the bits of a code.
  int64_t bits() const {
    int64_t bits = 0;
    while ((int64_t{1} << bits) < experts) ++bits;
    return bits;
  }
  int64_t splits() const { return coded ? bits() : experts - 1; }
  int64_t columns() const { return parts * (coded ? splits() + 1 : 2 * experts - 1); }
  // Nodes with a split. Of codes all prefixes count, also those that no expert has.
  int64_t inner_nodes() const { return coded ? (int64_t{1} << bits()) - 1 : experts - 1; }
  int64_t first_split(int64_t part) const { return part * (coded ? splits() : 2 * experts - 1); }
  int64_t first_score(int64_t part) const { return coded ? parts * splits() + part : first_split(part) + experts - 1; }
};

struct TreeRoutingArgs : TreeForm {
  int64_t top_k;   // slots of a token: 0 for no choice, `experts` for a slot for each expert, less for the highest gates
  float* gates;    // (T, E)
  float* norm;     // (T, 2), the highest score and the sum that gates are divided by
  int64_t* ids;    // (T, K), the number of experts where a slot has none
  float* weights;  // (T, K), or null where a slot's weight is its expert's gate
  float* reach;    // (T, parts, E), what comes to each leaf, or null
  float* sums;     // (T, parts, 2), of the leaves' -s·log(s + 1e-6) and of s, or null
  bool* bad;       // set where a score is NaN or +inf
};

struct TreeRoutingBackwardArgs : TreeForm {
  int64_t top_k;
  const float *gates, *norm;  // as the forward pass gave them, like ids
  const int64_t* ids;
  const float *dgates, *dweights, *dreach, *dsums;  // null for none
  float* dscores;                                   // (T, C)
};

void tree_routing(const TreeRoutingArgs& args, int num_threads);
void tree_routing_backward(const TreeRoutingBackwardArgs& args, int num_threads);

}  // namespace gossamer
