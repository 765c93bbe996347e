#include "bindings/arguments.h"
#include "bindings/register.h"
#include "cpu/dispatch.h"
#ifdef GOSSAMER_WITH_CUDA
#include <stdexcept>
#include <string>

#include "cuda/dispatch.cuh"
#endif

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
#ifdef GOSSAMER_WITH_CUDA
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
#endif
}

}  // namespace gossamer::bindings
