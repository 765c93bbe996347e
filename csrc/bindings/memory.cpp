#include <new>

#include "bindings/arguments.h"
#include "bindings/register.h"
#include "cpu/core_distance.h"
#include "cpu/memory.h"
#include "cpu/page_pool.h"
#include "dlpack.h"

namespace gossamer::bindings {

namespace {

// A block of the page pool as a DLPack capsule of bytes; it returns to the pool when its last owner is gone.
py::capsule take_pages(int64_t bytes) {
  struct Owner {
    DLManagedTensor managed;
    int64_t shape, stride;
  };
  void* data = PagePool::instance().take(static_cast<size_t>(bytes));
  if (!data) throw std::bad_alloc();
  auto* owner = new Owner{};
  owner->shape = bytes;
  owner->stride = 1;
  owner->managed.tensor = {data, {1, 0}, 1, {1, 8, 1}, &owner->shape, &owner->stride, 0};
  owner->managed.context = owner;
  owner->managed.deleter = [](DLManagedTensor* self) {
    PagePool::instance().give_back(self->tensor.data);
    delete static_cast<Owner*>(self->context);
  };
  // Whoever imports the tensor renames the capsule and owns it from then on.
  return py::capsule(&owner->managed, "dltensor", [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    managed->deleter(managed);
  });
}

}  // namespace

void register_memory(py::module_& m) {
  m.def("core_distance", &core_distance, py::call_guard<py::gil_scoped_release>(),
        "Seconds that a cache line takes from a thread to its neighbour and back; the mean over a team's pairs.");
  m.def(
      "advise_huge_pages", [](uintptr_t data, size_t bytes) { advise_huge_pages(reinterpret_cast<void*>(data), bytes); },
      "Ask for huge pages under a fresh allocation.");
  m.def(
      "collapse_huge_pages", [](uintptr_t data, size_t bytes) { collapse_huge_pages(reinterpret_cast<void*>(data), bytes); },
      py::call_guard<py::gil_scoped_release>(), "Move memory that is in use to huge pages.");
  m.def("take_pages", &take_pages, "A reusable block of at least so many bytes, as a DLPack capsule.");
  m.def(
      "trim_pages", [] { return PagePool::instance().trim(); },
      "Return the blocks that are kept for reuse to the system; says how many bytes they were.");
}

}  // namespace gossamer::bindings
