#include "cpu/multi_low_rank.h"

#include "cpu/isa.h"

namespace gossamer {
namespace {

// Runs a kernel's team with its queues.
template <class Args, class Kernel>
void run(const Args& args, int num_threads, Kernel kernel) {
  const double work = static_cast<double>(args.groups.num_rows) * args.rank * (args.n + args.c);
  const int threads = useful_threads(work, num_threads);
  Arena plan;
  for (int i = 0; i < 3; ++i) take_queue(plan, threads);
  const Scratch scratch = allocate_scratch(plan.used());
  parallel_team(threads, [&](Team team) { kernel(args, scratch.get(), threads, team); });
}

}  // namespace

void multi_low_rank(const MultiLowRankForwardArgs& args, int num_threads) {
  run(args, num_threads, kernels().structured.multi_low_rank);
}

void multi_low_rank_backward(const MultiLowRankBackwardArgs& args, int num_threads) {
  run(args, num_threads, kernels().structured.multi_low_rank_backward);
}

}  // namespace gossamer
