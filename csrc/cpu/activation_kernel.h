// Activations of vectors and their derivatives. The formulas are those of _activation.py.
#pragma once

#include "cpu/activate.h"
#include "cpu/vec.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

template <class S>
struct GateUp {
  Vec<S> gate, up;
};

template <class S>
struct ActivationValue {
  Vec<S> value, dgate, dup;  // act(g, u) and its derivatives
};

// The exponents beyond which e^z is not a normal float or double.
template <class S>
constexpr S kMostExponent = sizeof(S) == 4 ? 87 : 708;

// e^z for z <= 0; zero if the result is not a normal number.
template <class S>
GOSSAMER_INLINE Vec<S> falling_exp(Vec<S> z) {
  return z < -kMostExponent<S> ? Vec<S>{} : vexp(z);
}

// σ(z), and 1 − σ(z) computed without cancellation. Results below the normal numbers become zero: vexp saturates there, and its
// value would matter in a product with a large gate.
template <class S>
struct Logistic {
  Vec<S> value, rest;
};

template <class S>
GOSSAMER_INLINE Logistic<S> logistic(Vec<S> z) {
  constexpr S most = kMostExponent<S>;
  const Vec<S> e = vexp(-z), sigma = S{1} / (S{1} + e);
  return {z < -most ? Vec<S>{} : sigma, z > most ? Vec<S>{} : e * sigma};
}

// s(g) in .value and s'(g) in .dgate of an ungated activation.
template <int Code, class S>
GOSSAMER_INLINE ActivationValue<S> gate_function(Vec<S> g) {
  constexpr S one = 1;
  if constexpr (Code == kSilu) {
    const auto [sigma, rest] = logistic<S>(g);
    return {g * sigma, sigma * (one + g * rest), Vec<S>{}};
  } else if constexpr (Code == kGelu) {
    constexpr S half = 0.5, inv_sqrt2 = 0.70710678118654752440, inv_sqrt_2pi = 0.39894228040143267794;
    const Vec<S> phi = half + half * verf(g * inv_sqrt2);
    return {g * phi, phi + g * inv_sqrt_2pi * falling_exp<S>(g * g * -half), Vec<S>{}};
  } else if constexpr (Code == kGeluTanh) {
    // ½(1 + tanh z) = σ(2z), which is accurate for small and for very negative z.
    constexpr S linear = 1.59576912160573071176, cubic = 0.07135481627260025;
    const Vec<S> square = g * g;
    const auto [sigma, rest] = logistic<S>(g * (linear + cubic * square));
    return {g * sigma, sigma + g * sigma * rest * (linear + 3 * cubic * square), Vec<S>{}};
  } else {
    // Comparisons are written so that NaN stays NaN.
    const Vec<S> positive = g < S{0} ? Vec<S>{} : g;
    if constexpr (Code == kRelu) return {positive, g > S{0} ? splat(one) : Vec<S>{}, Vec<S>{}};
    if constexpr (Code == kRelu2) return {positive * positive, 2 * positive, Vec<S>{}};
  }
}

template <int Code, bool Gated, class S>
GOSSAMER_INLINE ActivationValue<S> activate(GateUp<S> in, S alpha, S limit) {
  if constexpr (Code == kClampedSilu) {
    constexpr S one = 1;
    const Vec<S> g = in.gate > limit ? splat(limit) : in.gate;
    Vec<S> u = in.up > limit ? splat(limit) : in.up;
    u = u < -limit ? splat(-limit) : u;
    const auto [sigma, rest] = logistic<S>(alpha * g);
    const Vec<S> dgate = (sigma + alpha * g * sigma * rest) * (u + one);
    const Vec<S> dup = g * sigma;
    return {dup * (u + one), in.gate > limit ? Vec<S>{} : dgate, ((in.up > limit) | (in.up < -limit)) ? Vec<S>{} : dup};
  } else {
    const ActivationValue<S> s = gate_function<Code, S>(in.gate);
    if constexpr (!Gated) return s;
    return {s.value * in.up, s.dgate * in.up, s.value};
  }
}

// An activation as a function of a GateUp.
template <int Code, bool Gated, class S>
struct ActivationOf {
  static constexpr bool kGated = Gated;
  S alpha, limit;

  ActivationValue<S> operator()(GateUp<S> in) const { return activate<Code, Gated, S>(in, alpha, limit); }
};

// Calls f with an ActivationOf.
template <class S, class F>
GOSSAMER_INLINE void visit_activation(const ActivationForm& form, F&& f) {
  const auto call = [&](auto code, auto gated) {
    f(ActivationOf<code, gated, S>{static_cast<S>(form.alpha), static_cast<S>(form.limit)});
  };
  const auto pick = [&](auto code) { form.gated ? call(code, std::true_type{}) : call(code, std::false_type{}); };
  switch (form.code) {
    case kSilu:
      return pick(std::integral_constant<int, kSilu>{});
    case kGelu:
      return pick(std::integral_constant<int, kGelu>{});
    case kGeluTanh:
      return pick(std::integral_constant<int, kGeluTanh>{});
    case kRelu:
      return pick(std::integral_constant<int, kRelu>{});
    case kRelu2:
      return pick(std::integral_constant<int, kRelu2>{});
    default:
      return call(std::integral_constant<int, kClampedSilu>{}, std::true_type{});
  }
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
