// Counting sort of expert ids on the device. Free of CUDA headers, so that the bindings need none.
#pragma once

#include <cstdint>

namespace gossamer::cuda {

struct DispatchArgs {
  const void* expert_ids;  // (T, K) on the device
  bool int64_ids;
  int64_t num_rows;  // T * K, at least 1, below 2^31
  int64_t top_k;
  int64_t token_stride;
  int64_t slot_stride;
  int64_t num_experts;
  int32_t* slots;    // (T * K)
  int32_t* rows;     // (T * K)
  int32_t* offsets;  // (E + 1)
  int32_t* scratch;  // dispatch_scratch_size(num_rows, num_experts) elements
};

int64_t dispatch_scratch_size(int64_t num_rows, int64_t num_experts);

// Two launches on a stream of the device, or one for few slots. Returns null or a CUDA error message.
const char* dispatch(const DispatchArgs& args, int device, void* stream);

}  // namespace gossamer::cuda
