// The lists of ids as Python passes them, and errors for invalid ones.
#pragma once

#include <optional>

#include "bindings/arguments.h"
#include "cpu/gather_reduce.h"

namespace gossamer::bindings {

// (pointer, stride) of a table's scales, or None
using PyScales = std::optional<std::tuple<uintptr_t, int64_t>>;

inline RowScales row_scales(const PyScales& scales) {
  if (!scales) return {};
  const auto& [pointer, stride] = *scales;
  return {reinterpret_cast<float*>(pointer), stride};
}

// Checks the lists without holding the GIL, and raises an error if they are invalid.
void raise_bad_bags(const Bags& bags, int64_t num_rows, bool check_ids, bool check_weights, int num_threads);

}  // namespace gossamer::bindings
