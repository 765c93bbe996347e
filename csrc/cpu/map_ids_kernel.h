// Ids to rows, for one instruction set.
//
// A block of ids passes through each step in turn, in loops that the compiler turns into vectors. Remainders are taken by
// multiplying with a reciprocal in double precision, where the quotient is small enough to be off by one at most.
#pragma once

#include "cpu/isa_begin.h"
#include "cpu/map_ids.h"
#include "cpu/vec.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

constexpr int64_t kIdsPerBlock = 256;
constexpr uint64_t kMersenne61 = (uint64_t{1} << 61) - 1;
// Quotients below this are exact but for one.
constexpr double kLargestQuotient = 0x1p50;

// Mix13, a bijection of 64-bit numbers.
inline uint64_t mixed_id(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// A divisor with what its quotients are computed by.
struct Divisor {
  int64_t value;
  double reciprocal;

  explicit Divisor(int64_t value) : value(value), reciprocal(1.0 / static_cast<double>(value)) {}

  // Whether numbers up to `largest` have quotients that the reciprocal gives.
  bool takes(uint64_t largest) const {
    return largest < uint64_t{1} << 63 && static_cast<double>(largest) * reciprocal < kLargestQuotient;
  }

  int64_t quotient(int64_t x) const {
    const int64_t near = static_cast<int64_t>(static_cast<double>(x) * reciprocal), rest = x - near * value;
    return near - (rest < 0) + (rest >= value);
  }

  int64_t remainder(int64_t x) const {
    int64_t rest = x - static_cast<int64_t>(static_cast<double>(x) * reciprocal) * value;
    rest += rest < 0 ? value : 0;
    return rest - (rest >= value ? value : 0);
  }
};

inline void reduce(uint64_t* x, int64_t count, uint64_t largest, int64_t modulus) {
  const Divisor by(modulus);
  if (by.takes(largest)) {
    for (int64_t i = 0; i < count; ++i) x[i] = static_cast<uint64_t>(by.remainder(static_cast<int64_t>(x[i])));
  } else {
    for (int64_t i = 0; i < count; ++i) x[i] %= static_cast<uint64_t>(modulus);
  }
}

inline void divide(uint64_t* x, int64_t count, uint64_t largest, int64_t divisor) {
  const Divisor by(divisor);
  if (by.takes(largest)) {
    for (int64_t i = 0; i < count; ++i) x[i] = static_cast<uint64_t>(by.quotient(static_cast<int64_t>(x[i])));
  } else {
    for (int64_t i = 0; i < count; ++i) x[i] /= static_cast<uint64_t>(divisor);
  }
}

// (multiplier·x + addend) mod prime of numbers below it.
inline void affine(const uint64_t* x, uint64_t* to, int64_t count, const IdMap& map, int64_t prime) {
  const auto a = static_cast<uint64_t>(map.multiplier), b = static_cast<uint64_t>(map.addend);
  if (static_cast<uint64_t>(prime) == kMersenne61) {
    for (int64_t i = 0; i < count; ++i) {
      const auto product = static_cast<unsigned __int128>(x[i]) * a + b;
      const uint64_t sum = (static_cast<uint64_t>(product) & kMersenne61) + static_cast<uint64_t>(product >> 61);
      to[i] = sum >= kMersenne61 ? sum - kMersenne61 : sum;
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) to[i] = x[i] * a + b;
  reduce(to, count, static_cast<uint64_t>(prime) * static_cast<uint64_t>(prime), prime);
}

inline uint64_t largest_of(const uint64_t* x, int64_t count) {
  uint64_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, x[i]);
  return largest;
}

// Calls f(j, rows without the base) for each map from the first on of at most kIdsPerBlock ids, all inside the limit. Overwrites x.
template <class F>
GOSSAMER_INLINE void map_block(const IdMaps& by, int64_t first_map, uint64_t* x, int64_t count, F&& f) {
  uint64_t value[kIdsPerBlock];
  uint64_t largest = largest_of(x, count);
  if (by.mixed) {
    for (int64_t i = 0; i < count; ++i) x[i] = mixed_id(x[i]);
    largest = ~uint64_t{0};
  }
  if (static_cast<uint64_t>(by.prime) == kMersenne61) {
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t sum = (x[i] & kMersenne61) + (x[i] >> 61);
      x[i] = sum >= kMersenne61 ? sum - kMersenne61 : sum;
    }
  } else if (by.prime > 0) {
    reduce(x, count, largest, by.prime);
  }
  if (by.prime > 0) largest = static_cast<uint64_t>(by.prime) - 1;
  for (int64_t j = first_map; j < by.count; ++j) {
    const IdMap& map = by.maps[j];
    uint64_t most = largest;
    if (by.prime > 0) {
      affine(x, value, count, map, by.prime);
    } else {
      std::copy_n(x, count, value);
    }
    if (map.divisor > 1) {
      divide(value, count, most, map.divisor);
      most /= static_cast<uint64_t>(map.divisor);
    }
    if (most >= static_cast<uint64_t>(map.modulus)) reduce(value, count, most, map.modulus);
    f(j, value);
  }
}

// The place of the first id outside the limit, or -1.
template <class Id, class Row>
int64_t map_range(const MapIdsArgs& a, int64_t begin, int64_t end) {
  uint64_t x[kIdsPerBlock];
  for (int64_t at = begin; at < end; at += kIdsPerBlock) {
    const int64_t count = std::min(kIdsPerBlock, end - at);
    const Id* ids = static_cast<const Id*>(a.ids) + at;
    for (int64_t i = 0; i < count; ++i) x[i] = static_cast<uint64_t>(static_cast<int64_t>(ids[i]));
    const auto limit = static_cast<uint64_t>(a.by.limit);
    if (limit > 0 && largest_of(x, count) >= limit) {
      return at + (std::find_if(x, x + count, [&](uint64_t id) { return id >= limit; }) - x);
    }
    map_block(a.by, 0, x, count, [&](int64_t j, const uint64_t* value) __attribute__((always_inline)) {
      Row* to = static_cast<Row*>(a.rows) + at * a.by.count + j;
      const int64_t base = a.by.maps[j].base;
      for (int64_t i = 0; i < count; ++i) to[i * a.by.count] = static_cast<Row>(static_cast<int64_t>(value[i]) + base);
    });
  }
  return -1;
}

int64_t map_ids(const MapIdsArgs& a, int64_t begin, int64_t end) {
  if (a.wide_ids) return a.wide_rows ? map_range<int64_t, int64_t>(a, begin, end) : map_range<int64_t, int32_t>(a, begin, end);
  return a.wide_rows ? map_range<int32_t, int64_t>(a, begin, end) : map_range<int32_t, int32_t>(a, begin, end);
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
