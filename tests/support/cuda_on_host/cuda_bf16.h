// Stands in for CUDA's header of that name.
#pragma once

#include "cpu/dtype.h"
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  gossamer::BFloat16 value;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 x) { return gossamer::to_scalar(x.value); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  __nv_bfloat16 out;
  gossamer::from_scalar(x, out.value);
  return out;
}
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {__bfloat162float(x.x), __bfloat162float(x.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
