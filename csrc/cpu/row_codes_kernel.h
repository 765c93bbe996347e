// Optimizer steps on rows of codes: rounding values to codes, and training scales. Formulas: python/gossamer/_row_codes.py.
#pragma once

#include "cpu/step_kernel.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Learned scales stay at or above this.
constexpr float kLeastScale = 0x1p-20f;

template <class T>
constexpr float kLowestCode = std::numeric_limits<T>::min();
template <class T>
constexpr float kHighestCode = std::numeric_limits<T>::max();

// The nearest whole numbers, halves to even, of magnitudes below 2^22.
GOSSAMER_INLINE Vec<float> nearest(Vec<float> v) { return (v + 0x1.8p23f) - 0x1.8p23f; }

// The codes of v, units of a scale, as whole numbers in the range of T; of NaN zero.
template <class T>
GOSSAMER_INLINE Vec<float> round_to_code(Vec<float> v, bool stochastic, UInts u) {
  using Ints = VecTraits<float>::BitsVec;
  v = v == v ? v : Vec<float>{};
  v = v < kLowestCode<T> ? splat(kLowestCode<T>) : v;
  v = v > kHighestCode<T> ? splat(kHighestCode<T>) : v;
  if (!stochastic) return nearest(v);
  const Vec<float> cut = __builtin_convertvector(__builtin_convertvector(v, Ints), Vec<float>);
  const Vec<float> whole = cut > v ? cut - 1.0f : cut;
  const Vec<float> draw = __builtin_convertvector((Ints)(u >> 8), Vec<float>) * 0x1p-24f;
  return draw < v - whole ? whole + 1.0f : whole;
}

// Rounds row `number` to codes of a scale.
template <class T>
GOSSAMER_INLINE void write_codes(const StepRule& rule, uint64_t number, const float* w, float scale, T* codes, int64_t dim) {
  const bool stochastic = rule.stochastic_rounding;
  const uint64_t key = stochastic ? mix64(rule.step_key + number * kGolden) : 0;
  over_row<float>(dim, [&](int64_t c, int n) __attribute__((always_inline)) {
    store_n(codes + c, round_to_code<T>(load_n(w + c, n) / scale, stochastic, rounding_bits(key, c)), n);
  });
}

// δ_j of v, units of a scale: what rounding adds, or the end of the range beyond which v lies.
template <class T>
GOSSAMER_INLINE Vec<float> by_scale(Vec<float> v) {
  const Vec<float> inside = v < kLowestCode<T> ? splat(kLowestCode<T>) : nearest(v) - v;
  return v > kHighestCode<T> ? splat(kHighestCode<T>) : inside;
}

// The scale after a step down its slope Σ_j g_j·δ_j; NaN stays NaN.
GOSSAMER_INLINE float moved_scale(float scale, float rate, float slope) {
  const float moved = scale - rate * slope;
  return moved < kLeastScale ? kLeastScale : moved;
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
