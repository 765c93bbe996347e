#include "cpu/quantized_experts.h"

#include "cpu/isa.h"
#include "cpu/run_team.h"

namespace gossamer {

void quantized_grouped_matmul(const QuantizedMatmulArgs& args, int num_threads) {
  const double work = static_cast<double>(args.groups.num_rows) * args.n * args.c;
  run_team<GroupedBuffers>(args, work, num_threads, kernels().experts.quantized_grouped_matmul);
}

void quantized_expert_mlp(const QuantizedMlpArgs& args, int num_threads) {
  const double work = static_cast<double>(args.groups.num_rows) * (args.hidden + args.output) / 2 * args.inner;
  run_team<ExpertMlpBuffers>(args, work, num_threads, kernels().experts.quantized_expert_mlp);
}

}  // namespace gossamer
