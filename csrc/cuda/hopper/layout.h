// The layout of operand tiles in shared memory, as TMA writes them and wgmma's descriptors address them. Plain functions of numbers,
// shared by the kernels and by tests on the host.
//
// A panel is 64 rows of 128 bytes (64 elements of 16 bits). Of an operand with contiguous K a panel holds 64 of its M or
// N rows by 64 of K; of one with contiguous M or N it holds 64 of K by 64 of M or N. Either way the 16-byte chunks of
// row r are permuted by r % 8, which is the 128-byte swizzle of both units; panels start at multiples of 1024 bytes.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GOSSAMER_HD __host__ __device__ __forceinline__
#else
#define GOSSAMER_HD inline
#endif

namespace gossamer::hopper {

constexpr int kPanel = 64;      // rows of a panel, and its columns
constexpr int kRowBytes = 128;  // of a panel
constexpr int kPanelBytes = kPanel * kRowBytes;
constexpr int kChunkBytes = 16;
constexpr int kMmaK = 16;  // depth of one wgmma of 16-bit elements
constexpr int kAtomBytes = 8 * kRowBytes;

// Byte of chunk `chunk` (0..7) of row `row` in a panel.
GOSSAMER_HD constexpr uint32_t panel_offset(int row, int chunk) {
  return static_cast<uint32_t>(row * kRowBytes + ((chunk ^ (row % 8)) * kChunkBytes));
}

// A matrix descriptor: start address, leading and stride byte offsets in 16-byte units, and the 128-byte swizzle.
GOSSAMER_HD constexpr uint64_t make_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  constexpr uint64_t kSwizzle128 = 1;
  return uint64_t{(address >> 4) & 0x3fff} | uint64_t{(leading_bytes >> 4) & 0x3fff} << 16 |
         uint64_t{(stride_bytes >> 4) & 0x3fff} << 32 | kSwizzle128 << 62;
}

// The descriptor of panels from `address` on, one after the other along M or N.
//
// The stride offset leads from 8 rows to the next 8 rows: of M or N where K is contiguous, of K where it is not. There
// the leading offset leads from 64 of M or N to the next; where K is contiguous the swizzle leaves it unused.
GOSSAMER_HD constexpr uint64_t operand_descriptor(uint32_t address, bool k_contiguous) {
  return make_descriptor(address, k_contiguous ? 0 : kPanelBytes, kAtomBytes);
}

// What one step of kMmaK adds to a descriptor: 32 bytes within the rows, or 16 rows.
GOSSAMER_HD constexpr uint64_t descriptor_step(bool k_contiguous) {
  return (k_contiguous ? kMmaK * 2 : kMmaK * kRowBytes) >> 4;
}

// Epilogues pass accumulators through shared memory, a warp 16 rows by 32 columns of float32 at a time, so that each
// thread gets eight neighbouring columns of a row. kStagingBytes is one such piece; `unit` counts 16 bytes.
//
// The permutation keeps both sides free of bank conflicts: writers are rows 0..3 or 4..7 by eight bytes, readers are a
// row and the one four below it.
constexpr int kStagingColumns = 32;
constexpr int kStagingBytes = 16 * kStagingColumns * 4;

GOSSAMER_HD constexpr uint32_t staging_offset(int row, int unit) {
  return static_cast<uint32_t>(row * kRowBytes + ((unit ^ ((row & 3) << 1) ^ ((row >> 2) & 1)) * 16));
}

// The row that a lane reads, less 8 in the second half; its columns are 8 * (lane % 4) and on.
GOSSAMER_HD constexpr int staging_row(int lane) { return ((lane >> 3) & 3) | ((lane >> 2 & 1) << 2); }

// Shared memory of a block: panels start at multiples of 1024, which the start of dynamic shared memory need not be; two pieces
// of staging for each of eight warps; two barriers per stage, and two for the turns.
constexpr int kSharedLimit = 232448;
constexpr int kConsumerWarps = 8;
constexpr int kWarpStaging = 2 * kStagingBytes;

GOSSAMER_HD constexpr int stage_bytes(int block_m, int block_n) { return (block_m + block_n) * kRowBytes; }

GOSSAMER_HD constexpr int barriers_start(int block_m, int block_n, int stages) {
  return stages * stage_bytes(block_m, block_n) + kConsumerWarps * kWarpStaging;
}

GOSSAMER_HD constexpr int shared_bytes(int block_m, int block_n, int stages) {
  return kAtomBytes + barriers_start(block_m, block_n, stages) + (2 * stages + 2) * 8;
}

}  // namespace gossamer::hopper
