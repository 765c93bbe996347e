#include "cpu/grouped_matmul.h"

#include "cpu/isa.h"
#include "cpu/run_team.h"

namespace gossamer {
namespace {

template <class Args, class Kernel>
void run(const Args& args, int num_threads, Kernel kernel) {
  const double work = static_cast<double>(args.groups.num_rows) * args.n * args.c;
  run_team<GroupedBuffers>(args, work, num_threads, kernel);
}

}  // namespace

void grouped_matmul(const GroupedMatmulArgs& args, int num_threads) {
  run(args, num_threads, kernels().experts.grouped_matmul);
}

void grouped_matmul_dweight(const GroupedDweightArgs& args, int num_threads) {
  run(args, num_threads, kernels().experts.grouped_matmul_dweight);
}

}  // namespace gossamer
