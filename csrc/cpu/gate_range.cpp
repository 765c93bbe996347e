#include "cpu/gate_range.h"

namespace gossamer {
namespace {

// Calls f(value) for the values of an array of batches, tokens and heads, with `channels` channels each.
template <class F>
void each_value(const HeadArray& x, int64_t batch, int64_t tokens, int64_t heads, int64_t channels, F&& f) {
  visit_float(x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t t = 0; t < tokens; ++t) {
        const T* row = static_cast<const T*>(x.base) + b * x.batch_stride + t * x.token_stride;
        for (int64_t h = 0; h < heads; ++h) {
          for (int64_t c = 0; c < channels; ++c) f(to_scalar(row[h * x.head_stride + c]));
        }
      }
    }
  });
}

}  // namespace

GateRange gate_range(const DeltaRuleArgs& args) {
  GateRange range{0, 0, 0};
  each_value(args.beta, args.batch, args.tokens, args.heads, 1, [&](auto beta) {
    range.least_beta = beta < range.least_beta ? beta : range.least_beta;
    range.most_beta = beta > range.most_beta ? beta : range.most_beta;
  });
  if (args.decay == Gating::kNone || args.a_log) return range;
  const int64_t channels = args.decay == Gating::kByChannel ? args.key_size : 1;
  each_value(args.g, args.batch, args.tokens, args.heads, channels,
             [&](auto g) { range.most_g = g > range.most_g ? g : range.most_g; });
  return range;
}

}  // namespace gossamer
