// The vector kernels, included by each isa_*.cpp inside its namespace.
#include "cpu/vec.h"
#include "cpu/tile_kernel.h"
#include "cpu/gather_reduce_kernel.h"
#include "cpu/step_kernel.h"
#include "cpu/sparse_update_kernel.h"
#include "cpu/panel.h"
#include "cpu/gemm.h"
#include "cpu/tile_gemm.h"
#include "cpu/outer_product.h"
#include "cpu/quantized_kernel.h"
#include "cpu/grouped_matmul_kernel.h"
#include "cpu/multi_low_rank_kernel.h"
#include "cpu/activation_kernel.h"
#include "cpu/activate_kernel.h"
#include "cpu/expert_update_kernel.h"
#include "cpu/expert_mlp_kernel.h"
#include "cpu/expert_mlp_backward_kernel.h"
#include "cpu/quantized_experts_kernel.h"
#include "cpu/philox_kernel.h"
#include "cpu/topk_routing_kernel.h"
#include "cpu/low_rank_kernel.h"
#include "cpu/block_sparse_kernel.h"
#include "cpu/block_rectangle_kernel.h"

// A kernel as it is called: with the tiles that its products may use.
template <class Args, void (*kKernel)(const Args&, void*, int, Team)>
void in_team(const Args& args, void* shared, int num_threads, Team team) {
  const TilesInUse tiles(args.dtype);
  kKernel(args, shared, num_threads, team);
}

#define GOSSAMER_KERNEL_TABLE \
  GOSSAMER_BF16_DOT, GOSSAMER_AMX, gather_reduce, gather_max, gather_dot, sum_pieces, update_rows, \
      in_team<GroupedMatmulArgs, grouped_matmul>, in_team<GroupedDweightArgs, grouped_matmul_dweight>, multi_low_rank, multi_low_rank_backward, \
      in_team<ExpertMlpForwardArgs, expert_mlp>, in_team<ExpertMlpBackwardArgs, expert_mlp_backward>, \
      in_team<QuantizedMatmulArgs, quantized_grouped_matmul>, in_team<QuantizedMlpArgs, quantized_expert_mlp>, \
      in_team<RankProductArgs, rank_product>, in_team<LowRankArgs, low_rank_matmul>, block_product, sampled_product, \
      in_team<RectangleProductArgs, rectangle_product>, in_team<RectangleProductArgs, outer_rectangles>, \
      in_team<SampledRectanglesArgs, sampled_rectangles>, activate_rows, activate_backward_rows, topk_routing, \
      topk_routing_backward
