#include <pybind11/pybind11.h>

#include <string>

#include "bindings/register.h"
#include "cpu/isa.h"

// All bindings are one translation unit, because parsing pybind11 takes longer than compiling any of these files.
#include "bindings/activate.cpp"
#include "bindings/block_sparse.cpp"
#include "bindings/causal_conv1d.cpp"
#include "bindings/delta_rule.cpp"
#include "bindings/dispatch.cpp"
#include "bindings/expert_mlp.cpp"
#include "bindings/expert_topology.cpp"
#include "bindings/gather_compose.cpp"
#include "bindings/gather_reduce.cpp"
#include "bindings/grouped_matmul.cpp"
#include "bindings/hash_table.cpp"
#include "bindings/hopper.cpp"
#include "bindings/low_rank.cpp"
#include "bindings/map_ids.cpp"
#include "bindings/memory.cpp"
#include "bindings/multi_low_rank.cpp"
#include "bindings/product_key_topk.cpp"
#include "bindings/quantized_experts.cpp"
#include "bindings/quantized_weight.cpp"
#include "bindings/recorder.cpp"
#include "bindings/routed_experts.cpp"
#include "bindings/self_referential.cpp"
#include "bindings/sparse_update.cpp"
#include "bindings/topk_routing.cpp"
#include "bindings/tree_routing.cpp"
#ifdef GOSSAMER_WITH_CUDA
#include "bindings/dispatch_cuda.cpp"
#include "bindings/hash_table_cuda.cpp"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of gossamer: raw pointers, sizes and strides in elements, dtype codes.";
#ifdef GOSSAMER_WITH_CUDA
  m.attr("with_cuda") = true;
  gossamer::bindings::register_dispatch_cuda(m);
  gossamer::bindings::register_hash_table_cuda(m);
#else
  m.attr("with_cuda") = false;
#endif
  m.def("isa", [] { return gossamer::kernels().name; }, "The instruction set whose kernels are in use.");
  py::list compiled;
  for (const char* name : gossamer::compiled_isas()) compiled.append(py::str(name));
  m.attr("compiled_isas") = py::tuple(compiled);
  m.def("best_isa", &gossamer::best_isa, "The best instruction set that this processor runs, compiled or not.");
  m.def(
      "choose_isa",
      [](const std::string& name) {
        if (!gossamer::choose_kernels(name.empty() ? nullptr : name.c_str())) {
          throw py::value_error(
              "isa must be one that was compiled and that this processor runs, of amx, avx512_bf16, avx512, avx2 and generic, got " +
              name);
        }
      },
      "Use the kernels of another instruction set, for tests; the empty string stands for the best one.");
  m.def("multiplies_bfloat16", &gossamer::multiplies_bfloat16, "Whether this processor has products of bfloat16.");
  gossamer::bindings::register_memory(m);
  gossamer::bindings::register_recorder(m);
  gossamer::bindings::register_routed_experts(m);
  gossamer::bindings::register_dispatch(m);
  gossamer::bindings::register_gather_reduce(m);
  gossamer::bindings::register_sparse_update(m);
  gossamer::bindings::register_grouped_matmul(m);
  gossamer::bindings::register_multi_low_rank(m);
  gossamer::bindings::register_expert_mlp(m);
  gossamer::bindings::register_quantized_experts(m);
  gossamer::bindings::register_hash_table(m);
  gossamer::bindings::register_hopper(m);
  gossamer::bindings::register_low_rank(m);
  gossamer::bindings::register_map_ids(m);
  gossamer::bindings::register_gather_compose(m);
  gossamer::bindings::register_quantized_weight(m);
  gossamer::bindings::register_expert_topology(m);
  gossamer::bindings::register_block_sparse(m);
  gossamer::bindings::register_activate(m);
  gossamer::bindings::register_topk_routing(m);
  gossamer::bindings::register_tree_routing(m);
  gossamer::bindings::register_causal_conv1d(m);
  gossamer::bindings::register_delta_rule(m);
  gossamer::bindings::register_self_referential(m);
  gossamer::bindings::register_product_key_topk(m);
}
