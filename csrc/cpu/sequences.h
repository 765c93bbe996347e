// The sequences of a batch.
#pragma once

#include <algorithm>
#include <cstdint>

namespace gossamer {

// B sequences of T rows each, or the sequences into which `offsets` divides the rows of a batch of one. Rows are counted
// through all of
// them: sequence n holds rows begin(n) to begin(n + 1).
struct Sequences {
  int64_t count, length;
  const int64_t* offsets;  // (N + 1,), or null

  int64_t begin(int64_t n) const { return offsets ? offsets[n] : n * length; }
  int64_t size(int64_t n) const { return offsets ? offsets[n + 1] - offsets[n] : length; }

  // The sequence that holds a row.
  int64_t holding(int64_t row) const {
    return offsets ? std::upper_bound(offsets, offsets + count + 1, row) - offsets - 1 : row / length;
  }

  // Calls f(sequence, first, last) for the positions of each sequence that rows [begin, end) hold.
  template <class F>
  void each_piece(int64_t first_row, int64_t last_row, F&& f) const {
    if (first_row >= last_row) return;
    for (int64_t n = holding(first_row); n < count && begin(n) < last_row; ++n) {
      const int64_t first = std::max<int64_t>(0, first_row - begin(n)), last = std::min(size(n), last_row - begin(n));
      if (first < last) f(n, first, last);
    }
  }
};

}  // namespace gossamer
