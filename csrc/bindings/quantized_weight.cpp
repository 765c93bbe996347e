#include "cpu/quantized_weight.h"

#include "bindings/arguments.h"
#include "bindings/register.h"

namespace gossamer::bindings {

void register_quantized_weight(py::module_& m) {
  m.def(
      "dequantize_nf4",
      [](uintptr_t packed, uintptr_t code, uintptr_t scales, uintptr_t nested_index, uintptr_t nested_code, uintptr_t offset,
         int64_t count, int64_t block_size, int64_t nested_block_size, uintptr_t out, int dtype, int num_threads) {
        const auto* shift = reinterpret_cast<const float*>(offset);
        const NF4Args args{reinterpret_cast<const uint8_t*>(packed),
                           reinterpret_cast<const float*>(code),
                           reinterpret_cast<const float*>(scales),
                           reinterpret_cast<const uint8_t*>(nested_index),
                           reinterpret_cast<const float*>(nested_code),
                           shift ? *shift : 0.0f,
                           count,
                           block_size,
                           nested_block_size};
        py::gil_scoped_release release;
        dequantize_nf4(args, reinterpret_cast<void*>(out), static_cast<DType>(dtype), num_threads);
      },
      "The values of an NF4 weight in a floating dtype.");
  m.def(
      "dequantize_bytes",
      [](uintptr_t values, int64_t rows, int64_t columns, int64_t row_stride, int64_t col_stride, uintptr_t scales,
         int64_t scale_stride, float factor, bool fp8, uintptr_t out, int dtype, int num_threads) {
        const ByteWeightArgs args{reinterpret_cast<const uint8_t*>(values), rows, columns, row_stride, col_stride,
                                  reinterpret_cast<const float*>(scales), scale_stride, factor, fp8};
        py::gil_scoped_release release;
        dequantize_bytes(args, reinterpret_cast<void*>(out), static_cast<DType>(dtype), num_threads);
      },
      "The values of an int8 or fp8 weight in a floating dtype.");
}

}  // namespace gossamer::bindings
