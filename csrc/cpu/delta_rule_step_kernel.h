// One token of the delta rule, and gradients of raw gates; see delta_rule_kernel.h.
#pragma once

#include "cpu/delta_rule_kernel.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// q, k and the decays of one head and token.
template <class S>
struct StepRows {
  std::unique_ptr<S[]> values;
  S *k, *q, *decays;
  S beta;

  explicit StepRows(int64_t key_size) : values(new S[3 * whole_blocks(key_size)]) {
    k = values.get();
    q = k + whole_blocks(key_size);
    decays = q + whole_blocks(key_size);
  }
};

template <class T, class S>
void load_step(const DeltaRuleArgs& a, int64_t batch, int64_t head, StepRows<S>& step) {
  constexpr int n = kLanes<S>;
  const int64_t key_head = head / (a.heads / a.key_heads), whole = whole_blocks(a.key_size);
  S norms[1];
  const auto load_head = [&](const HeadArray& x, S* to, S scale) {
    const T* from = static_cast<const T*>(x.base) + batch * x.batch_stride + key_head * x.head_stride;
    load_rows(from, 0, 1, a.key_size, to, whole, 1);
    normalise_rows(to, whole, 1, a.key_size, a.l2norm, scale, norms);
  };
  load_head(a.k, step.k, S{1});
  load_head(a.q, step.q, static_cast<S>(a.scale));
  with_rows<T>(a.beta, batch, 0, head, [&](const auto* from) { step.beta = static_cast<S>(to_scalar(*from)); });
  if (a.decay == Gating::kNone) {
    std::fill_n(step.decays, whole, S{1});
    return;
  }
  const bool by_channel = a.decay == Gating::kByChannel;
  const DecayGate<S> gate = decay_gate_of<S>(a, head, by_channel ? a.key_size : 1);
  with_rows<T>(a.g, batch, 0, head, [&](const auto* from) {
    if (!by_channel) {
      const Vec<S> g = splat(static_cast<S>(to_scalar(*from)));
      std::fill_n(step.decays, whole, head_decay_of<S>(gate.decay(g, splat(gate.bias ? *gate.bias : S{0}))[0]));
      return;
    }
    load_rows(from, 0, 1, a.key_size, step.decays, whole, 1);
    for (int64_t c = 0; c < a.key_size; c += n) {
      const Vec<S> shift =
          gate.bias ? load_valid(gate.bias + c, static_cast<int>(std::min<int64_t>(n, a.key_size - c))) : Vec<S>{};
      store(step.decays + c, decay_of<S>(gate.decay(load(step.decays + c), shift)));
    }
  });
}

// Prefetches every second line of a row of `Vecs` vectors, beginning with line `First`.
template <int Vecs, int First, class S>
GOSSAMER_INLINE void prefetch_half(const S* row) {
  constexpr int bytes = Vecs * sizeof(Vec<S>);
#pragma GCC unroll 4
  for (int at = 64 * First; at < bytes; at += 128) __builtin_prefetch(reinterpret_cast<const char*>(row) + at, 0, 2);
}

// Columns of a state, read from memory once: their product with the key, then their update and the output. The second pass finds
// them in the second-level cache. Each pass prefetches half of the same columns of the next state, `ahead` values further, so that
// memory is never idle.
template <int Vecs, class S>
GOSSAMER_INLINE void step_columns(const DeltaRuleArgs& a, const StepRows<S>& step, S* state, const S* v, S* o, int last,
                                  int64_t ahead) {
  constexpr int n = kLanes<S>;
  const int64_t stride = a.value_size;
  const auto load_at = [&](const S* from, int i) __attribute__((always_inline)) {
    return i + 1 < Vecs ? load(from + i * n) : load_valid(from + i * n, last);
  };
  Vec<S> read[Vecs] = {}, out[Vecs] = {};
  for (int64_t d = 0; d < a.key_size; ++d) {
    const S* row = state + d * stride;
    const Vec<S> k = splat(step.k[d] * step.decays[d]);
    prefetch_half<Vecs, 0>(row + ahead);
#pragma GCC unroll 8
    for (int i = 0; i < Vecs; ++i) read[i] = fma(k, load_at(row, i), read[i]);
  }
  for (int i = 0; i < Vecs; ++i) read[i] = (load(v + i * n) - read[i]) * step.beta;
  for (int64_t d = 0; d < a.key_size; ++d) {
    S* row = state + d * stride;
    const Vec<S> decay = splat(step.decays[d]), k = splat(step.k[d]), q = splat(step.q[d]);
    prefetch_half<Vecs, 1>(row + ahead);
#pragma GCC unroll 8
    for (int i = 0; i < Vecs; ++i) {
      const Vec<S> s = fma(k, read[i], decay * load_at(row, i));
      out[i] = fma(q, s, out[i]);
      if (i + 1 < Vecs) {
        store(row + i * n, s);
      } else {
        store_valid(row + i * n, s, last);
      }
    }
  }
  for (int i = 0; i < Vecs; ++i) store(o + i * n, out[i]);
}

template <class T>
void step_heads(const DeltaRuleArgs& a, int64_t begin, int64_t end) {
  using S = Accumulator<T>;
  constexpr int n = kLanes<S>, most = GOSSAMER_VECTOR_BYTES == 64 ? 8 : 4;
  StepRows<S> step(a.key_size);
  const auto values = std::make_unique<S[]>(2 * whole_blocks(a.value_size));
  S *v = values.get(), *o = v + whole_blocks(a.value_size);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t batch = i / a.heads, head = i % a.heads;
    load_step<T>(a, batch, head, step);
    load_rows(static_cast<const T*>(a.v.base) + batch * a.v.batch_stride + head * a.v.head_stride, 0, 1, a.value_size, v, 0, 1);
    const int64_t size = a.key_size * a.value_size, ahead = i + 1 < end ? size : 0;
    S* state = static_cast<S*>(a.final_state) + i * size;
    for (int64_t c = 0; c < a.value_size;) {
      const int64_t left = a.value_size - c;
      const auto run = [&](auto vecs) {
        const int64_t columns = std::min<int64_t>(vecs * n, left);
        step_columns<vecs>(a, step, state + c, v + c, o + c, static_cast<int>(columns - (vecs - 1) * n), ahead);
        c += columns;
      };
      if (left > (most - 1) * n) {
        run(std::integral_constant<int, most>{});
      } else if (left > 3 * n) {
        run(std::integral_constant<int, 4>{});
      } else if (left > n) {
        run(std::integral_constant<int, 2>{});
      } else {
        run(std::integral_constant<int, 1>{});
      }
    }
    store_rows(o, 0, 1, a.value_size, static_cast<T*>(a.o.base) + batch * a.o.batch_stride + head * a.o.head_stride, 0);
  }
}

// Heads [begin, end) of all batches.
void delta_rule_step(const DeltaRuleArgs& a, int64_t begin, int64_t end) {
  visit_float(a.dtype, [&](auto tag) { step_heads<typename decltype(tag)::type>(a, begin, end); });
}

// Gradients of the raw gates of heads [begin, end) from those of log decays. Sums over tokens are added up from sums of 64.
template <class T>
void gate_backward_heads(const GateBackwardArgs& a, int64_t begin, int64_t end) {
  using S = Accumulator<T>;
  constexpr int n = kLanes<S>;
  const auto sums = std::make_unique<S[]>(4 * (a.channels + n));
  S *rate_sum = sums.get(), *bias_sum = rate_sum + a.channels + n, *rate_part = bias_sum + a.channels + n,
    *bias_part = rate_part + a.channels + n;
  const int64_t all = a.batch * a.tokens;
  for (int64_t head = begin; head < end; ++head) {
    const DecayGate<S> gate = decay_gate_of<S>(a, head, a.channels);
    std::fill_n(rate_sum, 2 * (a.channels + n), S{0});
    for (int64_t first = 0; first < all; first += kChunkTokens) {
      std::fill_n(rate_part, 2 * (a.channels + n), S{0});
      for (int64_t i = first; i < std::min(first + kChunkTokens, all); ++i) {
        const auto at = [&](const HeadArray& x) {
          return i / a.tokens * x.batch_stride + i % a.tokens * x.token_stride + head * x.head_stride;
        };
        const T* g = static_cast<const T*>(a.g.base) + at(a.g);
        S* dg = static_cast<S*>(a.dg.base) + at(a.dg);
        for (int64_t c = 0; c < a.channels; c += n) {
          const int valid = static_cast<int>(std::min<int64_t>(n, a.channels - c));
          const Vec<S> shift = gate.bias ? load_valid(gate.bias + c, valid) : Vec<S>{}, x = load_valid(g + c, valid) + shift;
          const Vec<S> flow = load_valid(dg + c, valid);
          Vec<S> to_rate, to_raw;
          if (gate.sigmoid) {
            const Vec<S> y = vsigmoid(gate.rate * x);
            to_raw = flow * gate.lower_bound * y * (S{1} - y) * gate.rate;
            to_rate = to_raw * x;
          } else {
            to_raw = -flow * gate.rate * vsigmoid(x);
            to_rate = -flow * gate.rate * vsoftplus(x);
          }
          store_valid(dg + c, to_raw, valid);
          store(rate_part + c, load(rate_part + c) + to_rate);
          store(bias_part + c, load(bias_part + c) + to_raw);
        }
      }
      for (int64_t c = 0; c < a.channels; ++c) {
        rate_sum[c] += rate_part[c];
        bias_sum[c] += bias_part[c];
      }
    }
    S total{0};
    for (int64_t c = 0; c < a.channels; ++c) total += rate_sum[c];
    static_cast<S*>(a.da_log)[head] = total;
    if (a.ddt_bias) std::copy_n(bias_sum, a.channels, static_cast<S*>(a.ddt_bias) + head * a.channels);
  }
}

void gate_backward(const GateBackwardArgs& a, int64_t begin, int64_t end) {
  visit_float(a.g.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if ((a.sums == DType::kFloat64) == std::is_same_v<T, double>) gate_backward_heads<T>(a, begin, end);
  });
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
