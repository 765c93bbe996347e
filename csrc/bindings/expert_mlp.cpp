#include "cpu/expert_mlp.h"

#include <utility>

#include "bindings/arguments.h"
#include "bindings/expert_arguments.h"
#include "bindings/quantized_arguments.h"
#include "bindings/register.h"

namespace gossamer::bindings {

namespace {

// (dx, (dW1, transposed), db1, (da, db) of the first update, the same of W2, dweights); null pointers are not wanted.
using PyGradient = std::pair<uintptr_t, bool>;
using PyFactors = std::pair<uintptr_t, uintptr_t>;
using PyProductGradients = std::tuple<PyGradient, uintptr_t, PyFactors>;

WeightGradient weight_gradient(const PyGradient& g) { return {pointer<void>(g.first), g.second}; }
UpdateGradient update_gradient(const PyFactors& f) { return {pointer<void>(f.first), pointer<void>(f.second)}; }

}  // namespace

void register_expert_mlp(py::module_& m) {
  using py::arg;
  py::class_<ExpertMlpArgs>(m, "ExpertMlp", "The arguments of an expert layer that its passes share.")
      .def(py::init([](const PyGroups& g, const PyExpertSizes& sizes, const PyActivation& activation, const PyMatrix& x,
                       const PyProduct& gate_up, const PyProduct& down, const PyMatrix& weights, uintptr_t preact) {
             const auto& [tokens, hidden, output, inner, top_k] = sizes;
             const auto& [up_weight, up_bias, up_update] = gate_up;
             const auto& [down_weight, down_bias, down_update] = down;
             return ExpertMlpArgs{.dtype = matrix(x).dtype,
                                  .groups = groups(g),
                                  .tokens = tokens,
                                  .hidden = hidden,
                                  .output = output,
                                  .inner = inner,
                                  .top_k = top_k,
                                  .activation = activation_form(activation),
                                  .x = matrix(x),
                                  .gate_up = expert_weights(up_weight),
                                  .down = expert_weights(down_weight),
                                  .gate_up_bias = matrix(up_bias),
                                  .down_bias = matrix(down_bias),
                                  .weights = matrix(weights),
                                  .preact = pointer<void>(preact),
                                  .gate_up_update = update(up_update),
                                  .down_update = update(down_update)};
           }),
           arg("groups"), arg("sizes"), arg("activation"), arg("x"), arg("gate_up"), arg("down"), arg("weights"),
           arg("preact"));
  m.def(
      "expert_mlp",
      [](const ExpertMlpArgs& layer, uintptr_t y, int num_threads) {
        const ExpertMlpForwardArgs args{layer, pointer<void>(y)};
        py::gil_scoped_release release;
        expert_mlp(args, num_threads);
      },
      "y[t] = sum over the token's experts of weight · (act(x[t]·W1^T + b1)·W2^T + b2).", arg("layer"), arg("y"),
      arg("num_threads"));
  m.def(
      "quantized_expert_mlp",
      [](const ExpertMlpArgs& layer, const PyQuantized& gate_up, const PyQuantized& down, uintptr_t y, int num_threads) {
        const QuantizedMlpArgs args{{layer, pointer<void>(y)}, quantized_weights(gate_up), quantized_weights(down)};
        py::gil_scoped_release release;
        quantized_expert_mlp(args, num_threads);
      },
      "expert_mlp with quantised weights; those of the layer are not read.", arg("layer"), arg("gate_up"), arg("down"),
      arg("y"), arg("num_threads"));
  m.def(
      "expert_mlp_backward",
      [](const ExpertMlpArgs& layer, const PyMatrix& dy, uintptr_t dx, const PyProductGradients& gate_up,
         const PyProductGradients& down, const PyMatrix& dweights, int factor_dtype, int num_threads) {
        const auto& [dgate_up, dgate_up_bias, gate_up_factors] = gate_up;
        const auto& [ddown, ddown_bias, down_factors] = down;
        ExpertMlpBackwardArgs args{layer};
        args.dy = matrix(dy);
        args.dx = pointer<void>(dx);
        args.dgate_up = weight_gradient(dgate_up);
        args.ddown = weight_gradient(ddown);
        args.dweights = matrix(dweights);
        args.dgate_up_bias = pointer<void>(dgate_up_bias);
        args.ddown_bias = pointer<void>(ddown_bias);
        args.dgate_up_update = update_gradient(gate_up_factors);
        args.ddown_update = update_gradient(down_factors);
        args.factor_dtype = static_cast<DType>(factor_dtype);
        py::gil_scoped_release release;
        expert_mlp_backward(args, num_threads);
      },
      "The gradients of expert_mlp whose pointers are not null.", arg("layer"), arg("dy"), arg("dx"), arg("gate_up"),
      arg("down"), arg("dweights"), arg("factor_dtype"), arg("num_threads"));
}

}  // namespace gossamer::bindings
