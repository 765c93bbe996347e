// The arguments of an expert layer as Python passes them.
#pragma once

#include "bindings/arguments.h"
#include "bindings/names.h"
#include "cpu/expert_mlp.h"
#include "cpu/quantized_experts.h"

namespace gossamer::bindings {

inline ActivationForm activation_form(const PyActivation& a) {
  const auto& [gate, gated, interleaved, alpha, limit] = a;
  return {gate_code(gate), gated, interleaved, alpha, limit};
}

// (a, b, rank, scale, s) of an update, rank 0 for none
using PyUpdate = std::tuple<PyWeights, PyWeights, int64_t, double, uintptr_t>;
// (weight, bias, update)
using PyProduct = std::tuple<PyWeights, PyMatrix, PyUpdate>;
// (T, H, O, I, K)
using PyExpertSizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;

inline ExpertUpdate update(const PyUpdate& u) {
  const auto& [a, b, rank, scale, s] = u;
  return {expert_weights(a), expert_weights(b), rank, scale, pointer<void>(s)};
}

}  // namespace gossamer::bindings
