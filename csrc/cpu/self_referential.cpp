#include "cpu/self_referential.h"

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace gossamer {

// Sequences and heads are independent; tokens are not.
void self_referential(const SelfReferentialArgs& args, int num_threads) {
  parallel_ranges(args.batch * args.heads, 1, num_threads,
                  [&](int64_t begin, int64_t end) { kernels().rows.self_referential(args, begin, end); });
}

void self_referential_backward(const SelfReferentialBackwardArgs& args, int num_threads) {
  parallel_ranges(args.batch * args.heads, 1, num_threads,
                  [&](int64_t begin, int64_t end) { kernels().rows.self_referential_backward(args, begin, end); });
}

}  // namespace gossamer
