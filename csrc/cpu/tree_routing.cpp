#include "cpu/tree_routing.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace gossamer {
namespace {

// Scores that a thread looks at before a second is worth waking.
constexpr int64_t kScoresPerThread = int64_t{1} << 13;

template <class Args>
void over_tokens(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int num_threads) {
  const int64_t work = std::max<int64_t>(1, args.parts * (args.inner_nodes() + args.experts));
  parallel_ranges(args.tokens, std::max<int64_t>(1, kScoresPerThread / work), num_threads,
                  [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

void tree_routing(const TreeRoutingArgs& args, int num_threads) { over_tokens(kernels().rows.tree_routing, args, num_threads); }

void tree_routing_backward(const TreeRoutingBackwardArgs& args, int num_threads) {
  over_tokens(kernels().rows.tree_routing_backward, args, num_threads);
}

}  // namespace gossamer
