// Decoding quantised weights in one instruction set.
#pragma once

#include "cpu/dot_bytes.h"
#include "cpu/quantized_weight.h"
#include "cpu/tile_gemm.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

constexpr int kCodes = kLanes<float>;

// The next kCodes bytes, one per lane. Compilers split vectors that are not longer than one of their registers into scalars.
GOSSAMER_INLINE UInts unsigned_bytes(const uint8_t* from) {
#if GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
  return (UInts)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif GOSSAMER_F16C
  return (UInts)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  UInts v;
  for (int i = 0; i < kCodes; ++i) v[i] = from[i];
  return v;
#endif
}

GOSSAMER_INLINE SignedInts signed_bytes(const uint8_t* from) {
#if GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
  return (SignedInts)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif GOSSAMER_F16C
  return (SignedInts)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  return (SignedInts)(unsigned_bytes(from) << 24) >> 24;
#endif
}

// One matrix of a stack, or its transpose: the rows that a product computes, and the depth that it sums over.
struct QuantizedMatrix {
  const QuantizedWeights* weights;
  int64_t expert;
  bool transposed;

  int64_t depth() const { return transposed ? weights->rows : weights->columns; }
  // Of weights that are not in panels.
  const uint8_t* row(int64_t n) const { return weights->data + (expert * weights->rows + n) * weights->row_bytes(); }
  // The first word of row n of weights in panels; the next ones are kCodePanel words apart.
  const uint8_t* panel_row(int64_t n) const { return row(n / kCodePanel * kCodePanel) + n % kCodePanel * kWordBytes; }
  // The position of the scale of a row's first columns; the scales of later columns follow.
  int64_t scales(int64_t n) const {
    return (expert * weights->scale_rows + (n >> weights->row_shift)) * weights->scale_columns;
  }
  float scale(int64_t at) const {
    const QuantizedWeights& w = *weights;
    switch (w.scale_dtype) {
      case kE8M0: {
        const uint32_t exponent = static_cast<const uint8_t*>(w.scale)[at];
        return exponent == 255 ? bits_to_float(0x7fc00000u) : bits_to_float(exponent == 0 ? 0x00400000u : exponent << 23);
      }
      case kNestedScale:
        return nested(at, 1)[0];
      case static_cast<int>(DType::kFloat32):
        return static_cast<const float*>(w.scale)[at] * w.factor;
      case static_cast<int>(DType::kBFloat16):
        return to_scalar(static_cast<const BFloat16*>(w.scale)[at]);
      default:
        return to_scalar(static_cast<const Float16*>(w.scale)[at]);
    }
  }
  // Calls f(load) with a function that loads kLanes scales from a position on; not for double quantisation.
  template <class F>
  inline __attribute__((always_inline)) void with_scale_loader(F&& f) const {
    const void* scales = weights->scale;
    switch (weights->scale_dtype) {
      case kE8M0:
        return f([=](int64_t at) __attribute__((always_inline)) {
          const UInts exponent = unsigned_bytes(static_cast<const uint8_t*>(scales) + at);
          const UInts bits = exponent == 0u ? UInts{} + 0x00400000u : exponent << 23;
          return (Vec<float>)(exponent == 255u ? UInts{} + 0x7fc00000u : bits);
        });
      case static_cast<int>(DType::kFloat32):
        return f([=, factor = weights->factor](int64_t at)
                     __attribute__((always_inline)) { return load(static_cast<const float*>(scales) + at) * factor; });
      case static_cast<int>(DType::kBFloat16):
        return f([=](int64_t at) __attribute__((always_inline)) { return load(static_cast<const BFloat16*>(scales) + at); });
      default:
        return f([=](int64_t at) __attribute__((always_inline)) { return load(static_cast<const Float16*>(scales) + at); });
    }
  }

  // The next `count` scales, at most one per lane; zeros follow.
  __attribute__((noinline)) Vec<float> scale_run(int64_t at, int count) const {
    if (weights->scale_dtype == kNestedScale) return nested(at, count);
    alignas(64) float found[kLanes<float>] = {};
    if (count == kLanes<float>) {
      with_scale_loader([&](auto load_at) __attribute__((always_inline)) { store(found, load_at(at)); });
    } else {
      for (int i = 0; i < count; ++i) found[i] = scale(at + i);
    }
    return load(found);
  }

 private:
  // Scales that are stored as codes.
  Vec<float> nested(int64_t at, int count) const {
    const QuantizedWeights& w = *weights;
    const uint8_t* codes = static_cast<const uint8_t*>(w.scale) + at;
#if GOSSAMER_F16C
    if (count == kLanes<float> && (at + count - 1) >> w.nested_shift == at >> w.nested_shift) {
      const Vec<float> factor = splat(w.nested_scale[at >> w.nested_shift]);
#if GOSSAMER_VECTOR_BYTES == 64
      return fma((Vec<float>)_mm512_i32gather_ps((__m512i)unsigned_bytes(codes), w.nested_code, 4), factor, splat(w.offset));
#else
      return fma((Vec<float>)_mm256_i32gather_ps(w.nested_code, (__m256i)unsigned_bytes(codes), 4), factor, splat(w.offset));
#endif
    }
#endif
    alignas(64) float value[kLanes<float>] = {}, factor[kLanes<float>] = {};
    for (int i = 0; i < count; ++i) {
      value[i] = w.nested_code[codes[i]];
      factor[i] = w.nested_scale[(at + i) >> w.nested_shift];
    }
    return fma(load(value), load(factor), splat(w.offset));
  }
};

// The next kCodes four-bit codes, the lower half of a byte before the upper one, or after it.
template <bool kHighFirst>
GOSSAMER_INLINE UInts nibbles(const uint8_t* from) {
  constexpr int in_word = std::min(8, kCodes), words = kCodes / in_word;
  uint32_t word[words] = {};
  for (int i = 0; i < words; ++i) std::memcpy(&word[i], from + i * in_word / 2, in_word / 2);
  return [&]<size_t... I>(std::index_sequence<I...>) {
    const UInts first = UInts{} + word[0], last = UInts{} + word[words - 1];
    return (__builtin_shufflevector(first, last, (I / in_word * kCodes + I)...) >> UInts{((I % in_word ^ kHighFirst) * 4)...}) &
           15u;
  }(std::make_index_sequence<kCodes>{});
}

constexpr int kWordBits = 32;
template <WeightFormat Format>
constexpr int kCodeBits = Format == WeightFormat::kFp8 || Format == WeightFormat::kInt8 ? 8 : 4;
// Whether the upper half of a byte comes first.
template <WeightFormat Format>
constexpr bool kHighFirst = Format == WeightFormat::kNf4;

// The values of the codes of a four-bit format; empty for eight-bit formats, whose values are computed.
template <WeightFormat Format>
class Codebook {
 public:
  explicit Codebook(const QuantizedWeights& w) {
    if constexpr (kCodeBits<Format> == 4) {
      for (int code = 0; code < 16; ++code) values_[code] = value(w, code);
#if GOSSAMER_BF16_DOT
      for (int code = 0; code < 32; ++code) from_scalar(values_[code % 16], terms_[code]);
#endif
    }
  }

  // The values of the codes in the lowest four bits of the lanes; other bits are ignored.
  inline __attribute__((always_inline)) Vec<float> at(UInts codes) const {
#if GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
    return (Vec<float>)_mm512_permutexvar_ps((__m512i)codes, _mm512_load_ps(values_));
#elif GOSSAMER_F16C
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(values_), (__m256i)codes);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(values_ + 8), (__m256i)codes);
    return (Vec<float>)_mm256_blendv_ps(low, high, (__m256)(codes << 28));
#else
    Vec<float> v;
    for (int i = 0; i < kCodes; ++i) v[i] = values_[codes[i] & 15u];
    return v;
#endif
  }

#if GOSSAMER_BF16_DOT
  // The same for 16-bit lanes, rounded to bfloat16; only NF4's values need the rounding.
  inline __attribute__((always_inline)) UInts terms_at(Terms codes) const {
    return (UInts)_mm512_permutexvar_epi16((__m512i)codes, _mm512_load_si512(terms_));
  }
#endif

 private:
  static float value(const QuantizedWeights& w, int code) {
    constexpr float e2m1[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    if (Format == WeightFormat::kInt4) return static_cast<float>(code - 8);
    if (Format == WeightFormat::kMxfp4) return code < 8 ? e2m1[code] : -e2m1[code - 8];
    return w.code[code];
  }

  alignas(64) float values_[16];
#if GOSSAMER_BF16_DOT
  alignas(64) BFloat16 terms_[32];
#endif
};

constexpr uint32_t kSignBit = 0x80000000u;

// The e4m3 number in the highest eight bits; other bits are ignored. With kNormal, none is NaN, zero or subnormal.
template <bool kNormal = false>
GOSSAMER_INLINE Vec<float> e4m3_value(UInts high) {
  const UInts magnitude = (high >> 4) & (0x7fu << 20);
  UInts bits = magnitude + (120u << 23);
  if constexpr (!kNormal) {
    const Vec<float> small = __builtin_convertvector((SignedInts)magnitude, Vec<float>) * 0x1p-29f;
    bits = magnitude < (8u << 20) ? (UInts)small : bits;
    bits = magnitude == (0x7fu << 20) ? UInts{} + 0x7fc00000u : bits;
  }
  return (Vec<float>)(bits | (high & kSignBit));
}

// Whether all bytes are normal e4m3 numbers, as nearly all weights are.
GOSSAMER_INLINE bool all_normal_e4m3(UInts words) {
#if GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
  // Magnitudes of normal numbers are 8 to 0x7e.
  const __m512i above = _mm512_sub_epi8((__m512i)(words & 0x7f7f7f7fu), _mm512_set1_epi8(8));
  return _mm512_cmpgt_epu8_mask(above, _mm512_set1_epi8(0x76)) == 0;
#else
  // Sums reach a byte's highest bit where its exponent is not zero, and where it is NaN.
  const UInts normal = (words & 0x78787878u) + 0x78787878u, nan = (words & 0x7f7f7f7fu) + 0x01010101u;
  const UInts others = (~normal | nan) & 0x80808080u;
#if GOSSAMER_F16C
  return _mm256_testz_si256((__m256i)others, (__m256i)others);
#else
  uint32_t any = 0;
  for (int i = 0; i < kCodes; ++i) any |= others[i];
  return any == 0;
#endif
#endif
}

// The values of the next kCodes codes at `from`.
template <WeightFormat Format>
GOSSAMER_INLINE Vec<float> decode(const uint8_t* from, const Codebook<Format>& book) {
  if constexpr (Format == WeightFormat::kFp8) {
    return e4m3_value(unsigned_bytes(from) << 24);
  } else if constexpr (Format == WeightFormat::kInt8) {
    return __builtin_convertvector(signed_bytes(from), Vec<float>);
  } else {
    return book.at(nibbles<kHighFirst<Format>>(from));
  }
}

// The values of the codes at one place of the words in the lanes.
template <WeightFormat Format, int Place, bool kNormal>
GOSSAMER_INLINE Vec<float> decode_place(UInts words, const Codebook<Format>& book) {
  if constexpr (kCodeBits<Format> == 4) {
    return book.at(words >> (4 * (Place ^ kHighFirst<Format>)));
  } else {
    // The code in the highest bits: what is shifted back from there has its sign.
    const UInts high = words << (kWordBits - 8 - 8 * Place);
    if constexpr (Format == WeightFormat::kFp8) return e4m3_value<kNormal>(high);
    return __builtin_convertvector((SignedInts)high >> (kWordBits - 8), Vec<float>);
  }
}

#if GOSSAMER_BF16_DOT
// The e4m3 numbers in the upper bytes of 16-bit lanes, as bfloat16; the lower bytes are zero.
template <bool kNormal>
GOSSAMER_INLINE UInts e4m3_terms(UInts high) {
  // An arithmetic shift moves exponent and fraction to their places and keeps the sign.
  const __m512i code = (__m512i)high;
  __m512i bits = _mm512_and_si512(_mm512_srai_epi16(code, 4), _mm512_set1_epi16(static_cast<int16_t>(0x87f0)));
  bits = _mm512_add_epi16(bits, _mm512_set1_epi16(120 << 7));
  if constexpr (!kNormal) {
    alignas(64) static constexpr auto small = [] {
      // k/512 for the fractions k of subnormal numbers, at the indices that bits 8 to 12 of a lane give after a shift.
      std::array<uint16_t, 32> t{};
      constexpr uint16_t values[8] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
      for (int i = 0; i < 32; ++i) t[i] = values[i % 8];
      return t;
    }();
    const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7f00));
    const __mmask32 subnormal = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(0x0800));
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f00));
    bits = _mm512_mask_permutexvar_epi16(bits, subnormal, _mm512_srli_epi16(code, 8), _mm512_load_si512(small.data()));
    bits = _mm512_or_si512(bits, _mm512_and_si512(code, _mm512_set1_epi16(static_cast<int16_t>(0x8000))));
    bits = _mm512_mask_mov_epi16(bits, nan, _mm512_set1_epi16(0x7fc0));
  }
  return (UInts)bits;
}

// A word of each lane made of the bytes of its word that A to D name; kZeroByte is a zero.
constexpr int kZeroByte = -1;
template <int A, int B, int C, int D>
GOSSAMER_INLINE UInts choose_bytes(UInts words) {
  constexpr auto places = [](int lane) {
    uint32_t word = 0;
    for (const int byte : {D, C, B, A}) word = word << 8 | (byte == kZeroByte ? 0x80u : static_cast<uint32_t>(byte + 4 * lane));
    return static_cast<int>(word);
  };
  constexpr int first = places(0), second = places(1), third = places(2), last = places(3);
  return (UInts)_mm512_shuffle_epi8((__m512i)words, _mm512_broadcast_i32x4(_mm_setr_epi32(first, second, third, last)));
}

// Each 16-bit lane shifted right, the lower ones of words by Low bits and the upper ones by High.
template <int Low, int High>
GOSSAMER_INLINE Terms shift_halves(Terms v) {
  return (Terms)_mm512_srlv_epi16((__m512i)v, _mm512_set1_epi32(Low | High << 16));
}

// The values of one signed byte of the words in the lanes. A product of bytes is cheaper than the shifts that extend a sign, unless
// the multipliers are busy.
template <int Place, bool kBusy>
GOSSAMER_INLINE Vec<float> signed_byte(UInts words) {
  if constexpr (kBusy) return __builtin_convertvector((SignedInts)(words << (24 - 8 * Place)) >> 24, Vec<float>);
  const __m512i byte = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi32(1 << 8 * Place), (__m512i)words);
  return (Vec<float>)_mm512_cvtepi32_ps(byte);
}

// The codes of the words in the lanes as pairs of neighbours along the sum, in bfloat16, which holds all but NF4's exactly.
// kBusy says that sums of many tokens keep the multipliers busy.
template <WeightFormat Format>
constexpr int kPairsInWord = kWordBits / kCodeBits<Format> / 2;
template <WeightFormat Format, bool kNormal, bool kBusy>
GOSSAMER_INLINE void decode_pairs(UInts words, const Codebook<Format>& book, UInts (&pairs)[kPairsInWord<Format>]) {
  if constexpr (Format == WeightFormat::kFp8) {
    pairs[0] = e4m3_terms<kNormal>(choose_bytes<kZeroByte, 0, kZeroByte, 1>(words));
    pairs[1] = e4m3_terms<kNormal>(choose_bytes<kZeroByte, 2, kZeroByte, 3>(words));
  } else if constexpr (Format == WeightFormat::kInt8) {
    pairs[0] = (UInts)signed_byte<0, kBusy>(words) >> 16 | (UInts)signed_byte<1, kBusy>(words);
    pairs[1] = (UInts)signed_byte<2, kBusy>(words) >> 16 | (UInts)signed_byte<3, kBusy>(words);
  } else {
    // Each half of a word twice, so that a shift of each 16-bit lane brings its own code to the lowest bits.
    const Terms low = (Terms)choose_bytes<0, 1, 0, 1>(words), high = (Terms)choose_bytes<2, 3, 2, 3>(words);
    constexpr int first = kHighFirst<Format> ? 4 : 0;
    pairs[0] = book.terms_at(shift_halves<first, 4 - first>(low));
    pairs[1] = book.terms_at(shift_halves<8 + first, 12 - first>(low));
    pairs[2] = book.terms_at(shift_halves<first, 4 - first>(high));
    pairs[3] = book.terms_at(shift_halves<8 + first, 12 - first>(high));
  }
}

// The next 32 codes in bfloat16, in their order.
template <WeightFormat Format, bool kNormal = false>
GOSSAMER_INLINE void decode_terms(const uint8_t* from, const Codebook<Format>& book, BFloat16* to) {
  UInts out;
  if constexpr (Format == WeightFormat::kFp8 && kNormal) {
    // A byte's sign, extended, is the sign of the wider lane.
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m512i shifted = _mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), 4);
    const __m512i bits = _mm512_and_si512(shifted, _mm512_set1_epi16(static_cast<int16_t>(0x87f0)));
    out = (UInts)_mm512_add_epi16(bits, _mm512_set1_epi16(120 << 7));
  } else if constexpr (Format == WeightFormat::kFp8) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    out = e4m3_terms<false>((UInts)_mm512_slli_epi16(_mm512_cvtepu8_epi16(codes), 8));
  } else if constexpr (Format == WeightFormat::kInt8) {
    const Vec<float> low = decode<Format>(from, book), high = decode<Format>(from + kCodes, book);
    out = (UInts)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  } else {
    // A byte's two codes go to the lowest bits of the two halves of a word.
    const UInts bytes = unsigned_bytes(from);
    out = book.terms_at((Terms)(kHighFirst<Format> ? bytes >> 4 | bytes << 16 : bytes | bytes << 12));
  }
  std::memcpy(static_cast<void*>(to), &out, sizeof out);
}
#endif

// Calls f with a format as a constant.
template <class F>
GOSSAMER_INLINE void visit_format(WeightFormat format, F&& f) {
  switch (format) {
    case WeightFormat::kFp8:
      return f(std::integral_constant<WeightFormat, WeightFormat::kFp8>{});
    case WeightFormat::kInt8:
      return f(std::integral_constant<WeightFormat, WeightFormat::kInt8>{});
    case WeightFormat::kInt4:
      return f(std::integral_constant<WeightFormat, WeightFormat::kInt4>{});
    case WeightFormat::kMxfp4:
      return f(std::integral_constant<WeightFormat, WeightFormat::kMxfp4>{});
    case WeightFormat::kNf4:
      return f(std::integral_constant<WeightFormat, WeightFormat::kNf4>{});
  }
}

// Whether products use the codes themselves, which the type of their terms can hold, and scale the sums instead: this saves
// rounding scaled weights, and its time. Other products use scaled weights, as dequantised.
template <class P>
constexpr bool kScalesSums = GOSSAMER_BF16_DOT && std::is_same_v<P, BFloat16Pair> && !kTiled<P>;

template <class T>
GOSSAMER_INLINE void store_decoded(T* to, Vec<float> v, int count) {
  if constexpr (std::is_same_v<T, double>) {
    for (int i = 0; i < count; ++i) to[i] = v[i];
  } else {
    store_valid(to, v, count);
  }
}

// Rows of a tile of codes are at most this long.
constexpr int64_t kTileBytes = 256;

// Copies `bytes` bytes of rows n .. n+count, of one panel, from the byte `from` on, `stride` apart: multiples of a word, and `stride`
// of whole vectors.
__attribute__((noinline)) inline void copy_from_panel(const QuantizedMatrix& w, int64_t n, int64_t count, int64_t from,
                                                      int64_t bytes, uint8_t* to, int64_t stride) {
  constexpr int64_t lanes = kCodes, line = kCodePanel * kWordBytes;
  const uint8_t* words = w.row(n / kCodePanel * kCodePanel) + from * kCodePanel;
  const int64_t first = n % kCodePanel, rows = std::min(count, kCodePanel - first);
  for (int64_t group = first / lanes * lanes; group < first + rows; group += lanes) {
    for (int64_t at = 0; at < bytes; at += lanes * kWordBytes) {
      const int64_t valid = std::min(lanes, (bytes - at) / kWordBytes);
      Vec<float> v[lanes] = {};
      if (valid == lanes) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; ++i)
          v[i] = load_bytes<Vec<float>>(words + at * kCodePanel + i * line + group * kWordBytes);
      } else {
        for (int64_t i = 0; i < valid; ++i)
          v[i] = load_bytes<Vec<float>>(words + at * kCodePanel + i * line + group * kWordBytes);
      }
      transpose<float>(v);
      for (int64_t r = std::max(first, group); r < std::min(first + rows, group + lanes); ++r) {
        std::memcpy(to + (r - first) * stride + at, &v[r - group], sizeof v[0]);
      }
    }
  }
}

// Calls f(i, codes) with the bytes of row n+i from the byte `from` on, `bytes` of them, for `count` rows.
template <class F>
GOSSAMER_INLINE void each_row_of_tile(const QuantizedMatrix& w, int64_t n, int64_t count, int64_t from, int64_t bytes, F&& f) {
  alignas(64) uint8_t copied[kCodePanel * kTileBytes];
  const bool in_panels = w.weights->in_panels;
  for (int64_t i = 0, first = 0; i < count; ++i) {
    if (in_panels && (i == 0 || (n + i) % kCodePanel == 0)) {
      first = i;
      copy_from_panel(w, n + i, count - i, from, bytes, copied, kTileBytes);
    }
    f(i, in_panels ? copied + (i - first) * kTileBytes : w.row(n + i) + from);
  }
}

// Columns c .. c+count of row n, whose codes are at `from`, where c is a multiple of the columns of a scale: only the codes, or
// multiplied by their scales.
template <WeightFormat Format, bool kScaled, class T>
GOSSAMER_INLINE void decode_run(const QuantizedMatrix& w, const Codebook<Format>& book, int64_t n, int64_t c, int64_t count,
                                const uint8_t* from, T* out) {
  constexpr int64_t per_byte = 8 / kCodeBits<Format>;
  // The smallest group that shares a scale.
  constexpr int64_t together = 32;
  const int64_t scales = w.scales(n), last = c + count;
  const int shift = kScaled ? w.weights->column_shift : 62;
  while (c < last) {
    const int64_t end = std::min(last, ((c >> shift) + 1) << shift);
    [[maybe_unused]] const float scale = kScaled ? w.scale(scales + (c >> shift)) : 1.0f;
    const auto value = [&](const uint8_t* codes) __attribute__((always_inline)) {
      const Vec<float> v = decode<Format>(codes, book);
      return kScaled ? v * scale : v;
    };
    const auto advance = [&](int64_t by) {
      c += by;
      out += by;
      from += by / per_byte;
    };
#if GOSSAMER_BF16_DOT
    if constexpr (Format == WeightFormat::kFp8 && !kScaled && std::is_same_v<T, BFloat16>) {
      constexpr int64_t checked = sizeof(UInts);
      for (; c + checked <= end; advance(checked)) {
        if (all_normal_e4m3(load_bytes<UInts>(from))) {
          decode_terms<Format, true>(from, book, out);
          decode_terms<Format, true>(from + together, book, out + together);
        } else {
          decode_terms<Format>(from, book, out);
          decode_terms<Format>(from + together, book, out + together);
        }
      }
    }
#endif
    for (; c + together <= end; advance(together)) {
#if GOSSAMER_BF16_DOT
      if constexpr (!kScaled && std::is_same_v<T, BFloat16>) {
        decode_terms<Format>(from, book, out);
        continue;
      }
#endif
#pragma GCC unroll 8
      for (int64_t i = 0; i < together; i += kCodes) store_decoded(out + i, value(from + i / per_byte), kCodes);
    }
    for (; c + kCodes <= end; advance(kCodes)) store_decoded(out, value(from), kCodes);
    if (const int64_t rest = end - c; rest > 0) {
      uint8_t codes[kCodes] = {};
      std::memcpy(codes, from, (rest + per_byte - 1) / per_byte);
      store_decoded(out, value(codes), static_cast<int>(rest));
      advance(rest);
    }
  }
}

// Rows n .. n+count and columns c .. c+width of the stored matrix, rows `stride` apart in out.
template <bool kScaled, class T>
__attribute__((noinline)) void decode_tile(const QuantizedMatrix& w, int64_t n, int count, int64_t c, int width, T* out,
                                           int64_t stride) {
  visit_format(w.weights->format, [&](auto format) {
    const Codebook<format> book(*w.weights);
    constexpr int per_byte = 8 / kCodeBits<format>;
    each_row_of_tile(w, n, count, c / per_byte, (width + per_byte - 1) / per_byte,
                     [&](int64_t i, const uint8_t* codes) __attribute__((always_inline)) {
                       decode_run<format, kScaled>(w, book, n + i, c, width, codes, out + i * stride);
                     });
  });
}

// Lines for the first-level cache: decoding, unlike products, reads them in a short time.
struct NearLines : LinesAhead {
  __attribute__((always_inline)) void fetch() { fetch_into<3>(); }
};

// The lines of the tile of `count` stored rows and at most `width` columns that follows the one at row n and column c: along the
// columns, and then of the next rows.
inline NearLines tile_ahead(const QuantizedMatrix& w, int64_t n, int64_t count, int64_t c, int64_t width) {
  const QuantizedWeights& weights = *w.weights;
  const bool more = c + width < weights.columns;
  const int64_t row = more ? n : n + count, column = more ? c + width : 0, bytes = weights.row_bytes();
  const int64_t rows = std::min(count, weights.rows - row), columns = std::min(width, weights.columns - column);
  if (rows <= 0) return {};
  const int64_t first = column * bytes / weights.columns, last = (column + columns) * bytes / weights.columns;
  if (weights.in_panels) {
    const int64_t panel = row / kCodePanel * kCodePanel, panels = (row + rows - panel + kCodePanel - 1) / kCodePanel;
    return {LinesAhead::of(w.row(panel) + first * kCodePanel, (last - first) * kCodePanel, bytes * kCodePanel, panels)};
  }
  return {LinesAhead::of(w.row(row) + first, last - first, bytes, rows)};
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
