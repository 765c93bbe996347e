// Dequantisation of frozen weights in few bits.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace gossamer {

// Layouts as in python/gossamer/ops/quantized_expert_weight.py; of kNf4, python/gossamer/ops/quantized_weight.py.
enum class WeightFormat : int { kFp8 = 0, kInt8 = 1, kInt4 = 2, kMxfp4 = 3, kNf4 = 4 };

// How scales are stored: as one of the floating dtypes, as the exponent bytes of e8m0, or as indices of a nested scale's code.
constexpr int kE8M0 = -1, kNestedScale = -2;

// Rows of a panel of codes: their words fill a cache line, or a vector of the widest instruction set.
constexpr int64_t kCodePanel = 16;
constexpr int64_t kWordBytes = 4;

// A contiguous stack (E, N, C). The scale of (n, c) is at [n >> row_shift][c >> column_shift] of an expert's
// (scale_rows, scale_columns); one in float32 is times `factor`.
struct QuantizedWeights {
  WeightFormat format;
  const uint8_t* data;
  const void* scale;
  int scale_dtype;
  int64_t rows, columns;
  int row_shift, column_shift;
  int64_t scale_rows, scale_columns;
  float factor = 1.0f;
  const float* code = nullptr;  // what NF4's codes stand for
  // For scale s at position i: nested_code[s] · nested_scale[i >> nested_shift] + offset.
  const float *nested_code = nullptr, *nested_scale = nullptr;
  float offset = 0;
  int nested_shift = 0;
  bool rounds_rows = false;  // products round their other operand to 8 bits
  // Whether codes lie in panels of kCodePanel rows, whose words of four bytes take turns: word i of the panel's row r is at
  // word kCodePanel · i + r. Then rows and row_bytes() are multiples of kCodePanel and 4.
  bool in_panels = false;

  int64_t row_bytes() const { return format == WeightFormat::kFp8 || format == WeightFormat::kInt8 ? columns : columns / 2; }
};

// w[i] = code[q[i]] · scale[i / block_size] for `count` values, four bits each and the even ones high. The scale of block k is
// scales[k], or with double quantisation nested_code[nested_index[k]] · scales[k / nested_block_size] + offset.
struct NF4Args {
  const uint8_t* packed;
  const float *code, *scales;
  const uint8_t* nested_index;  // null without double quantisation
  const float* nested_code;
  float offset;
  int64_t count, block_size, nested_block_size;
};

// w(i, j) = decode(values(i, j)) · scale[i · scale_stride] · factor, of int8 or fp8 (e4m3) as they cross the binding.
struct ByteWeightArgs {
  const uint8_t* values;
  int64_t rows, columns, row_stride, col_stride;
  const float* scales;
  int64_t scale_stride;
  float factor;
  bool fp8;
};

// Into `out`, row after row, in floating dtype `dtype`.
void dequantize_nf4(const NF4Args& args, void* out, DType dtype, int num_threads);
void dequantize_bytes(const ByteWeightArgs& args, void* out, DType dtype, int num_threads);

}  // namespace gossamer
