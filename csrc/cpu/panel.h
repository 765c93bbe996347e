// Packed matrices, the operands of the products.
//
// A panel stores a matrix of `depth` rows and `width` columns as blocks of columns, each block row by row. A block is Vectors
// vectors wide, kPanelWidth columns by default; the last block is as wide as it needs to be. Products sum along the depth and keep
// columns in vector lanes. Tokens are packed in two ways: as columns, with the features as depth, for products with weights; and
// as rows for weight gradients.
//
// Panels hold what the products multiply: values of the accumulator's type or, where an instruction multiplies them, pairs of
// bfloat16 that are neighbours along the sum. Depth then counts pairs, and a zero may complete the last one.
#pragma once

#include "cpu/tile_kernel.h"
#include "cpu/vec.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Vectors per block: as many as leave enough registers for the sums of several rows.
template <class S>
constexpr int kBlockVectors = kTiled<S> ? 2 : GOSSAMER_TILE_VECTORS;
template <class S>
constexpr int kPanelWidth = kBlockVectors<S> * kLanes<S>;

template <class S, int Vectors = kBlockVectors<S>>
struct Panel {
  static constexpr int kWidth = Vectors * kLanes<S>;
  S* data;
  int64_t depth, width;

  int64_t num_blocks() const { return (width + kWidth - 1) / kWidth; }
  int block_vectors(int64_t block) const {
    const int64_t left = (width - block * kWidth + kLanes<S> - 1) / kLanes<S>;
    return static_cast<int>(std::min<int64_t>(left, Vectors));
  }
  S* block(int64_t b) const { return data + b * kWidth * depth; }
  // One vector of columns, `column` a multiple of kLanes.
  S* at(int64_t row, int64_t column) const {
    const int64_t b = column / kWidth;
    return block(b) + row * block_vectors(b) * kLanes<S> + column % kWidth;
  }
};

// A panel viewed in the type of its sums; null where the packed values have another type.
template <class P>
Panel<SumOf<P>> sums_of(const Panel<P>& panel) {
  if constexpr (std::is_same_v<P, SumOf<P>>) {
    return panel;
  } else {
    return {nullptr, 0, 0};
  }
}

// Calls f with the number of vectors of a block as a constant.
template <class P, int Most = kBlockVectors<P>, class F>
GOSSAMER_INLINE void with_vectors(int vectors, F&& f) {
  if constexpr (Most > 2) {
    if (vectors == 3) return f(std::integral_constant<int, 3>{});
  }
  if (vectors == 2) return f(std::integral_constant<int, 2>{});
  f(std::integral_constant<int, 1>{});
}

// Calls f with the number of vectors of a panel's block as a constant, and whether half of the last of them is enough.
template <class P, class F>
GOSSAMER_INLINE void with_block(const Panel<P>& panel, int64_t block, F&& f) {
  with_vectors<P>(panel.block_vectors(block), [&](auto vectors) {
    if constexpr (kHasHalves<P>) {
      const int64_t last = panel.width - block * kPanelWidth<P> - (vectors - 1) * kLanes<P>;
      if (kSplitsVectors && last <= kLanes<P> / 2) return f(vectors, std::true_type{});
    }
    f(vectors, std::false_type{});
  });
}

template <class V, size_t... I>
GOSSAMER_INLINE V interleave_low(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * sizeof...(I))...);
}
template <class V, size_t... I>
GOSSAMER_INLINE V interleave_high(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + sizeof...(I) / 2 + (I % 2) * sizeof...(I))...);
}

#if GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
// transpose() of words, mostly with instructions that work within quarters of a vector, of which a processor executes more per
// cycle.
template <class V>
GOSSAMER_INLINE void transpose_words(V (&v)[16]) {
  __m512 pairs[16];
  __m512 quarters[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps((__m512)v[i], (__m512)v[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps((__m512)v[i], (__m512)v[i + 1]);
  }
  // quarters[4g + j]: of rows 4g to 4g + 3, columns j, j + 4, j + 8 and j + 12.
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    for (int half = 0; half < 2; ++half) {
      const __m512d low = (__m512d)pairs[i + half], high = (__m512d)pairs[i + 2 + half];
      quarters[i + 2 * half] = (__m512)_mm512_unpacklo_pd(low, high);
      quarters[i + 2 * half + 1] = (__m512)_mm512_unpackhi_pd(low, high);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(quarters[j], quarters[4 + j], 0x88),
                 b = _mm512_shuffle_f32x4(quarters[j], quarters[4 + j], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(quarters[8 + j], quarters[12 + j], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(quarters[8 + j], quarters[12 + j], 0xdd);
    v[j] = (V)_mm512_shuffle_f32x4(a, c, 0x88);
    v[8 + j] = (V)_mm512_shuffle_f32x4(a, c, 0xdd);
    v[4 + j] = (V)_mm512_shuffle_f32x4(b, d, 0x88);
    v[12 + j] = (V)_mm512_shuffle_f32x4(b, d, 0xdd);
  }
}
#endif

// Transposes kLanes vectors of kLanes: interleaving the two halves of the list, log2(kLanes) times.
template <class S>
GOSSAMER_INLINE void transpose(Vec<S> (&v)[kLanes<S>]) {
#if GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
  if constexpr (sizeof(S) == 4) return transpose_words(v);
#endif
  constexpr int n = kLanes<S>;
  constexpr auto lanes = std::make_index_sequence<n>{};
  for (int stage = 1; stage < n; stage *= 2) {
    Vec<S> next[n];
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = interleave_low(v[i], v[i + n / 2], lanes);
      next[2 * i + 1] = interleave_high(v[i], v[i + n / 2], lanes);
    }
    for (int i = 0; i < n; ++i) v[i] = next[i];
  }
}

// Packs columns [first, last) of the source rows as panel rows: tokens in lanes, terms along the columns. `first` is even where
// pairs are packed.
template <class T, class P, int Vectors>
void pack_as_columns(const Panel<P, Vectors>& panel, const T* const* rows, int64_t first, int64_t last) {
  constexpr int n = kLanes<P>, terms = kTerms<P>, ahead = 4 * n * terms;
  for (int64_t token = 0; token < panel.width; token += n) {
    const int tokens = static_cast<int>(std::min<int64_t>(n, panel.width - token));
    for (int64_t k = first; k < last; k += n * terms) {
      Vec<P> v[n];
      if (k + ahead < last) {
        for (int i = 0; i < tokens; ++i) __builtin_prefetch(rows[token + i] + k + ahead);
      } else {
        const int64_t at = k + ahead - last + first, next = at < last ? std::min(token + 2 * n, panel.width) : 0;
        for (int64_t i = token + n; i < next; ++i) __builtin_prefetch(rows[i] + at);
      }
      for (int i = 0; i < n; ++i) v[i] = i >= tokens ? Vec<P>{} : load_terms<P>(rows[token + i] + k, last - k);
      transpose<P>(v);
      const int count = static_cast<int>(std::min<int64_t>(n, (last - k + terms - 1) / terms));
      for (int i = 0; i < count; ++i) store(panel.at(k / terms + i, token), v[i]);
    }
  }
}

// Copies columns [first, last) of a contiguous row into a panel's row; those of `next`, unless it is null, become the second terms
// of pairs.
template <class T, class P, int Vectors>
GOSSAMER_INLINE void pack_run(const Panel<P, Vectors>& panel, int64_t row, const T* run, const T* next, int64_t first,
                              int64_t last) {
  constexpr int n = kLanes<P>;
  int64_t c = first;
  for (; c + 2 * n <= last; c += 2 * n) {
    const auto [low, high] = load_two_lanes<P>(run + c, next ? next + c : nullptr);
    store(panel.at(row, c), low);
    store(panel.at(row, c + n), high);
  }
  for (; c < last; c += n) {
    const int columns = static_cast<int>(std::min<int64_t>(n, last - c));
    store(panel.at(row, c), load_lanes<P>(run + c, next ? next + c : nullptr, columns));
  }
}

// Zeroes columns [first, last) of a panel's rows from `row` on; `first` is a multiple of kLanes. Sums over tokens by tiles read to
// the end of the panel.
template <class P, int Vectors>
void zero_past(const Panel<P, Vectors>& panel, int64_t row, int64_t first, int64_t last) {
  if constexpr (kTiled<P>) {
    for (; row < panel.depth; ++row) {
      for (int64_t c = first; c < last; c += kLanes<P>) store(panel.at(row, c), Vec<P>{});
    }
  }
}

// Packs columns [first, last) of `tokens` source rows as columns, with terms along the rows; `first` is a multiple of kLanes.
template <class T, class P, int Vectors>
void pack_as_rows(const Panel<P, Vectors>& panel, const T* const* rows, int64_t tokens, int64_t first, int64_t last) {
  for (int64_t token = 0; token < tokens; token += kTerms<P>) {
    const T* row = rows[token];
    const T* next = token + 1 < tokens ? rows[token + 1] : nullptr;
    pack_run(panel, token / kTerms<P>, row, next, first, last);
  }
  zero_past(panel, packed_depth<P>(tokens), first, last);
}

// The same with each column as a panel row and terms along it: the left operand of a sum over tokens.
template <class T, class P>
void pack_as_terms(const Panel<P>& panel, const T* const* rows, int64_t tokens, int64_t first, int64_t last) {
  constexpr int n = kLanes<P>, terms = kTerms<P>;
  for (int64_t token = 0; token < tokens; token += n * terms) {
    for (int64_t c = first; c < last; c += n) {
      const int columns = static_cast<int>(std::min<int64_t>(n, last - c));
      Vec<P> v[n];
      for (int i = 0; i < n; ++i) {
        const int64_t t = token + i * terms;
        v[i] = t >= tokens ? Vec<P>{} : load_lanes<P>(rows[t] + c, t + 1 < tokens ? rows[t + 1] + c : nullptr, columns);
      }
      transpose<P>(v);
      for (int i = 0; i < columns; ++i) store(panel.at(c + i, token / terms), v[i]);
    }
  }
}

// Fills columns [first, last) of `to`, with terms along its rows, from the same rows of `from`, whose columns are tokens; `first`
// is a multiple of kLanes.
template <class S, class P, int Vectors>
void transpose_panel(const Panel<P, Vectors>& to, const Panel<S>& from, int64_t first, int64_t last) {
  constexpr int n = kLanes<S>, terms = kTerms<P>;
  for (int64_t token = 0; token < from.width; token += n) {
    const int tokens = static_cast<int>(std::min<int64_t>(n, from.width - token));
    for (int64_t c = first; c < last; c += n) {
      const int columns = static_cast<int>(std::min<int64_t>(n, last - c));
      Vec<S> v[n];
      for (int i = 0; i < n; ++i) v[i] = i < columns ? load(from.at(c + i, token)) : Vec<S>{};
      transpose<S>(v);
      // Lanes past the last token are zero, and n is even: the second term of the last pair exists.
      for (int i = 0; i < tokens; i += terms) store(to.at((token + i) / terms, c), pack_lanes<P>(v[i], v[i + terms - 1]));
    }
  }
  zero_past(to, packed_depth<P>(from.width), first, last);
}

// Rows [first, last) of a panel of sums with tokens as columns, packed for products with terms along its rows: rows
// first / kTerms and on of `to`. `first` is a multiple of a pair.
template <class S, class P>
void pack_along_rows(const Panel<P>& to, const Panel<S>& from, int64_t first, int64_t last) {
  for (int64_t k = first; k < last; k += kTerms<P>) {
    for (int64_t token = 0; token < from.width; token += kLanes<S>) {
      const Vec<S> next = k + 1 < last ? load(from.at(k + 1, token)) : Vec<S>{};
      store(to.at(k / kTerms<P>, token), pack_lanes<P>(load(from.at(k, token)), next));
    }
  }
}

// The same rows packed with terms along the tokens: the left operand of a sum over tokens.
template <class S, class P>
void pack_along_tokens(const Panel<P>& to, const Panel<S>& from, int64_t first, int64_t last) {
  constexpr int n = kLanes<S>, terms = kTerms<P>;
  for (int64_t k = first; k < last; ++k) {
    for (int64_t token = 0; token < from.width; token += n) {
      const Vec<S> v = load(from.at(k, token));
      if constexpr (terms == 1) {
        store(to.at(k, token), v);
      } else {
        store_sums(reinterpret_cast<BFloat16*>(to.at(k, token / terms)), v);
      }
    }
    // The upper half of the last vector.
    if (kTiled<P> && from.width > 0 && (from.width - 1) / n % 2 == 0) {
      std::memset(static_cast<void*>(to.at(k, (from.width - 1) / n * n / terms) + n / terms), 0, n / terms * sizeof(P));
    }
  }
}

// Rows of tokens as the left operand of tile products: each token's terms, zero-padded to a whole tile.
template <class P>
struct PackedRows {
  P* data;
  int64_t terms, tokens;

  int64_t stride() const { return packed_row_stride<P>(terms); }
  P* at(int64_t token, int64_t k) const { return data + token * stride() + k; }
  Term<P>* row(int64_t token) const { return reinterpret_cast<Term<P>*>(at(token, 0)); }

  void zero_past_terms() const {
    const int64_t used = packed_depth<P>(terms);
    for (int64_t t = 0; t < tokens; ++t)
      std::memset(static_cast<void*>(at(t, used)), 0, (tile_depth<P>(terms) - used) * sizeof(P));
  }
};

// Columns first .. last of the source rows, `first` a multiple of whole vectors; zeros follow up to the end of a tile.
template <class T, class P>
void copy_rows(const PackedRows<P>& to, const T* const* rows, int64_t first, int64_t last) {
  constexpr int64_t lanes = kLanes<P>, terms = kTerms<P>;
  for (int64_t t = 0; t < to.tokens; ++t) {
    for (int64_t k = first; k < last; k += lanes * terms) store(to.at(t, k / terms), load_terms<P>(rows[t] + k, last - k));
  }
}

// Rows first .. last of a panel of sums with tokens as columns, `first` a multiple of a pair.
template <class S, class P>
void transpose_rows(const PackedRows<P>& to, const Panel<S>& from, int64_t first, int64_t last) {
  constexpr int lanes = kLanes<P>, terms = kTerms<P>;
  for (int64_t k = first; k < last; k += lanes * terms) {
    const int pairs = static_cast<int>(std::min<int64_t>(lanes, (last - k + terms - 1) / terms));
    for (int64_t token = 0; token < to.tokens; token += lanes) {
      Vec<P> v[lanes];
      for (int j = 0; j < lanes; ++j) {
        const int64_t row = k + j * terms;
        const Vec<S> next = j < pairs && row + terms - 1 < last ? load(from.at(row + terms - 1, token)) : Vec<S>{};
        v[j] = j < pairs ? pack_lanes<P>(load(from.at(row, token)), next) : Vec<P>{};
      }
      transpose<P>(v);
      const int tokens = static_cast<int>(std::min<int64_t>(lanes, to.tokens - token));
      for (int i = 0; i < tokens; ++i) {
        if (pairs == lanes) {
          store(to.at(token + i, k / terms), v[i]);
        } else {
          std::memcpy(static_cast<void*>(to.at(token + i, k / terms)), &v[i], pairs * sizeof(P));
        }
      }
    }
  }
}

// Calls f(token, column, vector, valid lanes) over the transpose of c, `columns` rows of `tokens` values.
template <class S, class F>
GOSSAMER_INLINE void for_transposed(const S* c, int64_t c_stride, int64_t columns, int64_t tokens, F&& f) {
  constexpr int n = kLanes<S>;
  for (int64_t token = 0; token < tokens; token += n) {
    const int num_tokens = static_cast<int>(std::min<int64_t>(n, tokens - token));
    for (int64_t column = 0; column < columns; column += n) {
      const int valid = static_cast<int>(std::min<int64_t>(n, columns - column));
      Vec<S> v[n];
      for (int i = 0; i < n; ++i) v[i] = i < valid ? load(c + (column + i) * c_stride + token) : Vec<S>{};
      transpose<S>(v);
      for (int i = 0; i < num_tokens; ++i) f(token + i, column, v[i], valid);
    }
  }
}

// out[column][token] = c[token][column], tokens `out_stride` and columns c_stride apart; whole vectors of tokens are written.
template <class S>
void transpose_tokens(const S* c, int64_t c_stride, int64_t tokens, int64_t columns, S* out, int64_t out_stride) {
  for_transposed(c, c_stride, tokens, columns,
                 [&](int64_t column, int64_t token, Vec<S> v, int) { store(out + column * out_stride + token, v); });
}

template <class T>
GOSSAMER_INLINE void store_valid(T* to, Vec<Accumulator<T>> v, int valid) {
  if (valid == kLanes<Accumulator<T>>) {
    store(to, v);
  } else {
    store_some(to, v, valid);
  }
}

template <class T>
GOSSAMER_INLINE void store_valid_sums(T* to, Vec<Accumulator<T>> v, int valid) {
  if (valid == kLanes<Accumulator<T>>) return store_sums(to, v);
  T buffer[kLanes<Accumulator<T>>];
  store_sums(buffer, v);
  std::memcpy(static_cast<void*>(to), buffer, valid * sizeof(T));
}

template <class T>
GOSSAMER_INLINE Vec<Accumulator<T>> load_valid(const T* from, int valid) {
  return valid == kLanes<Accumulator<T>> ? load(from) : load_some(from, valid);
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
