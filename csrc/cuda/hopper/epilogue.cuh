// Stores accumulators to memory, eight neighbouring columns of a row at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/hopper/layout.h"
#include "cuda/hopper/schedule.h"

namespace gossamer::hopper {

constexpr int kVector = 8;
// Accumulators of a thread in 64 columns, the piece that is staged at a time, in two halves of 32 columns.
constexpr int kPieceColumns = 2 * kStagingColumns;
constexpr int kPieceRegisters = kPieceColumns / 2;

struct Vector {
  float v[kVector];
};

__device__ __forceinline__ float2 widen(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ __forceinline__ float2 widen(__half2 x) { return __half22float2(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(float x) { return x; }

template <typename T>
struct Narrow;
template <>
struct Narrow<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static __device__ __forceinline__ Pair pair(float x, float y) { return __floats2bfloat162_rn(x, y); }
  static __device__ __forceinline__ __nv_bfloat16 one(float x) { return __float2bfloat16_rn(x); }
};
template <>
struct Narrow<__half> {
  using Pair = __half2;
  static __device__ __forceinline__ Pair pair(float x, float y) { return __floats2half2_rn(x, y); }
  static __device__ __forceinline__ __half one(float x) { return __float2half_rn(x); }
};

// Eight elements of 16 bits as they lie in memory.
union Packed {
  uint4 bits;
  uint32_t pairs[4];
};

template <typename T>
__device__ __forceinline__ Vector unpack(Packed packed) {
  Vector out;
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    typename Narrow<T>::Pair pair;
    memcpy(&pair, &packed.pairs[i], sizeof pair);
    const float2 values = widen(pair);
    out.v[2 * i] = values.x;
    out.v[2 * i + 1] = values.y;
  }
  return out;
}

// Elements `at[0 : count]`, zeros after them. `aligned` says that whole vectors may be moved at once.
template <typename T>
__device__ __forceinline__ Packed load_vector(const T* at, int count, bool aligned) {
  Packed packed;
  if (aligned && count >= kVector) {
    packed.bits = *reinterpret_cast<const uint4*>(at);
    return packed;
  }
  packed.bits = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i < count) {
      uint16_t bits;
      memcpy(&bits, at + i, sizeof bits);
      packed.pairs[i / 2] |= static_cast<uint32_t>(bits) << (i % 2 * 16);
    }
  }
  return packed;
}

template <typename T>
__device__ __forceinline__ void store_vector(T* at, const Vector& values, int count, bool aligned) {
  if (aligned && count >= kVector) {
    Packed packed;
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      const auto pair = Narrow<T>::pair(values.v[2 * i], values.v[2 * i + 1]);
      memcpy(&packed.pairs[i], &pair, sizeof pair);
    }
    *reinterpret_cast<uint4*>(at) = packed.bits;
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i < count) at[i] = Narrow<T>::one(values.v[i]);
  }
}

// A warp's 16 rows by 32 columns of accumulators, from 16 registers of each thread to shared memory.
__device__ __forceinline__ void stage_columns(uint8_t* staging, const float* acc) {
  const int lane = threadIdx.x % kLanes, row = lane / 4, quarter = lane % 4;
#pragma unroll
  for (int j = 0; j < kStagingColumns / 8; ++j) {
    const int unit = 2 * j + quarter / 2, within = quarter % 2 * 8;
    *reinterpret_cast<float2*>(staging + staging_offset(row, unit) + within) = make_float2(acc[4 * j], acc[4 * j + 1]);
    *reinterpret_cast<float2*>(staging + staging_offset(row + 8, unit) + within) = make_float2(acc[4 * j + 2], acc[4 * j + 3]);
  }
}

// The eight columns of `row` from 8 * `eighth` on.
__device__ __forceinline__ Vector staged(const uint8_t* staging, int row, int eighth) {
  Vector out;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float4 four = *reinterpret_cast<const float4*>(staging + staging_offset(row, 2 * eighth + i));
    out.v[4 * i] = four.x;
    out.v[4 * i + 1] = four.y;
    out.v[4 * i + 2] = four.z;
    out.v[4 * i + 3] = four.w;
  }
  return out;
}

// Piece `piece` of a warp's accumulators to shared memory: its first half from register `kFirst(piece)` on, its second
// from `kSecond(piece)` on. A switch with constant registers in each case, so that what follows is compiled once.
template <int kPieces, int kFirstStride, int kSecondStart, int kSecondStride>
__device__ __forceinline__ void stage_piece(uint8_t* staging, const float* acc, int piece) {
  static_assert(kPieces >= 1 && kPieces <= 4);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    if (i == piece) {
      stage_columns(staging, acc + i * kFirstStride);
      stage_columns(staging + kStagingBytes, acc + kSecondStart + i * kSecondStride);
    }
  }
  __syncwarp();
}

// Pieces of neighbouring columns.
template <int kN>
__device__ __forceinline__ void stage_neighbours(uint8_t* staging, const float (&acc)[kN / 2], int piece) {
  stage_piece<kN / kPieceColumns, kPieceRegisters, kPieceRegisters / 2, kPieceRegisters>(staging, acc, piece);
}

// Pieces of 32 columns of the left half and the same columns of the right half.
template <int kN>
__device__ __forceinline__ void stage_halves(uint8_t* staging, const float (&acc)[kN / 2], int piece) {
  stage_piece<kN / kPieceColumns, kPieceRegisters / 2, kN / 4, kPieceRegisters / 2>(staging, acc, piece);
}

// Destinations of the two rows, of a warp's 16, that a lane reads; null for a row that is not stored.
template <typename T>
struct RowPair {
  T* first;
  T* second;
  __device__ T* operator[](int half) const { return half ? second : first; }
};

// The row within a tile of a lane's `half`-th row, for a 64-row block from `block_row` on.
__device__ __forceinline__ int lane_row(int block_row, int half) {
  const int warp = threadIdx.x / kLanes % 4;
  return block_row + 16 * warp + staging_row(threadIdx.x % kLanes) + 8 * half;
}

// Rounds accumulators, with the bias of their columns where there is one, and stores columns `column : num_columns`.
template <typename T, int kN>
__device__ __forceinline__ void store_tile(const float (&acc)[kN / 2], uint8_t* staging, RowPair<T> rows, const T* bias,
                                           int column, int num_columns, bool aligned, bool bias_aligned) {
  // Two blocks of 96 accumulators leave too few registers to hold all items at once.
  constexpr int kTogether = kN == 192 ? 2 : 4;
  const int lane = threadIdx.x % kLanes, eighth = lane % 4;
#pragma unroll 1
  for (int piece = 0; piece < kN / kPieceColumns; ++piece) {
    stage_neighbours<kN>(staging, acc, piece);
#pragma unroll kTogether
    for (int item = 0; item < 4; ++item) {
      const int half = item % 2, side = item / 2;
      const int n = column + piece * kPieceColumns + side * kStagingColumns + eighth * kVector;
      if (rows[half] == nullptr || n >= num_columns) continue;
      Vector values = staged(staging + side * kStagingBytes, staging_row(lane) + 8 * half, eighth);
      if (bias != nullptr) {
        const Vector add = unpack<T>(load_vector(bias + n, num_columns - n, bias_aligned));
#pragma unroll
        for (int i = 0; i < kVector; ++i) values.v[i] += add.v[i];
      }
      store_vector(rows[half] + n, values, num_columns - n, aligned);
    }
  }
}

}  // namespace gossamer::hopper
