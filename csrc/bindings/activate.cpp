#include "bindings/arguments.h"
#include "bindings/expert_arguments.h"
#include "bindings/register.h"
#include "cpu/activate.h"

namespace gossamer::bindings {

void register_activate(py::module_& m) {
  m.def(
      "activate",
      [](const PyActivation& activation, int64_t rows, int64_t inner, const PyMatrix& preact, const PyMatrix& dact,
         uintptr_t out, int num_threads) {
        const ActivateArgs args{activation_form(activation), rows, inner, matrix(preact), matrix(dact), pointer<void>(out)};
        py::gil_scoped_release release;
        activate(args, num_threads);
      },
      "The activation of rows, or what flows back to the pre-activation where a gradient of the activation is given.");
}

}  // namespace gossamer::bindings
