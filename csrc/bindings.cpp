#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <string>
#include <tuple>

#include "cpu/dispatch.h"
#include "cpu/gather_reduce.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace {

#ifdef GOSSAMER_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

using gossamer::Bags;
using gossamer::DType;
using gossamer::FloatMatrix;
using gossamer::IndexArray;

// (pointer, row stride, column stride, dtype code), as python/gossamer/cpu_kernels/_native.py writes it.
using PyMatrix = std::tuple<uintptr_t, int64_t, int64_t, int>;
// (pointer, stride, dtype code)
using PyVector = std::tuple<uintptr_t, int64_t, int>;

FloatMatrix matrix(const PyMatrix& m) {
  const auto& [pointer, row_stride, col_stride, dtype] = m;
  return {reinterpret_cast<void*>(pointer), row_stride, col_stride, static_cast<DType>(dtype)};
}

FloatMatrix row_matrix(const PyVector& v) {
  const auto& [pointer, stride, dtype] = v;
  return {reinterpret_cast<void*>(pointer), 0, stride, static_cast<DType>(dtype)};
}

IndexArray index_array(const PyVector& v) {
  const auto& [pointer, stride, dtype] = v;
  return {reinterpret_cast<const void*>(pointer), stride, static_cast<DType>(dtype) == DType::kInt64};
}

void register_dispatch(py::module_& m) {
  m.def(
      "dispatch",
      [](uintptr_t expert_ids, int dtype, int64_t num_tokens, int64_t top_k, int64_t token_stride, int64_t slot_stride,
         int64_t num_experts, uintptr_t slots, uintptr_t rows, uintptr_t offsets, int num_threads) {
        const gossamer::DispatchArgs args{reinterpret_cast<const void*>(expert_ids),
                                          static_cast<DType>(dtype) == DType::kInt64,
                                          num_tokens,
                                          top_k,
                                          token_stride,
                                          slot_stride,
                                          num_experts,
                                          reinterpret_cast<int32_t*>(slots),
                                          reinterpret_cast<int32_t*>(rows),
                                          reinterpret_cast<int32_t*>(offsets)};
        py::gil_scoped_release release;
        return gossamer::dispatch(args, num_threads);
      },
      "Counting sort by expert; returns -1, or the first flat slot whose id is negative.");
}

// Checks the lists with the lock released, and raises what is wrong with them.
void raise_bad_bags(const Bags& bags, int64_t num_rows, int num_threads) {
  gossamer::BagsError error;
  {
    py::gil_scoped_release release;
    error = gossamer::check_bags(bags, num_rows, num_threads);
  }
  if (error.kind == gossamer::BagsError::kIndex) {
    throw py::index_error("index must be in [0, N) with N=" + std::to_string(num_rows) + ", got " +
                          std::to_string(error.value) + " at flat position " + std::to_string(error.position));
  }
  if (error.kind == gossamer::BagsError::kOffset) {
    throw py::value_error("offsets must ascend within [0, L] with L=" + std::to_string(bags.num_positions) + ", got " +
                          std::to_string(error.value) + " at position " + std::to_string(error.position));
  }
}

void register_gather_reduce(py::module_& m) {
  py::class_<Bags>(m, "Bags", "The lists of ids of gather_reduce.")
      .def(py::init([](const PyVector& index, const PyVector& offsets, int64_t bag_size, int64_t num_positions,
                       int64_t num_bags, int64_t limit, int64_t padding_idx) {
        const auto all = std::numeric_limits<int64_t>::max();
        return Bags{index_array(index), index_array(offsets), bag_size, num_positions, num_bags, limit < 0 ? all : limit,
                    padding_idx};
      }));
  m.def(
      "gather_reduce",
      [](const PyMatrix& table, int64_t num_rows, int64_t dim, const Bags& bags, const PyVector& weights, uintptr_t out,
         int num_threads) {
        raise_bad_bags(bags, num_rows, num_threads);
        const gossamer::GatherArgs args{matrix(table), num_rows, dim, bags, row_matrix(weights), reinterpret_cast<void*>(out)};
        py::gil_scoped_release release;
        gossamer::gather_reduce(args, num_threads);
      },
      "out[b] = sum over the live ids of bag b of weight · table[id].");
  m.def(
      "gather_dot",
      [](const PyMatrix& dout, const PyMatrix& table, int64_t num_rows, int64_t dim, const Bags& bags, const PyVector& out,
         int num_threads) {
        raise_bad_bags(bags, num_rows, num_threads);
        const gossamer::GatherDotArgs args{matrix(dout), matrix(table), num_rows, dim, bags, row_matrix(out)};
        py::gil_scoped_release release;
        gossamer::gather_dot(args, num_threads);
      },
      "out[p] = <dout[bag of p], table[index[p]]>, zero where the id is skipped.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of gossamer: raw pointers, sizes and strides in elements, dtype codes.";
  m.attr("with_cuda") = kWithCuda;
  m.attr("isa") = gossamer::kernels().name;
  register_dispatch(m);
  register_gather_reduce(m);
}
