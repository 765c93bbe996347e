// Products with expert weights, dense and quantised, for one instruction set: setup.py compiles it once for each.
#include "cpu/isa_begin.h"
#include "cpu/expert_mlp.h"
#include "cpu/gather_reduce.h"
#include "cpu/grouped_matmul.h"
#include "cpu/quantized_experts.h"

#include "cpu/isa_target.h"

#include "cpu/expert_mlp_backward_kernel.h"
#include "cpu/grouped_matmul_kernel.h"
#include "cpu/quantized_experts_kernel.h"
#include "cpu/tiled_table.h"

namespace gossamer::GOSSAMER_ISA {

const ExpertKernels kExperts = {
    .grouped_matmul = GOSSAMER_BY_TILES(kExperts, grouped_matmul),
    .grouped_matmul_dweight = GOSSAMER_BY_TILES(kExperts, grouped_matmul_dweight),
    .expert_mlp = GOSSAMER_BY_TILES(kExperts, expert_mlp),
    .expert_mlp_backward = GOSSAMER_BY_TILES(kExperts, expert_mlp_backward),
    .quantized_grouped_matmul = GOSSAMER_BY_TILES(kExperts, quantized_grouped_matmul),
    .quantized_expert_mlp = GOSSAMER_BY_TILES(kExperts, quantized_expert_mlp),
};

}  // namespace gossamer::GOSSAMER_ISA

#include "cpu/isa_end.h"
