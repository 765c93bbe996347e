#include <utility>

#include "bindings/arguments.h"
#include "bindings/register.h"
#include "cpu/expert_mlp.h"

namespace gossamer::bindings {

namespace {

// (code, gated, interleaved, alpha, limit)
using PyActivation = std::tuple<int, bool, bool, double, double>;

ExpertMlpArgs expert_mlp_args(const PyGroups& g, const std::tuple<int64_t, int64_t, int64_t, int64_t>& sizes,
                                        const PyActivation& activation, const PyMatrix& x, const PyWeights& gate_up,
                                        const PyWeights& down, const PyMatrix& gate_up_bias, const PyMatrix& down_bias,
                                        const PyMatrix& weights, uintptr_t preact) {
  const auto& [tokens, hidden, inner, top_k] = sizes;
  const auto& [code, gated, interleaved, alpha, limit] = activation;
  return {matrix(x).dtype,
          groups(g),
          tokens,
          hidden,
          inner,
          top_k,
          {code, gated, interleaved, alpha, limit},
          matrix(x),
          expert_weights(gate_up),
          expert_weights(down),
          matrix(gate_up_bias),
          matrix(down_bias),
          matrix(weights),
          reinterpret_cast<void*>(preact)};
}

}  // namespace

// The arguments that forward and backward share, for the signatures below.
#define GOSSAMER_EXPERT_MLP_PARAMETERS                                                                             \
  const PyGroups &g, const std::tuple<int64_t, int64_t, int64_t, int64_t>&sizes, const PyActivation &activation,   \
      const PyMatrix &x, const PyWeights &gate_up, const PyWeights &down, const PyMatrix &gate_up_bias,            \
      const PyMatrix &down_bias, const PyMatrix &weights, uintptr_t preact
#define GOSSAMER_EXPERT_MLP_ARGUMENTS \
  g, sizes, activation, x, gate_up, down, gate_up_bias, down_bias, weights, preact

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
