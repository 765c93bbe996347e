#include "bindings/arguments.h"
#include "bindings/expert_arguments.h"
#include "bindings/register.h"
#include "cpu/quantized_experts.h"

namespace gossamer::bindings {

namespace {

// (format, data, scale, scale dtype, (N, C), (row shift, column shift), (scale rows, scale columns))
using PySizes = std::pair<int64_t, int64_t>;
using PyQuantized = std::tuple<int, uintptr_t, uintptr_t, int, PySizes, PySizes, PySizes>;

QuantizedWeights quantized_weights(const PyQuantized& w) {
  const auto& [format, data, scale, scale_dtype, sizes, shifts, scales] = w;
  return {static_cast<WeightFormat>(format),
          reinterpret_cast<const uint8_t*>(data),
          reinterpret_cast<const void*>(scale),
          scale_dtype,
          sizes.first,
          sizes.second,
          static_cast<int>(shifts.first),
          static_cast<int>(shifts.second),
          scales.first,
          scales.second};
}

}  // namespace

void register_quantized_experts(py::module_& m) {
  m.def(
      "quantized_grouped_matmul",
      [](const PyGroups& g, const PyMatrix& x, int64_t x_div, const PyQuantized& weight, bool transposed,
         const PyMatrix& bias, uintptr_t y, bool y_grouped, int num_threads) {
        QuantizedMatmulArgs args{};
        args.weights = quantized_weights(weight);
        args.dtype = matrix(x).dtype;
        args.groups = groups(g);
        args.n = transposed ? args.weights.columns : args.weights.rows;
        args.c = transposed ? args.weights.rows : args.weights.columns;
        args.x = {matrix(x), x_div};
        args.bias = matrix(bias);
        args.y = reinterpret_cast<void*>(y);
        args.y_grouped = y_grouped;
        args.transposed = transposed;
        py::gil_scoped_release release;
        quantized_grouped_matmul(args, num_threads);
      },
      "grouped_matmul with a quantised weight, or its transpose.");
  m.def(
      "quantized_expert_mlp",
      [](GOSSAMER_EXPERT_MLP_PARAMETERS, uintptr_t y, const PyQuantized& gate_up_weights,
         const PyQuantized& down_weights, int num_threads) {
        const QuantizedMlpArgs args{{expert_mlp_args(GOSSAMER_EXPERT_MLP_ARGUMENTS), reinterpret_cast<void*>(y)},
                                    quantized_weights(gate_up_weights),
                                    quantized_weights(down_weights)};
        py::gil_scoped_release release;
        quantized_expert_mlp(args, num_threads);
      },
      "expert_mlp with quantised weights; gate_up and down are not read.");
}

}  // namespace gossamer::bindings
