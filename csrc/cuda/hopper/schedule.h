// Finds the i-th tile on the device from the offsets of the groups. The host launches one block per multiprocessor and reads nothing
// back; block b takes tiles b, b + blocks, and so on.
#pragma once

#include <cstdint>

#include "cuda/hopper/layout.h"

namespace gossamer::hopper {

// Number of row tiles that pass over all column tiles together, so that they and one weight tile stay in L2.
constexpr int kGroupRows = 8;
constexpr int kLanes = 32;

// The nearest index in [0, most]: offsets and slots may hold anything.
GOSSAMER_HD int32_t in_range(int32_t index, int32_t most) { return index < 0 ? 0 : index < most ? index : most; }

struct TilePlace {
  int32_t row_tile, column_tile;
};

// The local-th tile of num_rows by num_columns tiles.
GOSSAMER_HD TilePlace tile_place(int64_t local, int32_t num_rows, int32_t num_columns) {
  const int64_t in_group = static_cast<int64_t>(kGroupRows) * num_columns;
  const auto first = static_cast<int32_t>(local / in_group) * kGroupRows;
  const auto rest = static_cast<uint32_t>(local % in_group);
  const auto size = static_cast<uint32_t>(num_rows - first < kGroupRows ? num_rows - first : kGroupRows);
  return {first + static_cast<int32_t>(rest % size), static_cast<int32_t>(rest / size)};
}

struct Tile {
  int32_t expert;
  int32_t row, row_end;  // first sorted row of the tile (of the group where K is ragged), and the end of its group
  int32_t row_tile, column_tile;
};

// Tiles over the rows of ragged groups, in expert order, none for an empty expert. Indices must not decrease from call to
// call. On the device all lanes of a warp call together and look at 32 experts at a time.
class RowSchedule {
 public:
  GOSSAMER_HD RowSchedule(const int32_t* offsets, int32_t num_experts, int32_t num_rows, int32_t block_rows,
                          int32_t num_columns)
      : offsets_(offsets), num_experts_(num_experts), num_rows_(num_rows), block_rows_(block_rows), num_columns_(num_columns) {}

  // False past the last tile.
  GOSSAMER_HD bool seek(int64_t index, Tile& tile) {
    for (; first_ < num_experts_; first_ += kLanes) {
      const Found found = search(index);
      if (found.lane < kLanes) {
        const int32_t tiles = row_tiles(found.start, found.end);
        const TilePlace place = tile_place(index - (before_ + found.before) * num_columns_, tiles, num_columns_);
        tile = {first_ + found.lane, found.start + place.row_tile * block_rows_, found.end, place.row_tile, place.column_tile};
        return true;
      }
      before_ += found.before;
    }
    return false;
  }

 private:
  // The expert of the chunk that has the tile, and the row tiles of those before it; lane kLanes and all of them where
  // none has.
  struct Found {
    int32_t lane, before, start, end;
  };

  GOSSAMER_HD int32_t row_tiles(int32_t start, int32_t end) const {
    return end <= start ? 0 : static_cast<int32_t>((static_cast<int64_t>(end) - start + block_rows_ - 1) / block_rows_);
  }

  GOSSAMER_HD int32_t bound(int32_t offset) const { return in_range(offset, num_rows_); }

  GOSSAMER_HD bool reaches(int64_t index, int32_t tiles) const { return (before_ + tiles) * num_columns_ > index; }

  GOSSAMER_HD Found search(int64_t index) const {
#if defined(__CUDA_ARCH__)
    constexpr unsigned kAll = 0xffffffffu;
    const int lane = threadIdx.x % kLanes;
    const int32_t expert = first_ + lane;
    const bool inside = expert < num_experts_;
    const int32_t start = inside ? bound(__ldg(offsets_ + expert)) : 0;
    const int32_t end = inside ? bound(__ldg(offsets_ + expert + 1)) : 0;
    const int32_t mine = row_tiles(start, end);
    __syncwarp();
    int32_t sum = mine;
    for (int step = 1; step < kLanes; step *= 2) {
      const int32_t other = __shfl_up_sync(kAll, sum, step);
      if (lane >= step) sum += other;
    }
    const unsigned hits = __ballot_sync(kAll, reaches(index, sum));
    if (hits == 0) return {kLanes, __shfl_sync(kAll, sum, kLanes - 1), 0, 0};
    const int hit = __ffs(static_cast<int>(hits)) - 1;
    return {hit, __shfl_sync(kAll, sum - mine, hit), __shfl_sync(kAll, start, hit), __shfl_sync(kAll, end, hit)};
#else
    int32_t sum = 0;
    for (int lane = 0; lane < kLanes && first_ + lane < num_experts_; ++lane) {
      const int32_t start = bound(offsets_[first_ + lane]), end = bound(offsets_[first_ + lane + 1]);
      const int32_t mine = row_tiles(start, end);
      if (reaches(index, sum + mine)) return {lane, sum, start, end};
      sum += mine;
    }
    return {kLanes, sum, 0, 0};
#endif
  }

  const int32_t* offsets_;
  int32_t num_experts_, num_rows_, block_rows_, num_columns_;
  int32_t first_ = 0;
  int64_t before_ = 0;
};

// Tiles over one matrix per expert, empty ones too, whose sums run over the expert's rows.
class WeightSchedule {
 public:
  GOSSAMER_HD WeightSchedule(const int32_t* offsets, int32_t num_experts, int32_t num_rows, int32_t row_tiles,
                             int32_t num_columns)
      : offsets_(offsets), num_experts_(num_experts), num_rows_(num_rows), row_tiles_(row_tiles), num_columns_(num_columns) {}

  GOSSAMER_HD bool seek(int64_t index, Tile& tile) {
    const int64_t tiles = static_cast<int64_t>(row_tiles_) * num_columns_;
    const int64_t expert = index / tiles;
    if (expert >= num_experts_) return false;
    const TilePlace place = tile_place(index % tiles, row_tiles_, num_columns_);
    const int32_t start = in_range(offsets_[expert], num_rows_);
    const int32_t end = in_range(offsets_[expert + 1], num_rows_);
    tile = {static_cast<int32_t>(expert), start, end < start ? start : end, place.row_tile, place.column_tile};
    return true;
  }

 private:
  const int32_t* offsets_;
  int32_t num_experts_, num_rows_, row_tiles_, num_columns_;
};

}  // namespace gossamer::hopper
