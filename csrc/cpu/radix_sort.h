// A stable parallel sort of entries by their rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu/parallel.h"

namespace gossamer {

// Few enough digits that the lines being written to stay in the first-level cache.
constexpr int kMaxDigitBits = 8;

// Least significant digits first. Called by every thread of a team, after a barrier; there is one behind the last pass.
// Returns whichever of the two buffers holds the result. `histograms` has team.size · 2^kMaxDigitBits elements.
template <class E>
E* radix_sort(E* from, E* to, int64_t count, int key_bits, int64_t* histograms, Team team) {
  const int passes = (key_bits + kMaxDigitBits - 1) / kMaxDigitBits;
  const auto [begin, end] = team.share(count);
  constexpr int64_t kStride = int64_t{1} << kMaxDigitBits;
  int64_t offsets[kStride];
  for (int pass = 0, shift = 0; pass < passes; ++pass) {
    const int bits = (key_bits - shift + passes - pass - 1) / (passes - pass);
    const int64_t digits = int64_t{1} << bits;
    const auto mask = static_cast<decltype(from->row)>(digits - 1);
    int64_t* mine = histograms + team.thread * kStride;
    std::fill(mine, mine + digits, 0);
    for (int64_t i = begin; i < end; ++i) ++mine[(from[i].row >> shift) & mask];
    team.barrier();
    // Equal digits keep their order: those of lower threads come first.
    int64_t before = 0;
    for (int64_t digit = 0; digit < digits; ++digit) {
      for (int thread = 0; thread < team.size; ++thread) {
        if (thread == team.thread) offsets[digit] = before;
        before += histograms[thread * kStride + digit];
      }
    }
    for (int64_t i = begin; i < end; ++i) to[offsets[(from[i].row >> shift) & mask]++] = from[i];
    team.barrier();
    std::swap(from, to);
    shift += bits;
  }
  return from;
}

}  // namespace gossamer
