// How Python hands over an expert layer.
#pragma once

#include "bindings/arguments.h"
#include "cpu/expert_mlp.h"

namespace gossamer::bindings {

// (code, gated, interleaved, alpha, limit)
using PyActivation = std::tuple<int, bool, bool, double, double>;

inline ActivationForm activation_form(const PyActivation& a) {
  const auto& [code, gated, interleaved, alpha, limit] = a;
  return {code, gated, interleaved, alpha, limit};
}

inline ExpertMlpArgs expert_mlp_args(const PyGroups& g, const std::tuple<int64_t, int64_t, int64_t, int64_t>& sizes,
                                        const PyActivation& activation, const PyMatrix& x, const PyWeights& gate_up,
                                        const PyWeights& down, const PyMatrix& gate_up_bias, const PyMatrix& down_bias,
                                        const PyMatrix& weights, uintptr_t preact) {
  const auto& [tokens, hidden, inner, top_k] = sizes;
  return {matrix(x).dtype,
          groups(g),
          tokens,
          hidden,
          inner,
          top_k,
          activation_form(activation),
          matrix(x),
          expert_weights(gate_up),
          expert_weights(down),
          matrix(gate_up_bias),
          matrix(down_bias),
          matrix(weights),
          reinterpret_cast<void*>(preact)};
}

}  // namespace gossamer::bindings

// The arguments that forward and backward share, for the signatures below.
#define GOSSAMER_EXPERT_MLP_PARAMETERS                                                                             \
  const PyGroups &g, const std::tuple<int64_t, int64_t, int64_t, int64_t>&sizes, const PyActivation &activation,   \
      const PyMatrix &x, const PyWeights &gate_up, const PyWeights &down, const PyMatrix &gate_up_bias,            \
      const PyMatrix &down_bias, const PyMatrix &weights, uintptr_t preact
#define GOSSAMER_EXPERT_MLP_ARGUMENTS \
  g, sizes, activation, x, gate_up, down, gate_up_bias, down_bias, weights, preact
