#include "cpu/map_ids.h"

#include <algorithm>
#include <atomic>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace gossamer {
namespace {

// Number of rows above which a second thread is worth waking.
constexpr int64_t kRowsPerThread = int64_t{1} << 14;

}  // namespace

int64_t map_ids(const MapIdsArgs& args, int num_threads) {
  std::atomic<int64_t> outside{args.count};
  parallel_ranges(args.count, std::max<int64_t>(1, kRowsPerThread / args.by.count), num_threads,
                  [&](int64_t begin, int64_t end) {
                    const int64_t found = kernels().tables.map_ids(args, begin, end);
                    if (found < 0) return;
                    // The lowest position over all threads, so that the message does not depend on their order.
                    int64_t first = outside.load();
                    while (found < first && !outside.compare_exchange_weak(first, found)) {
                    }
                  });
  return outside.load() < args.count ? outside.load() : -1;
}

}  // namespace gossamer
