#include "cpu/delta_rule.h"

#include "cpu/grouped_matmul.h"
#include "cpu/isa.h"

namespace gossamer {
namespace {

// Number of multiplications of a call, which determines the number of threads.
double work_of(const DeltaRuleArgs& a) {
  return static_cast<double>(a.batch * a.tokens * a.heads) * static_cast<double>(3 * a.key_size * a.value_size);
}

template <class Args, class Kernel>
void run(const Args& args, bool backward, int num_threads, Kernel kernel) {
  const int threads = useful_threads(work_of(args), num_threads);
  const size_t bytes = args.dtype == DType::kFloat64 ? DeltaRuleLayout<double>(args, backward, threads).bytes(args, threads)
                                                     : DeltaRuleLayout<float>(args, backward, threads).bytes(args, threads);
  const Scratch scratch = allocate_scratch(bytes);
  parallel_team(threads, [&](Team team) { kernel(args, scratch.get(), threads, team); });
}

}  // namespace

void delta_rule(const DeltaRuleArgs& args, int num_threads) { run(args, false, num_threads, kernels().rows.delta_rule); }

void delta_rule_backward(const DeltaRuleBackwardArgs& args, int num_threads) {
  run(args, true, num_threads, kernels().rows.delta_rule_backward);
}

void delta_rule_step(const DeltaRuleArgs& args, int num_threads) {
  // Each thread should have some hundred kilobytes of states to process.
  constexpr int64_t kValues = 48 << 10;
  const int64_t grain = std::max<int64_t>(1, kValues / (args.key_size * args.value_size));
  parallel_ranges(args.batch * args.heads, grain, num_threads,
                  [&](int64_t begin, int64_t end) { kernels().rows.delta_rule_step(args, begin, end); });
}

void gate_backward(const GateBackwardArgs& args, int num_threads) {
  parallel_ranges(args.heads, 1, num_threads,
                  [&](int64_t begin, int64_t end) { kernels().rows.gate_backward(args, begin, end); });
}

}  // namespace gossamer
