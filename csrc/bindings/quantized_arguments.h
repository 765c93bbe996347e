// Quantised weights as Python passes them.
#pragma once

#include "bindings/arguments.h"
#include "bindings/names.h"
#include "cpu/quantized_weight.h"

namespace gossamer::bindings {

using PySizes = std::pair<int64_t, int64_t>;
// Of NF4: (code, nested code, nested scales, offset, nested shift); all but the first 0 without double quantisation
using PyBlocks = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int>;
// (format, data, scale, scale dtype, (N, C), (row shift, column shift), (scale rows, scale columns), blocks, (rounds rows, in panels))
using PyQuantized =
    std::tuple<std::string_view, uintptr_t, uintptr_t, int, PySizes, PySizes, PySizes, PyBlocks, std::pair<bool, bool>>;

// Formats that differ only in their scales share an enumerator.
inline WeightFormat weight_format(std::string_view name) {
  if (name == "fp8_block") return WeightFormat::kFp8;
  if (name == "int8_absmax") return WeightFormat::kInt8;
  static constexpr std::array<std::string_view, 5> kNames{"fp8", "int8", "int4", "mxfp4", "nf4"};
  return static_cast<WeightFormat>(place_of(name, kNames, "weight format"));
}

inline QuantizedWeights quantized_weights(const PyQuantized& w) {
  const auto& [format, data, scale, scale_dtype, sizes, shifts, scales, blocks, how] = w;
  const auto& [code, nested_code, nested_scale, offset, nested_shift] = blocks;
  return {.format = weight_format(format),
          .data = pointer<const uint8_t>(data),
          .scale = pointer<const void>(scale),
          .scale_dtype = scale_dtype,
          .rows = sizes.first,
          .columns = sizes.second,
          .row_shift = static_cast<int>(shifts.first),
          .column_shift = static_cast<int>(shifts.second),
          .scale_rows = scales.first,
          .scale_columns = scales.second,
          .factor = format == "int8_absmax" ? static_cast<float>(1.0 / 127.0) : 1.0f,
          .code = pointer<const float>(code),
          .nested_code = pointer<const float>(nested_code),
          .nested_scale = pointer<const float>(nested_scale),
          .offset = offset ? *pointer<const float>(offset) : 0.0f,
          .nested_shift = nested_shift,
          .rounds_rows = how.first,
          .in_panels = how.second};
}

}  // namespace gossamer::bindings
