// Ids to rows, for one instruction set.
//
// A block of ids passes through each step in turn, in loops that the compiler turns into vectors. Quotients are computed by
// multiplying with a reciprocal in double precision if they are small enough that the result is off by at most one.
#pragma once

#include "cpu/isa_begin.h"
#include "cpu/map_ids.h"
#include "cpu/vec.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

constexpr int64_t kIdsPerBlock = 256;
constexpr uint64_t kMersenne31 = (uint64_t{1} << 31) - 1, kMersenne61 = (uint64_t{1} << 61) - 1;
// Quotients below this are off by at most one.
constexpr double kLargestQuotient = 0x1p50;

// Mix13, a bijection of 64-bit numbers.
inline uint64_t mixed_id(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// A divisor and the constants with which its quotients are computed.
struct Divisor {
  int64_t value;
  double reciprocal;

  explicit Divisor(int64_t value) : value(value), reciprocal(1.0 / static_cast<double>(value)) {}

  // Whether near() is exact for numbers up to `largest`. After adding a half, the real quotient is at least 1/(2·divisor) away
  // from the nearest integers, and two roundings move it by less.
  static bool is_exact(uint64_t largest) { return largest < uint64_t{1} << 50; }

  // Whether near() is off by at most one for numbers up to `largest`.
  bool takes(uint64_t largest) const {
    return largest < uint64_t{1} << 63 && static_cast<double>(largest) * reciprocal < kLargestQuotient;
  }

  int64_t near(int64_t x) const { return static_cast<int64_t>((static_cast<double>(x) + 0.5) * reciprocal); }

  int64_t quotient(int64_t x) const {
    const int64_t found = near(x), rest = x - found * value;
    return found - (rest < 0) + (rest >= value);
  }

  int64_t remainder(int64_t x) const {
    int64_t rest = x - near(x) * value;
    rest += rest < 0 ? value : 0;
    return rest - (rest >= value ? value : 0);
  }
};

// Remainders of numbers up to `largest`.
inline void reduce(const uint64_t* x, uint64_t* to, int64_t count, uint64_t largest, int64_t modulus) {
  const Divisor by(modulus);
  if (Divisor::is_exact(largest)) {
    for (int64_t i = 0; i < count; ++i) to[i] = x[i] - static_cast<uint64_t>(by.near(static_cast<int64_t>(x[i])) * modulus);
  } else if (by.takes(largest)) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint64_t>(by.remainder(static_cast<int64_t>(x[i])));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = x[i] % static_cast<uint64_t>(modulus);
  }
}

// Quotients.
inline void divide(const uint64_t* x, uint64_t* to, int64_t count, uint64_t largest, int64_t divisor) {
  const Divisor by(divisor);
  if (Divisor::is_exact(largest)) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint64_t>(by.near(static_cast<int64_t>(x[i])));
  } else if (by.takes(largest)) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint64_t>(by.quotient(static_cast<int64_t>(x[i])));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = x[i] / static_cast<uint64_t>(divisor);
  }
}

// Both, for numbers with exact quotients.
inline void split(const uint64_t* x, uint64_t* remainders, uint64_t* quotients, int64_t count, int64_t divisor) {
  const Divisor by(divisor);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t quotient = by.near(static_cast<int64_t>(x[i]));
    quotients[i] = static_cast<uint64_t>(quotient);
    remainders[i] = x[i] - static_cast<uint64_t>(quotient * divisor);
  }
}

// Numbers modulo 2^31−1 or 2^61−1 by adding up their digits in that base and one.
template <int kBits>
inline void reduce_mersenne(uint64_t* x, int64_t count) {
  constexpr uint64_t prime = (uint64_t{1} << kBits) - 1;
  for (int64_t i = 0; i < count; ++i) {
    uint64_t sum = (x[i] & prime) + (x[i] >> kBits);
    if constexpr (kBits < 32) sum = (sum & prime) + (sum >> kBits), sum = (sum & prime) + (sum >> kBits);
    x[i] = sum >= prime ? sum - prime : sum;
  }
}

// Numbers up to `largest` modulo a prime.
inline void reduce_prime(uint64_t* x, int64_t count, uint64_t largest, int64_t prime) {
  if (static_cast<uint64_t>(prime) == kMersenne61) return reduce_mersenne<61>(x, count);
  if (static_cast<uint64_t>(prime) == kMersenne31) return reduce_mersenne<31>(x, count);
  uint64_t from[kIdsPerBlock];
  std::copy_n(x, count, from);
  reduce(from, x, count, largest, prime);
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
  reduce_prime(to, count, static_cast<uint64_t>(prime) * static_cast<uint64_t>(prime), prime);
}

inline uint64_t largest_of(const uint64_t* x, int64_t count) {
  uint64_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, x[i]);
  return largest;
}

// Calls f(j, rows without the base) for each map from the first on of at most kIdsPerBlock ids, all inside the limit. Overwrites x.
template <class F>
GOSSAMER_INLINE void map_block(const IdMaps& by, int64_t first_map, uint64_t* x, int64_t count, F&& f) {
  // Each step reads one of these and writes another, so that its loop can be vectorised.
  uint64_t value[kIdsPerBlock], quotients[kIdsPerBlock], rest[2][kIdsPerBlock];
  uint64_t largest = largest_of(x, count);
  if (by.mixed) {
    for (int64_t i = 0; i < count; ++i) x[i] = mixed_id(x[i]);
    largest = ~uint64_t{0};
  }
  if (by.prime > 0) {
    reduce_prime(x, count, largest, by.prime);
    largest = static_cast<uint64_t>(by.prime) - 1;
  }
  bool carried =
      false;  // whether rest[j % 2] holds the quotients by divisor and modulus of the map before, the divisor of this one
  uint64_t most_carried = 0;
  for (int64_t j = first_map; j < by.count; ++j) {
    const IdMap& map = by.maps[j];
    const uint64_t* from = x;
    uint64_t most = largest;
    if (by.prime > 0) {
      affine(x, value, count, map, by.prime);
      from = value;
    }
    if (carried) {
      from = rest[j % 2];
      most = most_carried;
    } else if (map.divisor > 1) {
      divide(from, quotients, count, most, map.divisor);
      from = quotients;
      most /= static_cast<uint64_t>(map.divisor);
    }
    carried = false;
    if (most >= static_cast<uint64_t>(map.modulus)) {
      const bool continued =
          by.prime == 0 && j + 1 < by.count && static_cast<__int128>(map.divisor) * map.modulus == by.maps[j + 1].divisor;
      uint64_t* to = from == value ? quotients : value;
      if (continued && Divisor::is_exact(most)) {
        split(from, to, rest[(j + 1) % 2], count, map.modulus);
        carried = true;
        most_carried = most / static_cast<uint64_t>(map.modulus);
      } else {
        reduce(from, to, count, most, map.modulus);
      }
      from = to;
    }
    f(j, from);
  }
}

// The position of the first id outside the limit, or -1.
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
