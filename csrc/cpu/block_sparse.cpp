#include "cpu/block_sparse.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/run_team.h"

namespace gossamer {

std::vector<Rectangle> choose_rectangles(const BlockLists& lists, int64_t bm, int64_t bn, int64_t across, int64_t size,
                                         int64_t part) {
  // Threads meet twice a rectangle, which a million multiplications make up for.
  constexpr double kLeastWork = 1 << 20;
  // The dense operand is read for every rectangle; elsewhere it is packed once.
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
    if (!found.empty() && found.back().column == column && found.back().count == count) {
      found.back().last = list + 1;
      continue;
    }
    found.push_back({list, list + 1, column, count});
    live += count > 0;
    read += static_cast<double>(count) * bn;
  }
  if (live == 0 || work < kLeastWork * live || read > kMostReads * size) return {};
  return found;
}

namespace {

// Whether a product with a transposed matrix, which is what a weight's gradient is, can be a sum of outer products: no
// epilogue follows, rows of the dense operand are contiguous, and each rectangle's result is one matrix.
bool sums_outer_products(const BlockProductArgs& a, const std::vector<Rectangle>& rectangles) {
  if (a.col_stride == 1 || a.b.col_stride != 1 || a.epilogue.bias || a.epilogue.activation >= 0) return false;
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
  // Packing and storing count too: a matrix with few blocks still has rows.
  const double blocks = args.lists.offsets[args.lists.count];
  const double work = args.n * (blocks * args.bm * args.bn + args.depth + args.rows());
  // Sums of outer products are other sums, so what they are chosen by must not depend on n.
  constexpr int64_t kOuterColumns = 64;
  auto found = choose_rectangles(args.lists, args.bm, args.bn, kOuterColumns, args.depth, args.b.size);
  const bool outer = !found.empty() && sums_outer_products(args, found);
  if (!outer) found = choose_rectangles(args.lists, args.bm, args.bn, args.n, args.depth, args.b.size);
  const RectangleProductArgs by_rectangles{args, found.data(), static_cast<int64_t>(found.size())};
  if (outer) return run_team<OuterRectangleBuffers>(by_rectangles, work, num_threads, kernels().outer_rectangles);
  if (!found.empty()) {
    return run_team<RectangleBuffers>(by_rectangles, work, num_threads, kernels().rectangle_product);
  }
  run_team<BlockProductBuffers>(args, work, num_threads, kernels().block_product);
}

void sampled_product(const SampledProductArgs& args, int num_threads) {
  const double blocks = args.lists.offsets[args.lists.count];
  const double work = args.depth * (blocks * args.bm * args.bn + args.rows() + args.cols) + args.nnz * args.bm * args.bn;
  const auto found = choose_rectangles(args.lists, args.bm, args.bn, args.depth, args.cols, args.b.size);
  if (!found.empty()) {
    const SampledRectanglesArgs by_rectangles{args, found.data(), static_cast<int64_t>(found.size())};
    return run_team<RectangleBuffers>(by_rectangles, work, num_threads, kernels().sampled_rectangles);
  }
  run_team<SampledProductBuffers>(args, work, num_threads, kernels().sampled_product);
}

}  // namespace gossamer
