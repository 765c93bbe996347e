// Products of quantised weights with rows in 8 bits, of one instruction set.
//
// Of each group of columns c of a row x, codes q[c] = round(x[c] / s) and their scale s = max |x| / 127. Weights are whole numbers
// w[n][c] times a scale too, so a group's products are whole numbers, whose sums are exact in any order:
//
//   y[n] = Σ over groups, in order, of (s · scale[n]) · Σ over the group's columns of q[c] · w[n][c]
#pragma once

#include "cpu/dot_bytes.h"
#include "cpu/memory.h"
#include "cpu/quantized_gather_kernel.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Whether weights of a format are whole numbers of 8 bits times a scale.
constexpr bool is_whole(WeightFormat format) {
  return format == WeightFormat::kInt8 || format == WeightFormat::kInt4 || format == WeightFormat::kMxfp4;
}

// Columns that share a scale of x: those that share a scale of the weight, at most 2^7.
inline int int8_shift(const QuantizedMatrix& w) { return std::min(w.weights->column_shift, 7); }

// A weight's stored words become words of four bytes, each a weight plus this number, which makes it positive; e2m1 is doubled.
template <WeightFormat Format>
constexpr int kRaised = Format == WeightFormat::kInt8   ? 128
                        : Format == WeightFormat::kInt4 ? 8
                                                        : 12;
template <WeightFormat Format>
constexpr int kWordsInWord = Format == WeightFormat::kInt8 ? 1 : 2;
// Words of raised bytes of 32 columns. Of four bits the even columns of them come first, four words, and then the odd ones.
constexpr int kWordsTogether = 8;

// The raised bytes of the codes in the low halves of the bytes.
template <WeightFormat Format>
GOSSAMER_INLINE UInts raised_nibbles(UInts codes) {
  if constexpr (Format == WeightFormat::kInt4) return codes;
#if GOSSAMER_F16C
  const __m128i table = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
#if GOSSAMER_VECTOR_BYTES == 64
  return (UInts)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), (__m512i)codes);
#else
  return (UInts)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), (__m256i)codes);
#endif
#else
  constexpr uint32_t table[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
  UInts out{};
  for (int i = 0; i < kCodes; ++i) {
    for (int shift = 0; shift < 32; shift += 8) out[i] |= table[codes[i] >> shift & 15u] << shift;
  }
  return out;
#endif
}

// The raised bytes of stored words.
template <WeightFormat Format>
GOSSAMER_INLINE void raise(UInts words, UInts (&out)[kWordsInWord<Format>]) {
  if constexpr (Format == WeightFormat::kInt8) {
    out[0] = words ^ 0x80808080u;
  } else {
    out[0] = raised_nibbles<Format>(words & 0x0f0f0f0fu);
    out[1] = raised_nibbles<Format>(words >> 4 & 0x0f0f0f0fu);
  }
}

// Rows of x in codes, as columns of a panel of words of four along the depth, in the order of raised words. Where they are few, one
// word after the other without the panel's padding. Scales and starts are by group and column.
struct Int8Rows {
  Panel<uint32_t> words;
  const float* scales;
  const int32_t* starts;  // what makes up for raised weights
  int64_t few;            // columns of `words` if it has no blocks, else 0
  int64_t stride;         // of scales and starts
};

// Values at depth k of a panel's columns.
GOSSAMER_INLINE Vec<float> term_at(const float* at, int) { return load(at); }
GOSSAMER_INLINE Vec<float> term_at(const BFloat16Pair* at, int term) {
  const UInts pair = load(at);
  return (Vec<float>)(term ? pair & 0xffff0000u : pair << 16);
}

// Below this a group's values count as zero: their reciprocals pass the largest float.
constexpr float kLeastInt8 = 0x1p-100f;

// Codes of the columns at `column` of a panel, kLanes of them: word(i, v) takes the words of the depth, group(g, scale, start) the
// scale of each group of 2^shift and the sum of its codes.
template <class P, class Word, class Group>
GOSSAMER_INLINE void code_columns(const Panel<P>& x, int64_t column, int64_t depth, int shift, bool nibbles, Word&& word,
                                  Group&& group) {
  const int64_t size = int64_t{1} << shift;
  const int64_t step = (x.depth > 1 ? x.at(1, column) : x.at(0, column)) - x.at(0, column);
  const P* base = x.at(0, column);
  const auto value = [&](int64_t k) __attribute__((always_inline)) {
    return term_at(base + k / kTerms<P> * step, static_cast<int>(k % kTerms<P>));
  };
  for (int64_t g = 0, first = 0; first < depth; ++g, first += size) {
    const int64_t last = std::min(depth, first + size);
    UInts most{};
    for (int64_t k = first; k < last; ++k) {
      const UInts bits = (UInts)value(k) & 0x7fffffffu;
      most = bits > most ? bits : most;
    }
    const Vec<float> largest = (Vec<float>)most;
    const auto none = largest < kLeastInt8, bad = most >= 0x7f800000u;
    const Vec<float> inverse = none || bad ? Vec<float>{} : 127.0f / largest;
    const Vec<float> scale = bad ? splat(bits_to_float(0x7fc00000u)) : none ? Vec<float>{} : largest * (1.0f / 127.0f);
    SignedInts sum{};
    const auto code = [&](int64_t k) __attribute__((always_inline)) {
      if (k >= depth) return SignedInts{};
      const Vec<float> v = value(k) * inverse;
      const SignedInts q = nearest_codes(v == v ? v : Vec<float>{});
      sum += q;
      return q & 255;
    };
    const auto four = [&](int64_t k, int64_t by) __attribute__((always_inline)) {
      return (UInts)(code(k) | code(k + by) << 8 | code(k + 2 * by) << 16 | code(k + 3 * by) << 24);
    };
    for (int64_t k = first; k < last; k += 32) {
      const int64_t at = k / 4;
      for (int64_t i = 0; i < kWordsTogether / 2; ++i) {
        if (nibbles) {
          word(at + i, four(k + 8 * i, 2));
          word(at + 4 + i, four(k + 8 * i + 1, 2));
        } else {
          word(at + 2 * i, four(k + 8 * i, 1));
          word(at + 2 * i + 1, four(k + 8 * i + 4, 1));
        }
      }
    }
    group(g, scale, sum);
  }
}

// A thread's memory for rows in codes.
class Int8Memory {
 public:
  Int8Memory() = default;
  // For products of at most `depth` with at most `tokens` rows.
  Int8Memory(int64_t depth, int64_t tokens)
      : width_((tokens + kCodes - 1) / kCodes * kCodes),
        groups_((depth + 31) / 32),
        words_(groups_ * kWordsTogether),
        memory_(allocate_scratch((words_ + 2 * groups_) * width_ * sizeof(uint32_t))) {}

  template <class P>
  Int8Rows round(const QuantizedMatrix& w, const Panel<P>& x) const {
    const int shift = int8_shift(w);
    const int64_t depth = w.depth(), words = (depth + 31) / 32 * kWordsTogether,
                  stride = (x.width + kCodes - 1) / kCodes * kCodes;
    const bool nibbles = w.weights->format != WeightFormat::kInt8;
    const int raised = w.weights->format == WeightFormat::kInt8 ? 128 : w.weights->format == WeightFormat::kInt4 ? 8 : 12;
    const float unit = w.weights->format == WeightFormat::kMxfp4 ? 0.5f : 1.0f;
    uint32_t* base = reinterpret_cast<uint32_t*>(memory_.get());
    float* scales = reinterpret_cast<float*>(base + words_ * width_);
    int32_t* starts = reinterpret_cast<int32_t*>(scales + groups_ * width_);
    const Panel<uint32_t> panel{base, words, x.width};
    Int8Rows out{panel, scales, starts, 0, stride};
    const auto code = [&](int64_t column, auto&& word) __attribute__((always_inline)) {
      code_columns(x, column, depth, shift, nibbles, word,
                   [&](int64_t g, Vec<float> scale, SignedInts sum) __attribute__((always_inline)) {
                     store(scales + g * stride + column, scale * unit);
                     const SignedInts start = sum * -raised;
                     std::memcpy(starts + g * stride + column, &start, sizeof start);
                   });
    };
    if (x.width <= kCodes) {
      with_few_tokens<kCodes>(x.width, [&](auto tokens) {
        out.few = tokens;
        code(0, [&](int64_t i, UInts v)
                    __attribute__((always_inline)) { std::memcpy(base + i * tokens, &v, tokens * sizeof(uint32_t)); });
      });
      return out;
    }
    for (int64_t column = 0; column < x.width; column += kCodes) {
      uint32_t* to = panel.at(0, column);
      const int64_t step = panel.block_vectors(column / Panel<uint32_t>::kWidth) * kCodes;
      code(column, [&](int64_t i, UInts v) __attribute__((always_inline)) { std::memcpy(to + i * step, &v, sizeof v); });
    }
    return out;
  }

 private:
  int64_t width_ = 0, groups_ = 0, words_ = 0;
  Scratch memory_;
};

// One step along the depth of few_int8_product(): `count` columns, `run` of which share scales.
template <int Vectors>
struct Int8Step {
  CodeWords<Vectors> words;
  const uint32_t* x;
  const float* x_scales;
  const int32_t* starts;
  int64_t stride;
  const Vec<float>* scales;
  int64_t count, run, group_shift, first_column;
};

template <WeightFormat Format, int Tokens>
__attribute__((noinline)) void add_int8_step(const Int8Step<kCodeVectors<Tokens>>& step, Vec<float>* total) {
  constexpr int lanes = kCodes, in_word = kWordBits / kCodeBits<Format>, vectors = kCodeVectors<Tokens>,
                parts = kWordsInWord<Format>;
  const float* x_scales = step.x_scales;
  const int32_t* starts = step.starts;
  for (int64_t r = 0; r < step.count; r += step.run, x_scales += step.stride, starts += step.stride) {
    const Vec<float>* scales = step.scales + (((step.first_column + r) >> step.group_shift) % lanes);
    SignedInts sum[vectors][Tokens];
#pragma GCC unroll 16
    for (int i = 0; i < vectors * Tokens; ++i) sum[i / Tokens][i % Tokens] = starts[i % Tokens] - SignedInts{};
    const int64_t last_word = (std::min(step.count, r + step.run) + in_word - 1) / in_word;
    for (int64_t i = r / in_word; i < last_word; ++i) {
      const uint32_t* values = step.x + (parts == 1 ? i : i / 4 * 8 + i % 4) * Tokens;
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        step.words.fetch_ahead(v, i);
        UInts raised[parts];
        raise<Format>(step.words.at(v, i), raised);
        const uint32_t* factors = values;
        asm volatile("" : "+r"(factors));
#pragma GCC unroll 2
        for (int p = 0; p < parts; ++p) {
#pragma GCC unroll 16
          for (int t = 0; t < Tokens; ++t) sum[v][t] = dot_bytes(raised[p], factors[4 * p * Tokens + t] - UInts{}, sum[v][t]);
        }
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 16
      for (int t = 0; t < Tokens; ++t) {
        Vec<float>& to = total[v * Tokens + t];
        to = fma(__builtin_convertvector(sum[v][t], Vec<float>), scales[v * lanes] * splat(x_scales[t]), to);
      }
    }
    asm volatile("" : : "r"(total) : "memory");
  }
}

template <WeightFormat Format, int Tokens>
void few_int8_product(const QuantizedMatrix& w, int64_t n, int64_t count, const Int8Rows& x, float* c, int64_t c_stride,
                      bool by_token) {
  constexpr int lanes = kCodes, bits = kCodeBits<Format>, vectors = kCodeVectors<Tokens>, height = vectors * lanes;
  constexpr int64_t columns = 256;
  const int64_t depth = w.depth();
  const int shift = std::min(w.weights->column_shift, 40), x_shift = int8_shift(w);
  alignas(64) uint8_t words[CodeWords<vectors>::room(columns * bits / kWordBits)];
  for (int64_t i = 0; i < count; i += height) {
    CodeRows<vectors> rows(w, n + i, n + count);
    Vec<float> total[vectors * Tokens] = {};
    for (int64_t k = 0; k < depth; k += columns) {
      const int64_t last = std::min(depth, k + columns);
      const int64_t group = k >> x_shift;
      add_int8_step<Format, Tokens>(
          {rows.words(k, columns, words), x.words.data + k / 4 * Tokens, x.scales + group * x.stride,
           x.starts + group * x.stride, x.stride, rows.scales(k >> shift), last - k, int64_t{1} << x_shift, shift, k},
          total);
    }
    store_totals<Tokens, vectors>(total, c, c_stride, i, count, by_token);
  }
}

// Words of raised bytes of `width` columns of a row.
template <WeightFormat Format>
GOSSAMER_INLINE void raise_row(const uint8_t* from, int64_t width, uint32_t* to) {
  constexpr int64_t stored = kCodeBits<Format> * 4;  // bytes of 32 columns
  for (int64_t c = 0; c < width; c += 8 * sizeof(UInts) / kCodeBits<Format>, from += sizeof(UInts)) {
    const int64_t left = (width - c) * kCodeBits<Format> / 8;
    UInts words{};
    if (left >= static_cast<int64_t>(sizeof words)) {
      words = load_bytes<UInts>(from);
    } else {
      std::memcpy(&words, from, left);
    }
    UInts raised[kWordsInWord<Format>];
    raise<Format>(words, raised);
    if constexpr (kWordsInWord<Format> == 1) {
      std::memcpy(to + c / 4, &raised[0], sizeof words);
    } else {
      const char *even = reinterpret_cast<const char*>(&raised[0]), *odd = reinterpret_cast<const char*>(&raised[1]);
      for (size_t i = 0; i < sizeof words / stored; ++i) {
        std::memcpy(to + c / 4 + i * kWordsTogether, even + i * stored, stored);
        std::memcpy(to + c / 4 + i * kWordsTogether + 4, odd + i * stored, stored);
      }
    }
  }
}

// c (+)= the products of Rows rows of raised words, `a_step` apart, with a block of Vecs vectors; groups of `run` words.
template <int Rows, int Vecs>
__attribute__((noinline)) void int8_block_product(const uint32_t* a, int64_t a_step, const uint32_t* b, int64_t words,
                                                  int64_t run, bool first, const float* scales, const float* x_scales,
                                                  const int32_t* starts, int64_t stride, float* c, int64_t c_stride,
                                                  NearLines& ahead) {
  NearLines lines = ahead;
  Vec<float> total[Rows][Vecs] = {};
  const auto each = [&](auto&& f) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) f(total[i][v], i, v);
    }
  };
  if (!first) {
    each([&](Vec<float>& t, int i, int v) __attribute__((always_inline)) { t = load(c + i * c_stride + v * kCodes); });
  }
  for (int64_t k = 0; k < words; k += run, scales += kGroup, x_scales += stride, starts += stride) {
    SignedInts sum[Rows][Vecs];
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) {
      const SignedInts start = load_bytes<SignedInts>(starts + v * kCodes);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) sum[i][v] = start;
    }
    const int64_t last = std::min(words, k + run);
    for (int64_t j = k; j < last; ++j) {
      UInts column[Vecs];
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) column[v] = load_bytes<UInts>(b + (j * Vecs + v) * kCodes);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const UInts row = a[i * a_step + j] - UInts{};
#pragma GCC unroll 4
        for (int v = 0; v < Vecs; ++v) sum[i][v] = dot_bytes(row, column[v], sum[i][v]);
      }
      lines.fetch();
    }
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) {
      const Vec<float> of_x = load(x_scales + v * kCodes);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        total[i][v] = fma(__builtin_convertvector(sum[i][v], Vec<float>), splat(scales[i]) * of_x, total[i][v]);
      }
    }
  }
  each([&](Vec<float>& t, int i, int v) __attribute__((always_inline)) { store(c + i * c_stride + v * kCodes, t); });
  ahead = lines;
}

template <WeightFormat Format>
void many_int8_product(const QuantizedMatrix& w, int64_t n, int64_t count, const Int8Rows& x, float* c, int64_t c_stride) {
  constexpr int64_t room = 256, words_of_row = room / 4;
  alignas(64) uint32_t tile[kGroup * words_of_row];
  alignas(64) float scales[room / 32 * kGroup];
  const int shift = int8_shift(w);
  const int64_t depth = w.depth(), run = int64_t{1} << shift;
  for (int64_t i = 0; i < count; i += kGroup) {
    const int rows = static_cast<int>(std::min<int64_t>(kGroup, count - i));
    ScalesOfRows scales_of_rows(w, n + i, n + i + rows);
    for (int64_t k = 0; k < depth; k += room) {
      const int64_t terms = std::min(room, depth - k), words = (terms + 31) / 32 * kWordsTogether;
      each_row_of_tile(w, n + i, rows, k * kCodeBits<Format> / 8, terms * kCodeBits<Format> / 8,
                       [&](int64_t j, const uint8_t* codes)
                           __attribute__((always_inline)) { raise_row<Format>(codes, terms, tile + j * words_of_row); });
      std::fill(tile + rows * words_of_row, tile + (rows + 3) / 4 * 4 * words_of_row, 0u);
      scales_of_rows.at(k, k + terms, run, scales);
      auto ahead = tile_ahead(w, n + i, rows, k, room);
      ahead.share_among((rows + 3) / 4 * x.words.num_blocks() * words);
      const int64_t group = k >> shift;
      for (int64_t block = 0; block < x.words.num_blocks(); ++block) {
        with_vectors<uint32_t>(x.words.block_vectors(block), [&](auto vectors) {
          constexpr int width = vectors * kCodes;
          const uint32_t* b = x.words.block(block) + k / 4 * width;
          const int64_t at = group * x.stride + block * Panel<uint32_t>::kWidth;
          for_tiles<vectors == 1 ? 8 : 4>(rows, [&](auto height, int64_t j) {
            int8_block_product<height, vectors>(tile + j * words_of_row, words_of_row, b, words, run / 4, k == 0, scales + j,
                                                x.scales + at, x.starts + at, x.stride,
                                                c + (i + j) * c_stride + block * Panel<uint32_t>::kWidth, c_stride, ahead);
          });
        });
      }
    }
  }
}

template <class F>
GOSSAMER_INLINE void visit_whole(WeightFormat format, F&& f) {
  if (format == WeightFormat::kInt8) return f(std::integral_constant<WeightFormat, WeightFormat::kInt8>{});
  if (format == WeightFormat::kInt4) return f(std::integral_constant<WeightFormat, WeightFormat::kInt4>{});
  f(std::integral_constant<WeightFormat, WeightFormat::kMxfp4>{});
}

// group_product(), or by token token_rows_product(), of rows in codes; few and many have the same bits.
inline void int8_group_product(const QuantizedMatrix& w, int64_t n, int64_t count, const Int8Rows& x, float* c,
                               int64_t c_stride, bool by_token) {
  visit_whole(w.weights->format, [&](auto format) {
    if (x.few == 0) return many_int8_product<format>(w, n, count, x, c, c_stride);
    with_few_tokens<kCodes>(x.few,
                            [&](auto tokens) { few_int8_product<format, tokens>(w, n, count, x, c, c_stride, by_token); });
  });
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
