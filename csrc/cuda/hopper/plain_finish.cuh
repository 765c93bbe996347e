// The finish of a plain product: bias, rounding, rows in sorted order or scattered to their slots.
#pragma once

#include "cuda/hopper/row_product.cuh"

namespace gossamer::hopper {

struct PlainParams {
  RowProductParams product;
  void* y;
  const void* bias;  // (E, N), or null
  int64_t stride_y;
  int32_t n;
  bool scatter, zero_dropped;
  bool aligned, bias_aligned;  // whole vectors of y, and of the bias, may be moved at once
};

template <typename T>
struct PlainFinish {
  using Params = PlainParams;

  static __device__ T* row_of(const Params& p, int64_t row) {
    const int64_t to = p.scatter ? slot_of(p.product.experts, row) : row;
    return static_cast<T*>(p.y) + to * p.stride_y;
  }

  // Rows without an expert become zero, one warp at a time.
  static __device__ void prepare(const Params& p) {
    if (!p.zero_dropped) return;
    constexpr int kWarps = 2 * kWarpsPerGroup;
    const Experts& experts = p.product.experts;
    const int warp = threadIdx.x / kLanes - kWarpsPerGroup, lane = threadIdx.x % kLanes;
    const int32_t live = in_range(__ldg(experts.offsets + experts.num_experts), experts.num_rows);
    const int64_t first = live + int64_t{blockIdx.x} * kWarps + warp;
    for (int64_t row = first; row < experts.num_rows; row += int64_t{gridDim.x} * kWarps) {
      T* to = row_of(p, row);
      for (int n = lane * kVector; n < p.n; n += kLanes * kVector) {
        store_vector(to + n, Vector{}, p.n - n, p.aligned);
      }
    }
  }

  template <typename, int kN>
  static __device__ __forceinline__ void tile(const Params& p, const Tile& tile, const float (&acc)[kN / 2], uint8_t* staging,
                                              int block_row) {
    const auto row = [&](int half) -> T* {
      const int64_t r = int64_t{tile.row} + lane_row(block_row, half);
      return r < tile.row_end ? row_of(p, r) : nullptr;
    };
    const T* bias = p.bias == nullptr ? nullptr : static_cast<const T*>(p.bias) + int64_t{tile.expert} * p.n;
    store_tile<T, kN>(acc, staging, {row(0), row(1)}, bias, tile.column_tile * kN, p.n, p.aligned, p.bias_aligned);
  }
};

}  // namespace gossamer::hopper
