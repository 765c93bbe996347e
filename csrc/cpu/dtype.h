// Element types as they cross the binding, and their scalar conversions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

namespace gossamer {

// Codes shared with python/gossamer/cpu_kernels/_native.py.
enum class DType : int {
  kFloat32 = 0,
  kFloat64 = 1,
  kBFloat16 = 2,
  kFloat16 = 3,
  kInt32 = 4,
  kInt64 = 5,
  kInt8 = 6,
  kInt16 = 7
};

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type in which a type is accumulated.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Two neighbouring terms of a product that one instruction multiplies and adds.
struct BFloat16Pair {
  BFloat16 terms[2];
};

// The packed type for products of a type: its accumulator's type, or pairs.
template <class T, bool Pairs>
using PackedAs = std::conditional_t<Pairs && std::is_same_v<T, BFloat16>, BFloat16Pair, Accumulator<T>>;

// The sum type of packed values, the type of their terms, and the number of terms in each.
template <class P>
using SumOf = std::conditional_t<std::is_same_v<P, BFloat16Pair>, float, P>;
template <class P>
using Term = std::conditional_t<std::is_same_v<P, BFloat16Pair>, BFloat16, P>;
template <class P>
constexpr int kTerms = std::is_same_v<P, BFloat16Pair> ? 2 : 1;
template <class P>
constexpr int64_t packed_depth(int64_t terms) {
  return (terms + kTerms<P> - 1) / kTerms<P>;
}

// Rows of the AMX tiles that multiply pairs, and number of packed values along their depth.
constexpr int kTileSide = 16;

// Packed values along a sum, zero-padded to whole tiles.
template <class P>
constexpr int64_t tile_depth(int64_t terms) {
  const int64_t depth = packed_depth<P>(terms);
  return kTerms<P> > 1 ? (depth + kTileSide - 1) / kTileSide * kTileSide : depth;
}

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline double to_scalar(double value) { return value; }
inline float to_scalar(float value) { return value; }
inline float to_scalar(BFloat16 value) { return bits_to_float(uint32_t{value.bits} << 16); }

inline float to_scalar(Float16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  // Scaling converts half's exponent bias to float's and normalises subnormals; exponents of infinity and NaN are restored
  // separately.
  const float scaled = bits_to_float(magnitude << 13) * bits_to_float(0x77800000u);
  return bits_to_float(sign | (magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : float_to_bits(scaled)));
}

inline void from_scalar(double value, double& out) { out = value; }
inline void from_scalar(double value, float& out) { out = static_cast<float>(value); }

inline void from_scalar(float value, BFloat16& out) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

inline void from_scalar(float value, Float16& out) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 2^16 or beyond
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}

// Bytes of one value of a dtype.
inline size_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    case DType::kBFloat16:
    case DType::kFloat16:
    case DType::kInt16:
      return 2;
    case DType::kInt8:
      return 1;
    default:
      return 4;
  }
}

template <class T>
struct TypeTag {
  using type = T;
};

// Calls f with a tag of the C++ type of a floating dtype.
template <class F>
decltype(auto) visit_float(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(TypeTag<float>{});
    case DType::kFloat64:
      return f(TypeTag<double>{});
    case DType::kBFloat16:
      return f(TypeTag<BFloat16>{});
    case DType::kFloat16:
      return f(TypeTag<Float16>{});
    default:
      throw std::invalid_argument("gossamer._C: not a floating dtype code");
  }
}

// Whether rows of a type are codes, which are multiplied by a scale.
template <class T>
constexpr bool kIsCode = std::is_integral_v<T>;

// Calls f with a tag of the C++ type of a table's dtype: floating, or codes.
template <class F>
decltype(auto) visit_table(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kInt8:
      return f(TypeTag<int8_t>{});
    case DType::kInt16:
      return f(TypeTag<int16_t>{});
    default:
      return visit_float(dtype, f);
  }
}

// An int32 or int64 array with a stride in elements; base may be null for an absent argument.
struct IndexArray {
  const void* base;
  int64_t stride;
  bool wide;

  explicit operator bool() const { return base != nullptr; }
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(base)[i * stride] : static_cast<const int32_t*>(base)[i * stride];
  }
};

// A floating array with two strides in elements; base may be null for an absent argument.
struct FloatMatrix {
  void* base;
  int64_t row_stride;
  int64_t col_stride;
  DType dtype;

  explicit operator bool() const { return base != nullptr; }
  double at(int64_t row, int64_t col) const {
    const int64_t i = row * row_stride + col * col_stride;
    return visit_float(
        dtype, [&](auto tag) -> double { return to_scalar(static_cast<const typename decltype(tag)::type*>(base)[i]); });
  }
};

}  // namespace gossamer
