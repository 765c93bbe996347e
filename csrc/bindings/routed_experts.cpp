#include "cpu/routed_experts.h"

#include <optional>

#include "bindings/arguments.h"
#include "bindings/quantized_arguments.h"
#include "bindings/register.h"
#include "bindings/router_arguments.h"

namespace gossamer::bindings {

void register_routed_experts(py::module_& m) {
  using py::arg;
  using Quantized = std::optional<PyQuantized>;
  py::class_<PreparedExperts>(m, "PreparedExperts", "An expert layer without what changes from call to call.")
      .def(py::init([](const ExpertMlpArgs& layer, int64_t num_experts, const Quantized& gate_up, const Quantized& down) {
             PreparedExperts made{{{layer, nullptr}, {}, {}}, num_experts, gate_up && down};
             if (made.quantized) {
               made.args.gate_up_weights = quantized_weights(*gate_up);
               made.args.down_weights = quantized_weights(*down);
             }
             return made;
           }),
           arg("layer"), arg("num_experts"), arg("gate_up"), arg("down"))
      .def(
          "routed",
          [](const PreparedExperts& layer, const PyRouter& router, int64_t n_group, int64_t topk_group, uintptr_t bias,
             const PyMatrix& x, uintptr_t y, int num_threads) {
            const TopkRoutingArgs args = topk_args(router, n_group, topk_group, bias, 0, 0);
            const ExpertCall call{args.tokens, args.top_k, matrix(x), pointer<void>(y)};
            py::gil_scoped_release release;
            return routed_experts(layer, call, args, num_threads);
          },
          "Writes y and returns true; or returns false if a logit is NaN or +inf, or the bias NaN.")
      .def(
          "chosen",
          [](const PreparedExperts& layer, const PyMatrix& ids, const std::pair<int64_t, int64_t>& shape,
             const PyMatrix& weights, const PyMatrix& x, uintptr_t y, int num_threads) {
            const auto& [address, token_stride, slot_stride, dtype] = ids;
            const ExpertCall call{shape.first, shape.second, matrix(x), pointer<void>(y)};
            const ChosenExperts chosen{pointer<const void>(address), static_cast<DType>(dtype) == DType::kInt64, token_stride,
                                       slot_stride, matrix(weights)};
            py::gil_scoped_release release;
            return chosen_experts(layer, call, chosen, num_threads);
          },
          "Writes y and returns true; or returns false if an id is negative.")
      .def(
          "dispatched",
          [](const PreparedExperts& layer, const PyGroups& g, const std::pair<int64_t, int64_t>& shape, const PyMatrix& weights,
             const PyMatrix& x, uintptr_t y, int num_threads) {
            const ExpertCall call{shape.first, shape.second, matrix(x), pointer<void>(y)};
            const Groups rows = groups(g);
            py::gil_scoped_release release;
            dispatched_experts(layer, call, rows, matrix(weights), num_threads);
          },
          "Writes y, of rows that are dispatched already.");
}

}  // namespace gossamer::bindings
