// Weighted sums of table rows over lists of indices, and the gradient of the weights.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace gossamer {

// Bag b holds the positions offsets[b] .. offsets[b+1], or b·bag_size .. (b+1)·bag_size where there are no offsets.
// An id from `limit` on, or equal to padding_idx, contributes nothing, and its table row is not read.
struct Bags {
  IndexArray index;
  IndexArray offsets;
  int64_t bag_size;
  int64_t num_positions, num_bags;
  int64_t limit, padding_idx;

  int64_t begin(int64_t bag) const { return offsets ? offsets[bag] : bag * bag_size; }
  int64_t end(int64_t bag) const { return offsets ? offsets[bag + 1] : (bag + 1) * bag_size; }
};

struct GatherArgs {
  FloatMatrix table;  // (N, D), column stride 1
  int64_t num_rows, dim;
  Bags bags;
  FloatMatrix weights;  // one row of num_positions, or absent
  void* out;            // (B, D) contiguous, the table's dtype
};

struct GatherDotArgs {
  FloatMatrix dout;   // (B, D), column stride 1, the table's dtype
  FloatMatrix table;  // (N, D), column stride 1
  int64_t num_rows, dim;
  Bags bags;
  FloatMatrix out;  // one row of num_positions, zeroed by the caller where offsets may leave positions out
};

// What is wrong with the lists; kind is kNothing when they are sound.
struct BagsError {
  enum Kind { kNothing = 0, kIndex = 1, kOffset = 2 } kind;
  int64_t position, value;
};

BagsError check_bags(const Bags& bags, int64_t num_rows, int num_threads);
void gather_reduce(const GatherArgs& args, int num_threads);
void gather_dot(const GatherDotArgs& args, int num_threads);

}  // namespace gossamer
