// Stands in for the instruction of that file: a model, after its documentation, of what a descriptor addresses and of
// which accumulators a thread has.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/hopper/ptx.cuh"

namespace gossamer::hopper {

inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float to_float(__half x) { return __half2float(x); }

template <typename T>
float operand_element(uint64_t descriptor, bool mn_contiguous, int mn, int k) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const auto leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fail("a descriptor of another swizzle");
  const uint32_t address = mn_contiguous ? start + mn / 64 * leading + mn % 64 * 2 + k / 8 * stride + k % 8 * 128
                                         : start + mn / 8 * stride + mn % 8 * 128 + k * 2;
  T value;
  memcpy(&value, shared_pointer(swizzled(address), sizeof value), sizeof value);
  return to_float(value);
}

template <typename T, int kN, bool kMnA, bool kMnB>
void mma(float (&d)[kN / 2], uint64_t a, uint64_t b, uint32_t add) {
  const int thread = threadIdx.x % 128;
  float rows[2][16];
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 16; ++k) {
      rows[half][k] = operand_element<T>(a, kMnA, thread / 32 * 16 + thread % 32 / 4 + 8 * half, k);
    }
  }
  for (int group = 0; group < kN / 8; ++group) {
    for (int side = 0; side < 2; ++side) {
      float column[16];
      for (int k = 0; k < 16; ++k) column[k] = operand_element<T>(b, kMnB, group * 8 + thread % 4 * 2 + side, k);
      for (int half = 0; half < 2; ++half) {
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += rows[half][k] * column[k];
        float& to = d[4 * group + 2 * half + side];
        to = add ? to + sum : sum;
      }
    }
  }
}

}  // namespace gossamer::hopper
