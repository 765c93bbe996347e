// Quantised expert weights of one instruction set: decoding runs of a row, and products with them.
#pragma once

#include "cpu/quantized_experts.h"
#include "cpu/tile_gemm.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// One expert's matrix, or its transpose: the rows that a product computes, and the depth that it sums over.
struct QuantizedMatrix {
  const QuantizedWeights* weights;
  int64_t expert;
  bool transposed;

  int64_t depth() const { return transposed ? weights->rows : weights->columns; }
  const uint8_t* row(int64_t n) const { return weights->data + (expert * weights->rows + n) * weights->row_bytes(); }
  // The place of the scale of a row's first columns; the next ones' follow it.
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
      case static_cast<int>(DType::kFloat32):
        return static_cast<const float*>(w.scale)[at];
      case static_cast<int>(DType::kBFloat16):
        return to_scalar(static_cast<const BFloat16*>(w.scale)[at]);
      default:
        return to_scalar(static_cast<const Float16*>(w.scale)[at]);
    }
  }
};

constexpr int kCodes = kLanes<float>;
typedef int32_t SignedInts __attribute__((vector_size(GOSSAMER_VECTOR_BYTES)));

// The next kCodes bytes, one a lane. Compilers make scalars of vectors that are no longer than a register of theirs.
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

// The next kCodes four-bit codes, the lower half of a byte before the upper one.
GOSSAMER_INLINE UInts nibbles(const uint8_t* from) {
  constexpr int in_word = std::min(8, kCodes), words = kCodes / in_word;
  uint32_t word[words] = {};
  for (int i = 0; i < words; ++i) std::memcpy(&word[i], from + i * in_word / 2, in_word / 2);
  return [&]<size_t... I>(std::index_sequence<I...>) {
    const UInts first = UInts{} + word[0], last = UInts{} + word[words - 1];
    return (__builtin_shufflevector(first, last, (I / in_word * kCodes + I)...) >> UInts{(I % in_word * 4)...}) & 15u;
  }(std::make_index_sequence<kCodes>{});
}

// The magnitude of the e2m1 number in the lowest bits, whatever the others are.
GOSSAMER_INLINE Vec<float> e2m1_magnitude(UInts code) {
  // Twice, for instructions that look at four bits.
  alignas(64) static constexpr float values[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, 0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
#if GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_permutexvar_ps((__m512i)code, _mm512_load_ps(values));
#elif GOSSAMER_F16C
  return (Vec<float>)_mm256_permutevar8x32_ps(_mm256_load_ps(values), (__m256i)code);
#else
  Vec<float> v;
  for (int i = 0; i < kCodes; ++i) v[i] = values[code[i] & 7u];
  return v;
#endif
}

constexpr uint32_t kSignBit = 0x80000000u;

// The e4m3 number in the highest eight bits, whatever the others are; kNormal says that none is NaN, zero or subnormal.
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
  // Sums reach a byte's highest bit where its exponent is not zero, and where it is NaN.
  const UInts normal = (words & 0x78787878u) + 0x78787878u, nan = (words & 0x7f7f7f7fu) + 0x01010101u;
  const UInts others = (~normal | nan) & 0x80808080u;
#if GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
  return _mm512_test_epi32_mask((__m512i)others, (__m512i)others) == 0;
#elif GOSSAMER_F16C
  return _mm256_testz_si256((__m256i)others, (__m256i)others);
#else
  uint32_t any = 0;
  for (int i = 0; i < kCodes; ++i) any |= others[i];
  return any == 0;
#endif
}

constexpr int kWordBits = 32;
template <WeightFormat Format>
constexpr int kCodeBits = Format == WeightFormat::kFp8 || Format == WeightFormat::kInt8 ? 8 : 4;

// The values of the next kCodes codes at `from`.
template <WeightFormat Format>
GOSSAMER_INLINE Vec<float> decode(const uint8_t* from) {
  if constexpr (Format == WeightFormat::kFp8) {
    return e4m3_value(unsigned_bytes(from) << 24);
  } else if constexpr (Format == WeightFormat::kInt8) {
    return __builtin_convertvector(signed_bytes(from), Vec<float>);
  } else if constexpr (Format == WeightFormat::kInt4) {
    return __builtin_convertvector((SignedInts)nibbles(from) - 8, Vec<float>);
  } else {
    const UInts code = nibbles(from);
    return (Vec<float>)((UInts)e2m1_magnitude(code) | ((code & 8u) << 28));
  }
}

// The values of the codes at one place of the words in the lanes.
template <WeightFormat Format, int Place, bool kNormal>
GOSSAMER_INLINE Vec<float> decode_place(UInts words) {
  constexpr int bits = kCodeBits<Format>;
  // The code in the highest bits: what is shifted back from there has its sign.
  const UInts high = words << (kWordBits - bits - bits * Place);
  if constexpr (Format == WeightFormat::kFp8) {
    return e4m3_value<kNormal>(high);
  } else if constexpr (Format == WeightFormat::kMxfp4) {
    return (Vec<float>)((UInts)e2m1_magnitude(words >> (bits * Place)) | (high & kSignBit));
  } else {
    // A number from 0 to 15 that stands for one from -8 to 7 is its two's complement with the highest bit flipped.
    const UInts signed_code = Format == WeightFormat::kInt4 ? high ^ kSignBit : high;
    return __builtin_convertvector((SignedInts)signed_code >> (kWordBits - bits), Vec<float>);
  }
}

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
  }
}

template <class T>
GOSSAMER_INLINE void store_decoded(T* to, Vec<float> v, int count) {
  if constexpr (std::is_same_v<T, double>) {
    for (int i = 0; i < count; ++i) to[i] = v[i];
  } else {
    store_valid(to, v, count);
  }
}

// Columns c .. c+count of row n; c is even.
template <WeightFormat Format, class T>
GOSSAMER_INLINE void decode_run(const QuantizedMatrix& w, int64_t n, int64_t c, int64_t count, T* out) {
  constexpr int64_t per_byte = 8 / kCodeBits<Format>;
  // The smallest group that shares a scale.
  constexpr int64_t together = 32;
  const int64_t scales = w.scales(n), last = c + count;
  const int shift = w.weights->column_shift;
  const uint8_t* from = w.row(n) + c / per_byte;
  while (c < last) {
    const int64_t end = std::min(last, ((c >> shift) + 1) << shift);
    const float scale = w.scale(scales + (c >> shift));
    const auto vector = [&](int64_t i) { store_decoded(out + i, decode<Format>(from + i / per_byte) * scale, kCodes); };
    const auto advance = [&](int64_t by) {
      c += by;
      out += by;
      from += by / per_byte;
    };
    for (; c + together <= end; advance(together)) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < together; i += kCodes) vector(i);
    }
    for (; c + kCodes <= end; advance(kCodes)) vector(0);
    if (const int64_t rest = end - c; rest > 0) {
      uint8_t codes[kCodes] = {};
      std::memcpy(codes, from, (rest + per_byte - 1) / per_byte);
      store_decoded(out, decode<Format>(codes) * scale, static_cast<int>(rest));
      advance(rest);
    }
  }
}

// Rows n .. n+count and columns c .. c+width of the stored matrix, rows `stride` apart in out.
template <class T>
__attribute__((noinline)) void decode_tile(const QuantizedMatrix& w, int64_t n, int count, int64_t c, int width, T* out,
                                           int64_t stride) {
  visit_format(w.weights->format, [&](auto format) {
    for (int i = 0; i < count; ++i) decode_run<format>(w, n + i, c, width, out + i * stride);
  });
}

// Fetches columns c .. c+width of the stored rows n .. n+count.
GOSSAMER_INLINE void prefetch_tile(const QuantizedMatrix& w, int64_t n, int64_t count, int64_t c, int64_t width) {
  const int64_t per_row = w.weights->row_bytes();
  const int64_t first = c * per_row / std::max<int64_t>(1, w.weights->columns);
  const int64_t last = (c + width) * per_row / std::max<int64_t>(1, w.weights->columns);
  for (int64_t i = n; i < std::min(n + count, w.weights->rows); ++i) {
    prefetch_lines<0, Fetch::kReadLater>(w.row(i) + first, last - first);
  }
}

// The scales at places + offset, one a lane.
GOSSAMER_INLINE Vec<float> load_scales(const QuantizedWeights& w, const int64_t (&places)[kLanes<float>], int64_t offset) {
  const auto gather = [&](auto tag) {
    using T = typename decltype(tag)::type;
    std::array<T, kLanes<float>> found;
    for (int i = 0; i < kLanes<float>; ++i) found[i] = static_cast<const T*>(w.scale)[places[i] + offset];
    return found;
  };
  switch (w.scale_dtype) {
    case kE8M0: {
      UInts exponent;
      const auto bytes = gather(TypeTag<uint8_t>{});
      for (int i = 0; i < kLanes<float>; ++i) exponent[i] = bytes[i];
      const UInts bits = exponent == 0u ? UInts{} + 0x00400000u : exponent << 23;
      return (Vec<float>)(exponent == 255u ? UInts{} + 0x7fc00000u : bits);
    }
    case static_cast<int>(DType::kFloat32):
      return load(gather(TypeTag<float>{}).data());
    case static_cast<int>(DType::kBFloat16):
      return load(gather(TypeTag<BFloat16>{}).data());
    default:
      return load(gather(TypeTag<Float16>{}).data());
  }
}

// Columns of codes that are brought into the lanes together: a word of each of kLanes rows, as many times.
template <WeightFormat Format>
constexpr int kCodeColumns = kLanes<float> * kWordBits / kCodeBits<Format>;

// Adds columns k .. last, kCodeColumns at a time, of kLanes rows to sum[token]: what accumulate_few() does with the decoded rows. The
// codes' words, and not the values, are transposed, so that each value is decoded in its lane.
template <WeightFormat Format, int Tokens>
GOSSAMER_INLINE void accumulate_codes(Vec<float> (&sum)[Tokens], const QuantizedMatrix& w, int64_t n, int64_t k, int64_t last,
                                      const Panel<float>& panel) {
  constexpr int lanes = kLanes<float>, in_word = kWordBits / kCodeBits<Format>;
  // Columns whose scale is the same, at least.
  constexpr int together = std::min(32, kCodeColumns<Format>);
  const int shift = w.weights->column_shift;
  const float* x = panel.data + k * lanes;
  int64_t places[lanes];
  for (int i = 0; i < lanes; ++i) places[i] = w.scales(n + i);
  Vec<float> scale{};
  int64_t group = -1;
  for (; k < last; k += kCodeColumns<Format>) {
    Vec<float> words[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) words[i] = (Vec<float>)load_bytes<UInts>(w.row(n + i) + k / in_word * (kWordBits / 8));
    transpose<float>(words);
    for (int column = 0; column < kCodeColumns<Format>; column += together) {
      if (const int64_t next = (k + column) >> shift; next != group) {
        scale = load_scales(*w.weights, places, next);
        group = next;
      }
      for (int i = column / in_word; i < (column + together) / in_word; ++i) {
        const UInts word = (UInts)words[i];
        const auto add = [&](Vec<float> weights) {
#pragma GCC unroll 8
          for (int t = 0; t < Tokens; ++t) sum[t] = fma(splat(x[t]), weights, sum[t]);
          x += lanes;
        };
        const auto add_places = [&]<int... Place>(auto normal, std::integer_sequence<int, Place...>) {
          (add(decode_place<Format, Place, normal>(word) * scale), ...);
        };
        constexpr auto all = std::make_integer_sequence<int, in_word>{};
        if (Format == WeightFormat::kFp8 && all_normal_e4m3(word)) {
          add_places(std::true_type{}, all);
        } else {
          add_places(std::false_type{}, all);
        }
      }
    }
  }
}

// accumulate_few() of decoded rows, from sums that are nothing yet; the same code for all formats.
template <int Tokens, class P>
__attribute__((noinline)) void accumulate_decoded(Vec<SumOf<P>> (&sum)[Tokens], const Weight<Term<P>>& rows,
                                                  const Panel<P>& panel) {
  accumulate_few<Tokens, false>(sum, rows, rows.base, static_cast<int>(rows.num_rows), 0, 0, rows.depth, panel);
}

template <WeightFormat Format, int Tokens, class P>
__attribute__((noinline)) void few_tokens_of(const QuantizedMatrix& w, int64_t n, int64_t count, const Panel<P>& panel,
                                             SumOf<P>* c, int64_t c_stride) {
  using T = Term<P>;
  constexpr int lanes = kLanes<P>, room = kDepth * kTerms<P>;
  alignas(64) T tile[lanes * room];
  few_tokens_product<Tokens, P>(count, w.depth(), c, c_stride, [&](auto& sum, int64_t i, int rows, int64_t k, int64_t last) {
    const int64_t depth = last - k;
    prefetch_tile(w, n + i + lanes, lanes, k, depth);
    if constexpr (std::is_same_v<P, float>) {
      if (rows == lanes && depth % kCodeColumns<Format> == 0) return accumulate_codes<Format>(sum, w, n + i, k, last, panel);
    }
    for (int row = 0; row < rows; ++row) decode_run<Format>(w, n + i + row, k, depth, tile + row * room);
    // Sums of their own: those of the other way stay in registers.
    Vec<SumOf<P>> own[Tokens] = {};
    accumulate_decoded<Tokens, P>(own, {tile, room, 1, rows, depth}, {panel.data + k / kTerms<P> * lanes, depth, panel.width});
    for (int t = 0; t < Tokens; ++t) sum[t] = own[t];
  });
}

// group_product() of tile_gemm.h: the same sums in the same order.
template <class P>
void group_product(const QuantizedMatrix& w, int64_t n, int64_t count, const Panel<P>& panel, SumOf<P>* c, int64_t c_stride,
                   P* pack) {
  using T = Term<P>;
  if constexpr (!kTiled<P>) {
    if (panel.width <= kFewTokens && !w.transposed) {
      return with_few_tokens(panel.width, [&](auto tokens) {
        visit_format(w.weights->format, [&](auto format) { few_tokens_of<format, tokens>(w, n, count, panel, c, c_stride); });
      });
    }
  }
  constexpr int room = kDepth * kTerms<P>;
  alignas(64) T tile[kGroup * room];
  const int segment = segment_of<P>(w.depth());
  for (int64_t i = 0; i < count; i += kGroup) {
    const int rows = static_cast<int>(std::min<int64_t>(kGroup, count - i));
    for (int64_t k = 0; k < w.depth(); k += room) {
      const int terms = static_cast<int>(std::min<int64_t>(room, w.depth() - k));
      const int depth = (terms + kTerms<P> - 1) / kTerms<P>;
      if (w.transposed) {
        decode_tile(w, k, terms, n + i, rows, tile, kGroup);
        const Weight<T> decoded{tile, 1, kGroup, rows, terms};
        if constexpr (kTiled<P>) {
          pack_transposed(decoded, 0, rows, 0, terms, pack);
        } else {
          pack_columns(decoded, 0, rows, 0, terms, pack);
        }
      } else {
        if constexpr (std::is_same_v<T, P>) {
          decode_tile(w, n + i, rows, k, terms, pack, kDepth);
          std::fill(pack + rows * kDepth, pack + (rows + 3) / 4 * 4 * kDepth, P{});
        } else {
          decode_tile(w, n + i, rows, k, terms, tile, room);
          pack_rows(Weight<T>{tile, room, 1, rows, terms}, 0, rows, 0, terms, pack);
        }
        prefetch_tile(w, n + i, rows, k + room, std::min<int64_t>(room, w.depth() - k - terms));
      }
      if constexpr (kTiled<P>) {
        tiled_product(pack, kDepth, rows, panel, k / kTerms<P>, depth, k == 0, c + i * c_stride, c_stride, {});
      } else {
        for (int64_t block = 0; block < panel.num_blocks(); ++block) {
          with_block(panel, block, [&](auto vectors, auto half) {
            const P* b = panel.block(block) + k / kTerms<P> * vectors * kLanes<P>;
            for_tiles<kTileRows<vectors>>(rows, [&](auto height, int64_t j) {
              SumOf<P>* to = c + (i + j) * c_stride + block * kPanelWidth<P>;
              if (w.transposed) {
                block_product<height, vectors, 1, kGroup, half>(pack + j, 0, b, depth, segment, k == 0, to, c_stride);
              } else {
                block_product<height, vectors, kDepth, 1, half>(pack + j * kDepth, 0, b, depth, segment, k == 0, to, c_stride);
              }
            });
          });
        }
      }
    }
  }
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
