// One optimizer step on one row. Formulas: python/gossamer/optim.py.
#pragma once

#include "cpu/philox_kernel.h"
#include "cpu/sparse_update.h"
#include "cpu/vec.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

template <class P>
GOSSAMER_INLINE Vec<Accumulator<P>> load_n(const P* from, int n) {
  return n == kLanes<Accumulator<P>> ? load(from) : load_some(from, n);
}

template <class P>
GOSSAMER_INLINE void store_n(P* to, Vec<Accumulator<P>> v, int n) {
  if (n == kLanes<Accumulator<P>>) {
    store(to, v);
  } else {
    store_some(to, v, n);
  }
}

// Calls f(column, lanes) for each vector of a row, the last perhaps with fewer lanes.
template <class S, class F>
GOSSAMER_INLINE void over_row(int64_t dim, F&& f) {
  int64_t column = 0;
  for (; column + kLanes<S> <= dim; column += kLanes<S>) f(column, kLanes<S>);
  if (column < dim) f(column, static_cast<int>(dim - column));
}

// Σ f(column, lanes) over a row, where dead lanes may hold anything.
template <class S, class F>
GOSSAMER_INLINE S sum_row(int64_t dim, F&& f) {
  Vec<S> sum = {};
  over_row<S>(dim, [&](int64_t column, int n) __attribute__((always_inline)) {
    Vec<S> v = f(column, n);
    if (n < kLanes<S>) {
      S lanes[kLanes<S>] = {};
      store_some(lanes, v, n);
      v = load(lanes);
    }
    sum += v;
  });
  return sum_lanes<S>(sum);
}

// Uniform 32-bit numbers of a row's columns from `column` on; see ops/_rounding.py.
GOSSAMER_INLINE UInts rounding_bits(uint64_t row_key, int64_t column) {
  UInts x;
  for (size_t i = 0; i < sizeof(UInts) / 4; ++i) x[i] = static_cast<uint32_t>(column + i);
  x = (x * 0x9E3779B9u + static_cast<uint32_t>(row_key)) ^ static_cast<uint32_t>(row_key >> 32);
  x = (x ^ (x >> 16)) * 0x21F0AAADu;
  x = (x ^ (x >> 15)) * 0x735A2D97u;
  return x ^ (x >> 15);
}

GOSSAMER_INLINE Vec<float> round_to(BFloat16, Vec<float> x, UInts u) {
  const UInts bits = (UInts)x;
  const UInts rounded = (bits + (u & 0xffffu)) & 0xffff0000u;
  return (bits & 0x7f800000u) == 0x7f800000u ? x : (Vec<float>)rounded;
}

GOSSAMER_INLINE Vec<float> round_to(Float16, Vec<float> x, UInts u) {
  using Ints = VecTraits<float>::BitsVec;
  const UInts bits = (UInts)x;
  const Vec<float> rounded = (Vec<float>)((bits + (u & 0x1fffu)) & 0xffffe000u);
  const Vec<float> magnitude = (Vec<float>)(bits & 0x7fffffffu);
  const Ints small = magnitude < 0x1p-14f;
  // Zero if not wanted, because converting large numbers to integers is undefined.
  const Vec<float> grid = small ? magnitude * 0x1p24f : Vec<float>{};
  const Vec<float> whole = __builtin_convertvector(__builtin_convertvector(grid, Ints), Vec<float>);
  const Vec<float> draw = __builtin_convertvector((Ints)(u >> 8), Vec<float>) * 0x1p-24f;
  const Vec<float> up = draw < grid - whole ? splat(1.0f) : Vec<float>{};
  const UInts tiny = (UInts)((whole + up) * 0x1p-24f) | (bits & 0x80000000u);
  const Vec<float> finite = small ? (Vec<float>)tiny : rounded;
  return (bits & 0x7f800000u) == 0x7f800000u ? x : finite;
}

// Writes new weights, rounded according to the rule.
template <class T>
struct RowWriter {
  T* row;
  bool stochastic;
  uint64_t key = 0;

  RowWriter(const StepRule& rule, T* to, uint64_t number) : row(to), stochastic(rule.stochastic_rounding) {
    if (stochastic) key = mix64(rule.step_key + number * kGolden);
  }

  void operator()(int64_t column, Vec<Accumulator<T>> v, int n) const {
    if constexpr (sizeof(T) == 2) {
      if (stochastic) v = round_to(T{}, v, rounding_bits(key, column));
    }
    store_n(row + column, v, n);
  }
};

// Clips a row's gradient in place and adds weight decay to it if the rule requires it.
template <class T, class S>
GOSSAMER_INLINE void prepare_gradient(const StepRule& rule, const T* w, S* grad, int64_t dim) {
  if (rule.clip_value <= std::numeric_limits<double>::max()) {
    const Vec<S> most = splat(static_cast<S>(rule.clip_value));
    over_row<S>(dim, [&](int64_t c, int n) __attribute__((always_inline)) {
      Vec<S> g = load_n(grad + c, n);
      g = g > most ? most : g;
      store_n(grad + c, g < -most ? -most : g, n);
    });
  }
  if (rule.clip_norm <= std::numeric_limits<double>::max()) {
    const S norm = std::sqrt(sum_row<S>(dim, [&](int64_t c, int n) __attribute__((always_inline)) {
      const Vec<S> g = load_n(grad + c, n);
      return g * g;
    }));
    if (norm > static_cast<S>(rule.clip_norm)) {
      const S scale = static_cast<S>(rule.clip_norm) / norm;
      over_row<S>(dim,
                  [&](int64_t c, int n) __attribute__((always_inline)) { store_n(grad + c, load_n(grad + c, n) * scale, n); });
    }
  }
  if (rule.weight_decay != 0 && rule.decay == Decay::kGradient) {
    const S decay = static_cast<S>(rule.weight_decay);
    over_row<S>(dim, [&](int64_t c, int n) __attribute__((always_inline)) {
      store_n(grad + c, load_n(grad + c, n) + decay * load_n(w + c, n), n);
    });
  }
}

template <class S>
GOSSAMER_INLINE S mean_square(const S* grad, int64_t dim) {
  return sum_row<S>(dim,
                    [&](int64_t c, int n) __attribute__((always_inline)) {
                      const Vec<S> g = load_n(grad + c, n);
                      return g * g;
                    }) /
         static_cast<S>(dim);
}

template <class T, class S>
GOSSAMER_INLINE void lamb(const StepRule& rule, T* w, S* m, S* v, S* grad, int64_t dim, const RowWriter<T>& write) {
  const S b1 = static_cast<S>(rule.beta1), b2 = static_cast<S>(rule.beta2), eps = static_cast<S>(rule.eps);
  const S rest1 = static_cast<S>(1 - rule.beta1), rest2 = static_cast<S>(1 - rule.beta2);
  const S correct1 = static_cast<S>(1 / rule.correction1), correct2 = static_cast<S>(1 / std::sqrt(rule.correction2));
  const S decay = static_cast<S>(rule.weight_decay);
  // q overwrites the gradient.
  over_row<S>(dim, [&](int64_t c, int n) __attribute__((always_inline)) {
    const Vec<S> g = load_n(grad + c, n);
    const Vec<S> first = b1 * load_n(m + c, n) + rest1 * g;
    const Vec<S> second = b2 * load_n(v + c, n) + rest2 * g * g;
    store_n(m + c, first, n);
    store_n(v + c, second, n);
    store_n(grad + c, first * correct1 / (vsqrt(second) * correct2 + eps) + decay * load_n(w + c, n), n);
  });
  const S norm_w = std::sqrt(sum_row<S>(dim, [&](int64_t c, int n) __attribute__((always_inline)) {
    const Vec<S> x = load_n(w + c, n);
    return x * x;
  }));
  const S norm_q = std::sqrt(mean_square(grad, dim) * static_cast<S>(dim));
  const S trust = norm_w > 0 && norm_q > 0 ? norm_w / norm_q : S{1};
  const S step = static_cast<S>(rule.lr) * trust;
  over_row<S>(dim, [&](int64_t c, int n)
                       __attribute__((always_inline)) { write(c, load_n(w + c, n) - step * load_n(grad + c, n), n); });
}

// Takes the step on row `number`, whose summed gradient is `grad`; `state1` and `state2` are its states, or null.
template <class T>
__attribute__((noinline)) void step_row(const StepRule& rule, int64_t number, T* w, Accumulator<T>* state1,
                                        Accumulator<T>* state2, Accumulator<T>* grad, int64_t dim) {
  using S = Accumulator<T>;
  const RowWriter<T> write(rule, w, static_cast<uint64_t>(number));
  prepare_gradient(rule, w, grad, dim);
  const S lr = static_cast<S>(rule.lr), b1 = static_cast<S>(rule.beta1), b2 = static_cast<S>(rule.beta2);
  const S rest1 = static_cast<S>(1 - rule.beta1), rest2 = static_cast<S>(1 - rule.beta2);
  const S eps = static_cast<S>(rule.eps);
  const S keep = rule.decay == Decay::kWeights ? static_cast<S>(1 - rule.lr * rule.weight_decay) : S{1};
  switch (rule.algorithm) {
    case Algorithm::kSgd:
      if (!state1) {
        return over_row<S>(dim, [&](int64_t c, int n) __attribute__((always_inline)) {
          write(c, load_n(w + c, n) - lr * load_n(grad + c, n), n);
        });
      }
      return over_row<S>(dim, [&](int64_t c, int n) __attribute__((always_inline)) {
        const Vec<S> g = load_n(grad + c, n);
        const Vec<S> m = b1 * load_n(state1 + c, n) + g;
        store_n(state1 + c, m, n);
        write(c, load_n(w + c, n) - lr * (rule.nesterov ? g + b1 * m : m), n);
      });
    case Algorithm::kAdagrad:
      return over_row<S>(dim, [&](int64_t c, int n) __attribute__((always_inline)) {
        const Vec<S> g = load_n(grad + c, n);
        const Vec<S> s = load_n(state1 + c, n) + g * g;
        store_n(state1 + c, s, n);
        write(c, load_n(w + c, n) - lr * g / (vsqrt(s) + eps), n);
      });
    case Algorithm::kRowwiseAdagrad: {
      *state1 += mean_square(grad, dim);
      const S step = lr / (std::sqrt(*state1) + eps);
      // For a zero gradient at a zero sum with ε = 0, the quotient is NaN in the formula too.
      return over_row<S>(dim, [&](int64_t c, int n) __attribute__((always_inline)) {
        write(c, keep * load_n(w + c, n) - step * load_n(grad + c, n), n);
      });
    }
    case Algorithm::kAdam: {
      const S step = static_cast<S>(rule.lr / rule.correction1);
      const S correct2 = static_cast<S>(1 / std::sqrt(rule.correction2));
      return over_row<S>(dim, [&](int64_t c, int n) __attribute__((always_inline)) {
        const Vec<S> g = load_n(grad + c, n);
        const Vec<S> m = b1 * load_n(state1 + c, n) + rest1 * g;
        const Vec<S> v = b2 * load_n(state2 + c, n) + rest2 * g * g;
        store_n(state1 + c, m, n);
        store_n(state2 + c, v, n);
        write(c, keep * load_n(w + c, n) - step * m / (vsqrt(v) * correct2 + eps), n);
      });
    }
    case Algorithm::kPartialRowwiseAdam: {
      *state2 = b2 * *state2 + rest2 * mean_square(grad, dim);
      const S denominator = std::sqrt(*state2) * static_cast<S>(1 / std::sqrt(rule.correction2)) + eps;
      const S step = static_cast<S>(rule.lr / rule.correction1) / denominator;
      return over_row<S>(dim, [&](int64_t c, int n) __attribute__((always_inline)) {
        const Vec<S> m = b1 * load_n(state1 + c, n) + rest1 * load_n(grad + c, n);
        store_n(state1 + c, m, n);
        write(c, keep * load_n(w + c, n) - step * m, n);
      });
    }
    case Algorithm::kLamb:
      return lamb(rule, w, state1, state2, grad, dim, write);
    case Algorithm::kFtrl: {
      // The rule divides by the rate.
      if (lr == 0) return;
      const S l1 = static_cast<S>(rule.l1), l2 = static_cast<S>(rule.l2);
      return over_row<S>(dim, [&](int64_t c, int n) __attribute__((always_inline)) {
        const Vec<S> g = load_n(grad + c, n), old = load_n(state1 + c, n);
        const Vec<S> sum = old + g * g;
        const Vec<S> root = vsqrt(sum);
        const Vec<S> z = load_n(state2 + c, n) + g - (root - vsqrt(old)) / lr * load_n(w + c, n);
        store_n(state1 + c, sum, n);
        store_n(state2 + c, z, n);
        const Vec<S> shrunk = z > S{0} ? z - l1 : z + l1;
        const Mask<S> inside = (z <= l1) & (z >= -l1);
        write(c, inside ? Vec<S>{} : -shrunk / ((b1 + root) / lr + l2), n);
      });
    }
  }
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
