// The operands of a product: rows by expert, in sorted order or gathered, and the experts' weights.
#pragma once

#include "cuda/hopper/kernel.cuh"

namespace gossamer::hopper {

// Sorted row r is row r where div is 0, else row slots[r] / div. The stride counts elements and is a multiple of 8.
struct Rows {
  const void* data;
  int64_t stride;
  int32_t width;
  uint32_t div;
};

struct Experts {
  const int32_t* slots;
  const int32_t* offsets;
  int32_t num_rows, num_experts, num_slots;
};

// The slot of a sorted row.
__device__ __forceinline__ int32_t slot_of(const Experts& experts, int64_t row) {
  return in_range(__ldg(experts.slots + row), experts.num_slots - 1);
}

__device__ __forceinline__ int32_t source_row(const Rows& rows, int32_t row, int32_t slot) {
  return rows.div == 0 ? row : static_cast<int32_t>(static_cast<uint32_t>(slot) / rows.div);
}

// The bytes of a chunk from `column` on that lie within the row.
__device__ __forceinline__ uint32_t chunk_bytes(const Rows& rows, int column) {
  const int rest = (rows.width - column) * 2;
  return static_cast<uint32_t>(rest < 0 ? 0 : rest > kChunkBytes ? kChunkBytes : rest);
}

__device__ __forceinline__ const void* chunk(const Rows& rows, int32_t source, int column, uint32_t bytes) {
  // A chunk of zero bytes must still have a valid address.
  const int64_t element = bytes == 0 ? 0 : source * rows.stride + column;
  return static_cast<const char*>(rows.data) + 2 * element;
}

// A thread's share of panels: chunk `lane` of every 16th row.
constexpr int kChunksPerRow = kRowBytes / kChunkBytes;
constexpr int kRowsApart = kGroupThreads / kChunksPerRow;

__device__ __forceinline__ int copier_row() { return threadIdx.x / kChunksPerRow; }
__device__ __forceinline__ int copier_chunk() { return threadIdx.x % kChunksPerRow; }

}  // namespace gossamer::hopper
