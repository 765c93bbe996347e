#include <stdexcept>
#include <string>

#include "bindings/arguments.h"
#include "bindings/register.h"
#include "cuda/dispatch.cuh"

namespace gossamer::bindings {

void register_dispatch_cuda(py::module_& m) {
  m.def("cuda_dispatch_scratch_size", &cuda::dispatch_scratch_size,
        "Elements of int32 scratch that cuda_dispatch needs.");
  m.def(
      "cuda_dispatch",
      [](uintptr_t expert_ids, bool int64_ids, int64_t num_rows, int64_t top_k, int64_t token_stride,
         int64_t slot_stride, int64_t num_experts, uintptr_t slots, uintptr_t rows, uintptr_t offsets,
         uintptr_t scratch, int device, uintptr_t stream) {
        const cuda::DispatchArgs args{reinterpret_cast<const void*>(expert_ids),
                                                int64_ids,
                                                num_rows,
                                                top_k,
                                                token_stride,
                                                slot_stride,
                                                num_experts,
                                                reinterpret_cast<int32_t*>(slots),
                                                reinterpret_cast<int32_t*>(rows),
                                                reinterpret_cast<int32_t*>(offsets),
                                                reinterpret_cast<int32_t*>(scratch)};
        const char* error = cuda::dispatch(args, device, reinterpret_cast<void*>(stream));
        if (error != nullptr) throw std::runtime_error(std::string("gossamer dispatch: CUDA error: ") + error);
      },
      "Counting sort by expert on a stream of the device.");
}

}  // namespace gossamer::bindings
