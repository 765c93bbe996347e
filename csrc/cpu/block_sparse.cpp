#include "cpu/block_sparse.h"

#include "cpu/isa.h"
#include "cpu/run_team.h"

namespace gossamer {

void block_product(const BlockProductArgs& args, int num_threads) {
  // Packing and storing count too: a matrix with few blocks still has rows.
  const double blocks = args.lists.offsets[args.lists.count];
  const double work = args.n * (blocks * args.bm * args.bn + args.depth + args.rows());
  run_team<BlockProductBuffers>(args, work, num_threads, kernels().block_product);
}

void sampled_product(const SampledProductArgs& args, int num_threads) {
  const double blocks = args.lists.offsets[args.lists.count];
  const double work = args.depth * (blocks * args.bm * args.bn + args.rows() + args.cols) + args.nnz * args.bm * args.bn;
  run_team<SampledProductBuffers>(args, work, num_threads, kernels().sampled_product);
}

}  // namespace gossamer
