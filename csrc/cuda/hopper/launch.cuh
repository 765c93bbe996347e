// Host side: tensor maps for TMA, and launches.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/grouped_matmul.cuh"
#include "cuda/hopper/operands.cuh"

namespace gossamer::hopper {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                 const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, looked up on first use: the extension must load without a driver, so it does not link to it.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    const bool usable = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return reinterpret_cast<EncodeTiled>(usable ? found : nullptr);
  }();
  return function;
}

// A map of `rank` 2 or 3 for boxes of 64 rows by 64 columns with the swizzle of panels: sizes innermost first, strides in elements.
// Reads outside the sizes give zeros.
inline const char* encode(CUtensorMap* map, bool bfloat16, const void* data, int rank, const int64_t (&sizes)[3],
                          const int64_t (&strides)[2]) {
  const EncodeTiled function = encode_tiled();
  if (function == nullptr) return "the driver has no cuTensorMapEncodeTiled (it is older than CUDA 12)";
  const cuuint64_t dims[3] = {static_cast<cuuint64_t>(sizes[0]), static_cast<cuuint64_t>(sizes[1]),
                              static_cast<cuuint64_t>(sizes[2])};
  const cuuint64_t bytes[2] = {static_cast<cuuint64_t>(strides[0]) * 2, static_cast<cuuint64_t>(strides[1]) * 2};
  const cuuint32_t box[3] = {kPanel, kPanel, 1}, ones[3] = {1, 1, 1};
  const CUresult result =
      function(map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, rank,
               const_cast<void*>(data), dims, bytes, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused a tensor";
}

inline Rows rows_of(const cuda::RowsView& view) {
  return {view.data, view.stride, static_cast<int32_t>(view.width), static_cast<uint32_t>(view.div)};
}

// Only rows in sorted order need a map.
inline const char* encode_rows(CUtensorMap* map, bool bfloat16, const cuda::RowsView& view) {
  if (view.div != 0) return nullptr;
  return encode(map, bfloat16, view.data, 2, {view.width, view.num_rows, 1}, {view.stride, 0});
}

inline const char* encode_weight(CUtensorMap* map, bool bfloat16, const cuda::WeightView& view) {
  return encode(map, bfloat16, view.data, 3, {view.inner, view.outer, view.num_experts},
                {view.outer_stride, view.expert_stride});
}

inline Experts experts_of(const cuda::RoutingView& view) {
  return {view.slots, view.offsets, static_cast<int32_t>(view.num_rows), static_cast<int32_t>(view.num_experts),
          static_cast<int32_t>(view.num_slots)};
}

inline bool vectors_fit(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % kChunkBytes == 0 && stride % 8 == 0;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether most experts have at most the rows of one panel, so that half of a two-panel tile would be empty.
inline bool few_rows(const cuda::RoutingView& view) { return view.num_rows <= kPanel * view.num_experts; }

// Whether experts have enough rows for two blocks to share a weight tile: the half pair of tiles that an expert wastes on average
// is then at most a sixteenth of its work.
inline bool many_rows(const cuda::RoutingView& view) {
  return view.num_rows / std::max<int64_t>(view.num_experts, 1) >= cuda::paired_from();
}

// Upper bound on the number of row tiles for any routing.
inline int64_t most_row_tiles(const cuda::RoutingView& view, int block_rows) {
  return std::min(view.num_rows, view.num_rows / block_rows + view.num_experts);
}

// Launches one block per multiprocessor, or fewer for few tiles. Returns null or a CUDA error message.
template <class Problem>
const char* launch(const typename Problem::Params& params, int64_t most_tiles, const cuda::Where& where) {
  using S = typename Problem::S;
  // The statically linked CUDA runtime has its own current device.
  if (const cudaError_t error = cudaSetDevice(where.device); error != cudaSuccess) return cudaGetErrorString(error);
  int multiprocessors = 0;
  cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, where.device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  error = cudaFuncSetAttribute(kernel<Problem>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t clusters = std::clamp<int64_t>(most_tiles, 1, std::max(1, multiprocessors / S::kCluster));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {S::kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * S::kCluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = S::kSharedBytes;
  config.stream = static_cast<cudaStream_t>(where.stream);
  config.attrs = &cluster;
  config.numAttrs = S::kCluster > 1 ? 1 : 0;
  error = cudaLaunchKernelEx(&config, kernel<Problem>, params);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace gossamer::hopper
