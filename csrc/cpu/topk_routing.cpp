#include "cpu/topk_routing.h"

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace gossamer {
namespace {

// Number of logits above which a second thread is worth waking.
constexpr int64_t kLogitsPerThread = int64_t{1} << 14;

template <class Args>
void over_tokens(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int num_threads) {
  parallel_ranges(args.tokens, std::max<int64_t>(1, kLogitsPerThread / args.experts), num_threads,
                  [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

void topk_routing(const TopkRoutingArgs& args, int num_threads) { over_tokens(kernels().rows.topk_routing, args, num_threads); }

void topk_routing_backward(const TopkRoutingBackwardArgs& args, int num_threads) {
  over_tokens(kernels().rows.topk_routing_backward, args, num_threads);
}

}  // namespace gossamer
