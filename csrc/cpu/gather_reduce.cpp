#include "cpu/gather_reduce.h"

#include <limits>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace gossamer {
namespace {

// Elements a thread should have to do before it is worth starting.
constexpr int64_t kElementsPerThread = 16384;

// Cuts the bags so that every thread gets about as many positions, and calls f(first bag, last bag).
template <class F>
void over_bags(const Bags& bags, int64_t dim, int num_threads, F&& f) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(dim, 1));
  // An empty bag costs about one position: its row of the output is still written.
  const int64_t first = bags.num_bags > 0 ? bags.begin(0) : 0;
  const auto cost_before = [&](int64_t bag) { return (bag < bags.num_bags ? bags.begin(bag) : bags.end(bag - 1)) - first + bag; };
  const auto bag_at = [&](int64_t cost) {
    int64_t low = 0, high = bags.num_bags;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (cost_before(middle) < cost) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  if (bags.num_bags == 0) return;
  parallel_ranges(cost_before(bags.num_bags), grain, num_threads,
                  [&](int64_t begin, int64_t end) { f(bag_at(begin), bag_at(end)); });
}

}  // namespace

BagsError check_bags(const Bags& bags, int64_t num_rows, int num_threads) {
  if (bags.num_bags == 0) return {BagsError::kNothing, 0, 0};
  if (bags.offsets) {
    int64_t previous = 0;
    for (int64_t b = 0; b <= bags.num_bags; ++b) {
      const int64_t offset = bags.offsets[b];
      if (offset < previous || offset > bags.num_positions) return {BagsError::kOffset, b, offset};
      previous = offset;
    }
  }
  const int64_t first = bags.begin(0), last = bags.end(bags.num_bags - 1);
  int64_t bad = std::numeric_limits<int64_t>::max();
  parallel_ranges(last - first, kElementsPerThread, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t p = first + begin; p < first + end; ++p) {
      // One comparison for both ends: a negative id is a huge unsigned number.
      if (static_cast<uint64_t>(bags.index[p]) >= static_cast<uint64_t>(num_rows)) {
#pragma omp critical(gossamer_check_bags)
        bad = std::min(bad, p);
        break;
      }
    }
  });
  if (bad == std::numeric_limits<int64_t>::max()) return {BagsError::kNothing, 0, 0};
  return {BagsError::kIndex, bad, bags.index[bad]};
}

void gather_reduce(const GatherArgs& args, int num_threads) {
  over_bags(args.bags, args.dim, num_threads,
            [&](int64_t first, int64_t last) { kernels().gather_reduce(args, first, last); });
}

void gather_dot(const GatherDotArgs& args, int num_threads) {
  over_bags(args.bags, args.dim, num_threads,
            [&](int64_t first, int64_t last) { kernels().gather_dot(args, first, last); });
}

}  // namespace gossamer
