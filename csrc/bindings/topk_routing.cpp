#include <string>

#include "bindings/arguments.h"
#include "bindings/register.h"
#include "cpu/topk_routing.h"

namespace gossamer::bindings {

// (logits, row stride, T, E, K, whether scores are sigmoids, whether weights are divided by their sum, scale)
using PyRouter = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, bool, bool, float>;

inline void check_chosen(const std::string& name, int64_t value) {
  if (value <= kMostChosen) return;
  throw py::value_error(name + " must be at most " + std::to_string(kMostChosen) + ", got " + std::to_string(value));
}

inline RouterArgs router_args(const PyRouter& router) {
  const auto& [logits, row_stride, tokens, experts, top_k, sigmoid, renormalize, scale] = router;
  // Sigmoid scores of the chosen experts lie on the stack.
  if (sigmoid) check_chosen("top_k", top_k);
  return {pointer<const float>(logits), row_stride, tokens, experts, top_k, sigmoid, renormalize, scale};
}

void register_topk_routing(py::module_& m) {
  m.def(
      "topk_routing",
      [](const PyRouter& router, int64_t n_group, int64_t topk_group, uintptr_t bias, uintptr_t ids, uintptr_t weights,
         int num_threads) {
        check_chosen("top_k", std::get<4>(router));
        check_chosen("topk_group", topk_group);
        const TopkRoutingArgs args{
            router_args(router),    n_group, topk_group, pointer<const float>(bias), pointer<int64_t>(ids),
            pointer<float>(weights)};
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
