#include "cpu/low_rank.h"

#include <optional>

#include "bindings/arguments.h"
#include "bindings/quantized_arguments.h"
#include "bindings/register.h"

namespace gossamer::bindings {
namespace {

using namespace py::literals;

// (rows, columns of the result, depth of the product)
using PyProductSizes = std::tuple<int64_t, int64_t, int64_t>;
// (seed, threshold), or none without dropout
using PyDropout = std::optional<std::tuple<uint64_t, uint64_t>>;
// (rank, left, right, factor, dropout), and (a, factor) where left is a result
using PyRankUpdate = std::tuple<int64_t, PyMatrix, PyMatrix, double, PyDropout>;
using PyFactor = std::tuple<PyMatrix, double>;

Dropout dropout(const PyDropout& d) { return d ? Dropout{true, std::get<0>(*d), std::get<1>(*d)} : Dropout{}; }

}  // namespace

void register_low_rank(py::module_& m) {
  py::class_<RankProductArgs>(m, "RankProduct", "A product with a rank's few columns.")
      .def(py::init([](const PyProductSizes& sizes, const PyMatrix& big, const PyMatrix& small, const PyMatrix& out,
                       double factor, const PyDropout& mask, bool transposed) {
             const auto& [rows, rank, depth] = sizes;
             return RankProductArgs{.dtype = matrix(big).dtype,
                                    .rows = rows,
                                    .depth = depth,
                                    .rank = rank,
                                    .big = matrix(big),
                                    .small = matrix(small),
                                    .out = matrix(out),
                                    .factor = factor,
                                    .dropout = dropout(mask),
                                    .transposed = transposed};
           }),
           "sizes"_a, "big"_a, "small"_a, "out"_a, "factor"_a, "mask"_a, "transposed"_a);
  py::class_<LowRankArgs>(m, "LowRank", "A linear layer's product with a low-rank update in it.")
      .def(py::init([](const PyProductSizes& sizes, const PyMatrix& x, const PyMatrix& weight,
                       const std::optional<PyQuantized>& quantized, const PyVector& bias, const PyMatrix& y,
                       const std::optional<PyRankUpdate>& update, const std::optional<PyFactor>& a) {
             const auto& [rows, columns, depth] = sizes;
             LowRankArgs args{.dtype = matrix(y).dtype,
                              .rows = rows,
                              .columns = columns,
                              .depth = depth,
                              .x = matrix(x),
                              .weight = matrix(weight),
                              .bias = row_matrix(bias),
                              .y = matrix(y)};
             if (quantized) args.quantized = quantized_weights(*quantized);
             if (update) {
               const auto& [rank, left, right, factor, mask] = *update;
               args.rank = rank;
               args.left = matrix(left);
               args.right = matrix(right);
               args.factor = factor;
               args.dropout = dropout(mask);
             }
             if (a) {
               args.a = matrix(std::get<0>(*a));
               args.left_factor = std::get<1>(*a);
             }
             return args;
           }),
           "sizes"_a, "x"_a, "weight"_a, "quantized"_a, "bias"_a, "y"_a, "update"_a, "a"_a);
  m.def("rank_product", &rank_product, py::call_guard<py::gil_scoped_release>(),
        "out (rows, rank) = factor · drop(big (rows, depth)) · small (depth, rank).");
  m.def("low_rank_matmul", &low_rank_matmul, py::call_guard<py::gil_scoped_release>(),
        "y (rows, columns) = x · weightᵀ + bias + factor · drop(left · right); without x the update alone is added to y. With "
        "a, left becomes its factor · x · aᵀ. A quantised weight takes the place of weight.");
}

}  // namespace gossamer::bindings
