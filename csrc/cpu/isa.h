// The kernels as compiled for each instruction set, and the choice among them at run time.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/parallel.h"

namespace gossamer {

// Only declared here, so that changing one kernel's arguments does not recompile the other parts.
struct ActivateArgs;
struct BlockProductArgs;
struct CausalConvBackwardArgs;
struct CausalConvForwardArgs;
struct CausalConvStepArgs;
struct DeltaRuleArgs;
struct DeltaRuleBackwardArgs;
struct ExpertMlpBackwardArgs;
struct ExpertMlpForwardArgs;
struct GateBackwardArgs;
struct GatherArgs;
struct GatherDotArgs;
struct GatherMaxArgs;
struct GroupedDweightArgs;
struct GroupedMatmulArgs;
struct HashFindArgs;
struct LowRankArgs;
struct MapIdsArgs;
struct MultiLowRankBackwardArgs;
struct MultiLowRankForwardArgs;
struct ProductGradientArgs;
struct ProductKeySearchArgs;
struct ProductKeyTopkArgs;
struct ProductKeyTopkBackwardArgs;
struct QuantizedMatmulArgs;
struct QuantizedMlpArgs;
struct RankProductArgs;
struct RectangleProductArgs;
struct SampledProductArgs;
struct SampledRectanglesArgs;
struct SelfReferentialArgs;
struct SelfReferentialBackwardArgs;
struct SortedIds;
struct TopkRoutingArgs;
struct TopkRoutingBackwardArgs;
struct TreeRoutingArgs;
struct TreeRoutingBackwardArgs;
struct UpdateArgs;

// The vector kernels of one instruction set, in parts that are compiled separately. Kernels that take a Team are called by each
// of its threads, with shared memory laid out for at most num_threads.

// Products with expert weights, dense and quantised: cpu/kernels/experts.cpp.
struct ExpertKernels {
  void (*grouped_matmul)(const GroupedMatmulArgs& args, void* shared, int num_threads, Team team);
  void (*grouped_matmul_dweight)(const GroupedDweightArgs& args, void* shared, int num_threads, Team team);
  void (*expert_mlp)(const ExpertMlpForwardArgs& args, void* shared, int num_threads, Team team);
  void (*expert_mlp_backward)(const ExpertMlpBackwardArgs& args, void* shared, int num_threads, Team team);
  void (*quantized_grouped_matmul)(const QuantizedMatmulArgs& args, void* shared, int num_threads, Team team);
  void (*quantized_expert_mlp)(const QuantizedMlpArgs& args, void* shared, int num_threads, Team team);
};

// Products with low-rank and block-sparse weights: cpu/kernels/structured.cpp.
struct StructuredKernels {
  void (*multi_low_rank)(const MultiLowRankForwardArgs& args, void* shared, int num_threads, Team team);
  void (*multi_low_rank_backward)(const MultiLowRankBackwardArgs& args, void* shared, int num_threads, Team team);
  void (*rank_product)(const RankProductArgs& args, void* shared, int num_threads, Team team);
  void (*low_rank_matmul)(const LowRankArgs& args, void* shared, int num_threads, Team team);
  void (*block_product)(const BlockProductArgs& args, void* shared, int num_threads, Team team);
  void (*sampled_product)(const SampledProductArgs& args, void* shared, int num_threads, Team team);
  void (*rectangle_product)(const RectangleProductArgs& args, void* shared, int num_threads, Team team);
  void (*outer_rectangles)(const RectangleProductArgs& args, void* shared, int num_threads, Team team);
  void (*sampled_rectangles)(const SampledRectanglesArgs& args, void* shared, int num_threads, Team team);
};

// Reading embedding tables and stepping on their rows, and retrieval by product keys: cpu/kernels/tables.cpp.
struct TableKernels {
  void (*gather_reduce)(const GatherArgs& args, int64_t first_bag, int64_t last_bag);
  void (*gather_max)(const GatherMaxArgs& args, int64_t first_bag, int64_t last_bag);
  void (*gather_dot)(const GatherDotArgs& args, int64_t first_bag, int64_t last_bag);
  void (*sum_pieces)(const UpdateArgs& args, const SortedIds& ids, int64_t first_piece, int64_t last_piece);
  void (*update_rows)(const UpdateArgs& args, const SortedIds& ids, int64_t begin, int64_t end, void* scratch);
  int64_t (*map_ids)(const MapIdsArgs& args, int64_t begin, int64_t end);
  void (*hash_find)(const HashFindArgs& args, int64_t begin, int64_t end);
  void (*product_gradient)(const ProductGradientArgs& args, int64_t begin, int64_t end, void* sums);
  void (*product_key_topk)(const ProductKeyTopkArgs& args, int64_t begin, int64_t end);
  void (*product_key_topk_backward)(const ProductKeyTopkBackwardArgs& args, int64_t begin, int64_t end);
  void (*product_key_search)(const ProductKeySearchArgs& args, int64_t begin, int64_t end);
};

// Operations on rows of tokens, one by one or along a sequence: cpu/kernels/rows.cpp.
struct RowKernels {
  void (*activate)(const ActivateArgs& args, int64_t begin, int64_t end);
  void (*activate_backward)(const ActivateArgs& args, int64_t begin, int64_t end);
  void (*topk_routing)(const TopkRoutingArgs& args, int64_t begin, int64_t end);
  void (*topk_routing_backward)(const TopkRoutingBackwardArgs& args, int64_t begin, int64_t end);
  void (*tree_routing)(const TreeRoutingArgs& args, int64_t begin, int64_t end);
  void (*tree_routing_backward)(const TreeRoutingBackwardArgs& args, int64_t begin, int64_t end);
  void (*causal_conv1d)(const CausalConvForwardArgs& args, Team::Range rows, Team::Range channels);
  void (*causal_conv1d_backward)(const CausalConvBackwardArgs& args, void* partial, Team team);
  void (*causal_conv1d_step)(const CausalConvStepArgs& args, int64_t begin, int64_t end);
  void (*delta_rule)(const DeltaRuleArgs& args, void* shared, int num_threads, Team team);
  void (*delta_rule_backward)(const DeltaRuleBackwardArgs& args, void* shared, int num_threads, Team team);
  void (*delta_rule_step)(const DeltaRuleArgs& args, int64_t begin, int64_t end);
  void (*gate_backward)(const GateBackwardArgs& args, int64_t begin, int64_t end);
  void (*self_referential)(const SelfReferentialArgs& args, int64_t begin, int64_t end);
  void (*self_referential_backward)(const SelfReferentialBackwardArgs& args, int64_t begin, int64_t end);
};

struct Kernels {
  const char* name;
  bool pairs;  // whether products of bfloat16 multiply pairs
  bool tiles;  // whether products with whole weights use tiles
  const ExpertKernels& experts;
  const StructuredKernels& structured;
  const TableKernels& tables;
  const RowKernels& rows;
};

// Defined in cpu/kernels/ for each instruction set that is compiled.
#define GOSSAMER_PRODUCTS              \
  extern const ExpertKernels kExperts; \
  extern const StructuredKernels kStructured;
#define GOSSAMER_PARTS               \
  GOSSAMER_PRODUCTS                  \
  extern const TableKernels kTables; \
  extern const RowKernels kRows;

namespace generic {
GOSSAMER_PARTS
}
#if defined(__x86_64__)
namespace avx2 {
GOSSAMER_PARTS
}
namespace avx512 {
GOSSAMER_PARTS
}
namespace avx512_bf16 {
GOSSAMER_PARTS
}
namespace amx {
GOSSAMER_PRODUCTS
}
#endif
#undef GOSSAMER_PARTS
#undef GOSSAMER_PRODUCTS

// The kernels in use: the best that this processor runs, unless others were chosen.
const Kernels& kernels();

// Chooses kernels by name, or the best for null; returns false when this processor does not run them.
bool choose_kernels(const char* name);

// The name of the best instruction set that this processor runs, whether or not its kernels were compiled.
const char* best_isa();

// The names of the instruction sets whose kernels were compiled, best first.
std::vector<const char*> compiled_isas();

// Whether this processor has instructions that multiply bfloat16, which torch's own products use.
bool multiplies_bfloat16();

// Whether this processor executes a 64-byte vector as two halves in turn, so that half a vector takes half the time.
extern const bool kSplitsVectors;

}  // namespace gossamer
