#include "cpu/low_rank.h"

#include "cpu/isa.h"
#include "cpu/run_team.h"

namespace gossamer {

void rank_product(const RankProductArgs& args, int num_threads) {
  // A skinny product costs as much for reading as for multiplying.
  const double work = static_cast<double>(args.rows) * args.depth * static_cast<double>(args.rank + 16);
  run_team<LowRankBuffers>(args, work, num_threads, kernels().structured.rank_product);
}

void low_rank_matmul(const LowRankArgs& args, int num_threads) {
  const double terms = static_cast<double>(args.rank + (args.x ? args.depth : 16));
  const double work = static_cast<double>(args.rows) * args.columns * terms;
  run_team<LowRankBuffers>(args, work, num_threads, kernels().structured.low_rank_matmul);
}

}  // namespace gossamer
