#include "cpu/activate.h"

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace gossamer {
namespace {

// Number of values above which a second thread is worth waking.
constexpr int64_t kValuesPerThread = int64_t{1} << 15;

}  // namespace

void activate(const ActivateArgs& args, int num_threads) {
  const auto kernel = args.dact ? kernels().rows.activate_backward : kernels().rows.activate;
  parallel_ranges(args.rows * args.inner, kValuesPerThread, num_threads,
                  [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace gossamer
