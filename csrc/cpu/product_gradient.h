// The gradients of both factors of products of small matrices that positions choose from two tables.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace gossamer {

// Position p multiplies matrix l(p) (m, k) of the left table and matrix r(p) (k, n) of the right one, and adds the product times
// factors[p] to row b(p) of a result. Given the gradient of the result, the gradient of a left matrix sums dout[b]·rightᵀ over its
// positions, that of a right one leftᵀ·dout[b]. Matrices of the right are stored transposed, (n, k), so that every access is to a row
// of k elements. All arrays are contiguous and of one type, float or double.
struct ProductGradientArgs {
  DType dtype;
  int64_t m, k, n;
  int64_t num_left, num_right;
  const void* left;          // (num_left, m·k)
  const void* right;         // (num_right, n·k)
  const void* dout;          // (B, m·n)
  const void* factors;       // one for each position, or null for ones
  const int32_t* positions;  // those of each left matrix, in order
  const int32_t* offsets;    // (num_left + 1,) where they begin
  const int32_t* rows;       // (L, 2): b and r of each position
  void* left_gradient;       // (num_left, m·k)
  void* right_gradient;      // (num_right, n·k)
};

// Sums of the right table's gradient are over pieces of the left matrices that do not depend on the number of threads, added in
// order.
void product_gradient(const ProductGradientArgs& args, int num_threads);

}  // namespace gossamer
