#include "bindings/map_ids.h"

#include "bindings/arguments.h"
#include "bindings/register.h"
#include "cpu/map_ids.h"

namespace gossamer::bindings {

void register_map_ids(py::module_& m) {
  py::class_<MapList>(m, "IdMaps", "Maps of ids to rows.")
      .def(py::init<const std::vector<std::array<int64_t, 5>>&, int64_t, int64_t, bool>());
  m.def(
      "map_ids",
      [](uintptr_t ids, bool wide_ids, int64_t count, const MapList& maps, uintptr_t rows, bool wide_rows, int num_threads) {
        const MapIdsArgs args{pointer<const void>(ids), wide_ids, count, maps.get(), pointer<void>(rows), wide_rows};
        py::gil_scoped_release release;
        return map_ids(args, num_threads);
      },
      "The rows of ids by each of several maps, and the place of an id outside the limit, or -1.");
}

}  // namespace gossamer::bindings
