#include "cpu/self_referential.h"

#include "bindings/arguments.h"
#include "bindings/register.h"

namespace gossamer::bindings {

void register_self_referential(py::module_& m) {
  using Args = SelfReferentialArgs;
  py::class_<Args>(m, "SelfReferential", "Arguments of self_referential: addresses, 0 for null, and sizes.")
      .def(py::init([](int dtype, int64_t batch, int64_t tokens, int64_t heads, int64_t size, int64_t segment, uintptr_t x,
                       uintptr_t weight, uintptr_t shift, uintptr_t y, uintptr_t final_shift, uintptr_t steps, uintptr_t kept) {
             return Args{static_cast<DType>(dtype),
                         batch,
                         tokens,
                         heads,
                         size,
                         segment,
                         pointer<void>(x),
                         pointer<void>(weight),
                         pointer<void>(shift),
                         pointer<void>(y),
                         pointer<void>(final_shift),
                         pointer<void>(steps),
                         pointer<void>(kept)};
           }),
           py::kw_only(), py::arg("dtype"), py::arg("batch"), py::arg("tokens"), py::arg("heads"), py::arg("size"),
           py::arg("segment"), py::arg("x"), py::arg("weight"), py::arg("shift") = 0, py::arg("y") = 0,
           py::arg("final_shift") = 0, py::arg("steps") = 0, py::arg("kept") = 0);
  m.def("self_referential", &self_referential, py::call_guard<py::gil_scoped_release>(),
        "y[t] = W_y^T x[t] of matrices that change themselves at each token.");
  m.def(
      "self_referential_backward",
      [](const Args& forward, uintptr_t dy, uintptr_t dfinal_shift, uintptr_t dx, uintptr_t dstart, int num_threads) {
        const SelfReferentialBackwardArgs args{forward, pointer<void>(dy), pointer<void>(dfinal_shift), pointer<void>(dx),
                                               pointer<void>(dstart)};
        py::gil_scoped_release release;
        self_referential_backward(args, num_threads);
      },
      "The gradients of x and of each sequence's first matrix, from steps and kept of a forward pass.");
}

}  // namespace gossamer::bindings
