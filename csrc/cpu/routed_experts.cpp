#include "cpu/routed_experts.h"

#include <algorithm>
#include <cmath>

#include "cpu/dispatch.h"
#include "cpu/expert_mlp.h"
#include "cpu/memory.h"

namespace gossamer {
namespace {

bool may_route(const RoutedExperts& layer, const RoutedCall& call) {
  const int64_t experts = layer.router.experts;
  const float* bias = layer.router.bias;
  return std::all_of(call.logits, call.logits + call.tokens * experts, [](float v) { return v < INFINITY; }) &&
         (!bias || std::none_of(bias, bias + experts, [](float v) { return std::isnan(v); }));
}

}  // namespace

bool routed_experts(const RoutedExperts& layer, const RoutedCall& call, int num_threads) {
  if (!may_route(layer, call)) return false;
  TopkRoutingArgs router = layer.router;
  const int64_t tokens = call.tokens, rows = tokens * router.top_k;
  int32_t *slots, *row_of_slot, *offsets;
  const auto lay_out = [&](Arena arena) {
    router.ids = arena.take<int64_t>(rows);
    router.weights = arena.take<float>(rows);
    slots = arena.take<int32_t>(rows);
    row_of_slot = arena.take<int32_t>(rows);
    offsets = arena.take<int32_t>(router.experts + 1);
    return arena.used();
  };
  const Scratch memory = allocate_scratch(lay_out(Arena()));
  lay_out(Arena(memory.get()));

  router.logits = call.logits;
  router.row_stride = router.experts;
  router.tokens = tokens;
  topk_routing(router, num_threads);
  dispatch({router.ids, true, tokens, router.top_k, router.top_k, 1, router.experts, slots, row_of_slot, offsets}, num_threads);
  QuantizedMlpArgs args = layer.experts;
  args.dtype = call.x.dtype;
  args.groups = {slots, offsets, rows, router.experts};
  args.tokens = tokens;
  args.x = call.x;
  args.weights = {router.weights, router.top_k, 1, DType::kFloat32};
  args.y = call.y;
  if (layer.quantized) {
    quantized_expert_mlp(args, num_threads);
  } else {
    expert_mlp(args, num_threads);
  }
  return true;
}

}  // namespace gossamer
