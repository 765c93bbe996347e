// Arrays as Python passes them: tuples of plain numbers, written by python/gossamer/cpu_kernels/_native.py.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/dtype.h"
#include "cpu/grouped_matmul.h"

namespace gossamer::bindings {

namespace py = pybind11;

// (pointer, row stride, column stride, dtype code)
using PyMatrix = std::tuple<uintptr_t, int64_t, int64_t, int>;
// (pointer, stride, dtype code)
using PyVector = std::tuple<uintptr_t, int64_t, int>;

// (slots, offsets, number of rows, number of experts)
using PyGroups = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t>;
// (pointer, expert stride, row stride, column stride)
using PyWeights = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

// Raises CUDA's error message, if there is one.
inline void raise_cuda(const char* what, const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("gossamer ") + what + ": CUDA error: " + error);
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline FloatMatrix matrix(const PyMatrix& m) {
  const auto& [pointer, row_stride, col_stride, dtype] = m;
  return {reinterpret_cast<void*>(pointer), row_stride, col_stride, static_cast<DType>(dtype)};
}

inline FloatMatrix row_matrix(const PyVector& v) {
  const auto& [pointer, stride, dtype] = v;
  return {reinterpret_cast<void*>(pointer), 0, stride, static_cast<DType>(dtype)};
}

inline IndexArray index_array(const PyVector& v) {
  const auto& [pointer, stride, dtype] = v;
  return {reinterpret_cast<const void*>(pointer), stride, static_cast<DType>(dtype) == DType::kInt64};
}

inline Groups groups(const PyGroups& g) {
  const auto& [slots, offsets, num_rows, num_experts] = g;
  return {reinterpret_cast<const int32_t*>(slots), reinterpret_cast<const int32_t*>(offsets), num_rows, num_experts};
}

inline ExpertWeights expert_weights(const PyWeights& w) {
  const auto& [pointer, expert_stride, row_stride, col_stride] = w;
  return {reinterpret_cast<void*>(pointer), expert_stride, row_stride, col_stride};
}

}  // namespace gossamer::bindings
