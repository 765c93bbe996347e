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
  py::class_<RoutedExperts>(m, "RoutedExperts", "A top-k router's choice, the dispatch and the experts of a layer.")
      .def(py::init([](const PyRouter& router, int64_t n_group, int64_t topk_group, uintptr_t bias, const ExpertMlpArgs& layer,
                       const Quantized& gate_up, const Quantized& down) {
             RoutedExperts made{
                 topk_args(router, n_group, topk_group, bias, 0, 0), {{layer, nullptr}, {}, {}}, gate_up && down};
             if (made.quantized) {
               made.experts.gate_up_weights = quantized_weights(*gate_up);
               made.experts.down_weights = quantized_weights(*down);
             }
             return made;
           }),
           arg("router"), arg("n_group"), arg("topk_group"), arg("bias"), arg("layer"), arg("gate_up"), arg("down"))
      .def(
          "__call__",
          [](const RoutedExperts& layer, uintptr_t logits, int64_t tokens, const PyMatrix& x, uintptr_t y, int num_threads) {
            const RoutedCall call{pointer<const float>(logits), tokens, matrix(x), pointer<void>(y)};
            py::gil_scoped_release release;
            return routed_experts(layer, call, num_threads);
          },
          "Writes y and returns true; or returns false if a logit is NaN or +inf, or the bias NaN.");
}

}  // namespace gossamer::bindings
