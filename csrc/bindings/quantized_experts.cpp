#include "cpu/quantized_experts.h"

#include "bindings/arguments.h"
#include "bindings/quantized_arguments.h"
#include "bindings/register.h"

namespace gossamer::bindings {

void register_quantized_experts(py::module_& m) {
  using py::arg;
  m.def(
      "quantized_grouped_matmul",
      [](const PyGroups& g, int64_t n, int64_t c, const PyMatrix& x, int64_t x_div, const PyQuantized& weight, bool transposed,
         const PyMatrix& bias, uintptr_t y, bool y_grouped, int num_threads) {
        QuantizedMatmulArgs args{};
        args.dtype = matrix(x).dtype;
        args.groups = groups(g);
        args.n = n;
        args.c = c;
        args.x = {matrix(x), x_div};
        args.weights = quantized_weights(weight);
        args.transposed = transposed;
        args.bias = matrix(bias);
        args.y = pointer<void>(y);
        args.y_grouped = y_grouped;
        py::gil_scoped_release release;
        quantized_grouped_matmul(args, num_threads);
      },
      "grouped_matmul with a quantised weight, or its transpose.", arg("groups"), arg("n"), arg("c"), arg("x"), arg("x_div"),
      arg("weight"), arg("transposed"), arg("bias"), arg("y"), arg("y_grouped"), arg("num_threads"));
}

}  // namespace gossamer::bindings
