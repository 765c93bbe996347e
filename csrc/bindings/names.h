// Names used in Python and the numbers that kernels use for them.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <string_view>
#include <tuple>

namespace gossamer::bindings {

namespace py = pybind11;

// (function of the gate, gated, interleaved, alpha, limit)
using PyActivation = std::tuple<std::string_view, bool, bool, double, double>;

// The index of a name in a list that follows the order of an enumeration.
template <size_t kCount>
int place_of(std::string_view name, const std::array<std::string_view, kCount>& names, const char* what) {
  for (size_t i = 0; i < kCount; ++i) {
    if (names[i] == name) return static_cast<int>(i);
  }
  throw py::value_error(std::string("no such ") + what + ": " + std::string(name));
}

// A Gate of gate.h.
inline int gate_code(std::string_view name) {
  static constexpr std::array<std::string_view, 6> kNames{"silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_silu"};
  return place_of(name, kNames, "activation");
}

}  // namespace gossamer::bindings
