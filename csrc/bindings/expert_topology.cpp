#include "bindings/arguments.h"
#include "bindings/register.h"
#include "cpu/expert_topology.h"

namespace gossamer::bindings {

void register_expert_topology(py::module_& m) {
  const auto ints = [](uintptr_t address) { return reinterpret_cast<int32_t*>(address); };
  m.def(
      "expert_topology",
      [ints](uintptr_t offsets, int64_t experts, int64_t rows, int64_t wide, int64_t bm, const std::array<uintptr_t, 11>& to,
             int num_threads) {
        const ExpertTopologyArgs args{ints(offsets), experts,     rows,        wide,        bm,          ints(to[0]),
                                      ints(to[1]),   ints(to[2]), ints(to[3]), ints(to[4]), ints(to[5]), ints(to[6]),
                                      ints(to[7]),   ints(to[8]), ints(to[9]), ints(to[10])};
        py::gil_scoped_release release;
        return expert_topology(args, num_threads);
      },
      "The lists of blocks of an expert layer's hidden activation; False where offsets are none, or need more block rows.");
  m.def(
      "expert_places",
      [ints](uintptr_t offsets, uintptr_t padded_offsets, uintptr_t slots, int64_t experts, int64_t num_slots,
             int64_t padded_rows, uintptr_t slots_of_rows, uintptr_t rows_of_slots, int num_threads) {
        const ExpertPlacesArgs args{ints(offsets), ints(padded_offsets), ints(slots),         experts,
                                    num_slots,     padded_rows,          ints(slots_of_rows), ints(rows_of_slots)};
        py::gil_scoped_release release;
        return expert_places(args, num_threads);
      },
      "Which slot lies in each padded row, and in which padded row each slot lies; -1, or the expert whose rows do not fit, or "
      "-2 for slots that are none.");
}

}  // namespace gossamer::bindings
