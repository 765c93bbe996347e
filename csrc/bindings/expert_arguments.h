// How Python hands over an expert layer.
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

// (format, data, scale, scale dtype, (N, C), (row shift, column shift), (scale rows, scale columns))
using PySizes = std::pair<int64_t, int64_t>;
using PyQuantized = std::tuple<std::string_view, uintptr_t, uintptr_t, int, PySizes, PySizes, PySizes>;

// Formats that differ in their scales alone share an enumerator.
inline WeightFormat weight_format(std::string_view name) {
  if (name == "fp8_block") return WeightFormat::kFp8;
  static constexpr std::array<std::string_view, 4> kNames{"fp8", "int8", "int4", "mxfp4"};
  return static_cast<WeightFormat>(place_of(name, kNames, "weight format"));
}

inline QuantizedWeights quantized_weights(const PyQuantized& w) {
  const auto& [format, data, scale, scale_dtype, sizes, shifts, scales] = w;
  return {.format = weight_format(format),
          .data = pointer<const uint8_t>(data),
          .scale = pointer<const void>(scale),
          .scale_dtype = scale_dtype,
          .rows = sizes.first,
          .columns = sizes.second,
          .row_shift = static_cast<int>(shifts.first),
          .column_shift = static_cast<int>(shifts.second),
          .scale_rows = scales.first,
          .scale_columns = scales.second};
}

}  // namespace gossamer::bindings
