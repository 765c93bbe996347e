// Matrix products over ragged groups of rows, and types that all expert kernels share: rows and weights by expert.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace gossamer {

// Rows of expert e are offsets[e] .. offsets[e+1]; row r is slot slots[r].
struct Groups {
  const int32_t* slots;
  const int32_t* offsets;
  int64_t num_rows, num_experts;
};

// (E, N, C) of any strides.
struct ExpertWeights {
  void* base;
  int64_t expert_stride, row_stride, col_stride;
};

// Row r of a product reads row r of the matrix when divisor is 0, else row slots[r] / divisor. Column stride 1.
struct GatheredRows {
  FloatMatrix matrix;
  int64_t divisor;
};

struct GroupedMatmulArgs {
  DType dtype;
  Groups groups;
  int64_t n, c;
  GatheredRows x;
  ExpertWeights weight;
  FloatMatrix bias;  // (E, N), or absent
  void* y;           // (R, N) contiguous
  bool y_grouped;    // rows in expert order, else in slot order
};

struct GroupedDweightArgs {
  DType dtype;
  Groups groups;
  int64_t n, c;
  GatheredRows x, dy;
  void* dweight;  // (E, N, C) contiguous, or (E, C, N) when transposed
  bool transposed;
  void* dbias;  // (E, N) contiguous, or null
};

void grouped_matmul(const GroupedMatmulArgs& args, int num_threads);
void grouped_matmul_dweight(const GroupedDweightArgs& args, int num_threads);

// Rows of the largest chunks are a multiple of this, so that blocks of three vectors are full in any instruction set.
constexpr int64_t kChunkUnit = 48;

// An expert's rows are processed in chunks whose packed rows, at most `width` values each, stay in the second-level cache if
// that leaves enough rows, since each chunk reads the expert's weights again.
inline int64_t chunk_rows(int64_t width, size_t element_size, int64_t panel_bytes = 768 << 10) {
  const int64_t rows = panel_bytes / std::max<int64_t>(1, width * static_cast<int64_t>(element_size));
  return std::clamp<int64_t>(rows, 2 * kChunkUnit, 512) / kChunkUnit * kChunkUnit;
}

// Rows of smaller chunks are a multiple of this: whole vectors.
constexpr int64_t kEvenUnit = 16;

// Rows per chunk when dividing `rows`: equal, since a small last chunk would read the weights for few rows.
inline int64_t even_chunk(int64_t rows, int64_t limit, int64_t unit = kEvenUnit) {
  const int64_t pieces = std::max<int64_t>(1, (rows + limit - 1) / limit);
  return ((rows + pieces - 1) / pieces + unit - 1) / unit * unit;
}

// Number of values in a panel for any instruction set: the packed dimension is rounded up, and tiles may read slightly past the
// end.
constexpr int64_t panel_size(int64_t depth, int64_t width) { return depth * ((width + 31) / 32 * 32) + 512; }

// Stride in packed values of rows that tiles read: an odd number of whole tiles, since otherwise the rows of a tile would share
// a few sets of the first-level cache.
template <class P>
constexpr int64_t packed_row_stride(int64_t terms) {
  return ((packed_depth<P>(terms) + kTileSide - 1) / kTileSide | 1) * kTileSide;
}
template <class P>
constexpr int64_t packed_rows_size(int64_t terms, int64_t rows) {
  return (rows + kTileSide - 1) / kTileSide * kTileSide * packed_row_stride<P>(terms);
}

// Number of values for rows of tokens, either as columns of a panel or as the left operand of tiles.
template <class P>
constexpr int64_t panel_or_rows_size(int64_t terms, int64_t rows) {
  const int64_t panel = panel_size(packed_depth<P>(terms), rows);
  return kTerms<P> > 1 ? std::max(panel, packed_rows_size<P>(terms, rows)) : panel;
}

// The number of threads worth using for this many multiplications.
inline int useful_threads(double multiplications, int num_threads) {
  constexpr double kPerThread = 65536;
  return static_cast<int>(std::clamp<double>(multiplications / kPerThread, 1, num_threads));
}

inline WorkQueue take_queue(Arena& arena, int num_threads) {
  return WorkQueue(arena.take<std::atomic<int64_t>>(num_threads * WorkQueue::kStride));
}

// Calls f with a tag of the C++ type that a dtype's products are packed as by the kernels in use.
template <class F>
void visit_packed(DType dtype, bool pairs, F&& f) {
  visit_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (pairs) return f(TypeTag<PackedAs<T, true>>{});
    f(TypeTag<PackedAs<T, false>>{});
  });
}

// The shared memory of a call, for products of P.
template <class P>
struct GroupedBuffers {
  using S = SumOf<P>;
  WorkQueue queue;
  P *x, *dy = nullptr;
  S *dy_sums = nullptr, *partial = nullptr;
  int64_t chunk;

  GroupedBuffers(Arena& arena, const GroupedMatmulArgs& a, int num_threads) {
    queue = take_queue(arena, num_threads);
    chunk = chunk_rows(a.c, sizeof(P) / kTerms<P>);
    x = arena.take<P>(panel_or_rows_size<P>(a.c, chunk));
  }
  GroupedBuffers(Arena& arena, const GroupedDweightArgs& a, int num_threads) {
    queue = take_queue(arena, num_threads);
    chunk = chunk_rows(std::max(a.n, a.c), sizeof(P) / kTerms<P>);
    x = arena.take<P>(std::max(panel_size(a.c, tile_depth<P>(chunk)), panel_size(tile_depth<P>(chunk), a.c)));
    dy = arena.take<P>(std::max(panel_size(a.n, tile_depth<P>(chunk)), panel_size(tile_depth<P>(chunk), a.n)));
    if (a.dbias) dy_sums = arena.take<S>(panel_size(a.n, chunk));
    partial = arena.take<S>(sizeof(S) > element_size(a.dtype) ? a.n * a.c : 0);
  }
};

}  // namespace gossamer
