#include "cpu/topk_routing.h"

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace gossamer {
namespace {

// Logits that a thread looks at before a second is worth waking.
constexpr int64_t kLogitsPerThread = int64_t{1} << 14;

}  // namespace

void topk_routing(const TopkRoutingArgs& args, int num_threads) {
  parallel_ranges(args.tokens, std::max<int64_t>(1, kLogitsPerThread / args.experts), num_threads,
                  [&](int64_t begin, int64_t end) { kernels().topk_routing(args, begin, end); });
}

}  // namespace gossamer
