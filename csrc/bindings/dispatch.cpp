#include "bindings/arguments.h"
#include "bindings/register.h"
#include "cpu/dispatch.h"

namespace gossamer::bindings {

void register_dispatch(py::module_& m) {
  m.def(
      "dispatch",
      [](uintptr_t expert_ids, int dtype, int64_t num_tokens, int64_t top_k, int64_t token_stride, int64_t slot_stride,
         int64_t num_experts, uintptr_t slots, uintptr_t rows, uintptr_t offsets, int num_threads) {
        const DispatchArgs args{reinterpret_cast<const void*>(expert_ids),
                                static_cast<DType>(dtype) == DType::kInt64,
                                num_tokens,
                                top_k,
                                token_stride,
                                slot_stride,
                                num_experts,
                                reinterpret_cast<int32_t*>(slots),
                                reinterpret_cast<int32_t*>(rows),
                                reinterpret_cast<int32_t*>(offsets)};
        py::gil_scoped_release release;
        return dispatch(args, num_threads);
      },
      "Counting sort by expert; returns -1, or the first flat slot whose id is negative.");
}

}  // namespace gossamer::bindings
