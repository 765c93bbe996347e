// The counting sort of (token, expert) assignments.
#pragma once

#include <cstdint>

namespace gossamer {

struct DispatchArgs {
  const void* expert_ids;  // (T, K), int64 when wide, else int32
  bool wide;
  int64_t num_tokens, top_k;
  int64_t token_stride, slot_stride;
  int64_t num_experts;
  int32_t* slots;    // (R,)
  int32_t* rows;     // (R,)
  int32_t* offsets;  // (E+1,)
};

// Fills slots, rows and offsets; returns -1, or the first flat slot with a negative id, when nothing valid is written.
int64_t dispatch(const DispatchArgs& args, int num_threads);

}  // namespace gossamer
