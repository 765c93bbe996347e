// A stable parallel sort of entries by their rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu/parallel.h"

namespace gossamer {

// Few enough buckets that the lines being written stay in the second-level cache; more passes would cost more than its latency.
constexpr int kMaxDigitBits = 11;
// Streams that a thread interleaves. With a single stream, a frequent digit makes each step wait for the previous store to the same
// counter.
constexpr int kStreams = 4;

// Sorts by the least significant digit first. Called by every thread of a team after a barrier; ends with a barrier.
// Returns whichever of the two buffers holds the result. `histograms` has team.size · kStreams · 2^kMaxDigitBits elements.
template <class E, class Word>
E* radix_sort(E* from, E* to, int64_t count, int key_bits, Word* histograms, Team team) {
  // Every thread sums the counts of all threads, so many threads use shorter digits.
  const int most = team.size <= 8 ? kMaxDigitBits : 8;
  const int passes = (key_bits + most - 1) / most;
  constexpr int64_t kStride = int64_t{1} << kMaxDigitBits;
  Team::Range parts[kStreams];
  int64_t common = count;
  for (int s = 0; s < kStreams; ++s) {
    parts[s] = Team{team.thread * kStreams + s, team.size * kStreams}.share(count);
    common = std::min(common, parts[s].end - parts[s].begin);
  }
  // Calls f(stream, entry) for the thread's entries, in order within a stream.
  const auto each = [&](const E* entries, auto&& f) {
    for (int64_t i = 0; i < common; ++i) {
      for (int s = 0; s < kStreams; ++s) f(s, entries[parts[s].begin + i]);
    }
    for (int s = 0; s < kStreams; ++s) {
      for (int64_t i = parts[s].begin + common; i < parts[s].end; ++i) f(s, entries[i]);
    }
  };
  Word* mine = histograms + team.thread * kStreams * kStride;
  Word offsets[kStreams * kStride];
  for (int pass = 0, shift = 0; pass < passes; ++pass) {
    const int bits = (key_bits - shift + passes - pass - 1) / (passes - pass);
    const int64_t digits = int64_t{1} << bits;
    const auto mask = static_cast<Word>(digits - 1);
    for (int s = 0; s < kStreams; ++s) std::fill(mine + s * kStride, mine + s * kStride + digits, Word{0});
    each(from, [&](int s, const E& entry) { ++mine[s * kStride + ((entry.row >> shift) & mask)]; });
    team.barrier();
    // Equal digits keep their order: earlier streams come first.
    Word before = 0;
    for (int64_t digit = 0; digit < digits; ++digit) {
      for (int piece = 0; piece < team.size * kStreams; ++piece) {
        const int s = piece - team.thread * kStreams;
        if (s >= 0 && s < kStreams) offsets[s * kStride + digit] = before;
        before += histograms[piece * kStride + digit];
      }
    }
    each(from, [&](int s, const E& entry) { to[offsets[s * kStride + ((entry.row >> shift) & mask)]++] = entry; });
    team.barrier();
    std::swap(from, to);
    shift += bits;
  }
  return from;
}

}  // namespace gossamer
