#include "cpu/expert_mlp.h"

#include "cpu/isa.h"
#include "cpu/run_team.h"

namespace gossamer {
namespace {

template <class Args, class Kernel>
void run(const Args& args, int num_threads, Kernel kernel) {
  const double work = static_cast<double>(args.groups.num_rows) * (args.hidden + args.output) / 2 * args.inner;
  run_team<ExpertMlpBuffers>(args, work, num_threads, kernel);
}

}  // namespace

void expert_mlp(const ExpertMlpForwardArgs& args, int num_threads) { run(args, num_threads, kernels().experts.expert_mlp); }

void expert_mlp_backward(const ExpertMlpBackwardArgs& args, int num_threads) {
  run(args, num_threads, kernels().experts.expert_mlp_backward);
}

}  // namespace gossamer
