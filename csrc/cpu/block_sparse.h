// Products with block-sparse matrices.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/expert_mlp.h"

namespace gossamer {

// The blocks of a matrix as one list per block row: list r holds blocks offsets[r] .. offsets[r+1], at block columns
// indices[j]; block j is stored at values[order[j]], or at values[j] without an order. Only the first live[r] rows of list r
// and the first live_across[c] columns of block column c count, or all if these arrays are absent. The rest is padding, whose
// products may be skipped and set to zero. Numbers out of range mean all.
struct BlockLists {
  const int32_t *offsets, *indices, *order;
  int64_t count;
  const int32_t *live, *live_across;

  int64_t place(int64_t j) const { return order ? order[j] : j; }
};

// A dense operand whose blocked dimension is stored in parts of whole blocks, `stride` apart; a plain matrix is one part.
struct PartedMatrix : FloatMatrix {
  int64_t size, stride;

  // The offset of index i of that dimension; indices are `step` apart within a part.
  int64_t offset(int64_t i, int64_t step) const { return i / size * stride + i % size * step; }

  // Calls f(begin, end, shift) for the indices of each part within first .. last; index i is at i·step + shift.
  template <class F>
  void for_parts(int64_t first, int64_t last, int64_t step, F&& f) const {
    for (int64_t i = first; i < last;) {
      const int64_t end = std::min(last, (i / size + 1) * size);
      f(i, end, i / size * (stride - size * step));
      i = end;
    }
  }
};

// The operations on a product before it is stored.
struct Epilogue {
  FloatMatrix bias;  // one row with column stride 1, or absent
  bool bias_by_rows;
  int activation;  // a code of ActivationForm, or -1 for none
};

// y = act(s · b + bias) with s (lists.count · bm, depth) and b (depth, n).
struct BlockProductArgs {
  DType dtype;
  BlockLists lists;
  const void* values;
  int64_t bm, bn;                  // of s as it is read: for a transposed view, the stored block's sizes are swapped
  int64_t row_stride, col_stride;  // within a block; one of them is 1
  PartedMatrix b;                  // (depth, n), one of its strides 1
  int64_t depth, n;
  Epilogue epilogue;
  void* y;  // contiguous (rows, n), or when y_by_columns (parts, n, y_part), y_part rows per part
  bool y_by_columns;
  int64_t y_part;

  int64_t rows() const { return lists.count * bm; }
  // The address of y(row, column).
  int64_t y_offset(int64_t row, int64_t column) const {
    if (!y_by_columns) return row * n + column;
    return (row / y_part * n + column) * y_part + row % y_part;
  }
};

// values[j] = act(a · b + bias) at block j of the lists, which have no order; zero after the last block.
struct SampledProductArgs {
  DType dtype;
  BlockLists lists;
  const int32_t* rows_of;  // block row of each block
  int64_t nnz, bm, bn;
  FloatMatrix a;          // (rows, depth), one of its strides 1; with a_rows (num_a, depth) with contiguous rows
  const int32_t* a_rows;  // null, or the row of a for each row; zeros if it is outside num_a
  int64_t num_a;
  PartedMatrix b;  // (depth, cols), one of its strides 1
  int64_t depth, cols;
  Epilogue epilogue;
  void* values;  // (nnz, bm, bn) contiguous

  int64_t rows() const { return lists.count * bm; }
};

// Lists first .. last, all of which have the blocks of columns column .. column+count. `rows` rows and `depth` columns of them,
// in elements, are not padding.
struct Rectangle {
  int64_t first, last, column, count, rows, depth;
};

// The same products of lists that are rectangles.
struct RectangleProductArgs : BlockProductArgs {
  const Rectangle* rectangles;
  int64_t num_rectangles;

  int64_t max_depth() const;
  int64_t max_rows() const;
};

struct SampledRectanglesArgs : SampledProductArgs {
  const Rectangle* rectangles;
  int64_t num_rectangles;

  int64_t max_depth() const { return depth; }
};

// The rectangles that the lists of blocks form, including those of empty lists, if products are faster with them; otherwise
// none. `across` is the unblocked dimension; the blocked dimension of the dense operand has `size` indices, `part` of them per
// part.
std::vector<Rectangle> choose_rectangles(const BlockLists& lists, int64_t bm, int64_t bn, int64_t across, int64_t size,
                                         int64_t part);

void block_product(const BlockProductArgs& args, int num_threads);
void sampled_product(const SampledProductArgs& args, int num_threads);

// Amount of an operand packed at a time: enough work for every thread, and small enough for a last-level cache.
constexpr int64_t kPackedBytes = 16 << 20;

// Number of rows of a block row that are processed together.
inline int64_t group_rows(int64_t bm) { return std::min<int64_t>(bm, 32); }

// The shared memory of a call, for products of P.
template <class P>
struct BlockProductBuffers {
  WorkQueue queue;
  P* panel;
  int64_t chunk;

  BlockProductBuffers(Arena& arena, const BlockProductArgs& a, int num_threads) {
    // A multiple of every instruction set's panel width.
    constexpr int64_t kUnit = 96;
    const int64_t most = kPackedBytes / std::max<int64_t>(1, packed_depth<P>(a.depth) * static_cast<int64_t>(sizeof(P)));
    chunk = std::clamp<int64_t>(most, kUnit, (a.n + kUnit - 1) / kUnit * kUnit + kUnit) / kUnit * kUnit;
    queue = take_queue(arena, num_threads);
    panel = arena.take<P>(panel_size(packed_depth<P>(a.depth), chunk));
  }
};

template <class P>
struct SampledProductBuffers {
  using S = SumOf<P>;
  WorkQueue queue;
  P *a, *b;
  S* partial;
  int64_t chunk;

  SampledProductBuffers(Arena& arena, const SampledProductArgs& args, int num_threads) {
    constexpr int64_t kUnit = 128;
    const int64_t width = (args.rows() + args.cols) * static_cast<int64_t>(sizeof(P)) / kTerms<P>;
    const int64_t most = std::max(kPackedBytes / std::max<int64_t>(1, width) / kUnit, int64_t{1}) * kUnit;
    const int64_t pieces = std::max<int64_t>(1, (args.depth + most - 1) / most);
    chunk = std::max((args.depth + pieces - 1) / pieces + kUnit - 1, kUnit) / kUnit * kUnit;
    queue = take_queue(arena, num_threads);
    a = arena.take<P>(panel_size(packed_depth<P>(chunk), args.rows()));
    b = arena.take<P>(panel_size(packed_depth<P>(chunk), args.cols));
    // Partial sums need separate memory if the result's type cannot hold them.
    const bool apart = pieces > 1 && sizeof(S) > element_size(args.dtype);
    partial = arena.take<S>(apart ? args.nnz * args.bm * args.bn : 0);
  }
};

// The shared memory of a call over rectangles, for products of P.
template <class P>
struct RectangleBuffers {
  WorkQueue queue;
  P* panel;
  int64_t chunk;

  template <class Args>
  RectangleBuffers(Arena& arena, const Args& a, int num_threads) {
    queue = take_queue(arena, num_threads);
    chunk = chunk_rows(a.max_depth(), sizeof(P) / kTerms<P>);
    panel = arena.take<P>(panel_or_rows_size<P>(a.max_depth(), chunk));
  }
};

// Number of terms of a sum of outer products that are packed at a time, and of columns of the dense operand. They are
// constants, because sums must not depend on the sizes of the result.
constexpr int64_t kOuterTerms = 288, kOuterColumns = 4096;

// The same for sums of outer products, whose results are rows of n values or of a rectangle's width.
template <class P>
struct OuterRectangleBuffers {
  using S = SumOf<P>;
  WorkQueue queue;
  P *left, *right;
  S* partial;

  OuterRectangleBuffers(Arena& arena, const RectangleProductArgs& a, int num_threads) {
    const int64_t rows = a.max_rows(), columns = std::min(a.n, kOuterColumns);
    const int64_t terms = tile_depth<P>(std::min(a.max_depth(), kOuterTerms));
    queue = take_queue(arena, num_threads);
    left = arena.take<P>(panel_size(a.y_by_columns ? columns : rows, terms));
    right = arena.take<P>(panel_size(terms, a.y_by_columns ? rows : columns));
    partial = arena.take<S>(sizeof(S) > element_size(a.dtype) && a.max_depth() > kOuterTerms ? rows * columns : 0);
  }
};

}  // namespace gossamer
