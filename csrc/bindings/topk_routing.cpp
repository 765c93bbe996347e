#include "bindings/arguments.h"
#include "bindings/register.h"
#include "cpu/topk_routing.h"

namespace gossamer::bindings {

void register_topk_routing(py::module_& m) {
  m.def(
      "topk_routing",
      [](uintptr_t logits, int64_t row_stride, const std::array<int64_t, 5>& sizes, bool sigmoid, bool renormalize, float scale,
         uintptr_t bias, uintptr_t ids, uintptr_t weights, int num_threads) {
        const auto& [tokens, experts, top_k, n_group, topk_group] = sizes;
        if (std::max(top_k, topk_group) > kMostChosen) throw py::value_error("top_k and topk_group must be at most 64");
        const TopkRoutingArgs args{pointer<const float>(logits), row_stride, tokens, experts, top_k, n_group, topk_group, sigmoid,
                                   renormalize, scale, pointer<const float>(bias), pointer<int64_t>(ids), pointer<float>(weights)};
        py::gil_scoped_release release;
        topk_routing(args, num_threads);
      },
      "The experts of each token and their weights, from float32 logits; sizes are T, E, K, and the groups and how many of them "
      "a token may use.");
}

}  // namespace gossamer::bindings
