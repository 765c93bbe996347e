// Matrix products on panels.
//
// Every output value is summed along the depth in order, with a new partial sum every segment_of() values or every tile,
// regardless of other rows and columns. So a token's result depends neither on its position in a batch nor on the number of
// threads.
#pragma once

#include "cpu/panel.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Depth of a block of a product in packed values, a multiple of every segment.
constexpr int kDepth = 128;

// One long chain of float additions is several times less accurate than the dot products of BLAS, which keep a sum per lane.
// Short segments avoid this; each costs a pass over the sums. At depths where BLAS itself adds chains of hundreds of terms, long
// segments are accurate enough.
inline int segment_length(int64_t depth) { return depth < 256 ? 16 : depth < 512 ? 32 : 128; }

// The same in packed values.
template <class P>
int segment_of(int64_t depth) {
  // The rounding of bfloat16 inputs far outweighs that of a long chain of float additions.
  return kTerms<P> > 1 ? kDepth : segment_length(depth);
}

// Weight rows processed together: the unit of work that threads share.
constexpr int kGroup = 32;

// Prefetches runs of `bytes`, `stride` apart, during a product: a few lines per step, since many at once would delay the product's
// own loads.
struct LinesAhead {
  const char* run = nullptr;
  int64_t bytes = 0, stride = 0, runs = 0, at = 0, per_step = 0, gap = 0, wait = 0;

  template <class T>
  static LinesAhead of(const T* first, int64_t values, int64_t stride, int64_t runs) {
    if (values <= 0 || runs <= 0) return {};
    constexpr int64_t size = sizeof(T);
    return {reinterpret_cast<const char*>(first), values * size, stride * size, runs};
  }
  // `per_step` lines every `gap` steps.
  void share_among(int64_t steps) {
    const int64_t lines = std::max<int64_t>(1, runs * ((bytes + 63) / 64));
    steps = std::max<int64_t>(1, steps);
    per_step = (lines + steps - 1) / steps;
    gap = wait = std::max<int64_t>(1, steps / lines);
  }
  __attribute__((always_inline)) void fetch() { fetch_into<2>(); }
  // Prefetches one line of each run, which overlaps page-table lookups that would otherwise come one after another.
  void touch_runs() const {
    for (int64_t i = 0; i < runs; ++i) __builtin_prefetch(run + i * stride, 0, 2);
  }

 protected:
  // Locality as of __builtin_prefetch(): 2 is the second-level cache.
  template <int Locality>
  __attribute__((always_inline)) void fetch_into() {
    if (--wait > 0) return;
    wait = gap;
    for (int64_t i = 0; i < per_step && runs > 0; ++i) {
      __builtin_prefetch(run + at, 0, Locality);
      at += 64;
      if (at >= bytes) {
        at = 0;
        run += stride;
        --runs;
      }
    }
  }
};
struct NothingAhead {
  void fetch() {}
};

// sum[i][v] += a(i, k) · b[k][v] over k, a(i, k) at a[i·a_row + k·a_step]. With Half, the upper half of the last v is unused and
// not computed.
template <class P, bool Half = false, int Rows, int Vecs, class Ahead = NothingAhead>
GOSSAMER_INLINE void accumulate(Vec<SumOf<P>> (&sum)[Rows][Vecs], const P* a, int64_t a_row, int64_t a_step, const P* b,
                                int64_t depth, Ahead&& ahead = {}) {
  constexpr int whole = Half ? Vecs - 1 : Vecs;
  // Measured: with one whole vector of floats, a broadcast for each width is faster.
  [[maybe_unused]] constexpr bool kShared = whole > 1 || (whole == 1 && kTerms<P> > 1);
  [[maybe_unused]] HalfVec<SumOf<P>> tail[Rows] = {};
  // Branch predictors miss the end of a loop of about a hundred iterations; unrolling halves their number.
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    Vec<P> column[Vecs];
#pragma GCC unroll 4
    for (int v = 0; v < whole; ++v) column[v] = load(b + v * kLanes<P>);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < whole; ++v) sum[i][v] = fma(splat(a[i * a_row]), column[v], sum[i][v]);
      if constexpr (Half) {
        // Compilers broadcast a value for each of the two widths unless one is half of the other.
        const auto value = kShared ? lower_half<P>(splat(a[i * a_row])) : splat_half(a[i * a_row]);
        tail[i] = fma(value, load_bytes<HalfVec<P>>(b + whole * kLanes<P>), tail[i]);
      }
    }
    ahead.fetch();
    a += a_step;
    b += Vecs * kLanes<P>;
  }
  if constexpr (Half) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) sum[i][whole] += widened(tail[i]);
  }
}

// One expert's weight, w(n, k) at base[n·row_stride + k·col_stride].
template <class T>
struct Weight {
  const T* base;
  int64_t row_stride, col_stride;
  int64_t num_rows, depth;
};

// One packed value: `terms` terms from `from` on, `stride` apart, and zeros for missing terms.
template <class P, class T>
GOSSAMER_INLINE P packed_value(const T* from, [[maybe_unused]] int64_t stride, [[maybe_unused]] int64_t terms) {
  if constexpr (std::is_same_v<P, BFloat16Pair>) {
    return {{from[0], terms > 1 ? from[stride] : BFloat16{0}}};
  } else {
    return static_cast<P>(to_scalar(*from));
  }
}

// Rows of a tile of weights; products read whole tiles.
template <class P>
constexpr int kRowUnit = kTiled<P> ? kTileSide : 4;

// Copies w(n .. n+count, k .. k+terms) packed as [kGroup][kDepth]; missing rows are zero.
template <class T, class P>
void pack_rows(const Weight<T>& w, int64_t n, int count, int64_t k, int64_t terms, P* out) {
  constexpr int lanes = kLanes<P>;
  const int depth = static_cast<int>((terms + kTerms<P> - 1) / kTerms<P>);
  const T* from = w.base + n * w.row_stride + k * w.col_stride;
  for (int i = 0; i < (count + kRowUnit<P> - 1) / kRowUnit<P> * kRowUnit<P>; ++i) {
    P* to = out + i * kDepth;
    const T* row = from + i * w.row_stride;
    if (i >= count) {
      for (int j = 0; j < depth; ++j) to[j] = P{};
    } else if (w.col_stride == 1) {
      static_assert(kDepth % lanes == 0);
      for (int j = 0; j < depth; j += lanes) store(to + j, load_terms<P>(row + j * kTerms<P>, terms - j * kTerms<P>));
    } else {
      for (int j = 0; j < depth; ++j) {
        const int64_t term = j * kTerms<P>;
        to[j] = packed_value<P>(row + term * w.col_stride, w.col_stride, terms - term);
      }
    }
  }
}

// The same for a weight that is contiguous in n, packed as [kDepth][Unit].
template <int Unit = kGroup, class T, class P>
void pack_columns(const Weight<T>& w, int64_t n, int count, int64_t k, int64_t terms, P* out) {
  constexpr int lanes = kLanes<P>;
  const Panel<P, Unit / lanes> panel{out, packed_depth<P>(terms), Unit};
  for (int64_t i = 0; i < terms; i += kTerms<P>) {
    const T* row = w.base + n + (k + i) * w.col_stride;
    pack_run(panel, i / kTerms<P>, row, i + 1 < terms ? row + w.col_stride : nullptr, 0, count);
    for (int j = (count + lanes - 1) / lanes * lanes; j < Unit; j += lanes) store(panel.at(i / kTerms<P>, j), Vec<P>{});
  }
}

template <class P>
constexpr int kPackSize = kDepth * kGroup;

// c (+)= Σ_k a(i, k) · b[k] for a tile of Rows rows and one block of Vecs vectors, a(i, k) at a[i·ARow + k·AStep], or at
// a[i·a_row + k] where ARow is 0. Each form is a separate function, so that its sums stay in registers.
template <int Rows, int Vecs, int ARow, int AStep, bool Half = false, class P, class Ahead = NothingAhead>
__attribute__((noinline)) void block_product(const P* a, [[maybe_unused]] int64_t a_row, const P* b, int depth, int segment,
                                             bool first, SumOf<P>* c, int64_t c_stride, Ahead&& ahead = {}) {
  using S = SumOf<P>;
  auto lines = ahead;
  for (int k = 0; k < depth; k += segment) {
    Vec<S> sum[Rows][Vecs] = {};
    accumulate<P, Half>(sum, a + k * AStep, ARow > 0 ? ARow : a_row, AStep, b + k * Vecs * kLanes<P>,
                        std::min(segment, depth - k), lines);
    const bool fresh = first && k == 0;
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) {
        S* to = c + i * c_stride + v * kLanes<S>;
        store(to, fresh ? sum[i][v] : load(to) + sum[i][v]);
      }
    }
  }
  ahead = lines;
}

// Rows of a tile of Vecs vectors: at least eight independent sums, to hide the latency of an addition.
template <int Vecs>
constexpr int kTileRows = Vecs == 1 ? std::max(8, GOSSAMER_TILE_ROWS) : GOSSAMER_TILE_ROWS;

// Calls f with the height and the first row of each tile until `count` rows, rounded up to a multiple of 4, are covered.
template <int Rows = GOSSAMER_TILE_ROWS, class F>
GOSSAMER_INLINE void for_tiles(int64_t count, F&& f) {
  static_assert(Rows % 4 == 0);
  int64_t done = 0;
  while (count - done >= Rows) {
    f(std::integral_constant<int, Rows>{}, done);
    done += Rows;
  }
  if constexpr (Rows > 8) {
    if (count - done > 4) {
      f(std::integral_constant<int, 8>{}, done);
      done += 8;
    }
  }
  for (; done < count; done += 4) f(std::integral_constant<int, 4>{}, done);
}

// The full-height tiles of a product of `count` rows with a panel.
template <class P>
int64_t num_tiles(const Panel<P>& panel, int64_t count) {
  const auto tiles = [&](int64_t rows) { return (count + rows - 1) / rows; };
  const int64_t blocks = panel.num_blocks();
  if (blocks == 0) return 0;
  return (blocks - 1) * tiles(GOSSAMER_TILE_ROWS) +
         tiles(panel.block_vectors(blocks - 1) == 1 ? kTileRows<1> : GOSSAMER_TILE_ROWS);
}

// Bytes between the weight rows that a product reads and those that it prefetches: about what memory delivers within its latency.
constexpr int64_t kFetchDistance = 16 << 10;

// How a group of a weight's rows is read: in place, or packed in its memory order.
enum class Read { kInPlace, kRows, kColumns };

// c[i][token] (+)= Σ_k w(n+i, k) · panel[k][token] for i < count <= kGroup. A part of the weight's group and a block of the
// panel, both kDepth deep, share the first-level cache. Weights are read from memory once, so the next `unit` rows are prefetched
// during the product.
template <Read read, class T, class P>
void group_product_of(const Weight<T>& w, int64_t n, int count, int unit, const Panel<P>& panel, SumOf<P>* c, int64_t c_stride,
                      P* pack, bool add) {
  constexpr bool columns = read == Read::kColumns;
  constexpr int a_row = read == Read::kInPlace ? 0 : columns ? 1 : kDepth;
  constexpr int64_t step = kDepth * kTerms<P>;
  const int segment = segment_of<P>(w.depth);
  const int64_t blocks = panel.num_blocks(), row_stride = w.row_stride / kTerms<P>;
  // Rows are read in parts of `step` terms, and prefetched `distance` parts ahead.
  const int64_t steps = (w.depth + step - 1) / step,
                step_bytes = unit * std::min(step, w.depth) * static_cast<int64_t>(sizeof(T));
  const int64_t distance = columns ? 1 : std::max<int64_t>(1, kFetchDistance / step_bytes);
  for (int64_t k = 0; k < w.depth; k += step) {
    const int64_t terms = std::min(step, w.depth - k);
    const int depth = static_cast<int>((terms + kTerms<P> - 1) / kTerms<P>);
    const int64_t then = k / step + distance, next_n = n + then / steps * (then < steps ? count : unit),
                  next_k = then % steps * step;
    const int64_t next_rows = then < steps ? count : std::clamp<int64_t>(w.num_rows - next_n, 0, unit);
    const int64_t next_terms = std::min(step, w.depth - next_k);
    const int64_t runs = columns             ? next_terms
                         : w.col_stride == 1 ? next_rows
                                             : 0,
                  run_length = columns ? next_rows : next_terms;
    const T* next = w.base + next_n * w.row_stride + next_k * w.col_stride;
    auto ahead = LinesAhead::of(next, run_length, columns ? w.col_stride : w.row_stride, runs);
    ahead.share_among(num_tiles(panel, count) * (columns ? 1 : depth));
    if (next_k == 0 && !columns) ahead.touch_runs();
    const P* a = pack;
    if constexpr (read == Read::kInPlace) {
      a = reinterpret_cast<const P*>(w.base + n * w.row_stride + k);
    } else if constexpr (columns) {
      pack_columns(w, n, count, k, terms, pack);
    } else {
      pack_rows(w, n, count, k, terms, pack);
    }
    for (int64_t block = 0; block < blocks; ++block) {
      with_block(panel, block, [&](auto vectors, auto half) {
        const P* b = panel.block(block) + k / kTerms<P> * vectors * kLanes<P>;
        for_tiles<kTileRows<vectors>>(count, [&](auto tile, int64_t i) {
          SumOf<P>* to = c + i * c_stride + block * kPanelWidth<P>;
          if constexpr (columns) {
            ahead.fetch();
            block_product<tile, vectors, a_row, kGroup, half>(a + i, row_stride, b, depth, segment, !add && k == 0, to,
                                                              c_stride);
          } else {
            block_product<tile, vectors, a_row, 1, half>(a + i * (a_row > 0 ? a_row : row_stride), row_stride, b, depth,
                                                         segment, !add && k == 0, to, c_stride, ahead);
          }
        });
      });
    }
  }
}

// Up to this many tokens, weight rows rather than tokens fill the vector lanes, most of which tokens would leave empty.
constexpr int kFewTokens = GOSSAMER_VECTOR_BYTES / sizeof(double);

// Whether a weight is contiguous along its rows, as a transposed view is.
template <class T>
GOSSAMER_INLINE bool runs_along_rows(const Weight<T>& w) {
  return w.row_stride == 1 && w.col_stride != 1;
}

// Whether a quarter of a group of weight rows covers only parts of the cache lines that it reads.
template <class T>
GOSSAMER_INLINE bool quarters_cut_lines(const Weight<T>& w) {
  return runs_along_rows(w) && kGroup / 4 * sizeof(T) < 64;
}
template <class W>
GOSSAMER_INLINE bool quarters_cut_lines(const W&) {
  return false;
}

// The number of units of weight rows that are handed out in quarters. None for few tokens, whose products keep a whole unit of rows
// in the lanes; none where two quarters would read the same cache lines; none for tiles, which span half a unit.
template <class P, class W>
GOSSAMER_INLINE int64_t quartered(const W& w, int64_t tokens, int64_t units) {
  return tokens <= kFewTokens || kTiled<P> || quarters_cut_lines(w) ? 0 : units;
}

// Adds the terms first .. last of the kLanes weight rows at `from` to sum[token], as block_product does but with rows in the lanes.
// `rows` of these rows exist, and `next_rows` of those after them, which are prefetched.
template <int Tokens, bool Columns, class T, class P>
GOSSAMER_INLINE void accumulate_few(Vec<SumOf<P>> (&sum)[Tokens], const Weight<T>& w, const T* from, int rows, int next_rows,
                                    int64_t first, int64_t last, const Panel<P>& panel) {
  constexpr int n = kLanes<P>, terms = kTerms<P>;
  const P* x = panel.data + first / terms * n;
  const auto add = [&](Vec<P> weights) {
#pragma GCC unroll 16
    for (int t = 0; t < Tokens; ++t) sum[t] = fma(splat(x[t]), weights, sum[t]);
    x += n;
  };
  if constexpr (Columns) {
    for (int64_t k = first; k < last; k += terms) {
      const T* run = from + k * w.col_stride;
      const T* next = k + 1 < last ? run + w.col_stride : nullptr;
      __builtin_prefetch(run + n, 0, 2);
      if constexpr (terms > 1) __builtin_prefetch(run + w.col_stride + n, 0, 2);
      add(load_lanes<P>(run, next, rows));
    }
  } else {
    int64_t k = first;
    if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<P, float>) {
      // Transposes words of two terms, half as many as there are values.
      for (; rows == n && k + 2 * n <= last; k += 2 * n) {
        const T* row = from + k;
        for (int i = 0; i < next_rows; ++i) __builtin_prefetch(row + (n + i) * w.row_stride, 0, 2);
        Vec<float> v[n];
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) v[i] = load_bytes<Vec<float>>(row + i * w.row_stride);
        transpose<float>(v);
#pragma GCC unroll 16
        for (int j = 0; j < n; ++j) {
          add((Vec<float>)((UInts)v[j] << 16));
          add((Vec<float>)((UInts)v[j] & 0xffff0000u));
        }
      }
    }
    for (; k < last; k += n * terms) {
      const T* row = from + k;
      for (int i = 0; i < next_rows; ++i) __builtin_prefetch(row + (n + i) * w.row_stride, 0, 2);
      Vec<P> v[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) v[i] = i >= rows ? Vec<P>{} : load_terms<P>(row + i * w.row_stride, last - k);
      transpose<P>(v);
      if (last - k >= n * terms) {
#pragma GCC unroll 16
        for (int j = 0; j < n; ++j) add(v[j]);
      } else {
        for (int j = 0; j * terms < last - k; ++j) add(v[j]);
      }
    }
  }
}

// group_product for a panel of Tokens tokens. accumulate(sum, i, rows, k, last) adds the terms k .. last of the weight rows
// i .. i+rows, which are the lanes of sum[token].
template <int Tokens, class P, class Accumulate>
GOSSAMER_INLINE void few_tokens_product(int64_t count, int64_t depth, SumOf<P>* c, int64_t c_stride, Accumulate&& accumulate,
                                        bool add = false) {
  using S = SumOf<P>;
  constexpr int lanes = kLanes<S>;
  const int segment = segment_of<P>(depth) * kTerms<P>;
  for (int64_t i = 0; i < count; i += lanes) {
    const int rows = static_cast<int>(std::min<int64_t>(lanes, count - i));
    Vec<S> total[Tokens] = {};
    if (add) {
      Vec<S> before[lanes] = {};
      for (int r = 0; r < rows; ++r) before[r] = load(c + (i + r) * c_stride);
      transpose<S>(before);
      for (int t = 0; t < Tokens; ++t) total[t] = before[t];
    }
    for (int64_t k = 0; k < depth; k += segment) {
      Vec<S> sum[Tokens] = {};
      accumulate(sum, i, rows, k, std::min<int64_t>(depth, k + segment));
      for (int t = 0; t < Tokens; ++t) total[t] = !add && k == 0 ? sum[t] : total[t] + sum[t];
    }
    Vec<S> v[lanes] = {};
    for (int t = 0; t < Tokens; ++t) v[t] = total[t];
    transpose<S>(v);
    for (int r = 0; r < rows; ++r) store(c + (i + r) * c_stride, v[r]);
  }
}

// The same for a weight that is contiguous along its depth, or along its rows.
template <int Tokens, bool Columns, class T, class P>
__attribute__((noinline)) void few_tokens_of(const Weight<T>& w, int64_t n, int64_t count, const Panel<P>& panel, SumOf<P>* c,
                                             int64_t c_stride, bool add) {
  const auto accumulate = [&](auto& sum, int64_t i, int rows, int64_t k, int64_t last) {
    constexpr int lanes = kLanes<SumOf<P>>;
    const int next_rows = static_cast<int>(std::clamp<int64_t>(w.num_rows - (n + i + lanes), 0, lanes));
    accumulate_few<Tokens, Columns>(sum, w, w.base + (n + i) * w.row_stride, rows, next_rows, k, last, panel);
  };
  few_tokens_product<Tokens, P>(count, w.depth, c, c_stride, accumulate, add);
}

// Prefetches what a product with `tokens` tokens reads first of the weight rows from n on; the product prefetches the rest.
template <class T>
void fetch_first_rows(const Weight<T>& w, int64_t n, int64_t tokens) {
  if (w.col_stride != 1) return;
  const int64_t rows = tokens > kFewTokens ? GOSSAMER_TILE_ROWS : kLanes<float>,
                bytes = std::min<int64_t>(w.depth * sizeof(T), tokens > kFewTokens ? kFetchDistance / rows : 512);
  for (int64_t i = n; i < std::min<int64_t>(n + rows, w.num_rows); ++i) {
    prefetch_lines<1, Fetch::kReadLater>(w.base + i * w.row_stride, bytes);
  }
}

// Calls f with the number of tokens, rounded up to a few sizes, as a constant; lanes past a panel's end are zero.
template <int Most = kFewTokens, int Tokens = 1, class F>
GOSSAMER_INLINE void with_few_tokens(int64_t tokens, F&& f) {
  if constexpr (Tokens < Most) {
    if (tokens > Tokens) return with_few_tokens<Most, Tokens * 2>(tokens, f);
  }
  f(std::integral_constant<int, Tokens>{});
}

// group_product() by vectors.
template <class T, class P>
void vector_group_product(const Weight<T>& w, int64_t n, int64_t count, const Panel<P>& panel, SumOf<P>* c, int64_t c_stride,
                          P* pack, bool add) {
  const bool columns = runs_along_rows(w);
  if (panel.width <= kFewTokens && (columns || w.col_stride == 1)) {
    return with_few_tokens(panel.width, [&](auto tokens) {
      if (columns) return few_tokens_of<tokens, true>(w, n, count, panel, c, c_stride, add);
      few_tokens_of<tokens, false>(w, n, count, panel, c, c_stride, add);
    });
  }
  // With few tokens the product is bound by reading weights, and few long streams are read faster than many short ones.
  const int tile = panel.block_vectors(0) == 1 ? kTileRows<1> : GOSSAMER_TILE_ROWS;
  const int unit = panel.num_blocks() == 1 && !columns ? tile : kGroup;
  for (int64_t i = 0; i < count; i += unit) {
    const int rows = static_cast<int>(std::min<int64_t>(unit, count - i));
    SumOf<P>* to = c + i * c_stride;
    if (columns) {
      group_product_of<Read::kColumns>(w, n + i, rows, unit, panel, to, c_stride, pack, add);
      continue;
    }
    if constexpr (sizeof(T) * kTerms<P> == sizeof(P)) {
      if (w.col_stride == 1 && rows % 4 == 0 && w.depth % kTerms<P> == 0 && w.row_stride % kTerms<P> == 0) {
        group_product_of<Read::kInPlace>(w, n + i, rows, unit, panel, to, c_stride, pack, add);
        continue;
      }
    }
    group_product_of<Read::kRows>(w, n + i, rows, unit, panel, to, c_stride, pack, add);
  }
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
