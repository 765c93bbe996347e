// Products with expert weights in 8 or 4 bits, which are decoded while they are packed.
#pragma once

#include <cstdint>

#include "cpu/expert_mlp.h"
#include "cpu/grouped_matmul.h"

namespace gossamer {

// Layouts as in python/gossamer/ops/quantized_expert_weight.py.
enum class WeightFormat : int { kFp8 = 0, kInt8 = 1, kInt4 = 2, kMxfp4 = 3 };

// How scales are stored: as one of the floating dtypes, or as the exponent bytes of e8m0.
constexpr int kE8M0 = -1;

// A contiguous stack (E, N, C). The scale of (n, c) is at [n >> row_shift][c >> column_shift] of an expert's
// (scale_rows, scale_columns).
struct QuantizedWeights {
  WeightFormat format;
  const uint8_t* data;
  const void* scale;
  int scale_dtype;
  int64_t rows, columns;
  int row_shift, column_shift;
  int64_t scale_rows, scale_columns;

  int64_t row_bytes() const { return format == WeightFormat::kFp8 || format == WeightFormat::kInt8 ? columns : columns / 2; }
};

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
