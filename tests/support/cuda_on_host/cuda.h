// Stands in for CUDA's header of that name: the types of tensor maps, and the driver's function that encodes them.
#pragma once

#include <cstddef>
#include <cstdint>

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE = 0, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

struct alignas(64) CUtensorMap {
  const uint8_t* data;
  int rank;
  uint64_t sizes[3];
  uint64_t strides[2];  // bytes
};

// Refuses what the driver's documentation forbids.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  bool legal = rank >= 2 && rank <= 3 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  legal = legal && reinterpret_cast<uintptr_t>(map) % 64 == 0 && swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  legal = legal && box[0] == 64 && box[1] == 64 && (rank == 2 || box[2] == 1);
  for (cuuint32_t i = 0; i < rank; ++i) legal = legal && sizes[i] > 0 && sizes[i] <= uint64_t{1} << 32 && steps[i] == 1;
  for (cuuint32_t i = 0; i + 1 < rank; ++i) {
    legal = legal && strides[i] > 0 && strides[i] % 16 == 0 && strides[i] < uint64_t{1} << 40;
  }
  if (!legal) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const uint8_t*>(data), static_cast<int>(rank), {}, {}};
  for (cuuint32_t i = 0; i < rank; ++i) map->sizes[i] = sizes[i];
  for (cuuint32_t i = 0; i + 1 < rank; ++i) map->strides[i] = strides[i];
  return CUDA_SUCCESS;
}
