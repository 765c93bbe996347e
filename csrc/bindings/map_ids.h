// Maps of ids to rows as Python passes them.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "cpu/map_ids.h"

namespace gossamer::bindings {

class MapList {
 public:
  MapList(const std::vector<std::array<int64_t, 5>>& numbers, int64_t prime, int64_t limit, bool mixed)
      : prime_(prime), limit_(limit), mixed_(mixed) {
    maps_.reserve(numbers.size());
    for (const auto& [modulus, divisor, base, multiplier, addend] : numbers) {
      maps_.push_back({modulus, divisor, base, multiplier, addend});
    }
  }

  // Valid as long as this list exists.
  IdMaps get() const { return {maps_.data(), static_cast<int64_t>(maps_.size()), prime_, limit_, mixed_}; }

 private:
  std::vector<IdMap> maps_;
  int64_t prime_, limit_;
  bool mixed_;
};

}  // namespace gossamer::bindings
