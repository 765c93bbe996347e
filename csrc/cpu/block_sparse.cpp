#include "cpu/block_sparse.h"

#include <algorithm>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/run_team.h"

namespace gossamer {

namespace {

// Number of rows or columns of a block to compute; a block that is only padding is computed too.
int64_t live_of(int32_t live, int64_t size) { return live > 0 && live < size ? live : size; }

// The columns of `count` block columns from `column` on without padding, which occurs only at their end.
int64_t live_columns(const BlockLists& lists, int64_t column, int64_t count, int64_t bn) {
  if (!lists.live_across || count == 0) return count * bn;
  const int32_t* live = lists.live_across + column;
  const bool full = std::all_of(live, live + count - 1, [&](int32_t columns) { return live_of(columns, bn) == bn; });
  return full ? (count - 1) * bn + live_of(live[count - 1], bn) : count * bn;
}

}  // namespace

std::vector<Rectangle> choose_rectangles(const BlockLists& lists, int64_t bm, int64_t bn, int64_t across, int64_t size,
                                         int64_t part) {
  // Threads synchronise twice per rectangle, which pays off from a million multiplications on.
  constexpr double kLeastWork = 1 << 20;
  // The dense operand is read for every rectangle; without rectangles it is packed once.
  constexpr double kMostReads = 2;
  std::vector<Rectangle> found;
  double work = 0, live = 0, read = 0;
  for (int64_t list = 0; list < lists.count; ++list) {
    const int32_t begin = lists.offsets[list], end = lists.offsets[list + 1];
    for (int32_t j = begin + 1; j < end; ++j) {
      if (lists.indices[j] != lists.indices[j - 1] + 1) return {};
    }
    const int64_t column = begin < end ? lists.indices[begin] : 0, count = end - begin;
    if (count > 0 && column * bn / part != ((column + count) * bn - 1) / part) return {};
    work += static_cast<double>(bm) * count * bn * across;
    const int64_t rows = lists.live && count > 0 ? live_of(lists.live[list], bm) : bm;
    Rectangle* before = found.empty() ? nullptr : &found.back();
    // Padding is at the end of a rectangle.
    if (before && before->column == column && before->count == count && before->rows == (list - before->first) * bm) {
      before->last = list + 1;
      before->rows += rows;
      continue;
    }
    found.push_back({list, list + 1, column, count, rows, live_columns(lists, column, count, bn)});
    live += count > 0;
    read += static_cast<double>(count) * bn;
  }
  if (live == 0 || work < kLeastWork * live || read > kMostReads * size) return {};
  return found;
}

namespace {

// The size of the unblocked dimension for the choice of rectangles. With tiles, rectangles have different sums, so the choice
// must not depend on how many rows share the product.
int64_t worth_of(DType dtype, int64_t across) {
  constexpr int64_t kAlways = int64_t{1} << 40;
  return kernels().tiles && dtype == DType::kBFloat16 ? kAlways : across;
}

// Whether a product can be a sum of outer products, as a weight's gradient is: the sparse matrix is transposed, rows of the dense
// operand are contiguous, and no epilogue follows.
bool may_sum_outer_products(const BlockProductArgs& a) {
  return a.col_stride != 1 && a.b.col_stride == 1 && !a.epilogue.bias && a.epilogue.activation < 0;
}

// Whether each rectangle's part of the result is one matrix.
bool within_parts(const BlockProductArgs& a, const std::vector<Rectangle>& rectangles) {
  return !a.y_by_columns || std::all_of(rectangles.begin(), rectangles.end(), [&](const Rectangle& r) {
    return r.count == 0 || r.first * a.bm / a.y_part == (r.last * a.bm - 1) / a.y_part;
  });
}

}  // namespace

int64_t RectangleProductArgs::max_depth() const {
  int64_t most = 0;
  for (int64_t i = 0; i < num_rectangles; ++i) most = std::max(most, rectangles[i].count * bn);
  return most;
}

int64_t RectangleProductArgs::max_rows() const {
  int64_t most = 0;
  for (int64_t i = 0; i < num_rectangles; ++i) {
    if (rectangles[i].count > 0) most = std::max(most, (rectangles[i].last - rectangles[i].first) * bm);
  }
  return most;
}

void block_product(const BlockProductArgs& args, int num_threads) {
  // Packing and storing count as work too, since a matrix with few blocks still has rows.
  const double blocks = args.lists.offsets[args.lists.count];
  const double work = args.n * (blocks * args.bm * args.bn + args.depth + args.rows());
  const auto choose = [&](int64_t across) {
    return choose_rectangles(args.lists, args.bm, args.bn, across, args.depth, args.b.size);
  };
  const auto over = [&](const std::vector<Rectangle>& rectangles) {
    return RectangleProductArgs{args, rectangles.data(), static_cast<int64_t>(rectangles.size())};
  };
  if (may_sum_outer_products(args)) {
    // These sums differ, so the choice must not depend on n.
    const auto found = choose(64);
    if (!found.empty() && within_parts(args, found)) {
      return run_team<OuterRectangleBuffers>(over(found), work, num_threads, kernels().structured.outer_rectangles);
    }
  }
  const auto found = choose(worth_of(args.dtype, args.n));
  if (!found.empty()) return run_team<RectangleBuffers>(over(found), work, num_threads, kernels().structured.rectangle_product);
  run_team<BlockProductBuffers>(args, work, num_threads, kernels().structured.block_product);
}

namespace {

// The rows that a_rows selects, stacked.
Scratch gathered_rows(const SampledProductArgs& args, int num_threads) {
  constexpr int64_t kBytesPerThread = int64_t{1} << 16;
  const int64_t size = element_size(args.dtype), bytes = args.depth * size, stride = args.a.row_stride * size;
  Scratch rows = allocate_scratch(args.rows() * bytes);
  const auto* from = static_cast<const char*>(args.a.base);
  parallel_ranges(args.rows(), kBytesPerThread / std::max<int64_t>(bytes, 1), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = args.a_rows[i];
      if (row >= 0 && row < args.num_a) {
        std::memcpy(rows.get() + i * bytes, from + row * stride, bytes);
      } else {
        std::memset(rows.get() + i * bytes, 0, bytes);
      }
    }
  });
  return rows;
}

}  // namespace

void sampled_product(const SampledProductArgs& args, int num_threads) {
  const double blocks = args.lists.offsets[args.lists.count];
  const double work = args.depth * (blocks * args.bm * args.bn + args.rows() + args.cols) + args.nnz * args.bm * args.bn;
  // Deeper sums are more accurate in pieces.
  constexpr int64_t kDeepest = 1 << 15;
  const auto found = choose_rectangles(args.lists, args.bm, args.bn, worth_of(args.dtype, args.depth), args.cols, args.b.size);
  if (!found.empty() && args.depth <= kDeepest) {
    const SampledRectanglesArgs by_rectangles{args, found.data(), static_cast<int64_t>(found.size())};
    return run_team<RectangleBuffers>(by_rectangles, work, num_threads, kernels().structured.sampled_rectangles);
  }
  SampledProductArgs whole = args;
  Scratch rows;
  if (args.a_rows) {
    rows = gathered_rows(args, num_threads);
    whole.a = {rows.get(), args.depth, 1, args.dtype};
    whole.a_rows = nullptr;
  }
  run_team<SampledProductBuffers>(whole, work, num_threads, kernels().structured.sampled_product);
}

}  // namespace gossamer
