// Weight matrices that modify themselves: one for each batch and head, changed by an outer product at each token.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace gossamer {

// Arrays are contiguous and hold floats, or doubles. A matrix has d rows and D = 3d + 4 columns: those of y, q, k and β.
struct SelfReferentialArgs {
  DType dtype;
  int64_t batch, tokens, heads, size;  // size is d
  int64_t segment;                     // tokens from one kept matrix to the next
  const void* x;                       // (B, T, H, d)
  const void* weight;                  // (H, d, D), the trained start
  const void* shift;                   // (B, H, d, D), added to it; null for zero
  void* y;                             // (B, T, H, d)
  void* final_shift;                   // (B, H, d, D), or null
  void* steps;                         // (B, H, T, 2d + 4 + D): q, k, β and Δ of each token; or null
  void* kept;                          // (B, H, segments, d, D): the matrix at the end of each segment; or null

  int64_t columns() const { return 3 * size + 4; }
  int64_t step_size() const { return 2 * size + 4 + columns(); }
  int64_t segments() const { return (tokens + segment - 1) / segment; }
};

struct SelfReferentialBackwardArgs : SelfReferentialArgs {
  const void* dy;            // (B, T, H, d)
  const void* dfinal_shift;  // (B, H, d, D), or null
  void* dx;                  // (B, T, H, d)
  void* dstart;              // (B, H, d, D), the gradient of each sequence's first matrix
};

// y_t = W_yᵀ x_t, and the change of W; see ops/self_referential.py. Reads `shift`, writes the arrays that are not null.
void self_referential(const SelfReferentialArgs& args, int num_threads);

// Reads steps and kept of a forward pass.
void self_referential_backward(const SelfReferentialBackwardArgs& args, int num_threads);

}  // namespace gossamer
