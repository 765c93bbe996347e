// Rows of ragged groups times their expert's weight: loads and products. A Finish processes the finished tile.
#pragma once

#include "cuda/hopper/epilogue.cuh"
#include "cuda/hopper/operands.cuh"

namespace gossamer::hopper {

struct RowProductParams {
  CUtensorMap x_map;  // where rows are not gathered
  CUtensorMap w_map;  // (E, N, C), or (E, C, N) where w_transposed
  Experts experts;
  Rows x;
  int32_t num_columns;  // tiles of columns
  int32_t steps;        // panels along K, at least 1
  // 0, or where the second half of a weight's rows starts: the right half of a tile then takes columns from there on.
  int32_t second_half;
  bool w_transposed;
};

// `Finish` has Params with a RowProductParams `product`, and says what a tile's first column is and where it goes.
template <class S_, class Finish>
struct RowProduct {
  using S = S_;
  using Params = typename Finish::Params;

  static __device__ RowSchedule schedule(const Params& p) {
    return {p.product.experts.offsets, p.product.experts.num_experts, p.product.experts.num_rows, S::kTileRows,
            p.product.num_columns};
  }

  static __device__ int steps_of_every_tile(const Params& p) { return p.product.steps; }

  static __device__ void prepare(const Params& p) { Finish::prepare(p); }

  // First row of the weight, or column where it is transposed, of panel `panel`.
  static __device__ int panel_column(const RowProductParams& p, const Tile& tile, int panel) {
    if (p.second_half == 0) return tile.column_tile * S::kBlockN + panel * kPanel;
    constexpr int kHalf = S::kPanelsB / 2;
    const int column = tile.column_tile * (S::kBlockN / 2) + panel % kHalf * kPanel;
    return panel < kHalf ? column : p.second_half + column;
  }

  static __device__ void load_tile(const Params& params, const Tile& tile, const Shared<S>& shared, RingPosition& at) {
    const RowProductParams& p = params.product;
    constexpr int kCopies = S::kChunkCopies ? S::kBlockM / kRowsApart : 1;
    int32_t source[kCopies];
    if constexpr (S::kChunkCopies) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        // Rows past the group read its last row and are never stored; in a cluster this can be a whole tile.
        const int32_t row = tile.row + min(copier_row() + i * kRowsApart, tile.row_end - tile.row - 1);
        source[i] = source_row(p.x, row, p.x.div == 0 ? 0 : slot_of(p.experts, row));
      }
    }
    for (int step = 0; step < p.steps; ++step) {
      const uint32_t full = shared.full(at.stage), a = shared.stage(at.stage);
      const uint32_t b = a + S::kPanelsA * kPanelBytes;
      const int k = step * kPanel;
      // In a warp without chunk copies only the issuing thread waits; the others could fall behind and miss a phase.
      if (S::kChunkCopies || threadIdx.x == 0) {
        barrier_wait<(S::kCluster > 1)>(shared.empty(at.stage), at.parity ^ 1);
      }
      if (threadIdx.x == 0) {
        barrier_arrive_expect(full, (S::kPanelsB + (S::kChunkCopies ? 0 : S::kPanelsA)) * kPanelBytes);
        if constexpr (!S::kChunkCopies) {
          for (int panel = 0; panel < S::kPanelsA; ++panel) {
            load_box(a + panel * kPanelBytes, &p.x_map, full, k, tile.row + panel * kPanel);
          }
        }
        if constexpr (S::kCluster > 1) {
          for (int panel = static_cast<int>(cluster_rank()); panel < S::kPanelsB; panel += S::kCluster) {
            const int column = panel_column(p, tile, panel);
            load_box_to((1 << S::kCluster) - 1, b + panel * kPanelBytes, &p.w_map, full, p.w_transposed ? column : k,
                        p.w_transposed ? k : column, tile.expert);
          }
        } else {
          for (int panel = 0; panel < S::kPanelsB; ++panel) {
            const int column = panel_column(p, tile, panel);
            load_box(b + panel * kPanelBytes, &p.w_map, full, p.w_transposed ? column : k, p.w_transposed ? k : column,
                     tile.expert);
          }
        }
      }
      if constexpr (S::kChunkCopies) {
        const int column = k + copier_chunk() * kVector;
        const uint32_t bytes = chunk_bytes(p.x, column);
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          // Panels of rows are adjacent, and the swizzle repeats after kRowsApart rows.
          copy_chunk(a + panel_offset(copier_row(), copier_chunk()) + i * kRowsApart * kRowBytes,
                     chunk(p.x, source[i], column, bytes), bytes);
        }
        barrier_arrive_after_copies(full);
      }
      at = next<S::kStages>(at);
    }
  }

  static __device__ __forceinline__ void multiply_tile(const Params& p, const Tile&, float (&acc)[S::kBlocks][S::kBlockN / 2],
                                                       const Shared<S>& shared, Consumer<S>& consumer) {
    if (p.product.w_transposed) {
      multiply<S, false, true>(acc, shared, consumer, p.product.steps);
    } else {
      multiply<S, false, false>(acc, shared, consumer, p.product.steps);
    }
  }

  static __device__ __forceinline__ void finish(const Params& p, const Tile& tile, const float (&acc)[S::kBlockN / 2],
                                                uint8_t* staging, int block_row) {
    Finish::template tile<typename S::T, S::kBlockN>(p, tile, acc, staging, block_row);
  }
};

}  // namespace gossamer::hopper
