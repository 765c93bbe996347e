#include "bindings/arguments.h"
#include "bindings/register.h"
#include "cpu/grouped_matmul.h"

namespace gossamer::bindings {

void register_grouped_matmul(py::module_& m) {
  m.def(
      "grouped_matmul",
      [](const PyGroups& g, int64_t n, int64_t c, const PyMatrix& x, int64_t x_div, const PyWeights& weight,
         const PyMatrix& bias, uintptr_t y, bool y_grouped, int num_threads) {
        const GroupedMatmulArgs args{matrix(x).dtype,        groups(g),    n, c, {matrix(x), x_div},
                                               expert_weights(weight), matrix(bias), reinterpret_cast<void*>(y), y_grouped};
        py::gil_scoped_release release;
        grouped_matmul(args, num_threads);
      },
      "y[r] = x[g(r)] · weight[e(r)]^T + bias[e(r)], zero for dropped rows.");
  m.def(
      "grouped_matmul_dweight",
      [](const PyGroups& g, int64_t n, int64_t c, const PyMatrix& x, int64_t x_div, const PyMatrix& dy, int64_t dy_div,
         uintptr_t dweight, bool transposed, uintptr_t dbias, int num_threads) {
        const GroupedDweightArgs args{matrix(x).dtype,
                                                groups(g),
                                                n,
                                                c,
                                                {matrix(x), x_div},
                                                {matrix(dy), dy_div},
                                                reinterpret_cast<void*>(dweight),
                                                transposed,
                                                reinterpret_cast<void*>(dbias)};
        py::gil_scoped_release release;
        grouped_matmul_dweight(args, num_threads);
      },
      "dweight[e] = sum over the rows of e of dy[g(r)]^T x[g'(r)], and dbias[e] = sum of dy[g(r)].");
}

}  // namespace gossamer::bindings
