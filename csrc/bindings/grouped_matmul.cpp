#include "cpu/grouped_matmul.h"

#include "bindings/arguments.h"
#include "bindings/register.h"

namespace gossamer::bindings {

void register_grouped_matmul(py::module_& m) {
  using py::arg;
  m.def(
      "grouped_matmul",
      [](const PyGroups& g, int64_t n, int64_t c, const PyMatrix& x, int64_t x_div, const PyWeights& weight, bool,
         const PyMatrix& bias, uintptr_t y, bool y_grouped, int num_threads) {
        const GroupedMatmulArgs args{.dtype = matrix(x).dtype,
                                     .groups = groups(g),
                                     .n = n,
                                     .c = c,
                                     .x = {matrix(x), x_div},
                                     .weight = expert_weights(weight),
                                     .bias = matrix(bias),
                                     .y = pointer<void>(y),
                                     .y_grouped = y_grouped};
        py::gil_scoped_release release;
        grouped_matmul(args, num_threads);
      },
      "y[r] = x[g(r)] · weight[e(r)]^T + bias[e(r)], zero for dropped rows. A transposed weight has its strides exchanged.",
      arg("groups"), arg("n"), arg("c"), arg("x"), arg("x_div"), arg("weight"), arg("transposed"), arg("bias"), arg("y"),
      arg("y_grouped"), arg("num_threads"));
  m.def(
      "grouped_matmul_dweight",
      [](const PyGroups& g, int64_t n, int64_t c, const PyMatrix& x, int64_t x_div, const PyMatrix& dy, int64_t dy_div,
         uintptr_t dweight, bool transposed, uintptr_t dbias, int num_threads) {
        const GroupedDweightArgs args{.dtype = matrix(x).dtype,
                                      .groups = groups(g),
                                      .n = n,
                                      .c = c,
                                      .x = {matrix(x), x_div},
                                      .dy = {matrix(dy), dy_div},
                                      .dweight = pointer<void>(dweight),
                                      .transposed = transposed,
                                      .dbias = pointer<void>(dbias)};
        py::gil_scoped_release release;
        grouped_matmul_dweight(args, num_threads);
      },
      "dweight[e] = sum over the rows of e of dy[g(r)]^T x[g'(r)], and dbias[e] = sum of dy[g(r)].", arg("groups"), arg("n"),
      arg("c"), arg("x"), arg("x_div"), arg("dy"), arg("dy_div"), arg("dweight"), arg("transposed"), arg("dbias"),
      arg("num_threads"));
}

}  // namespace gossamer::bindings
