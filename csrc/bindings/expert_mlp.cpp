#include <utility>

#include "bindings/arguments.h"
#include "bindings/expert_arguments.h"
#include "bindings/register.h"
#include "cpu/expert_mlp.h"

namespace gossamer::bindings {

namespace {

// (a, b, rank, s) of an update, rank 0 for none; those of both products, and their scale
using PyUpdate = std::tuple<PyWeights, PyWeights, int64_t, uintptr_t>;
using PyUpdates = std::tuple<PyUpdate, PyUpdate, double>;

ExpertUpdate update(const PyUpdate& u, double scale) {
  const auto& [a, b, rank, s] = u;
  return {expert_weights(a), expert_weights(b), rank, scale, reinterpret_cast<void*>(s)};
}

ExpertMlpArgs with_updates(ExpertMlpArgs args, const PyUpdates& updates) {
  const auto& [gate_up, down, scale] = updates;
  args.gate_up_update = update(gate_up, scale);
  args.down_update = update(down, scale);
  return args;
}

}  // namespace

void register_expert_mlp(py::module_& m) {
  m.def(
      "expert_mlp",
      [](GOSSAMER_EXPERT_MLP_PARAMETERS, const PyUpdates& updates, uintptr_t y, int num_threads) {
        const ExpertMlpForwardArgs args{with_updates(expert_mlp_args(GOSSAMER_EXPERT_MLP_ARGUMENTS), updates),
                                        reinterpret_cast<void*>(y)};
        py::gil_scoped_release release;
        expert_mlp(args, num_threads);
      },
      "y[t] = sum over the token's experts of weight · (act(x[t]·W1^T + b1)·W2^T + b2).");
  m.def(
      "expert_mlp_backward",
      [](GOSSAMER_EXPERT_MLP_PARAMETERS, const PyUpdates& updates, const PyMatrix& dy, uintptr_t dx,
         const std::pair<uintptr_t, bool>& dgate_up,
         const std::pair<uintptr_t, bool>& ddown, const PyMatrix& dweights, uintptr_t dgate_up_bias,
         uintptr_t ddown_bias, const std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>& dfactors, int factor_dtype,
         int num_threads) {
        const auto& [da1, db1, da2, db2] = dfactors;
        const ExpertMlpBackwardArgs args{with_updates(expert_mlp_args(GOSSAMER_EXPERT_MLP_ARGUMENTS), updates),
                                                   matrix(dy),
                                                   reinterpret_cast<void*>(dx),
                                                   {reinterpret_cast<void*>(dgate_up.first), dgate_up.second},
                                                   {reinterpret_cast<void*>(ddown.first), ddown.second},
                                                   matrix(dweights),
                                                   reinterpret_cast<void*>(dgate_up_bias),
                                                   reinterpret_cast<void*>(ddown_bias),
                                                   {reinterpret_cast<void*>(da1), reinterpret_cast<void*>(db1)},
                                                   {reinterpret_cast<void*>(da2), reinterpret_cast<void*>(db2)},
                                                   static_cast<DType>(factor_dtype)};
        py::gil_scoped_release release;
        expert_mlp_backward(args, num_threads);
      },
      "The gradients of expert_mlp whose pointers are not null.");
}

}  // namespace gossamer::bindings
