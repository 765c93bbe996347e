#include "cpu/expert_topology.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/parallel.h"

namespace gossamer {
namespace {

// Number of written values above which a second thread is worth waking.
constexpr int64_t kNumbersPerThread = int64_t{1} << 16;

}  // namespace

bool expert_topology(const ExpertTopologyArgs& a, int num_threads) {
  const int64_t wide = a.wide, columns = a.experts * wide;
  std::vector<int64_t> start(a.experts + 1, 0);
  for (int64_t e = 0; e < a.experts; ++e) {
    if (a.offsets[e] < 0 || a.offsets[e + 1] < a.offsets[e]) return false;
    start[e + 1] = start[e] + (int64_t{a.offsets[e + 1]} - a.offsets[e] + a.bm - 1) / a.bm;
  }
  const int64_t live = start[a.experts];
  if (live > a.rows) return false;
  for (int64_t e = 0; e <= a.experts; ++e) a.padded_offsets[e] = static_cast<int32_t>(start[e] * a.bm);

  std::vector<int64_t> longest(a.experts);
  std::iota(longest.begin(), longest.end(), 0);
  std::stable_sort(longest.begin(), longest.end(),
                   [&](int64_t e, int64_t f) { return start[e + 1] - start[e] > start[f + 1] - start[f]; });
  for (int64_t i = 0; i < columns; ++i) a.column_schedule[i] = static_cast<int32_t>(longest[i / wide] * wide + i % wide);

  const int64_t grain = std::max<int64_t>(1, kNumbersPerThread / wide);
  parallel_ranges(a.rows, grain, num_threads, [&](int64_t begin, int64_t end) {
    int64_t e = std::upper_bound(start.begin() + 1, start.end(), begin) - start.begin() - 1;
    for (int64_t row = begin; row < end; ++row) {
      // All rows with blocks have the same number of blocks.
      a.row_schedule[row] = static_cast<int32_t>(row);
      a.row_offsets[row] = static_cast<int32_t>(std::min(row, live) * wide);
      while (e < a.experts && row >= start[e + 1]) ++e;
      const bool is_live = row < live;
      const int64_t left = is_live ? a.offsets[e + 1] - a.offsets[e] - (row - start[e]) * a.bm : 0;
      a.live_rows[row] = static_cast<int32_t>(std::min(left, a.bm));
      for (int64_t c = 0; c < wide; ++c) {
        a.row_indices[row * wide + c] = static_cast<int32_t>(is_live ? row : a.rows);
        a.column_indices[row * wide + c] = static_cast<int32_t>(is_live ? e * wide + c : columns);
        if (is_live) continue;
        a.row_indices_t[row * wide + c] = static_cast<int32_t>(a.rows);
        a.column_indices_t[row * wide + c] = static_cast<int32_t>(columns);
        a.order_t[row * wide + c] = static_cast<int32_t>(row * wide + c);
      }
    }
  });
  a.row_offsets[a.rows] = static_cast<int32_t>(live * wide);

  const int64_t mean = std::max<int64_t>(1, live / a.experts);
  parallel_ranges(columns, std::max<int64_t>(1, kNumbersPerThread / mean), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end; ++column) {
      const int64_t e = column / wide, first = start[e], count = start[e + 1] - first,
                    at = first * wide + column % wide * count;
      a.column_offsets[column] = static_cast<int32_t>(at);
      for (int64_t i = 0; i < count; ++i) {
        a.row_indices_t[at + i] = static_cast<int32_t>(first + i);
        a.column_indices_t[at + i] = static_cast<int32_t>(column);
        a.order_t[at + i] = static_cast<int32_t>((first + i) * wide + column % wide);
      }
    }
  });
  a.column_offsets[columns] = static_cast<int32_t>(live * wide);
  return true;
}

int64_t expert_places(const ExpertPlacesArgs& a, int num_threads) {
  for (int64_t e = 0; e < a.experts; ++e) {
    const int64_t begin = a.offsets[e], end = a.offsets[e + 1], row = a.padded_offsets[e], next = a.padded_offsets[e + 1];
    const bool both_exist = 0 <= begin && begin <= end && end <= a.num_slots && 0 <= row && next <= a.padded_rows;
    if (!both_exist || end - begin > next - row) return e;
  }
  const auto outside = [&](int32_t slot) { return slot < 0 || slot >= a.num_slots; };
  if (std::any_of(a.slots, a.slots + a.num_slots, outside)) return -2;
  // The following loops do not reach rows before the first expert's, nor slots that are missing because others occur twice.
  std::fill(a.slots_of_rows, a.slots_of_rows + a.padded_offsets[0], static_cast<int32_t>(a.num_slots));
  std::fill(a.rows_of_slots, a.rows_of_slots + a.num_slots, static_cast<int32_t>(a.padded_rows));
  parallel_ranges(a.experts, std::max<int64_t>(1, kNumbersPerThread * a.experts / std::max<int64_t>(1, a.padded_rows)),
                  num_threads, [&](int64_t first, int64_t last) {
                    for (int64_t e = first; e < last; ++e) {
                      const int64_t begin = a.offsets[e], count = a.offsets[e + 1] - begin, row = a.padded_offsets[e];
                      for (int64_t i = 0; i < count; ++i) {
                        const int32_t slot = a.slots[begin + i];
                        a.slots_of_rows[row + i] = slot;
                        a.rows_of_slots[slot] = static_cast<int32_t>(row + i);
                      }
                      std::fill(a.slots_of_rows + row + count, a.slots_of_rows + a.padded_offsets[e + 1],
                                static_cast<int32_t>(a.num_slots));
                    }
                  });
  std::fill(a.slots_of_rows + a.padded_offsets[a.experts], a.slots_of_rows + a.padded_rows, static_cast<int32_t>(a.num_slots));
  return -1;
}

}  // namespace gossamer
