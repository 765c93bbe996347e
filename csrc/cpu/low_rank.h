// Products of a linear layer with a low-rank update: skinny products over the rank, and the layer's own product including the
// update.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/grouped_matmul.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/quantized_weight.h"

namespace gossamer {

// Elements whose word of Philox4x32-10 is below `threshold` are dropped. The scaling of kept elements is a factor of the whole
// product, so that no element is rounded.
struct Dropout {
  bool on;
  uint64_t seed, threshold;
};

// out[i][j] = factor · Σ_k big(i, k) · small(k, j). Dropout applies to big; element (i, k) belongs to row k and column i of the
// mask if the mask is transposed.
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
// added to y; without left there is no last term. With a, left is a result: left(i, j) = left_factor · Σ_k x(i, k) · a(j, k).
struct LowRankArgs {
  DType dtype;
  int64_t rows, columns, depth, rank;
  FloatMatrix x;       // (rows, depth) with column stride 1, or absent
  FloatMatrix weight;  // (columns, depth), or absent for a quantised one
  FloatMatrix bias;    // (1, columns), or absent
  FloatMatrix a;       // (rank, depth), one of its strides 1, or absent; not without x
  FloatMatrix left;    // (rows, rank) with column stride 1, or absent with rank 0
  FloatMatrix right;   // (rank, columns), one of its strides 1
  FloatMatrix y;       // (rows, columns) with column stride 1
  double factor, left_factor;
  Dropout dropout;
  QuantizedWeights quantized;  // (1, columns, depth), or absent

  // The factor with which `left` is computed from a.
  RankProductArgs left_product() const {
    return {dtype, rows, depth, rank, x, {a.base, a.col_stride, a.row_stride, dtype}, left, left_factor, {}, false};
  }
};

void rank_product(const RankProductArgs& args, int num_threads);
void low_rank_matmul(const LowRankArgs& args, int num_threads);

// Number of rows processed together that are contiguous along a skinny product's sum.
constexpr int kWide = 256;

// Number of rows processed together: `most`, or fewer if that would leave threads without work.
inline int64_t rank_unit(int64_t rows, int num_threads, int64_t most) {
  return std::clamp<int64_t>(rows / (num_threads * 4) / 8 * 8, 8, most);
}

// How threads share a product: by the weight's rows, after packing rows of x together; or, with many rows, by rows of x or by
// columns of a weight that is contiguous along its rows, each thread with its own memory and caches and without waiting.
// Without x, by the rows of y.
enum class LowRankForm { kShared, kByRows, kByColumns, kUpdate };

inline LowRankForm low_rank_form(const LowRankArgs& a, int num_threads) {
  constexpr int64_t kLeast = 96;  // rows or columns of a thread
  if (!a.x) return LowRankForm::kUpdate;
  if (a.weight.row_stride == 1 && a.weight.col_stride != 1) {
    return a.rows >= kLeast && a.columns >= kLeast * num_threads ? LowRankForm::kByColumns : LowRankForm::kShared;
  }
  return num_threads > 1 && a.rows >= kLeast * num_threads ? LowRankForm::kByRows : LowRankForm::kShared;
}

// The memory of a call, for products of P.
template <class P>
struct LowRankBuffers {
  WorkQueue queue, left_queue, chunks;
  P *panel, *update = nullptr;
  void* left_product = nullptr;
  int64_t chunk = 0, quartered = 0;
  LowRankForm form = LowRankForm::kShared;

  LowRankBuffers(Arena& arena, const RankProductArgs& a, int num_threads) {
    queue = take_queue(arena, num_threads);
    panel = arena.take<P>(panel_or_rows_size<P>(a.depth, a.rank));
  }
  LowRankBuffers(Arena& arena, const LowRankArgs& a, int num_threads) {
    queue = take_queue(arena, num_threads);
    left_queue = take_queue(arena, num_threads);
    chunks = take_queue(arena, num_threads);
    form = low_rank_form(a, num_threads);
    if (form == LowRankForm::kUpdate) {
      update = arena.take<P>(panel_size(tile_depth<P>(a.rank), a.columns));
      return;
    }
    const int64_t copies = form == LowRankForm::kShared ? 1 : num_threads;
    const int64_t whole = form == LowRankForm::kByColumns ? a.columns : a.rows, share = (whole + copies - 1) / copies;
    // Processors that multiply pairs have second-level caches of a megabyte and more.
    constexpr int64_t bytes = kTerms<P> > 1 ? 1 << 20 : 768 << 10;
    // The last of a thread's several chunks is processed in quarters, which are whole vectors.
    const int64_t unit = form == LowRankForm::kShared ? kEvenUnit : 4 * kEvenUnit;
    chunk = even_chunk(share, chunk_rows(a.depth + a.rank, sizeof(P) / kTerms<P>, bytes), unit);
    quartered = share > chunk ? 1 : 0;
    panel_values_ = panel_size(packed_depth<P>(a.depth), chunk);
    update_values_ = panel_size(packed_depth<P>(a.rank), chunk);
    panel = arena.take<P>(panel_values_ * copies);
    update = arena.take<P>(update_values_ * copies);
    if (a.a && form == LowRankForm::kByColumns) {
      Arena plan;
      LowRankBuffers<P>(plan, a.left_product(), num_threads);
      left_product = arena.take<char>(plan.used());
    }
  }

  // The part of a thread that works alone.
  void keep_own(int thread) {
    queue = queue.of(thread);
    left_queue = left_queue.of(thread);
    panel += thread * panel_values_;
    update += thread * update_values_;
  }

 private:
  int64_t panel_values_ = 0, update_values_ = 0;
};

}  // namespace gossamer
