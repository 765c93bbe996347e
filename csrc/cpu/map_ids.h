// Ids to rows by integer arithmetic.
#pragma once

#include <cstdint>

namespace gossamer {

// h(x) = base + ((multiplier·x + addend) mod prime) div divisor mod modulus.
struct IdMap {
  int64_t modulus, divisor, base, multiplier, addend;
};

struct IdMaps {
  const IdMap* maps;
  int64_t count;
  int64_t prime;  // 0 for none, below 2³¹, or 2⁶¹−1
  int64_t limit;  // 0 for none; ids outside [0, limit) are errors
  bool mixed;     // whether ids are mixed first
};

struct MapIdsArgs {
  const void* ids;  // (count), int32 or int64, contiguous
  bool wide_ids;
  int64_t count;
  IdMaps by;
  void* rows;  // (count, maps), int32 or int64, contiguous
  bool wide_rows;
};

// The position of an id outside the limit, or -1 if all ids are inside.
int64_t map_ids(const MapIdsArgs& args, int num_threads);

}  // namespace gossamer
