#include "bindings/arguments.h"
#include "bindings/register.h"
#include "cuda/dispatch.cuh"

namespace gossamer::bindings {

void register_dispatch_cuda(py::module_& m) {
  m.def("cuda_dispatch_scratch_size", &cuda::dispatch_scratch_size, "Elements of int32 scratch that cuda_dispatch needs.");
  m.def(
      "cuda_dispatch",
      [](uintptr_t expert_ids, bool int64_ids, int64_t num_rows, int64_t top_k, int64_t token_stride, int64_t slot_stride,
         int64_t num_experts, uintptr_t slots, uintptr_t rows, uintptr_t offsets, uintptr_t scratch, int device,
         uintptr_t stream) {
        const cuda::DispatchArgs args{pointer<const void>(expert_ids),
                                      int64_ids,
                                      num_rows,
                                      top_k,
                                      token_stride,
                                      slot_stride,
                                      num_experts,
                                      pointer<int32_t>(slots),
                                      pointer<int32_t>(rows),
                                      pointer<int32_t>(offsets),
                                      pointer<int32_t>(scratch)};
        raise_cuda("dispatch", cuda::dispatch(args, device, pointer<void>(stream)));
      },
      "Counting sort by expert on a stream of the device.");
}

}  // namespace gossamer::bindings
