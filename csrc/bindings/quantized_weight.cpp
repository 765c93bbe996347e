#include "cpu/quantized_weight.h"

#include "bindings/arguments.h"
#include "bindings/register.h"

namespace gossamer::bindings {

using namespace py::literals;

void register_quantized_weight(py::module_& m) {
  py::class_<NF4Args>(m, "NF4Weight", "A weight in NF4, its scales in 8 bits where nested_index is not 0.")
      .def(py::init([](uintptr_t packed, uintptr_t code, uintptr_t scales, uintptr_t nested_index, uintptr_t nested_code,
                       uintptr_t offset, int64_t count, int64_t block_size, int64_t nested_block_size) {
             return NF4Args{.packed = pointer<const uint8_t>(packed),
                            .code = pointer<const float>(code),
                            .scales = pointer<const float>(scales),
                            .nested_index = pointer<const uint8_t>(nested_index),
                            .nested_code = pointer<const float>(nested_code),
                            .offset = offset ? *pointer<const float>(offset) : 0.0f,
                            .count = count,
                            .block_size = block_size,
                            .nested_block_size = nested_block_size};
           }),
           py::kw_only(), "packed"_a, "code"_a, "scales"_a, "nested_index"_a, "nested_code"_a, "offset"_a, "count"_a,
           "block_size"_a, "nested_block_size"_a);
  py::class_<ByteWeightArgs>(m, "ByteWeight", "A weight in int8 or fp8 with a scale a row, or one for all.")
      .def(py::init([](uintptr_t values, const std::string& format, const std::pair<int64_t, int64_t>& sizes,
                       const std::pair<int64_t, int64_t>& strides, uintptr_t scales, int64_t scale_stride) {
             const bool fp8 = format == "fp8";
             if (!fp8 && format != "int8_absmax") throw py::value_error("format must be int8_absmax or fp8, got " + format);
             return ByteWeightArgs{.values = pointer<const uint8_t>(values),
                                   .rows = sizes.first,
                                   .columns = sizes.second,
                                   .row_stride = strides.first,
                                   .col_stride = strides.second,
                                   .scales = pointer<const float>(scales),
                                   .scale_stride = scale_stride,
                                   .factor = fp8 ? 1.0f : static_cast<float>(1.0 / 127.0),
                                   .fp8 = fp8};
           }),
           py::kw_only(), "values"_a, "format"_a, "sizes"_a, "strides"_a, "scales"_a, "scale_stride"_a);
  m.def(
      "dequantize_nf4",
      [](const NF4Args& args, uintptr_t out, int dtype, int num_threads) {
        py::gil_scoped_release release;
        dequantize_nf4(args, pointer<void>(out), static_cast<DType>(dtype), num_threads);
      },
      "The values of an NF4 weight in a floating dtype.");
  m.def(
      "dequantize_bytes",
      [](const ByteWeightArgs& args, uintptr_t out, int dtype, int num_threads) {
        py::gil_scoped_release release;
        dequantize_bytes(args, pointer<void>(out), static_cast<DType>(dtype), num_threads);
      },
      "The values of an int8 or fp8 weight in a floating dtype.");
}

}  // namespace gossamer::bindings
