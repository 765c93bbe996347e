// Products with low-rank and block-sparse weights, for one instruction set: setup.py compiles it once for each.
#include "cpu/isa_begin.h"
#include "cpu/block_sparse.h"
#include "cpu/low_rank.h"
#include "cpu/multi_low_rank.h"
#include "cpu/quantized_experts.h"

#include "cpu/isa_target.h"

#include "cpu/block_rectangle_kernel.h"
#include "cpu/block_sparse_kernel.h"
#include "cpu/low_rank_kernel.h"
#include "cpu/multi_low_rank_kernel.h"
#include "cpu/tiled_table.h"

namespace gossamer::GOSSAMER_ISA {

const StructuredKernels kStructured = {
    .multi_low_rank = GOSSAMER_BY_VECTORS(kStructured, multi_low_rank),
    .multi_low_rank_backward = GOSSAMER_BY_VECTORS(kStructured, multi_low_rank_backward),
    .rank_product = GOSSAMER_BY_TILES(kStructured, rank_product),
    .low_rank_matmul = GOSSAMER_BY_TILES(kStructured, low_rank_matmul),
    .block_product = GOSSAMER_BY_VECTORS(kStructured, block_product),
    .sampled_product = GOSSAMER_BY_VECTORS(kStructured, sampled_product),
    .rectangle_product = GOSSAMER_BY_TILES(kStructured, rectangle_product),
    .outer_rectangles = GOSSAMER_BY_TILES(kStructured, outer_rectangles),
    .sampled_rectangles = GOSSAMER_BY_TILES(kStructured, sampled_rectangles),
};

}  // namespace gossamer::GOSSAMER_ISA

#include "cpu/isa_end.h"
