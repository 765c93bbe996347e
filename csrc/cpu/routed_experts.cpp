#include "cpu/routed_experts.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/expert_mlp.h"
#include "cpu/memory.h"

namespace gossamer {
namespace {

bool may_route(const TopkRoutingArgs& router) {
  for (int64_t token = 0; token < router.tokens; ++token) {
    const float* logits = router.logits + token * router.row_stride;
    if (!std::all_of(logits, logits + router.experts, [](float v) { return v < INFINITY; })) return false;
  }
  const float* bias = router.bias;
  return !bias || std::none_of(bias, bias + router.experts, [](float v) { return std::isnan(v); });
}

}  // namespace

void dispatched_experts(const PreparedExperts& layer, const ExpertCall& call, const Groups& groups, const FloatMatrix& weights,
                        int num_threads) {
  QuantizedMlpArgs args = layer.args;
  args.dtype = call.x.dtype;
  args.groups = groups;
  args.tokens = call.tokens;
  args.top_k = call.top_k;
  args.x = call.x;
  args.weights = weights;
  args.y = call.y;
  if (layer.quantized) {
    quantized_expert_mlp(args, num_threads);
  } else {
    expert_mlp(args, num_threads);
  }
}

bool chosen_experts(const PreparedExperts& layer, const ExpertCall& call, const ChosenExperts& chosen, int num_threads) {
  const int64_t num_slots = call.tokens * call.top_k;
  int32_t *slots, *rows, *offsets;
  const auto lay_out = [&](Arena arena) {
    slots = arena.take<int32_t>(num_slots);
    rows = arena.take<int32_t>(num_slots);
    offsets = arena.take<int32_t>(layer.num_experts + 1);
    return arena.used();
  };
  const Scratch memory = allocate_scratch(lay_out(Arena()));
  lay_out(Arena(memory.get()));
  const DispatchArgs sorting{chosen.ids,         chosen.wide,       call.tokens, call.top_k, chosen.token_stride,
                             chosen.slot_stride, layer.num_experts, slots,       rows,       offsets};
  if (dispatch(sorting, num_threads) >= 0) return false;
  dispatched_experts(layer, call, {slots, offsets, std::max(offsets[layer.num_experts], 1), layer.num_experts}, chosen.weights,
                     num_threads);
  return true;
}

bool routed_experts(const PreparedExperts& layer, const ExpertCall& call, const TopkRoutingArgs& router, int num_threads) {
  if (!may_route(router)) return false;
  const int64_t num_slots = call.tokens * call.top_k;
  std::vector<int64_t> ids(num_slots);
  std::vector<float> weights(num_slots);
  TopkRoutingArgs args = router;
  args.ids = ids.data();
  args.weights = weights.data();
  topk_routing(args, num_threads);
  return chosen_experts(layer, call, {ids.data(), true, call.top_k, 1, {weights.data(), call.top_k, 1, DType::kFloat32}},
                        num_threads);
}

}  // namespace gossamer
