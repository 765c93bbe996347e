#include "bindings/arguments.h"
#include "bindings/register.h"
#include "cpu/multi_low_rank.h"

namespace gossamer::bindings {

using namespace py::literals;

void register_multi_low_rank(py::module_& m) {
  py::class_<MultiLowRankArgs>(m, "MultiLowRank", "Low-rank updates of rows, each by its own adapter.")
      .def(py::init([](const PyGroups& adapters, const PyMatrix& x, const PyWeights& a, const PyWeights& b,
                       const std::tuple<int64_t, int64_t, int64_t>& sizes, const PyVector& scales, double scale,
                       const PyVector& ranks, uintptr_t s) {
             const auto& [n, c, rank] = sizes;
             return MultiLowRankArgs{.dtype = matrix(x).dtype,
                                     .groups = groups(adapters),
                                     .n = n,
                                     .c = c,
                                     .rank = rank,
                                     .x = matrix(x),
                                     .a = expert_weights(a),
                                     .b = expert_weights(b),
                                     .scales = row_matrix(scales),
                                     .scale = scale,
                                     .ranks = index_array(ranks),
                                     .s = pointer<void>(s)};
           }),
           py::kw_only(), "adapters"_a, "x"_a, "a"_a, "b"_a, "sizes"_a, "scales"_a, "scale"_a, "ranks"_a, "s"_a);
  m.def(
      "multi_low_rank",
      [](const MultiLowRankArgs& update, const PyMatrix& y, bool add, int num_threads) {
        const MultiLowRankForwardArgs args{update, matrix(y), add};
        py::gil_scoped_release release;
        multi_low_rank(args, num_threads);
      },
      "update"_a, py::kw_only(), "y"_a, "add"_a, "num_threads"_a,
      "y[m] (+)= scale[i] · x[m]·a[i]ᵀ·b[i]ᵀ with the row's adapter i.");
  m.def(
      "multi_low_rank_backward",
      [](const MultiLowRankArgs& update, const PyMatrix& dy, uintptr_t ds, const PyMatrix& dx, uintptr_t da, uintptr_t db,
         int factor_dtype, int num_threads) {
        const MultiLowRankBackwardArgs args{update,
                                            matrix(dy),
                                            pointer<void>(ds),
                                            matrix(dx),
                                            pointer<void>(da),
                                            pointer<void>(db),
                                            static_cast<DType>(factor_dtype)};
        py::gil_scoped_release release;
        multi_low_rank_backward(args, num_threads);
      },
      "update"_a, py::kw_only(), "dy"_a, "ds"_a, "dx"_a, "da"_a, "db"_a, "factor_dtype"_a, "num_threads"_a,
      "The gradients of multi_low_rank whose pointers are not 0.");
}

}  // namespace gossamer::bindings
