// Grouped matrix products on Hopper GPUs. Free of CUDA headers, so that the bindings need none. Elements are bfloat16 or
// float16. Calls queue work on a stream and return null or an error message.
#pragma once

#include <cstdint>

namespace gossamer::cuda {

// Whether this build has these kernels. Without them the calls return an error message.
bool with_hopper();

// From this mean number of rows per expert, two blocks share a weight tile. Set by tests and measurements.
int64_t paired_from();
void set_paired_from(int64_t rows);

struct Where {
  int device;
  void* stream;
};

// Rows of expert e are offsets[e] .. offsets[e+1]; row r is slot slots[r] of num_slots. At least 1 row, slot and expert, below
// 2^31. Values of offsets and slots are brought into range when they are read, because the host has not checked them.
struct RoutingView {
  const int32_t* slots;
  const int32_t* offsets;
  int64_t num_rows, num_experts, num_slots;
};

// (num_rows, width), contiguous rows; data at a multiple of 16 bytes, stride a multiple of 8 elements. Sorted row r is
// row r where div is 0, else row slots[r] / div.
struct RowsView {
  const void* data;
  int64_t num_rows, width, stride, div;
};

// (num_experts, outer, inner), inner contiguous; data at a multiple of 16 bytes, strides multiples of 8 elements.
// (E, N, C), or (E, C, N) where transposed.
struct WeightView {
  const void* data;
  int64_t num_experts, outer, inner, expert_stride, outer_stride;
  bool transposed;
};

struct GroupedMatmulArgs {
  bool bfloat16;
  RoutingView routing;
  int64_t n, c;  // at least 1
  RowsView x;
  WeightView weight;
  const void* bias;  // (E, N) contiguous, or null
  void* y;           // (R, N) contiguous
  bool scatter;      // rows of y in slot order
  bool zero_dropped;
};

// y[r] = x[r] weight[e(r)]^T + bias[e(r)].
const char* grouped_matmul(const GroupedMatmulArgs& args, const Where& where);

struct GroupedDweightArgs {
  bool bfloat16;
  RoutingView routing;
  RowsView a, b;
  void* out;                            // (E, a.width, b.width), its last dimension contiguous
  int64_t expert_stride, outer_stride;  // in elements
};

// out[e] = sum of a[r]^T b[r] over the rows of e; zeros for an expert without rows.
const char* grouped_matmul_dweight(const GroupedDweightArgs& args, const Where& where);

}  // namespace gossamer::cuda
