// Stands in for CUDA's header of that name.
#pragma once

#include "cpu/dtype.h"
#include "cuda_runtime.h"

struct __half {
  gossamer::Float16 value;
};
struct __half2 {
  __half x, y;
};

inline float __half2float(__half x) { return gossamer::to_scalar(x.value); }
inline __half __float2half_rn(float x) {
  __half out;
  gossamer::from_scalar(x, out.value);
  return out;
}
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
