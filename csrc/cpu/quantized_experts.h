// Products with expert weights in 8 or 4 bits, which are decoded while they are packed.
#pragma once

#include <cstdint>

#include "cpu/expert_mlp.h"
#include "cpu/grouped_matmul.h"
#include "cpu/quantized_weight.h"

namespace gossamer {

struct QuantizedMatmulArgs : GroupedMatmulArgs {  // its weight is not used
  QuantizedWeights weights;
  bool transposed;
};

struct QuantizedMlpArgs : ExpertMlpForwardArgs {  // its gate_up and down are not used
  QuantizedWeights gate_up_weights, down_weights;
};

void quantized_grouped_matmul(const QuantizedMatmulArgs& args, int num_threads);
void quantized_expert_mlp(const QuantizedMlpArgs& args, int num_threads);

}  // namespace gossamer
