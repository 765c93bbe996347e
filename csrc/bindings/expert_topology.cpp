#include "bindings/arguments.h"
#include "bindings/register.h"
#include "cpu/expert_topology.h"

namespace gossamer::bindings {

void register_expert_topology(py::module_& m) {
  m.def(
      "expert_topology",
      [](uintptr_t offsets, int64_t experts, int64_t rows, int64_t wide, int64_t bm, const std::array<uintptr_t, 11>& to,
         int num_threads) {
        const auto out = [&](int i) { return pointer<int32_t>(to[i]); };
        const ExpertTopologyArgs args{pointer<const int32_t>(offsets),
                                      experts,
                                      rows,
                                      wide,
                                      bm,
                                      out(0),
                                      out(1),
                                      out(2),
                                      out(3),
                                      out(4),
                                      out(5),
                                      out(6),
                                      out(7),
                                      out(8),
                                      out(9),
                                      out(10)};
        py::gil_scoped_release release;
        return expert_topology(args, num_threads);
      },
      "The lists of blocks of an expert layer's hidden activation; False where offsets are none, or need more block rows.");
  m.def(
      "expert_places",
      [](uintptr_t offsets, uintptr_t padded_offsets, uintptr_t slots, int64_t experts, int64_t num_slots, int64_t padded_rows,
         uintptr_t slots_of_rows, uintptr_t rows_of_slots, int num_threads) {
        const ExpertPlacesArgs args{pointer<const int32_t>(offsets),
                                    pointer<const int32_t>(padded_offsets),
                                    pointer<const int32_t>(slots),
                                    experts,
                                    num_slots,
                                    padded_rows,
                                    pointer<int32_t>(slots_of_rows),
                                    pointer<int32_t>(rows_of_slots)};
        py::gil_scoped_release release;
        return expert_places(args, num_threads);
      },
      "Which slot lies in each padded row, and in which padded row each slot lies; -1, or the expert whose rows do not fit, or "
      "-2 for slots that are none.");
}

}  // namespace gossamer::bindings
