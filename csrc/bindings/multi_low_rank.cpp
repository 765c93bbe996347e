#include "bindings/arguments.h"
#include "bindings/register.h"
#include "cpu/multi_low_rank.h"

namespace gossamer::bindings {

namespace {

// (scales, the scale where there are none)
using PyScale = std::pair<PyVector, double>;

MultiLowRankArgs multi_low_rank_args(const PyGroups& g, const PyMatrix& x, const PyWeights& a, const PyWeights& b,
                                     const std::tuple<int64_t, int64_t, int64_t>& sizes, const PyScale& scale,
                                     const PyVector& ranks, uintptr_t s) {
  const auto& [n, c, rank] = sizes;
  return {matrix(x).dtype,           groups(g),    n,  c, rank, matrix(x), expert_weights(a), expert_weights(b),
          row_matrix(scale.first), scale.second, index_array(ranks), reinterpret_cast<void*>(s)};
}

}  // namespace

void register_multi_low_rank(py::module_& m) {
  m.def(
      "multi_low_rank",
      [](const PyGroups& g, const PyMatrix& x, const PyWeights& a, const PyWeights& b,
         const std::tuple<int64_t, int64_t, int64_t>& sizes, const PyScale& scale, const PyVector& ranks, uintptr_t s,
         const PyMatrix& y, bool add, int num_threads) {
        const MultiLowRankForwardArgs args{multi_low_rank_args(g, x, a, b, sizes, scale, ranks, s), matrix(y), add};
        py::gil_scoped_release release;
        multi_low_rank(args, num_threads);
      },
      "y[m] (+)= scale[i] · x[m]·a[i]^T·b[i]^T with the row's adapter i.");
  m.def(
      "multi_low_rank_backward",
      [](const PyGroups& g, const PyMatrix& x, const PyWeights& a, const PyWeights& b,
         const std::tuple<int64_t, int64_t, int64_t>& sizes, const PyScale& scale, const PyVector& ranks, uintptr_t s,
         const PyMatrix& dy, uintptr_t ds, const PyMatrix& dx, uintptr_t da, uintptr_t db, int factor_dtype,
         int num_threads) {
        const MultiLowRankBackwardArgs args{multi_low_rank_args(g, x, a, b, sizes, scale, ranks, s),
                                            matrix(dy),
                                            reinterpret_cast<void*>(ds),
                                            matrix(dx),
                                            reinterpret_cast<void*>(da),
                                            reinterpret_cast<void*>(db),
                                            static_cast<DType>(factor_dtype)};
        py::gil_scoped_release release;
        multi_low_rank_backward(args, num_threads);
      },
      "The gradients of multi_low_rank whose pointers are not null.");
}

}  // namespace gossamer::bindings
