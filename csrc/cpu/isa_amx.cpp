// The kernels for x86-64 with AVX-512 F, BW, DQ, VL and BF16, and AMX tiles of bfloat16.
#include "cpu/isa_begin.h"

#if defined(__x86_64__)
#include "cpu/isa_avx512_bf16_target.h"

#define GOSSAMER_ISA amx
#define GOSSAMER_AMX 1

// Only some of the kernels are another instruction set's: see with_tiles().
#pragma GCC diagnostic ignored "-Wunused-function"

#include "cpu/isa_kernels.h"

namespace gossamer::amx {

namespace {

// A product by tiles; those of other values than bfloat16 are another instruction set's.
template <auto kOther, class Args, void (*kKernel)(const Args&, void*, int, Team)>
void by_tiles(const Args& args, void* shared, int num_threads, Team team) {
  if (args.dtype != DType::kBFloat16) return (avx512_bf16::kKernels.*kOther)(args, shared, num_threads, team);
  const TilesInUse tiles;
  kKernel(args, shared, num_threads, team);
}

// What does not multiply whole weights is that instruction set's too.
Kernels with_tiles() {
  Kernels k = avx512_bf16::kKernels;
  k.name = "amx";
  k.tiles = true;
  k.grouped_matmul = by_tiles<&Kernels::grouped_matmul, GroupedMatmulArgs, grouped_matmul>;
  k.grouped_matmul_dweight = by_tiles<&Kernels::grouped_matmul_dweight, GroupedDweightArgs, grouped_matmul_dweight>;
  k.expert_mlp = by_tiles<&Kernels::expert_mlp, ExpertMlpForwardArgs, expert_mlp>;
  k.expert_mlp_backward = by_tiles<&Kernels::expert_mlp_backward, ExpertMlpBackwardArgs, expert_mlp_backward>;
  k.quantized_grouped_matmul = by_tiles<&Kernels::quantized_grouped_matmul, QuantizedMatmulArgs, quantized_grouped_matmul>;
  k.quantized_expert_mlp = by_tiles<&Kernels::quantized_expert_mlp, QuantizedMlpArgs, quantized_expert_mlp>;
  k.rank_product = by_tiles<&Kernels::rank_product, RankProductArgs, rank_product>;
  k.low_rank_matmul = by_tiles<&Kernels::low_rank_matmul, LowRankArgs, low_rank_matmul>;
  k.rectangle_product = by_tiles<&Kernels::rectangle_product, RectangleProductArgs, rectangle_product>;
  k.outer_rectangles = by_tiles<&Kernels::outer_rectangles, RectangleProductArgs, outer_rectangles>;
  k.sampled_rectangles = by_tiles<&Kernels::sampled_rectangles, SampledRectanglesArgs, sampled_rectangles>;
  return k;
}

}  // namespace

const Kernels kKernels = with_tiles();

}  // namespace gossamer::amx

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
