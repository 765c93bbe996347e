#include <utility>

#include "bindings/arguments.h"
#include "bindings/expert_arguments.h"
#include "bindings/register.h"
#include "cpu/expert_mlp.h"

namespace gossamer::bindings {

void register_expert_mlp(py::module_& m) {
  m.def(
      "expert_mlp",
      [](GOSSAMER_EXPERT_MLP_PARAMETERS, uintptr_t y, int num_threads) {
        const ExpertMlpForwardArgs args{expert_mlp_args(GOSSAMER_EXPERT_MLP_ARGUMENTS),
                                                  reinterpret_cast<void*>(y)};
        py::gil_scoped_release release;
        expert_mlp(args, num_threads);
      },
      "y[t] = sum over the token's experts of weight · (act(x[t]·W1^T + b1)·W2^T + b2).");
  m.def(
      "expert_mlp_backward",
      [](GOSSAMER_EXPERT_MLP_PARAMETERS, const PyMatrix& dy, uintptr_t dx, const std::pair<uintptr_t, bool>& dgate_up,
         const std::pair<uintptr_t, bool>& ddown, const PyMatrix& dweights, uintptr_t dgate_up_bias,
         uintptr_t ddown_bias, int num_threads) {
        const ExpertMlpBackwardArgs args{expert_mlp_args(GOSSAMER_EXPERT_MLP_ARGUMENTS),
                                                   matrix(dy),
                                                   reinterpret_cast<void*>(dx),
                                                   {reinterpret_cast<void*>(dgate_up.first), dgate_up.second},
                                                   {reinterpret_cast<void*>(ddown.first), ddown.second},
                                                   matrix(dweights),
                                                   reinterpret_cast<void*>(dgate_up_bias),
                                                   reinterpret_cast<void*>(ddown_bias)};
        py::gil_scoped_release release;
        expert_mlp_backward(args, num_threads);
      },
      "The gradients of expert_mlp whose pointers are not null.");
}

}  // namespace gossamer::bindings
