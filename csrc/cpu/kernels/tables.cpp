// Lookups in tables, steps on rows and retrieval by product keys, for one instruction set: setup.py compiles it once for each.
#include "cpu/isa_begin.h"
#include "cpu/gather_compose.h"
#include "cpu/gather_reduce.h"
#include "cpu/hash_table.h"
#include "cpu/low_rank.h"
#include "cpu/map_ids.h"
#include "cpu/memory.h"
#include "cpu/product_gradient.h"
#include "cpu/product_key_topk.h"
#include "cpu/sparse_update.h"

#include "cpu/isa_target.h"

#include "cpu/gather_compose_kernel.h"
#include "cpu/gather_reduce_kernel.h"
#include "cpu/hash_find_kernel.h"
#include "cpu/map_ids_kernel.h"
#include "cpu/product_gradient_kernel.h"
#include "cpu/product_key_search_kernel.h"
#include "cpu/sparse_update_kernel.h"

namespace gossamer::GOSSAMER_ISA {

const TableKernels kTables = {
    .gather_reduce = gather_rows,
    .gather_max = gather_max,
    .gather_dot = gather_dot,
    .sum_pieces = sum_pieces,
    .update_rows = update_rows,
    .map_ids = map_ids,
    .hash_find = hash_find,
    .product_gradient = product_gradient,
    .product_key_topk = product_key_topk,
    .product_key_topk_backward = product_key_topk_backward,
    .product_key_search = product_key_search,
};

}  // namespace gossamer::GOSSAMER_ISA

#include "cpu/isa_end.h"
