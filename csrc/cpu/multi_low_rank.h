// Low-rank updates of rows, each by its own adapter, forward and backward.
#pragma once

#include <cstdint>

#include "cpu/grouped_matmul.h"

namespace gossamer {

struct MultiLowRankArgs {
  DType dtype;
  Groups groups;  // rows by adapter; rows without an adapter come after the last group
  int64_t n, c, rank;
  FloatMatrix x;       // (M, C), column stride 1, as all rows here
  ExpertWeights a, b;  // (A, r, C) and (A, N, r), each contiguous along one of its last two dimensions
  FloatMatrix scales;  // (1, A), or absent if all adapters use `scale`
  double scale;
  IndexArray ranks;  // (A,), or absent if every adapter has rank r
  void* s;           // (R, r) contiguous, x·aᵀ by adapter, in the accumulator's type; null in a forward that need not save it

  int64_t rank_of(int64_t adapter) const { return ranks ? ranks[adapter] : rank; }
  double scale_of(int64_t adapter) const { return scales ? scales.at(0, adapter) : scale; }
};

struct MultiLowRankForwardArgs : MultiLowRankArgs {
  FloatMatrix y;  // (M, N)
  bool add;       // whether to add to y; otherwise rows without an adapter become zero
};

struct MultiLowRankBackwardArgs : MultiLowRankArgs {
  FloatMatrix dy;      // (M, N)
  void* ds;            // (R, r) scratch, as s; null if neither dx nor da is wanted
  FloatMatrix dx;      // (M, C), or null, like the others
  void *da, *db;       // (A, r, C) and (A, N, r) contiguous
  DType factor_dtype;  // of da and db: `dtype` or float32
};

void multi_low_rank(const MultiLowRankForwardArgs& args, int num_threads);
void multi_low_rank_backward(const MultiLowRankBackwardArgs& args, int num_threads);

// A thread processes at most this many rows of one adapter at a time: enough that factors are read rarely, few enough that
// every thread gets some.
constexpr int64_t kAdapterUnit = 32;
inline int64_t adapter_chunk(int64_t num_rows, int num_threads) {
  const int64_t share = (num_rows + 4 * num_threads - 1) / (4 * num_threads);
  return std::clamp<int64_t>((share + kAdapterUnit - 1) / kAdapterUnit * kAdapterUnit, kAdapterUnit, 4 * kAdapterUnit);
}

// Number of a factor's values packed at a time; together with the current rows they fit the second-level cache.
constexpr int64_t kFactorPack = 64 << 10;
// Number of columns of a factor's gradient per piece of work.
constexpr int64_t kFactorColumns = 192;
// Number of rows that are summed before adding to the total of a factor's gradient.
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
