#include <array>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/register.h"
#include "cpu/map_ids.h"

namespace gossamer::bindings {

void register_map_ids(py::module_& m) {
  m.def(
      "map_ids",
      [](uintptr_t ids, bool wide_ids, int64_t count, const std::vector<std::array<int64_t, 5>>& numbers, int64_t prime,
         int64_t limit, bool mixed, uintptr_t rows, bool wide_rows, int num_threads) {
        std::vector<IdMap> maps;
        maps.reserve(numbers.size());
        for (const auto& [modulus, divisor, base, multiplier, addend] : numbers) {
          maps.push_back({modulus, divisor, base, multiplier, addend});
        }
        const MapIdsArgs args{
            pointer<const void>(ids), wide_ids, count, maps.data(), static_cast<int64_t>(maps.size()), prime, limit, mixed,
            pointer<void>(rows),      wide_rows};
        py::gil_scoped_release release;
        return map_ids(args, num_threads);
      },
      "The rows of ids by each of several maps, and the place of an id outside the limit, or -1.");
}

}  // namespace gossamer::bindings
