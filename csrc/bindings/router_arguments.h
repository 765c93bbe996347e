// A router's arguments as Python passes them.
#pragma once

#include <string>

#include "bindings/arguments.h"
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

inline TopkRoutingArgs topk_args(const PyRouter& router, int64_t n_group, int64_t topk_group, uintptr_t bias, uintptr_t ids,
                                 uintptr_t weights) {
  check_chosen("top_k", std::get<4>(router));
  check_chosen("topk_group", topk_group);
  return {router_args(router), n_group, topk_group, pointer<const float>(bias), pointer<int64_t>(ids), pointer<float>(weights)};
}

}  // namespace gossamer::bindings
