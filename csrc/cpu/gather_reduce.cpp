#include "cpu/gather_reduce.h"

#include <limits>
#include <type_traits>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace gossamer {
namespace {

// The first position in [begin, end) whose id is not below num_rows, or -1.
template <class Index>
int64_t first_outside(const Bags& bags, int64_t begin, int64_t end, int64_t num_rows) {
  const auto* ids = static_cast<const Index*>(bags.index.base);
  // One comparison for both ends: a negative id is a huge unsigned number.
  using Unsigned = std::make_unsigned_t<Index>;
  const uint64_t all = static_cast<uint64_t>(std::numeric_limits<Index>::max()) + 1;
  const uint64_t rows = std::min(static_cast<uint64_t>(num_rows), all);
  constexpr int64_t kBlock = 256;
  for (int64_t p = begin; p < end; p += kBlock) {
    const int64_t stop = std::min(end, p + kBlock);
    Unsigned largest = 0;
    for (int64_t i = p; i < stop; ++i) largest = std::max(largest, static_cast<Unsigned>(ids[i]));
    if (largest < rows) continue;
    for (int64_t i = p; i < stop; ++i) {
      if (static_cast<Unsigned>(ids[i]) >= rows) return i;
    }
  }
  return -1;
}

int64_t first_nan(const Bags& bags, int64_t begin, int64_t end, int64_t num_rows) {
  return visit_float(bags.weights.dtype, [&](auto tag) -> int64_t {
    const auto* values = static_cast<const typename decltype(tag)::type*>(bags.weights.base);
    for (int64_t p = begin; p < end; ++p) {
      const auto value = to_scalar(values[p]);
      if (value == value) continue;
      const int64_t id = bags.index[p];
      if (id != bags.padding_idx && id >= 0 && id < std::min(num_rows, bags.limit)) return p;
    }
    return -1;
  });
}

// Number of ids above which a second thread is worth waking for checks, which run at memory speed.
constexpr int64_t kIdsPerThread = int64_t{1} << 18;

}  // namespace

BagsError check_bags(const Bags& bags, int64_t num_rows, bool check_ids, bool check_weights, int num_threads) {
  if (bags.num_bags == 0) return {BagsError::kNothing, 0, 0, 0};
  if (bags.offsets) {
    int64_t previous = 0;
    for (int64_t b = 0; b <= bags.num_bags; ++b) {
      const int64_t offset = bags.offsets[b];
      if (offset < previous || offset > bags.num_positions) return {BagsError::kOffset, b, offset, 0};
      previous = offset;
    }
  }
  BagsError found{BagsError::kNothing, std::numeric_limits<int64_t>::max(), 0, 0};
  const int64_t pieces = bags.features ? bags.num_features : 1;
  const int64_t bags_each = bags.num_bags / pieces;
  for (int64_t f = 0; f < pieces; ++f) {
    const int64_t rows = bags.features ? bags.features[f].rows : num_rows;
    const int64_t first = bags.begin(f * bags_each), last = bags_each ? bags.end((f + 1) * bags_each - 1) : first;
    const int64_t grain = check_weights && bags.weights ? kElementsPerThread : kIdsPerThread;
    parallel_ranges(last - first, grain, num_threads, [&](int64_t begin, int64_t end) {
      const auto note = [&](BagsError::Kind kind, int64_t position) {
#pragma omp critical(gossamer_check_bags)
        if (position < found.position) found = {kind, position, bags.index[position], rows};
      };
      if (check_ids) {
        const int64_t bad = bags.index.wide ? first_outside<int64_t>(bags, first + begin, first + end, rows)
                                            : first_outside<int32_t>(bags, first + begin, first + end, rows);
        if (bad >= 0) note(BagsError::kIndex, bad);
      }
      if (check_weights && bags.weights) {
        const int64_t bad = first_nan(bags, first + begin, first + end, rows);
        if (bad >= 0) note(BagsError::kWeight, bad);
      }
    });
    if (found.kind != BagsError::kNothing) break;
  }
  return found;
}

void gather_reduce(const GatherArgs& args, int num_threads) {
  over_bags(args.bags, args.dim, num_threads,
            [&](int64_t first, int64_t last) { kernels().tables.gather_reduce(args, first, last); });
}

void gather_max(const GatherMaxArgs& args, int num_threads) {
  over_bags(args.bags, args.dim, num_threads,
            [&](int64_t first, int64_t last) { kernels().tables.gather_max(args, first, last); });
}

void gather_dot(const GatherDotArgs& args, int num_threads) {
  over_bags(args.bags, args.dim, num_threads,
            [&](int64_t first, int64_t last) { kernels().tables.gather_dot(args, first, last); });
}

}  // namespace gossamer
