#include "cpu/quantized_weight.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "cpu/parallel.h"

namespace gossamer {
namespace {

constexpr int64_t kGrain = 65536;

float decode_fp8(int bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  float value = exponent ? std::ldexp(1.0f + fraction / 8.0f, exponent - 7) : std::ldexp(fraction / 8.0f, -6);
  if ((bits & 127) == 127) value = std::nanf("");
  return bits & 128 ? -value : value;
}

}  // namespace

void dequantize_nf4(const NF4Args& a, void* out, DType dtype, int num_threads) {
  visit_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* to = static_cast<T*>(out);
    const int64_t blocks = (a.count + a.block_size - 1) / a.block_size;
    parallel_ranges(blocks, kGrain / a.block_size, num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const float scale = a.nested_index
                                ? a.nested_code[a.nested_index[block]] * a.scales[block / a.nested_block_size] + a.offset
                                : a.scales[block];
        T values[16];
        for (int q = 0; q < 16; ++q) from_scalar(a.code[q] * scale, values[q]);
        const int64_t last = std::min(a.count, (block + 1) * a.block_size);
        int64_t i = block * a.block_size;
        if (i % 2 == 0) {
          for (; i + 1 < last; i += 2) {
            const uint8_t byte = a.packed[i / 2];
            to[i] = values[byte >> 4];
            to[i + 1] = values[byte & 15];
          }
        }
        for (; i < last; ++i) to[i] = values[i % 2 ? a.packed[i / 2] & 15 : a.packed[i / 2] >> 4];
      }
    });
  });
}

void dequantize_bytes(const ByteWeightArgs& a, void* out, DType dtype, int num_threads) {
  std::array<float, 256> code;
  for (int bits = 0; bits < 256; ++bits) code[bits] = a.fp8 ? decode_fp8(bits) : static_cast<float>(static_cast<int8_t>(bits));
  visit_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* to = static_cast<T*>(out);
    parallel_ranges(a.rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, a.columns)), num_threads,
                    [&](int64_t begin, int64_t end) {
                      for (int64_t i = begin; i < end; ++i) {
                        const float scale = a.scales[i * a.scale_stride] * a.factor;
                        const uint8_t* row = a.values + i * a.row_stride;
                        for (int64_t j = 0; j < a.columns; ++j) {
                          from_scalar(code[row[j * a.col_stride]] * scale, to[i * a.columns + j]);
                        }
                      }
                    });
  });
}

}  // namespace gossamer
