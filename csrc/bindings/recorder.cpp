#include "cpu/recorder.h"

#include <pybind11/stl.h>

#include "bindings/register.h"

namespace gossamer::bindings {

namespace py = pybind11;

void register_recorder(py::module_& m) {
  m.def("start_recording", &start_recording, "Record the time of kernels' stages and the memory that they take, from now on.");
  m.def(
      "stop_recording",
      [] {
        const auto [times, memory] = stop_recording();
        py::list stages, events;
        for (const StageTime& t : times) stages.append(py::make_tuple(t.kernel, t.stage, t.nanoseconds, t.pieces));
        for (const MemoryEvent& e : memory) events.append(py::make_tuple(e.nanoseconds, e.bytes));
        return py::make_tuple(stages, events);
      },
      "End recording: [(kernel, stage, nanoseconds, pieces)], and [(nanoseconds by the steady clock, bytes)].");
}

}  // namespace gossamer::bindings
