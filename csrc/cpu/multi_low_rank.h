// Low-rank updates of rows, each by its own adapter, forward and backward.
#pragma once

#include <cstdint>

#include "cpu/grouped_matmul.h"

namespace gossamer {

struct MultiLowRankArgs {
  DType dtype;
  Groups groups;  // rows by adapter; rows without one lie past the last group
  int64_t n, c, rank;
  FloatMatrix x;       // (M, C), column stride 1, as all rows here
  ExpertWeights a, b;  // (A, r, C) and (A, N, r), each contiguous along one of its last two dimensions
  FloatMatrix scales;  // (1, A), or absent where `scale` is every adapter's
  double scale;
  IndexArray ranks;  // (A,), or absent where every adapter has the rank r
  void* s;           // (R, r) contiguous, x·aᵀ by adapter, in the accumulator's type; null in a forward that need not save it

  int64_t rank_of(int64_t adapter) const { return ranks ? ranks[adapter] : rank; }
  double scale_of(int64_t adapter) const { return scales ? scales.at(0, adapter) : scale; }
};

struct MultiLowRankForwardArgs : MultiLowRankArgs {
  FloatMatrix y;  // (M, N)
  bool add;       // to what y holds; else rows without adapter become zero
};

struct MultiLowRankBackwardArgs : MultiLowRankArgs {
  FloatMatrix dy;      // (M, N)
  void* ds;            // (R, r) room, as s; null where neither dx nor da is wanted
  FloatMatrix dx;      // (M, C), or null; so too the others
  void *da, *db;       // (A, r, C) and (A, N, r) contiguous
  DType factor_dtype;  // of da and db: `dtype` or float32
};

void multi_low_rank(const MultiLowRankForwardArgs& args, int num_threads);
void multi_low_rank_backward(const MultiLowRankBackwardArgs& args, int num_threads);

// A thread works on at most this many rows of one adapter at a time: enough to read its factors seldom, few enough that
// every thread gets some.
constexpr int64_t kAdapterUnit = 32;
inline int64_t adapter_chunk(int64_t num_rows, int num_threads) {
  const int64_t share = (num_rows + 4 * num_threads - 1) / (4 * num_threads);
  return std::clamp<int64_t>((share + kAdapterUnit - 1) / kAdapterUnit * kAdapterUnit, kAdapterUnit, 4 * kAdapterUnit);
}

// Values of a factor that are packed at a time; with the rows in hand they stay in the second-level cache.
constexpr int64_t kFactorPack = 64 << 10;
// Columns of a factor's gradient that are one piece of work.
constexpr int64_t kFactorColumns = 192;
// Rows that a factor's gradient sums before it adds to its total.
constexpr int64_t kFactorRows = 64;

// Memory of one thread of a call.
template <class T>
struct MultiLowRankBuffers {
  using S = Accumulator<T>;
  S *s, *pack, *rows, *sum;
  const T** runs;

  MultiLowRankBuffers(Arena& arena, const MultiLowRankArgs& a, int64_t chunk) {
    const int64_t wide = (a.rank + 31) / 32 * 32;
    s = arena.take<S>((chunk + 8) * wide);
    pack = arena.take<S>(std::max(kFactorPack, 128 * wide) + panel_size(kFactorRows, kFactorColumns));
    rows = arena.take<S>(128 * 32);
    sum = arena.take<S>((wide + 8) * (kFactorColumns + 32));
    runs = arena.take<const T*>(std::max({a.rank, a.n, a.c, kFactorRows}) + 32);
  }
};

}  // namespace gossamer
