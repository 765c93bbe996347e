#include "cpu/low_rank.h"

#include <optional>

#include "bindings/arguments.h"
#include "bindings/register.h"

namespace gossamer::bindings {
namespace {

// (seed, threshold), or none without dropout
using PyDropout = std::optional<std::tuple<uint64_t, uint64_t>>;

Dropout dropout(const PyDropout& d) { return d ? Dropout{true, std::get<0>(*d), std::get<1>(*d)} : Dropout{}; }

}  // namespace

void register_low_rank(py::module_& m) {
  m.def(
      "rank_product",
      [](int64_t rows, int64_t depth, int64_t rank, const PyMatrix& big, const PyMatrix& small, const PyMatrix& out,
         double factor, const PyDropout& drop, bool transposed, int num_threads) {
        const RankProductArgs args{matrix(big).dtype, rows,   depth,         rank,      matrix(big), matrix(small),
                                   matrix(out),       factor, dropout(drop), transposed};
        py::gil_scoped_release release;
        rank_product(args, num_threads);
      },
      "out = factor · drop(big) · small, of a rank's few columns.");
  m.def(
      "low_rank_matmul",
      [](int64_t rows, int64_t columns, int64_t depth, int64_t rank, const PyMatrix& x, const PyMatrix& weight,
         const PyVector& bias, const PyMatrix& a, const PyMatrix& left, const PyMatrix& right, const PyMatrix& y, double factor,
         double left_factor, const PyDropout& drop, int num_threads) {
        const LowRankArgs args{matrix(y).dtype,  rows,      columns,      depth,         rank,      matrix(x), matrix(weight),
                               row_matrix(bias), matrix(a), matrix(left), matrix(right), matrix(y), factor,    left_factor,
                               dropout(drop)};
        py::gil_scoped_release release;
        low_rank_matmul(args, num_threads);
      },
      "y = x · weight^T + bias + factor · drop(left · right); without x the last term is added to y. With a, left becomes "
      "left_factor · x · a^T.");
}

}  // namespace gossamer::bindings
