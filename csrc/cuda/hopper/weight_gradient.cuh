// Sums over each expert's rows of outer products: both operands lie with K, the rows, as panel rows.
#pragma once

#include "cuda/hopper/epilogue.cuh"
#include "cuda/hopper/operands.cuh"

namespace gossamer::hopper {

// out[e][m, n] = sum of a[r, m] b[r, n] over the rows r of e.
struct WeightGradientParams {
  CUtensorMap a_map, b_map;  // where the operand is not gathered
  Experts experts;
  Rows a, b;
  int32_t num_row_tiles, num_columns;
  void* out;
  int64_t stride_e, stride_m;  // n is contiguous
  bool aligned;
};

template <class S_>
struct WeightGradient {
  using S = S_;
  using T = typename S::T;
  using Params = WeightGradientParams;
  static_assert(S::kChunkCopies && !S::kPingPong);
  static constexpr int kCopies = kPanel / kRowsApart;

  static __device__ WeightSchedule schedule(const Params& p) {
    return {p.experts.offsets, p.experts.num_experts, p.experts.num_rows, p.num_row_tiles, p.num_columns};
  }

  static __device__ int steps_of_every_tile(const Params&) { return 0; }

  static __device__ void prepare(const Params&) {}

  static __device__ int num_steps(const Tile& tile) {
    return static_cast<int>((static_cast<int64_t>(tile.row_end) - tile.row + kPanel - 1) / kPanel);
  }

  // The slots of this thread's rows of a step, the last row's in place of those past the group.
  static __device__ void load_slots(const Params& p, const Tile& tile, int step, int32_t (&slots)[kCopies]) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int32_t first = tile.row + step * kPanel;
      slots[i] = slot_of(p.experts, first + min(copier_row() + i * kRowsApart, tile.row_end - first - 1));
    }
  }

  // TMA copies whole blocks of sorted rows. The last block of a group is copied row by row, so that its end is zero and nothing of the
  // next group is read.
  static __device__ bool by_box(const Rows& rows, bool whole) { return rows.div == 0 && whole; }

  static __device__ void copy_rows(const Rows& rows, uint32_t to, int32_t row, int32_t row_end, int num_panels,
                                   int first_column, const int32_t (&slots)[kCopies]) {
    int32_t source[kCopies];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) source[i] = source_row(rows, row + copier_row() + i * kRowsApart, slots[i]);
    const uint32_t mine = to + panel_offset(copier_row(), copier_chunk());
    // Not unrolled: the addresses of all panels do not fit into a producer's registers.
#pragma unroll 1
    for (int panel = 0; panel < num_panels; ++panel) {
      const int column = first_column + panel * kPanel + copier_chunk() * kVector;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const bool inside = copier_row() + i * kRowsApart < row_end - row;
        const uint32_t bytes = inside ? chunk_bytes(rows, column) : 0;
        copy_chunk(mine + panel * kPanelBytes + i * kRowsApart * kRowBytes, chunk(rows, source[i], column, bytes), bytes);
      }
    }
  }

  static __device__ void load_tile(const Params& p, const Tile& tile, const Shared<S>& shared, RingPosition& at) {
    const int steps = num_steps(tile);
    const int m = tile.row_tile * S::kBlockM, n = tile.column_tile * S::kBlockN;
    int32_t slots[kCopies];
    if (steps > 0) load_slots(p, tile, 0, slots);
    for (int step = 0; step < steps; ++step) {
      const int32_t row = tile.row + step * kPanel;
      const bool whole = tile.row_end - row >= kPanel;
      const bool a_box = by_box(p.a, whole), b_box = by_box(p.b, whole);
      const uint32_t full = shared.full(at.stage), a = shared.stage(at.stage);
      const uint32_t b = a + S::kPanelsA * kPanelBytes;
      barrier_wait(shared.empty(at.stage), at.parity ^ 1);
      if (threadIdx.x == 0) {
        barrier_arrive_expect(full, ((a_box ? S::kPanelsA : 0) + (b_box ? S::kPanelsB : 0)) * kPanelBytes);
        if (a_box) {
          for (int panel = 0; panel < S::kPanelsA; ++panel) {
            load_box(a + panel * kPanelBytes, &p.a_map, full, m + panel * kPanel, row);
          }
        }
        if (b_box) {
          for (int panel = 0; panel < S::kPanelsB; ++panel) {
            load_box(b + panel * kPanelBytes, &p.b_map, full, n + panel * kPanel, row);
          }
        }
      }
      if (!a_box) copy_rows(p.a, a, row, tile.row_end, S::kPanelsA, m, slots);
      if (!b_box) copy_rows(p.b, b, row, tile.row_end, S::kPanelsB, n, slots);
      barrier_arrive_after_copies(full);
      at = next<S::kStages>(at);
      if (step + 1 < steps) load_slots(p, tile, step + 1, slots);
    }
  }

  static __device__ __forceinline__ void multiply_tile(const Params&, const Tile& tile,
                                                       float (&acc)[S::kBlocks][S::kBlockN / 2], const Shared<S>& shared,
                                                       Consumer<S>& consumer) {
    // An expert without rows has no first step to initialise the accumulators.
#pragma unroll
    for (int block = 0; block < S::kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < S::kBlockN / 2; ++i) acc[block][i] = 0.0f;
    }
    multiply<S, true, true>(acc, shared, consumer, num_steps(tile));
  }

  static __device__ __forceinline__ void finish(const Params& p, const Tile& tile, const float (&acc)[S::kBlockN / 2],
                                                uint8_t* staging, int block_row) {
    const auto row = [&](int half) -> T* {
      const int m = tile.row_tile * S::kBlockM + lane_row(block_row, half);
      return m < p.a.width ? static_cast<T*>(p.out) + tile.expert * p.stride_e + m * p.stride_m : nullptr;
    };
    store_tile<T, S::kBlockN>(acc, staging, {row(0), row(1)}, nullptr, tile.column_tile * S::kBlockN, p.b.width, p.aligned,
                              false);
  }
};

}  // namespace gossamer::hopper
