#include "cpu/product_key_topk.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace gossamer {
namespace {

// Number of scores above which a second thread is worth waking.
constexpr int64_t kScoresPerThread = int64_t{1} << 14;

int64_t rows_per_thread(int64_t scores) { return std::max<int64_t>(1, kScoresPerThread / std::max<int64_t>(scores, 1)); }

}  // namespace

void product_key_topk(const ProductKeyTopkArgs& args, int num_threads) {
  parallel_ranges(args.rows, rows_per_thread(args.size1 + args.size2), num_threads,
                  [&](int64_t begin, int64_t end) { kernels().tables.product_key_topk(args, begin, end); });
}

void product_key_topk_backward(const ProductKeyTopkBackwardArgs& args, int num_threads) {
  parallel_ranges(args.rows, rows_per_thread(args.size1 + args.size2), num_threads,
                  [&](int64_t begin, int64_t end) { kernels().tables.product_key_topk_backward(args, begin, end); });
}

void product_key_search(const ProductKeySearchArgs& args, int num_threads) {
  // Each thread packs its own copy of the keys, which takes as long as the scores of a few queries.
  const int64_t grain = std::max<int64_t>(16, rows_per_thread(2 * args.side * args.groups));
  parallel_ranges(args.rows / args.groups, grain, num_threads,
                  [&](int64_t begin, int64_t end) { kernels().tables.product_key_search(args, begin, end); });
}

}  // namespace gossamer
