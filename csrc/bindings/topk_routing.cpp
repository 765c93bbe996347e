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
  check_chosen("top_k", top_k);
  return {pointer<const float>(logits), row_stride, tokens, experts, top_k, sigmoid, renormalize, scale};
}

void register_topk_routing(py::module_& m) {
  m.def(
      "topk_routing",
      [](const PyRouter& router, int64_t n_group, int64_t topk_group, uintptr_t bias, uintptr_t ids, uintptr_t weights,
         int num_threads) {
        check_chosen("topk_group", topk_group);
        const TopkRoutingArgs args{
            router_args(router),    n_group, topk_group, pointer<const float>(bias), pointer<int64_t>(ids),
            pointer<float>(weights)};
        py::gil_scoped_release release;
        topk_routing(args, num_threads);
      },
      "The experts of each token and their weights, from float32 logits.");
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
