// One function per primitive, each in the file of its stem, that adds the primitive's kernels to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace gossamer::bindings {

void register_memory(pybind11::module_& m);
void register_recorder(pybind11::module_& m);
void register_dispatch(pybind11::module_& m);
void register_dispatch_cuda(pybind11::module_& m);
void register_gather_compose(pybind11::module_& m);
void register_gather_reduce(pybind11::module_& m);
void register_sparse_update(pybind11::module_& m);
void register_grouped_matmul(pybind11::module_& m);
void register_multi_low_rank(pybind11::module_& m);
void register_expert_mlp(pybind11::module_& m);
void register_quantized_experts(pybind11::module_& m);
void register_hash_table(pybind11::module_& m);
void register_hash_table_cuda(pybind11::module_& m);
void register_hopper(pybind11::module_& m);
void register_delta_rule(pybind11::module_& m);
void register_low_rank(pybind11::module_& m);
void register_map_ids(pybind11::module_& m);
void register_quantized_weight(pybind11::module_& m);
void register_expert_topology(pybind11::module_& m);
void register_block_sparse(pybind11::module_& m);
void register_activate(pybind11::module_& m);
void register_topk_routing(pybind11::module_& m);
void register_routed_experts(pybind11::module_& m);
void register_tree_routing(pybind11::module_& m);
void register_product_key_topk(pybind11::module_& m);
void register_causal_conv1d(pybind11::module_& m);
void register_self_referential(pybind11::module_& m);

}  // namespace gossamer::bindings
