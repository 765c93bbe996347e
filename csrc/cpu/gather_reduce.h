// Sums, means and maxima of table rows over lists of indices, and the gradient of the weights.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/parallel.h"

namespace gossamer {

// The part of a flat storage of many tables that a feature reads; see ops/_bags.py.
struct Feature {
  int64_t element, row, rows, dim, column, mean;
};

// Bag b holds the positions offsets[b] .. offsets[b+1], or b·bag_size .. (b+1)·bag_size without offsets. An id outside the
// table, not below `limit`, or equal to padding_idx, contributes nothing, and its table row is not read. With features, bag f·B
// + b belongs to feature f, and its ids refer to that feature's table.
struct Bags {
  IndexArray index;
  IndexArray offsets;
  FloatMatrix weights;  // one row of num_positions, or absent
  int64_t bag_size;
  int64_t num_positions, num_bags;
  int64_t limit, padding_idx;
  bool mean;  // without features; each feature has its own
  bool drop;  // whether ids outside the table are skipped; otherwise they are errors
  const Feature* features = nullptr;
  int64_t num_features = 0;

  int64_t begin(int64_t bag) const { return offsets ? offsets[bag] : bag * bag_size; }
  int64_t end(int64_t bag) const { return offsets ? offsets[bag + 1] : (bag + 1) * bag_size; }
  int64_t bags_per_feature() const { return num_bags / num_features; }
};

// Scales of a table of codes: one per row, or one for all with stride 0. Absent for other tables.
struct RowScales {
  float* base = nullptr;
  int64_t stride = 0;

  explicit operator bool() const { return base != nullptr; }
  float& operator[](int64_t row) const { return base[row * stride]; }
};

struct GatherArgs {
  FloatMatrix table;  // (N, D), column stride 1; flat with features
  int64_t num_rows, dim;
  RowScales scales;
  Bags bags;
  FloatMatrix out;                               // (B, D) of the table's dtype or what it is accumulated in
  bool* suspect;                                 // set if a bag's id is outside the table or a weight is NaN; or null
  const struct ComposeArgs* composed = nullptr;  // replaces all of these if an id has several rows
  bool fetched = false;                          // whether the rows are in the second-level cache
};

struct GatherMaxArgs {
  FloatMatrix table;
  int64_t num_rows, dim;
  Bags bags;
  FloatMatrix out;  // as above
  int32_t* argmax;  // (B, D) contiguous, or null
};

struct GatherDotArgs {
  FloatMatrix dout;   // (B, D), column stride 1, of the table's dtype or what it is accumulated in
  FloatMatrix table;  // (N, D), column stride 1; flat with features
  int64_t num_rows, dim;
  RowScales scales;
  Bags bags;
  FloatMatrix out;  // one row of num_positions, zeroed by the caller if offsets may leave out positions
};

// The error in the lists; kind is kNothing if they are valid.
struct BagsError {
  enum Kind { kNothing = 0, kIndex = 1, kOffset = 2, kWeight = 3 } kind;
  int64_t position, value, num_rows;
};

// Checks offsets; ids, if requested; and, if requested and given, that no weight of a contributing id is NaN.
BagsError check_bags(const Bags& bags, int64_t num_rows, bool check_ids, bool check_weights, int num_threads);
void gather_reduce(const GatherArgs& args, int num_threads);
void gather_max(const GatherMaxArgs& args, int num_threads);
void gather_dot(const GatherDotArgs& args, int num_threads);

// Whether the nearer caches hold most of the rows being read: all rows fit, or a sample of the ids has many repeats. id(i) for i
// below `count` is an id.
template <class Id>
bool rows_are_near(int64_t count, int64_t table_bytes, const Id& id) {
  constexpr int64_t kNearBytes = int64_t{1} << 20, kSamples = 128, kSlots = 512, kLeast = kSamples / 8;
  if (table_bytes <= kNearBytes) return true;
  if (count < 16 * kSamples) return false;
  int64_t seen[kSlots];
  std::fill(seen, seen + kSlots, int64_t{-1});
  int64_t repeated = 0;
  for (int64_t i = 0; i < kSamples; ++i) {
    // Sampled at positions that vary within bags of any length.
    const int64_t found = id(i * (count / kSamples) + i % 13);
    int64_t& slot = seen[static_cast<uint64_t>(found) * 0x9e3779b97f4a7c15u >> 55];
    repeated += slot == found;
    slot = found;
  }
  return repeated >= kLeast;
}

// Number of elements per thread from which starting it is worthwhile.
constexpr int64_t kElementsPerThread = 16384;

// Cost of the bags before `bag`, in positions; an empty bag costs about one, as its output row is still written.
inline int64_t bag_cost(const Bags& bags, int64_t bag) {
  if (bags.num_bags == 0) return 0;
  return (bag < bags.num_bags ? bags.begin(bag) : bags.end(bag - 1)) - bags.begin(0) + bag;
}

// The first bag whose preceding bags cost at least `cost`.
inline int64_t bag_at(const Bags& bags, int64_t cost) {
  int64_t low = 0, high = bags.num_bags;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (bag_cost(bags, middle) < cost) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Cuts the bags so that every thread gets about as many positions, and calls f(first bag, last bag).
template <class F>
void over_bags(const Bags& bags, int64_t dim, int num_threads, F&& f) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(dim, 1));
  if (bags.num_bags == 0) return;
  parallel_ranges(bag_cost(bags, bags.num_bags), grain, num_threads,
                  [&](int64_t begin, int64_t end) { f(bag_at(bags, begin), bag_at(bags, end)); });
}

}  // namespace gossamer
