// The activations of gossamer.Activation and their derivatives.
#pragma once

#include <cmath>

#include "gate.h"
#include "cuda/hopper/layout.h"

namespace gossamer::hopper {

struct ActivationForm {
  int code;  // a Gate
  bool gated;
  bool interleaved;  // gate and up alternate
  float alpha, limit;
};

struct Slope {
  float value, slope;
};

GOSSAMER_HD float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return __expf(x);
#else
  return std::exp(x);
#endif
}

// Accurate to 2^-21, which is invisible in 16-bit results.
GOSSAMER_HD float sigmoid(float x) {
#if defined(__CUDA_ARCH__)
  return __fdividef(1.0f, 1.0f + __expf(-x));
#else
  return 1.0f / (1.0f + std::exp(-x));
#endif
}

// By one exponential, exact at both ends.
GOSSAMER_HD float hyperbolic_tangent(float x) {
  const float t = exponential(-2.0f * fabsf(x));
#if defined(__CUDA_ARCH__)
  return copysignf(__fdividef(1.0f - t, 1.0f + t), x);
#else
  return copysignf((1.0f - t) / (1.0f + t), x);
#endif
}

// Value and derivative of the activated gate.
template <int kCode>
GOSSAMER_HD Slope activate(float g, const ActivationForm& form) {
  if constexpr (kCode == kSilu) {
    const float s = sigmoid(g);
    return {g * s, s * (1.0f + g * (1.0f - s))};
  } else if constexpr (kCode == kGelu) {
    const float cdf = 0.5f * (1.0f + erff(g * 0.7071067811865476f));
    return {g * cdf, cdf + g * 0.3989422804014327f * exponential(-0.5f * g * g)};
  } else if constexpr (kCode == kGeluTanh) {
    const float t = hyperbolic_tangent(0.7978845608028654f * (g + 0.044715f * g * g * g));
    const float slope = 0.7978845608028654f * (1.0f + 0.134145f * g * g);
    return {0.5f * g * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * g * (1.0f - t * t) * slope};
  } else if constexpr (kCode == kRelu) {
    return {fmaxf(g, 0.0f), g > 0.0f ? 1.0f : 0.0f};
  } else if constexpr (kCode == kRelu2) {
    const float r = fmaxf(g, 0.0f);
    return {r * r, 2.0f * r};
  } else {
    const float c = fminf(g, form.limit);
    const float s = sigmoid(form.alpha * c);
    return {c * s, g <= form.limit ? s * (1.0f + form.alpha * c * (1.0f - s)) : 0.0f};
  }
}

// The factor of the activated gate, and its derivative.
template <int kCode>
GOSSAMER_HD Slope up_factor(float u, const ActivationForm& form) {
  if constexpr (kCode != kClampedSilu) return {u, 1.0f};
  const bool inside = u <= form.limit && u >= -form.limit;
  return {fminf(fmaxf(u, -form.limit), form.limit) + 1.0f, inside ? 1.0f : 0.0f};
}

template <int kCode>
struct Code {
  static constexpr int value = kCode;
};

// Calls `body` with the code as a constant: one branch for as many elements as it works on.
template <class Body>
GOSSAMER_HD void with_code(int code, Body&& body) {
  switch (code) {
    case kSilu:
      return body(Code<kSilu>{});
    case kGelu:
      return body(Code<kGelu>{});
    case kGeluTanh:
      return body(Code<kGeluTanh>{});
    case kRelu:
      return body(Code<kRelu>{});
    case kRelu2:
      return body(Code<kRelu2>{});
    default:
      return body(Code<kClampedSilu>{});
  }
}

// The outputs of an activation for one gate and up value, and their gradients for the output's gradient `dact`.
struct GluGradient {
  float act, dgate, dup;
};

template <int kCode>
GOSSAMER_HD float glu(float gate, float up, const ActivationForm& form) {
  const float value = activate<kCode>(gate, form).value;
  return form.gated ? value * up_factor<kCode>(up, form).value : value;
}

template <int kCode>
GOSSAMER_HD GluGradient glu_gradient(float dact, float gate, float up, const ActivationForm& form) {
  const Slope a = activate<kCode>(gate, form);
  if (!form.gated) return {a.value, dact * a.slope, 0.0f};
  const Slope factor = up_factor<kCode>(up, form);
  return {a.value * factor.value, dact * factor.value * a.slope, dact * a.value * factor.slope};
}

}  // namespace gossamer::hopper
