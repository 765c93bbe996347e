// Frozen weights in few bits, in floating point again.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace gossamer {

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
