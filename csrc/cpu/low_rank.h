// Products of a linear layer with a low-rank update: skinny ones over the rank, and the layer's own with the update in it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/grouped_matmul.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace gossamer {

// Elements whose word of Philox4x32-10 is below `threshold` are dropped. What the others are multiplied with is a factor of
// the whole product, so that no element is rounded.
struct Dropout {
  bool on;
  uint64_t seed, threshold;
};

// out[i][j] = factor · Σ_k big(i, k) · small(k, j). Dropout is of big, whose element (i, k) is of row k and column i of the
// mask when that is transposed.
struct RankProductArgs {
  DType dtype;  // of big and small
  int64_t rows, depth, rank;
  FloatMatrix big;    // (rows, depth), one of its strides 1
  FloatMatrix small;  // (depth, rank), one of its strides 1
  FloatMatrix out;    // (rows, rank), one of its strides 1, in dtype or float32
  double factor;
  Dropout dropout;
  bool transposed;
};

// y[i][j] = Σ_k x(i, k) · weight(j, k) + bias[j] + factor · drop(Σ_k left(i, k) · right(k, j)). Without x the last term is
// added to what y holds; without left it is not there.
struct LowRankArgs {
  DType dtype;
  int64_t rows, columns, depth, rank;
  FloatMatrix x;       // (rows, depth) with column stride 1, or absent
  FloatMatrix weight;  // (columns, depth)
  FloatMatrix bias;    // (1, columns), or absent
  FloatMatrix left;    // (rows, rank) with column stride 1, or absent with rank 0
  FloatMatrix right;   // (rank, columns)
  FloatMatrix y;       // (rows, columns) with column stride 1
  double factor;
  Dropout dropout;
};

void rank_product(const RankProductArgs& args, int num_threads);
void low_rank_matmul(const LowRankArgs& args, int num_threads);

// Rows that are contiguous in a skinny product's sum, of which so many are worked on together.
constexpr int kWide = 128;

// Rows that are worked on together: `most`, or fewer where that leaves threads without work.
inline int64_t rank_unit(int64_t rows, int num_threads, int64_t most) {
  return std::clamp<int64_t>(rows / (num_threads * 4) / 8 * 8, 8, most);
}

// The shared memory of a call, for products of P.
template <class P>
struct LowRankBuffers {
  WorkQueue queue;
  P *panel, *left;
  int64_t chunk;

  LowRankBuffers(Arena& arena, const RankProductArgs& a, int num_threads) : left(nullptr), chunk(0) {
    queue = take_queue(arena, num_threads);
    panel = arena.take<P>(panel_size(packed_depth<P>(a.depth), a.rank));
  }
  LowRankBuffers(Arena& arena, const LowRankArgs& a, int num_threads) {
    queue = take_queue(arena, num_threads);
    chunk = chunk_rows(a.depth + a.rank, sizeof(P) / kTerms<P>);
    panel = arena.take<P>(a.x ? panel_size(packed_depth<P>(a.depth), chunk) : 0);
    left = arena.take<P>(panel_size(packed_depth<P>(a.rank), chunk));
  }
};

}  // namespace gossamer
