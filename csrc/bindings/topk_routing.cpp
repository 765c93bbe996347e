#include "cpu/topk_routing.h"

#include "bindings/arguments.h"
#include "bindings/register.h"
#include "bindings/router_arguments.h"

namespace gossamer::bindings {

void register_topk_routing(py::module_& m) {
  m.def(
      "topk_routing",
      [](const PyRouter& router, int64_t n_group, int64_t topk_group, uintptr_t bias, uintptr_t ids, uintptr_t weights,
         int num_threads) {
        const TopkRoutingArgs args = topk_args(router, n_group, topk_group, bias, ids, weights);
        py::gil_scoped_release release;
        topk_routing(args, num_threads);
      },
      "The experts of each token and their weights, from float32 logits.");
  m.def(
      "mass_routing",
      [](const PyRouter& router, int64_t num_experts, int64_t max_ranks, float mass, bool exceed, uintptr_t ids,
         uintptr_t weights, int num_threads) {
        const MassRule rule{num_experts, max_ranks, mass, exceed};
        const TopkRoutingArgs args{router_args(router), 1, 1, nullptr, pointer<int64_t>(ids), pointer<float>(weights), &rule};
        py::gil_scoped_release release;
        topk_routing(args, num_threads);
      },
      "As many experts of each token as it takes until their probabilities reach a sum, and those, from float32 logits.");
  m.def(
      "topk_routing_backward",
      [](const PyRouter& router, uintptr_t ids, uintptr_t weights, uintptr_t dweights, uintptr_t dlogits, int num_threads) {
        const TopkRoutingBackwardArgs args{router_args(router), pointer<const int64_t>(ids), pointer<const float>(weights),
                                           pointer<const float>(dweights), pointer<float>(dlogits)};
        py::gil_scoped_release release;
        topk_routing_backward(args, num_threads);
      },
      "What flows back to the logits.");
}

}  // namespace gossamer::bindings
