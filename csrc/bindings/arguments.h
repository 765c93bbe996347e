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

// (slots, offsets, number of rows, number of experts, number of slots)
using PyGroups = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t>;
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

// Raises a ValueError if one of the indices is outside [0, limit). Python checks indices when it first sees them, and again
// after writes that torch counts; compiled code, and other writes to the memory, reach kernels without such a check.
inline void check_range(const char* name, const int32_t* indices, int64_t count, int64_t limit) {
  int64_t outside = 0;
  for (int64_t i = 0; i < count; ++i) outside += static_cast<uint32_t>(indices[i]) >= static_cast<uint64_t>(limit);
  if (outside == 0) return;
  int64_t at = 0;
  while (static_cast<uint32_t>(indices[at]) < static_cast<uint64_t>(limit)) ++at;
  throw py::value_error(std::string(name) + " must be in [0, " + std::to_string(limit) + "), got " +
                        std::to_string(indices[at]) + " at position " + std::to_string(at));
}

// Raises a ValueError unless the offsets ascend from 0 to at most limit.
inline void check_offsets(const char* name, const int32_t* offsets, int64_t count, int64_t limit) {
  int32_t before = 0;
  for (int64_t i = 0; i <= count; ++i) {
    if (offsets[i] < before || offsets[i] > limit || (i == 0 && offsets[i] != 0)) {
      throw py::value_error(std::string(name) + " must ascend from 0 to at most " + std::to_string(limit) + ", got " +
                            std::to_string(offsets[i]) + " at position " + std::to_string(i));
    }
    before = offsets[i];
  }
}

inline Groups groups(const PyGroups& g) {
  const auto& [slots, offsets, num_rows, num_experts, num_slots] = g;
  const Groups made{reinterpret_cast<const int32_t*>(slots), reinterpret_cast<const int32_t*>(offsets), num_rows, num_experts};
  if (made.offsets != nullptr) {
    check_offsets("dispatch.offsets", made.offsets, num_experts, num_rows);
    check_range("dispatch.slots", made.slots, num_rows, num_slots);
  }
  return made;
}

inline ExpertWeights expert_weights(const PyWeights& w) {
  const auto& [pointer, expert_stride, row_stride, col_stride] = w;
  return {reinterpret_cast<void*>(pointer), expert_stride, row_stride, col_stride};
}

}  // namespace gossamer::bindings
