#include "cpu/expert_mlp.h"

#include "cpu/isa.h"

namespace gossamer {
namespace {

// Runs a kernel's team with its shared memory.
template <class Args, class Kernel>
void run(const Args& args, int num_threads, Kernel kernel) {
  visit_packed(args.dtype, kernels().pairs, [&](auto tag) {
    const double work = static_cast<double>(args.groups.num_rows) * args.hidden * args.inner;
    const int threads = useful_threads(work, num_threads);
    Arena plan;
    ExpertMlpBuffers<typename decltype(tag)::type>(plan, args, threads);
    const Scratch scratch = allocate_scratch(plan.used());
    parallel_team(threads, [&](Team team) { kernel(args, scratch.get(), threads, team); });
  });
}

}  // namespace

void expert_mlp(const ExpertMlpForwardArgs& args, int num_threads) { run(args, num_threads, kernels().expert_mlp); }

void expert_mlp_backward(const ExpertMlpBackwardArgs& args, int num_threads) {
  run(args, num_threads, kernels().expert_mlp_backward);
}

}  // namespace gossamer
