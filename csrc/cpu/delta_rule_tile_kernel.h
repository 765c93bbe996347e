// Building blocks of the delta rule's kernels: products on rows with a fixed stride, rows of tensors, and gates.
#pragma once

#include "cpu/delta_rule.h"
#include "cpu/panel.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

enum class Into { kSet, kAdd, kSubtract, kDecayed };

// c (op)= Σ_k a(i, k) · b[k][j] for a tile of Rows rows and Vecs vectors, a(i, k) at a[i·lda + k], or at a[i + k·lda] where
// it is transposed. kDecayed: c = factor[i] · from + sum, with factor_step 0 for one factor of all rows.
template <int Rows, int Vecs, bool Transposed, Into into, class S>
__attribute__((noinline)) void state_tile(const S* a, int64_t lda, const S* b, int64_t ldb, int64_t depth, S* c, int64_t ldc,
                                          const S* from, const S* factor, int64_t factor_step) {
  Vec<S> sum[Rows][Vecs] = {};
  const int64_t row = Transposed ? 1 : lda, step = Transposed ? lda : 1;
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    Vec<S> column[Vecs];
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) column[v] = load(b + v * kLanes<S>);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) sum[i][v] = fma(splat(a[i * row]), column[v], sum[i][v]);
    }
    a += step;
    b += ldb;
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) {
      S* to = c + i * ldc + v * kLanes<S>;
      if constexpr (into == Into::kSet) store(to, sum[i][v]);
      if constexpr (into == Into::kAdd) store(to, load(to) + sum[i][v]);
      if constexpr (into == Into::kSubtract) store(to, load(to) - sum[i][v]);
      if constexpr (into == Into::kDecayed) {
        store(to, fma(splat(factor[i * factor_step]), load(from + i * ldc + v * kLanes<S>), sum[i][v]));
      }
    }
  }
}

// The same for `rows` rows, a multiple of 8, and `columns` columns, rounded up to whole vectors.
template <bool Transposed, Into into, class S>
void state_product(const S* a, int64_t lda, const S* b, int64_t ldb, int64_t rows, int64_t depth, int64_t columns, S* c,
                   int64_t ldc, const S* from = nullptr, const S* factor = nullptr, int64_t factor_step = 0) {
  constexpr int tile = GOSSAMER_TILE_ROWS, lanes = kLanes<S>;
  // Longer chains of float additions would be less accurate than plain torch's products.
  constexpr int64_t longest = 128;
  if (depth > longest) {
    state_product<Transposed, into>(a, lda, b, ldb, rows, longest, columns, c, ldc, from, factor, factor_step);
    constexpr Into more = into == Into::kSubtract ? Into::kSubtract : Into::kAdd;
    return state_product<Transposed, more>(a + (Transposed ? longest * lda : longest), lda, b + longest * ldb, ldb, rows,
                                           depth - longest, columns, c, ldc);
  }
  const int64_t vectors = (columns + lanes - 1) / lanes;
  for (int64_t v = 0; v < vectors;) {
    const int64_t left = vectors - v;
    const int width = static_cast<int>(left == 4 ? 2 : std::min<int64_t>(left, GOSSAMER_TILE_VECTORS));
    const int64_t j = v * lanes;
    for (int64_t i = 0; i < rows; i += tile) {
      const S* left_side = a + (Transposed ? i : i * lda);
      const auto run = [&](auto vecs) {
        state_tile<tile, vecs, Transposed, into>(left_side, lda, b + j, ldb, depth, c + i * ldc + j, ldc, from + i * ldc + j,
                                                 factor + i * factor_step, factor_step);
      };
      if constexpr (GOSSAMER_TILE_VECTORS > 2) {
        if (width == 3) {
          run(std::integral_constant<int, 3>{});
          continue;
        }
      }
      if (width == 2) {
        run(std::integral_constant<int, 2>{});
      } else {
        run(std::integral_constant<int, 1>{});
      }
    }
    v += width;
  }
}

// to[c][r] = from[r][c] for whole vectors of rows and columns.
template <class S>
void transpose_square(const S* from, int64_t from_stride, int64_t rows, int64_t columns, S* to, int64_t to_stride) {
  constexpr int n = kLanes<S>;
  for (int64_t r = 0; r < rows; r += n) {
    for (int64_t c = 0; c < columns; c += n) {
      Vec<S> v[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) v[i] = load(from + (r + i) * from_stride + c);
      transpose<S>(v);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) store(to + (c + i) * to_stride + r, v[i]);
    }
  }
}

// exp of a log decay, exactly 0 for −inf and very negative values.
template <class S>
constexpr S kLeastLogDecay = sizeof(S) == 4 ? S(-87) : S(-708);
template <class S>
GOSSAMER_INLINE Vec<S> decay_of(Vec<S> g) {
  return g < kLeastLogDecay<S> ? Vec<S>{} : vexp(g);
}

// The same for a head's decay, rounded only once, because its error accumulates over tokens in the whole state.
template <class S>
S head_decay_of(S g) {
  return g < kLeastLogDecay<S> ? S{0} : static_cast<S>(std::exp(static_cast<double>(g)));
}

// log(1 + exp(x)): the larger of x and 0, and log1p(y) = 2·atanh(y / (2 + y)) of y = exp(−|x|).
GOSSAMER_INLINE Vec<float> vsoftplus(Vec<float> x) {
  const Vec<float> y = vexp(x < 0.0f ? x : -x), s = y / (y + 2.0f), s2 = s * s;
  Vec<float> sum = splat(1.0f / 15);
  for (const float c : {1.0f / 13, 1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3, 1.0f}) sum = sum * s2 + c;
  return (x > 0.0f ? x : Vec<float>{}) + 2.0f * s * sum;
}
GOSSAMER_INLINE Vec<double> vsoftplus(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = (x[i] > 0 ? x[i] : 0) + std::log1p(std::exp(x[i] > 0 ? -x[i] : x[i]));
  return x;
}
template <class V>
GOSSAMER_INLINE V vsigmoid(V x) {
  const V y = vexp(x < 0 ? x : -x);
  return (x < 0 ? y : V{} + 1) / (y + 1);
}

// Parameters of a head's log decays.
template <class S>
struct DecayGate {
  bool raw, sigmoid;
  S rate, lower_bound;
  const S* bias;  // of the head's channels, or null

  __attribute__((always_inline)) Vec<S> decay(Vec<S> g, Vec<S> shift) const {
    if (!raw) return g;
    const Vec<S> x = g + shift;
    return sigmoid ? lower_bound * vsigmoid(rate * x) : -rate * vsoftplus(x);
  }
};

template <class S, class A>
DecayGate<S> decay_gate_of(const A& a, int64_t head, int64_t channels) {
  const S* a_log = static_cast<const S*>(a.a_log);
  const S* bias = static_cast<const S*>(a.dt_bias);
  return {a_log != nullptr, a.sigmoid, a_log ? std::exp(a_log[head]) : S{1}, static_cast<S>(a.lower_bound),
          bias ? bias + head * channels : nullptr};
}

// Calls f with the rows of one head in their type: T, or the type of sums.
template <class T, class F>
GOSSAMER_INLINE void with_rows(const HeadArray& x, int64_t batch, int64_t token, int64_t head, F&& f) {
  using S = Accumulator<T>;
  const int64_t at = batch * x.batch_stride + token * x.token_stride + head * x.head_stride;
  constexpr DType sums = sizeof(S) == 8 ? DType::kFloat64 : DType::kFloat32;
  if (x.dtype == sums) {
    f(static_cast<S*>(x.base) + at);
  } else if constexpr (!std::is_same_v<T, S>) {
    f(static_cast<T*>(x.base) + at);
  }
}

// Copies `count` rows of `size` values, followed by zeros up to `rows` whole rows.
template <class S, class T>
void load_rows(const T* from, int64_t stride, int64_t count, int64_t size, S* to, int64_t to_stride, int64_t rows) {
  constexpr int n = kLanes<S>;
  const int64_t whole = whole_blocks(size);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t c = 0; c < whole; c += n) {
      const int64_t left = t < count ? size - c : 0;
      const Vec<S> v = left >= n  ? load(from + t * stride + c)
                       : left > 0 ? load_some(from + t * stride + c, static_cast<int>(left))
                                  : Vec<S>{};
      store(to + t * to_stride + c, v);
    }
  }
}

template <class T, class S>
void store_rows(const S* from, int64_t from_stride, int64_t count, int64_t size, T* to, int64_t stride) {
  constexpr int n = kLanes<S>;
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t c = 0; c < size; c += n) {
      store_valid(to + t * stride + c, load(from + t * from_stride + c), static_cast<int>(std::min<int64_t>(n, size - c)));
    }
  }
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
