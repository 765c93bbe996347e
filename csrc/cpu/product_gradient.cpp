#include "cpu/product_gradient.h"

#include <algorithm>
#include <vector>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace gossamer {
namespace {

// Most pieces, and how many times more a piece multiplies than it has sums, which are added up again.
constexpr int64_t kMostPieces = 32, kLeastReuse = 16;

template <class S>
void sum_pieces(const ProductGradientArgs& args, int num_threads) {
  const int32_t* const offsets = args.offsets;
  const int64_t size = args.num_right * args.n * args.k, count = offsets[args.num_left] - offsets[0];
  const int64_t pieces =
      std::clamp<int64_t>(count * args.m / (kLeastReuse * std::max<int64_t>(args.num_right, 1)), 1, kMostPieces);
  const Scratch more = allocate_scratch((pieces - 1) * size * sizeof(S));
  S* const out = static_cast<S*>(args.right_gradient);
  const auto sums_of = [&](int64_t piece) { return piece == 0 ? out : reinterpret_cast<S*>(more.get()) + (piece - 1) * size; };
  const auto row_of = [&](int64_t piece) -> int64_t {
    if (piece == 0 || piece == pieces) return piece == 0 ? 0 : args.num_left;
    return std::lower_bound(offsets, offsets + args.num_left, offsets[0] + count * piece / pieces) - offsets;
  };
  std::vector<std::atomic<int64_t>> taken(num_threads * WorkQueue::kStride);
  parallel_team(static_cast<int>(std::min<int64_t>(num_threads, pieces)), [&](Team team) {
    WorkQueue queue(taken.data());
    queue.restart(team);
    team.barrier();
    queue.each(team, pieces, 1, [&](int64_t piece, int64_t) {
      std::fill_n(sums_of(piece), size, S{0});
      kernels().tables.product_gradient(args, row_of(piece), row_of(piece + 1), sums_of(piece));
    });
    team.barrier();
    const auto [begin, end] = team.share(size);
    for (int64_t piece = 1; piece < pieces; ++piece) {
      const S* from = sums_of(piece);
      for (int64_t i = begin; i < end; ++i) out[i] += from[i];
    }
  });
}

}  // namespace

void product_gradient(const ProductGradientArgs& args, int num_threads) {
  if (args.dtype == DType::kFloat64) {
    sum_pieces<double>(args, num_threads);
  } else {
    sum_pieces<float>(args, num_threads);
  }
}

}  // namespace gossamer
