// Quantised expert weights of one instruction set: decoding runs of a row, and products with them; see isa_kernels.h.

// One expert's matrix, or its transpose: the rows that a product computes, and the depth that it sums over.
struct QuantizedMatrix {
  const QuantizedWeights* weights;
  int64_t expert;
  bool transposed;

  int64_t depth() const { return transposed ? weights->rows : weights->columns; }
  const uint8_t* row(int64_t n) const {
    return weights->data + (expert * weights->rows + n) * weights->row_bytes();
  }
  float scale(int64_t n, int64_t c) const {
    const QuantizedWeights& w = *weights;
    const int64_t at = (expert * w.scale_rows + (n >> w.row_shift)) * w.scale_columns + (c >> w.column_shift);
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
typedef uint8_t CodeBytes __attribute__((vector_size(kCodes)));
typedef int8_t SignedBytes __attribute__((vector_size(kCodes)));
typedef int32_t SignedInts __attribute__((vector_size(GOSSAMER_VECTOR_BYTES)));

alignas(64) constexpr float kInt4Values[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
alignas(64) constexpr float kE2M1Values[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                               -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

template <size_t... I>
GOSSAMER_INLINE UInts spread_nibbles(CodeBytes bytes, std::index_sequence<I...>) {
  const UInts pairs = __builtin_convertvector(__builtin_shufflevector(bytes, bytes, (I / 2)...), UInts);
  return (pairs >> UInts{(I % 2 * 4)...}) & 15u;
}

GOSSAMER_INLINE Vec<float> look_up(const float* table, UInts code) {
#if GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_permutexvar_ps((__m512i)code, _mm512_load_ps(table));
#elif GOSSAMER_F16C
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), (__m256i)code);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), (__m256i)code);
  return (Vec<float>)_mm256_blendv_ps(low, high, (__m256)(code << 28));
#else
  Vec<float> v;
  for (int i = 0; i < kCodes; ++i) v[i] = table[code[i]];
  return v;
#endif
}

// The values of the next kCodes codes at `from`.
template <WeightFormat Format>
GOSSAMER_INLINE Vec<float> decode(const uint8_t* from) {
  if constexpr (Format == WeightFormat::kFp8) {
    const UInts code = __builtin_convertvector(load_bytes<CodeBytes>(from), UInts);
    const UInts magnitude = code & 0x7fu;
    const UInts normal = (magnitude << 20) + (120u << 23);
    const Vec<float> small = __builtin_convertvector((SignedInts)magnitude, Vec<float>) * 0x1p-9f;
    UInts bits = magnitude < 8u ? (UInts)small : normal;
    bits = magnitude == 0x7fu ? UInts{} + 0x7fc00000u : bits;
    return (Vec<float>)(bits | ((code & 0x80u) << 24));
  } else if constexpr (Format == WeightFormat::kInt8) {
    return __builtin_convertvector(__builtin_convertvector(load_bytes<SignedBytes>(from), SignedInts), Vec<float>);
  } else {
    CodeBytes bytes = {};
    std::memcpy(&bytes, from, kCodes / 2);
    const UInts code = spread_nibbles(bytes, std::make_index_sequence<kCodes>{});
    return look_up(Format == WeightFormat::kInt4 ? kInt4Values : kE2M1Values, code);
  }
}

// What a decoded value is stored as: the terms of P.
template <class P>
using Term = std::conditional_t<std::is_same_v<P, BFloat16Pair>, BFloat16, SumOf<P>>;

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
GOSSAMER_INLINE void decode_run(const QuantizedMatrix& w, int64_t n, int64_t c, int count, T* out) {
  constexpr int per_byte = Format == WeightFormat::kFp8 || Format == WeightFormat::kInt8 ? 1 : 2;
  const uint8_t* row = w.row(n) + c / per_byte;
  const int shift = w.weights->column_shift;
  for (int j = 0; j < count;) {
    const int end = static_cast<int>(std::min<int64_t>(count, ((((c + j) >> shift) + 1) << shift) - c));
    const float scale = w.scale(n, c + j);
    for (; j + kCodes <= end; j += kCodes) store_decoded(out + j, decode<Format>(row + j / per_byte) * scale, kCodes);
    if (j < end) {
      uint8_t codes[kCodes] = {};
      std::memcpy(codes, row + j / per_byte, (end - j + per_byte - 1) / per_byte);
      store_decoded(out + j, decode<Format>(codes) * scale, end - j);
      j = end;
    }
  }
}

// Rows n .. n+count and columns c .. c+width of the stored matrix, rows `stride` apart in out.
template <class T>
__attribute__((noinline)) void decode_tile(const QuantizedMatrix& w, int64_t n, int count, int64_t c, int width, T* out,
                                           int64_t stride) {
  const auto rows = [&](auto format) {
    for (int i = 0; i < count; ++i) decode_run<format>(w, n + i, c, width, out + i * stride);
  };
  switch (w.weights->format) {
    case WeightFormat::kFp8:
      return rows(std::integral_constant<WeightFormat, WeightFormat::kFp8>{});
    case WeightFormat::kInt8:
      return rows(std::integral_constant<WeightFormat, WeightFormat::kInt8>{});
    case WeightFormat::kInt4:
      return rows(std::integral_constant<WeightFormat, WeightFormat::kInt4>{});
    case WeightFormat::kMxfp4:
      return rows(std::integral_constant<WeightFormat, WeightFormat::kMxfp4>{});
  }
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

template <int Tokens, class P>
__attribute__((noinline)) void few_tokens_of(const QuantizedMatrix& w, int64_t n, int64_t count, const Panel<P>& panel,
                                             SumOf<P>* c, int64_t c_stride) {
  using T = Term<P>;
  constexpr int lanes = kLanes<P>, room = kDepth * kTerms<P>;
  alignas(64) T tile[lanes * room];
  few_tokens_product<Tokens, P>(count, w.depth(), c, c_stride, [&](auto& sum, int64_t i, int rows, int64_t k, int64_t last) {
    const int64_t depth = last - k;
    decode_tile(w, n + i, rows, k, static_cast<int>(depth), tile, room);
    prefetch_tile(w, n + i + lanes, lanes, k, depth);
    const Panel<P> part{panel.data + k / kTerms<P> * lanes, depth, panel.width};
    accumulate_few<Tokens, false>(sum, Weight<T>{tile, room, 1, rows, depth}, tile, rows, 0, 0, depth, part);
  });
}

// group_product() of gemm.h: the same sums in the same order.
template <class P>
void group_product(const QuantizedMatrix& w, int64_t n, int64_t count, const Panel<P>& panel, SumOf<P>* c, int64_t c_stride,
                   P* pack) {
  using T = Term<P>;
  if (panel.width <= kFewTokens && !w.transposed) {
    return with_few_tokens(panel.width, [&](auto tokens) { few_tokens_of<tokens>(w, n, count, panel, c, c_stride); });
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
        pack_columns(Weight<T>{tile, 1, kGroup, rows, terms}, 0, rows, 0, terms, pack);
      } else {
        decode_tile(w, n + i, rows, k, terms, tile, room);
        pack_rows(Weight<T>{tile, room, 1, rows, terms}, 0, rows, 0, terms, pack);
        prefetch_tile(w, n + i, rows, k + room, std::min<int64_t>(room, w.depth() - k - terms));
      }
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
