#include "cpu/low_rank.h"

#include <optional>

#include "bindings/arguments.h"
#include "bindings/quantized_arguments.h"
#include "bindings/register.h"

namespace gossamer::bindings {
namespace {

using namespace py::literals;

// (seed, threshold), or none without dropout
using PyDropout = std::optional<std::tuple<uint64_t, uint64_t>>;

Dropout dropout(const PyDropout& d) { return d ? Dropout{true, std::get<0>(*d), std::get<1>(*d)} : Dropout{}; }

}  // namespace

void register_low_rank(py::module_& m) {
  m.def(
      "rank_product",
      [](int64_t rows, int64_t depth, int64_t rank, const PyMatrix& big, const PyMatrix& small, const PyMatrix& out,
         double factor, const PyDropout& mask, bool transposed, int num_threads) {
        const RankProductArgs args{.dtype = matrix(big).dtype,
                                   .rows = rows,
                                   .depth = depth,
                                   .rank = rank,
                                   .big = matrix(big),
                                   .small = matrix(small),
                                   .out = matrix(out),
                                   .factor = factor,
                                   .dropout = dropout(mask),
                                   .transposed = transposed};
        py::gil_scoped_release release;
        rank_product(args, num_threads);
      },
      py::kw_only(), "rows"_a, "depth"_a, "rank"_a, "big"_a, "small"_a, "out"_a, "factor"_a, "mask"_a, "transposed"_a,
      "num_threads"_a, "out (rows, rank) = factor · drop(big (rows, depth)) · small (depth, rank), of a rank's few columns.");
  m.def(
      "low_rank_matmul",
      [](int64_t rows, int64_t columns, int64_t depth, int64_t rank, const PyMatrix& x, const PyMatrix& weight,
         const std::optional<PyQuantized>& quantized, const PyVector& bias, const PyMatrix& a, const PyMatrix& left,
         const PyMatrix& right, const PyMatrix& y, double factor, double left_factor, const PyDropout& mask, int num_threads) {
        const QuantizedWeights codes = quantized ? quantized_weights(*quantized) : QuantizedWeights{};
        const LowRankArgs args{.dtype = matrix(y).dtype,
                               .rows = rows,
                               .columns = columns,
                               .depth = depth,
                               .rank = rank,
                               .x = matrix(x),
                               .weight = matrix(weight),
                               .bias = row_matrix(bias),
                               .a = matrix(a),
                               .left = matrix(left),
                               .right = matrix(right),
                               .y = matrix(y),
                               .factor = factor,
                               .left_factor = left_factor,
                               .dropout = dropout(mask),
                               .quantized = quantized ? &codes : nullptr};
        py::gil_scoped_release release;
        low_rank_matmul(args, num_threads);
      },
      py::kw_only(), "rows"_a, "columns"_a, "depth"_a, "rank"_a, "x"_a, "weight"_a, "quantized"_a, "bias"_a, "a"_a, "left"_a,
      "right"_a, "y"_a, "factor"_a, "left_factor"_a, "mask"_a, "num_threads"_a,
      "y (rows, columns) = x · weightᵀ + bias + factor · drop(left · right); without x the last term is added to y. With a, "
      "left becomes left_factor · x · aᵀ. A quantised weight takes the place of weight.");
}

}  // namespace gossamer::bindings
