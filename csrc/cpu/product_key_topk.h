// Retrieval by product keys: the highest sums of one score from each of two lists.
#pragma once

#include <cstdint>

namespace gossamer {

// The maximum number of pairs per row, as in ops/product_key_topk.py.
constexpr int64_t kMostPairs = 64;

struct ProductKeyTopkArgs {
  const float *scores1, *scores2;  // (R, N1) and (R, N2), rows of the strides
  int64_t row_stride1, row_stride2, rows, size1, size2, top_k;
  float* values;  // (R, K)
  int64_t* ids;   // (R, K), a · N2 + b
  bool* bad;      // set if a score is NaN or +inf; the results are then invalid
};

struct ProductKeyTopkBackwardArgs {
  const float *dvalues, *values;  // (R, K)
  const int64_t* ids;             // (R, K)
  int64_t rows, size1, size2, top_k;
  float *dscores1, *dscores2;  // (R, N1), (R, N2)
};

// Query r belongs to group r % groups; a score of list i is the product of its half i with a sub-key of that group.
struct ProductKeySearchArgs {
  const float* queries;  // (R, 2 · half), rows of row_stride
  int64_t row_stride, rows;
  const float* keys;  // (groups, 2, side, half), contiguous
  int64_t groups, side, half, top_k;
  int64_t* ids;   // (R, K), a · side + b
  float* scores;  // (R, K), in the bits of two gather_dot
  bool* bad;      // as above
};

void product_key_topk(const ProductKeyTopkArgs& args, int num_threads);
void product_key_topk_backward(const ProductKeyTopkBackwardArgs& args, int num_threads);
void product_key_search(const ProductKeySearchArgs& args, int num_threads);

}  // namespace gossamer
