// Matrix products on panels. Included by isa_kernels.h.
//
// Every output value is a sum along depth in order, with a fresh sum every segment_of() values, or of tiles along depth and then what
// is left of it, whatever the other rows and columns are: a token's result does not depend on its place in a batch, nor on the
// number of threads.

// Packed values of a product that are worked on at a time, a multiple of every segment.
constexpr int kDepth = 128;

// One long chain of additions in float loses several times what the dot products of BLAS lose, which keep a sum per
// lane; short segments do not, but each costs a pass over the sums. Long ones are for depths whose products in BLAS, with
// chains of hundreds, lose more.
inline int segment_length(int64_t depth) { return depth < 256 ? 16 : depth < 512 ? 32 : 128; }

// The same in packed values.
template <class P>
int segment_of(int64_t depth) {
  // Pairs of bfloat16 bring errors of their own, far above those of a long chain of additions in float.
  return kTerms<P> > 1 ? kDepth : segment_length(depth);
}

// Weight rows that are worked on together: the unit in which threads share a product.
constexpr int kGroup = 32;

// sum[i][v] += a(i, k) · b[k][v] over k, a(i, k) at a[i·a_row + k·a_step]. With Half, the upper half of the last v, which
// nobody needs, stays as it is.
template <class P, bool Half = false, int Rows, int Vecs>
GOSSAMER_INLINE void accumulate(Vec<SumOf<P>> (&sum)[Rows][Vecs], const P* a, int64_t a_row, int64_t a_step, const P* b,
                                int64_t depth) {
  constexpr int whole = Half ? Vecs - 1 : Vecs;
  [[maybe_unused]] HalfVec<SumOf<P>> tail[Rows] = {};
  // The end of a loop of a hundred rounds is not foreseen.
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    Vec<P> column[Vecs];
#pragma GCC unroll 4
    for (int v = 0; v < whole; ++v) column[v] = load(b + v * kLanes<P>);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < whole; ++v) sum[i][v] = fma(splat(a[i * a_row]), column[v], sum[i][v]);
      if constexpr (Half) tail[i] = fma(splat_half(a[i * a_row]), load_bytes<HalfVec<P>>(b + whole * kLanes<P>), tail[i]);
    }
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

// One packed value: `terms` terms from `from` on, `stride` apart, and zero for those past the last.
template <class P, class T>
GOSSAMER_INLINE P packed_value(const T* from, [[maybe_unused]] int64_t stride, [[maybe_unused]] int64_t terms) {
  if constexpr (std::is_same_v<P, BFloat16Pair>) {
    return {{from[0], terms > 1 ? from[stride] : BFloat16{0}}};
  } else {
    return static_cast<P>(to_scalar(*from));
  }
}

// Rows of a tile of weights: what a product reads of them is a multiple of it.
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

// The same of a weight that is contiguous in n, as [kDepth][Unit].
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

// Fetches runs first .. last, `stride` apart and `length` values long, of a weight. Weights are read once, from far away: the
// next block comes while this one is worked on.
template <class T>
GOSSAMER_INLINE void prefetch_runs(const T* base, int64_t stride, int64_t first, int64_t last, int64_t length) {
  const int64_t bytes = length * static_cast<int64_t>(sizeof(T));
  for (int64_t i = first; i < last; ++i) prefetch_lines<0, Fetch::kReadLater>(base + i * stride, bytes);
}

template <class P>
constexpr int kPackSize = kDepth * kGroup;

// What rows_product() packs of a weight at a time, for a second-level cache of a megabyte and more.
constexpr int kRowsPackSize = 1 << 16;

// c (+)= Σ_k a(i, k) · b[k] for a tile of Rows rows and one block of Vecs vectors, a(i, k) at a[i·ARow + k·AStep], or at
// a[i·a_row + k] where ARow is 0. Its sums must live in registers, so each form is a function of its own.
template <int Rows, int Vecs, int ARow, int AStep, bool Half = false, class P>
__attribute__((noinline)) void block_product(const P* a, [[maybe_unused]] int64_t a_row, const P* b, int depth, int segment,
                                             bool first, SumOf<P>* c, int64_t c_stride) {
  using S = SumOf<P>;
  for (int k = 0; k < depth; k += segment) {
    Vec<S> sum[Rows][Vecs] = {};
    accumulate<P, Half>(sum, a + k * AStep, ARow > 0 ? ARow : a_row, AStep, b + k * Vecs * kLanes<P>, std::min(segment, depth - k));
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
}

// Rows of a tile of Vecs vectors: at least eight sums, or each would wait for its own last addition.
template <int Vecs>
constexpr int kTileRows = Vecs == 1 ? std::max(8, GOSSAMER_TILE_ROWS) : GOSSAMER_TILE_ROWS;

// Calls f with the height of each next tile and its place until `count` rows are covered, rounded up to a multiple of 4.
template <int Rows = GOSSAMER_TILE_ROWS, class F>
GOSSAMER_INLINE void for_tiles(int64_t count, F&& f) {
  static_assert(Rows % 4 == 0 && kGroup % Rows == 0);
  int64_t done = 0;
  while (count - done >= Rows) {
    f(std::integral_constant<int, Rows>{}, done);
    done += Rows;
  }
  for (; done < count; done += 4) f(std::integral_constant<int, 4>{}, done);
}

// Lines of memory that come while tiles are multiplied: of runs of `bytes`, `stride` apart, some with each step. Many at once would hold
// up the tiles.
struct LinesAhead {
  const char* run = nullptr;
  int64_t bytes = 0, stride = 0, runs = 0, at = 0, per_step = 0;

  template <class T>
  static LinesAhead of(const T* first, int64_t values, int64_t stride, int64_t runs) {
    if (values <= 0 || runs <= 0) return {};
    return {reinterpret_cast<const char*>(first), values * static_cast<int64_t>(sizeof(T)), stride * static_cast<int64_t>(sizeof(T)), runs};
  }
  void share_among(int64_t steps) {
    const int64_t lines = runs * ((bytes + 63) / 64);
    per_step = (lines + steps - 1) / std::max<int64_t>(1, steps);
  }
  __attribute__((always_inline)) void fetch() {
    for (int64_t i = 0; i < per_step && runs > 0; ++i) {
      __builtin_prefetch(run + at, 0, 2);
      at += 64;
      if (at >= bytes) {
        at = 0;
        run += stride;
        --runs;
      }
    }
  }
};

#if GOSSAMER_AMX
// c (+)= Σ_k left(i, k) · b[k] over whole tiles along the depth, for 16 · Rows rows and one block of Vecs vectors; strides are bytes.
template <int Rows, int Vecs>
__attribute__((noinline)) void tile_product(const char* left, int64_t left_stride, const BFloat16Pair* b, int64_t steps, bool fresh,
                                            float* c, int64_t c_stride, LinesAhead& ahead) {
  using Sums = TileSums<Rows, Vecs>;
  LinesAhead lines = ahead;
  fence_memory();
  if (fresh) {
    Sums::zero();
  } else {
    Sums::load(c, c_stride);
  }
  for (int64_t step = 0; step < steps; ++step) {
    Sums::add(left, left_stride, b);
    lines.fetch();
    left += 64;
    b += kTileSide * Vecs * kLanes<float>;
  }
  Sums::store(c, c_stride);
  fence_memory();
  ahead = lines;
}
#endif

// c (+)= left · panel from `from` on along its depth, for `count` rows of packed values that lie `stride` of them apart and are there
// up to a multiple of 16. What is left of the depth after whole tiles comes last.
template <class P>
void tiled_product(const P* left, int64_t stride, int count, const Panel<P>& panel, int64_t from, int depth, bool fresh, float* c,
                   int64_t c_stride, [[maybe_unused]] LinesAhead ahead) {
#if GOSSAMER_AMX
  const int64_t steps = depth / kTileSide;
  ahead.share_among(steps * panel.num_blocks());
  for (int64_t block = 0; block < panel.num_blocks(); ++block) {
    with_vectors<P>(panel.block_vectors(block), [&](auto vectors) {
      const P* b = panel.block(block) + from * vectors * kLanes<P>;
      float* to = c + block * kPanelWidth<P>;
      const auto product = count > kTileSide ? tile_product<2, vectors> : tile_product<1, vectors>;
      if (steps > 0) product(reinterpret_cast<const char*>(left), stride * sizeof(P), b, steps, fresh, to, c_stride * sizeof(float), ahead);
      const int done = static_cast<int>(steps) * kTileSide;
      if (done == depth) return;
      for_tiles<kTileRows<vectors>>(count, [&](auto tile, int64_t i) {
        block_product<tile, vectors, 0, 1>(left + i * stride + done, stride, b + done * vectors * kLanes<P>, depth - done, kDepth,
                                           fresh && done == 0, to + i * c_stride, c_stride);
      });
    });
  }
#endif
}

// c[token][0 .. 16 · vectors] (+)= rows · b for `steps` tiles along the depth, from `from` on in the rows; rows of c are kGroup values.
template <class P>
void tiles_of_rows([[maybe_unused]] const PackedRows<P>& rows, [[maybe_unused]] int64_t from, [[maybe_unused]] int64_t steps,
                   [[maybe_unused]] const P* b, [[maybe_unused]] int vectors, [[maybe_unused]] bool fresh, [[maybe_unused]] float* c,
                   [[maybe_unused]] LinesAhead& ahead) {
#if GOSSAMER_AMX
  with_vectors<P>(vectors, [&](auto vectors) {
    for (int64_t t = 0; t < rows.tokens; t += 2 * kTileSide) {
      const auto product = rows.tokens - t > kTileSide ? tile_product<2, vectors> : tile_product<1, vectors>;
      const char* left = reinterpret_cast<const char*>(rows.at(t, from));
      product(left, rows.stride() * sizeof(P), b, steps, fresh, c + t * kGroup, kGroup * sizeof(float), ahead);
    }
  });
#endif
}

// The same rows of a weight that is contiguous along them, packed as pack_rows() does.
template <class T, class P>
void pack_transposed(const Weight<T>& w, int64_t n, int count, int64_t k, int64_t terms, P* out) {
  constexpr int lanes = kLanes<P>, per = kTerms<P>;
  for (int i = 0; i < (count + kRowUnit<P> - 1) / kRowUnit<P> * kRowUnit<P>; i += lanes) {
    const int rows = std::clamp(count - i, 0, lanes);
    const T* from = w.base + n + i + k * w.col_stride;
    for (int64_t t = 0; t < terms; t += lanes * per) {
      Vec<P> v[lanes];
      for (int j = 0; j < lanes; ++j) {
        const int64_t term = t + j * per;
        const T* run = from + term * w.col_stride;
        v[j] = term < terms ? load_lanes<P>(run, term + 1 < terms ? run + w.col_stride : nullptr, rows) : Vec<P>{};
      }
      transpose<P>(v);
      for (int j = 0; j < lanes; ++j) store(out + (i + j) * kDepth + t / per, v[j]);
    }
  }
}

// How a group of a weight's rows is read: in place, or packed in its own order of memory.
enum class Read { kInPlace, kRows, kColumns };

// c[i][token] (+)= Σ_k w(n+i, k) · panel[k][token] for i < count <= kGroup. A part of the weight's group and a block of the
// panel, kDepth deep, are worked on together in the first-level cache; the next `unit` rows are fetched meanwhile, some
// with each tile: many at once would hold up the loads of the product.
template <Read read, class T, class P>
void group_product_of(const Weight<T>& w, int64_t n, int count, int unit, const Panel<P>& panel, SumOf<P>* c,
                      int64_t c_stride, P* pack, bool add) {
  constexpr bool columns = read == Read::kColumns;
  constexpr int a_row = read == Read::kInPlace ? 0 : columns ? 1 : kDepth;
  constexpr int64_t step = kDepth * kTerms<P>;
  const int segment = segment_of<P>(w.depth);
  const int64_t blocks = panel.num_blocks(), row_stride = w.row_stride / kTerms<P>;
  for (int64_t k = 0; k < w.depth; k += step) {
    const int64_t terms = std::min(step, w.depth - k);
    const int depth = static_cast<int>((terms + kTerms<P> - 1) / kTerms<P>);
    const bool more = k + step < w.depth;
    const int64_t next_n = more ? n : n + count, next_k = more ? k + step : 0;
    const int64_t next_rows = more ? count : std::clamp<int64_t>(w.num_rows - next_n, 0, unit);
    const int64_t next_terms = std::min(step, w.depth - next_k);
    const int64_t runs = columns ? next_terms : w.col_stride == 1 ? next_rows : 0, run_length = columns ? next_rows : next_terms;
    const int64_t tiles = blocks * ((count + GOSSAMER_TILE_ROWS - 1) / GOSSAMER_TILE_ROWS), share = (runs + tiles - 1) / tiles;
    int64_t fetched = 0;
    const T* next = w.base + next_n * w.row_stride + next_k * w.col_stride;
    // The pages of new rows are looked up together, which takes the time of one where each line by line would wait for its own.
    if (!more && !columns) {
      for (int64_t i = 0; i < runs; ++i) prefetch_lines<1, Fetch::kReadLater>(next + i * w.row_stride, 0);
    }
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
          const int64_t last = std::min(runs, fetched + share * tile / GOSSAMER_TILE_ROWS);
          prefetch_runs(next, columns ? w.col_stride : w.row_stride, fetched, last, run_length);
          fetched = last;
          block_product<tile, vectors, a_row, columns ? kGroup : 1, half>(a + i * (a_row > 0 ? a_row : row_stride), row_stride, b,
                                                                    depth, segment, !add && k == 0,
                                                                    c + i * c_stride + block * kPanelWidth<P>, c_stride);
        });
      });
    }
  }
}

// Up to so many tokens weights, not tokens, go into the vector lanes, most of which would be empty.
constexpr int kFewTokens = GOSSAMER_VECTOR_BYTES / sizeof(double);

// Whether runs of memory go along a weight's rows, as those of a transposed view do.
template <class T>
GOSSAMER_INLINE bool runs_along_rows(const Weight<T>& w) {
  return w.row_stride == 1 && w.col_stride != 1;
}

// Whether a quarter of a group of weight rows has but parts of the lines of memory that it reads.
template <class T>
GOSSAMER_INLINE bool quarters_cut_lines(const Weight<T>& w) {
  return runs_along_rows(w) && kGroup / 4 * sizeof(T) < 64;
}
template <class W>
GOSSAMER_INLINE bool quarters_cut_lines(const W&) {
  return false;
}

// The units of weight rows that are given out in quarters: none for few tokens, whose products hold rows in the lanes, as many
// as whole units have, none where two quarters would read the same lines, and none for tiles, which have as many rows as half a unit.
template <class P, class W>
GOSSAMER_INLINE int64_t quartered(const W& w, int64_t tokens, int64_t units) {
  return tokens <= kFewTokens || kTiled<P> || quarters_cut_lines(w) ? 0 : units;
}

// Adds the terms first .. last of the kLanes weight rows at `from` to sum[token]: block_product's sums, with rows in the
// lanes. `rows` of these rows exist and `next_rows` of those after them, which are fetched meanwhile.
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
      // Words of two terms are transposed, which are half as many as their values.
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

// group_product for a panel of Tokens tokens: accumulate(sum, i, rows, k, last) adds the terms k .. last of the weight rows
// i .. i+rows, which lie in the lanes of sum[token].
template <int Tokens, class P, class Accumulate>
GOSSAMER_INLINE void few_tokens_product(int64_t count, int64_t depth, SumOf<P>* c, int64_t c_stride,
                                        Accumulate&& accumulate, bool add = false) {
  using S = SumOf<P>;
  constexpr int lanes = kLanes<S>;
  const int segment = segment_of<P>(depth) * kTerms<P>;
  for (int64_t i = 0; i < count; i += lanes) {
    const int rows = static_cast<int>(std::min<int64_t>(lanes, count - i));
    Vec<S> total[Tokens] = {};
    for (int64_t k = 0; k < depth; k += segment) {
      Vec<S> sum[Tokens] = {};
      accumulate(sum, i, rows, k, std::min<int64_t>(depth, k + segment));
      for (int t = 0; t < Tokens; ++t) total[t] = k == 0 ? sum[t] : total[t] + sum[t];
    }
    Vec<S> v[lanes] = {};
    for (int t = 0; t < Tokens; ++t) v[t] = total[t];
    transpose<S>(v);
    for (int r = 0; r < rows; ++r) {
      S* to = c + (i + r) * c_stride;
      store(to, add ? load(to) + v[r] : v[r]);
    }
  }
}

// The same of a weight that is contiguous along its depth or, in columns, its rows.
template <int Tokens, bool Columns, class T, class P>
__attribute__((noinline)) void few_tokens_of(const Weight<T>& w, int64_t n, int64_t count, const Panel<P>& panel,
                                             SumOf<P>* c, int64_t c_stride, bool add) {
  const auto accumulate = [&](auto& sum, int64_t i, int rows, int64_t k, int64_t last) {
    constexpr int lanes = kLanes<SumOf<P>>;
    const int next_rows = static_cast<int>(std::clamp<int64_t>(w.num_rows - (n + i + lanes), 0, lanes));
    accumulate_few<Tokens, Columns>(sum, w, w.base + (n + i) * w.row_stride, rows, next_rows, k, last, panel);
  };
  few_tokens_product<Tokens, P>(count, w.depth, c, c_stride, accumulate, add);
}

// group_product() by tiles.
template <class T, class P>
void tiled_group_product(const Weight<T>& w, int64_t n, int64_t count, const Panel<P>& panel, float* c, int64_t c_stride, P* pack,
                         bool add) {
  static_assert(kGroup == 2 * kTileSide);
  constexpr int64_t step = kDepth * kTerms<P>;
  for (int64_t i = 0; i < count; i += kGroup) {
    const int rows = static_cast<int>(std::min<int64_t>(kGroup, count - i));
    const int64_t next_rows = std::clamp<int64_t>(w.num_rows - (n + i + rows), 0, rows);
    float* to = c + i * c_stride;
    const T* from = w.base + (n + i) * w.row_stride;
    const T* next = from + rows * w.row_stride;
    if (w.col_stride == 1 && rows % kTileSide == 0 && w.depth % (kTileSide * kTerms<P>) == 0 && w.row_stride % kTerms<P> == 0) {
      tiled_product(reinterpret_cast<const P*>(from), w.row_stride / kTerms<P>, rows, panel, 0, static_cast<int>(packed_depth<P>(w.depth)),
                    !add, to, c_stride, LinesAhead::of(next, w.depth, w.row_stride, next_rows));
      continue;
    }
    for (int64_t k = 0; k < w.depth; k += step) {
      const int64_t terms = std::min(step, w.depth - k);
      LinesAhead ahead;
      if (runs_along_rows(w)) {
        pack_transposed(w, n + i, rows, k, terms, pack);
        const bool more = k + step < w.depth;
        ahead = more ? LinesAhead::of(from + (k + step) * w.col_stride, rows, w.col_stride, std::min(step, w.depth - k - step))
                     : LinesAhead::of(next, next_rows, w.col_stride, std::min(step, w.depth));
      } else {
        pack_rows(w, n + i, rows, k, terms, pack);
        if (w.col_stride == 1) ahead = LinesAhead::of(next + k, terms, w.row_stride, next_rows);
      }
      tiled_product(pack, kDepth, rows, panel, k / kTerms<P>, static_cast<int>(packed_depth<P>(terms)), !add && k == 0, to, c_stride, ahead);
    }
  }
}

// Columns of a weight that is contiguous along its rows which rows_product() packs together: runs of some lines of memory, but few
// enough that they fit, and that each thread has several such pieces.
template <class P>
int64_t rows_product_unit(int64_t num_rows, int64_t depth, int threads) {
  const int64_t fits = kRowsPackSize / std::max<int64_t>(1, token_depth<P>(depth)), share = num_rows / (4 * threads);
  return std::clamp<int64_t>(std::min(fits, share) / kGroup * kGroup, kGroup, 4 * kGroup);
}

// Calls f(i, count, c) with c[token][j] = Σ_k rows[token][k] · w(i+j, k) by tiles, kGroup rows of a weight at a time of n .. end, one
// unit. The weight is contiguous along its rows: they are columns here, and are packed without being transposed. c has room for whole
// tiles of tokens, kGroup values each.
template <class T, class P, class F>
void rows_product(const Weight<T>& w, int64_t n, int64_t end, const PackedRows<P>& rows, float* c, P* pack, F&& f) {
  constexpr int64_t ahead_rows = 16;
  constexpr int64_t step = kRowsPackSize / kGroup * kTerms<P>;
  const int64_t width = end - n;
  for (int64_t i = n, count = w.depth > step ? kGroup : width; i < end; i += count) {
    count = std::min(count, end - i);
    for (int64_t k = 0; k < w.depth; k += step) {
      const int64_t terms = std::min(step, w.depth - k);
      const Panel<P> panel{pack, token_depth<P>(terms), count};
      for (int64_t j = 0; j < terms; j += kTerms<P>) {
        const T* run = w.base + i + (k + j) * w.col_stride;
        for (int64_t a = j + ahead_rows; a < std::min(j + ahead_rows + kTerms<P>, terms); ++a) {
          prefetch_lines<1>(w.base + i + (k + a) * w.col_stride, count * sizeof(T));
        }
        pack_run(panel, j / kTerms<P>, run, j + 1 < terms ? run + w.col_stride : nullptr, 0, count);
      }
      zero_past(panel, packed_depth<P>(terms), 0, count);
      auto ahead = LinesAhead::of(w.base + end + k * w.col_stride, std::min(width, w.num_rows - end), w.col_stride, terms);
      const int64_t steps = panel.depth / kTileSide, tiles = (rows.tokens + 2 * kTileSide - 1) / (2 * kTileSide);
      ahead.share_among(steps * tiles * panel.num_blocks());
      for (int64_t block = 0; block < panel.num_blocks(); ++block) {
        tiles_of_rows(rows, k / kTerms<P>, steps, panel.block(block), panel.block_vectors(block), k == 0, c, ahead);
        const int64_t at = block * kGroup;
        if (k + terms == w.depth) f(i + at, std::min<int64_t>(kGroup, count - at), c);
      }
    }
  }
}

// Calls f with the number of tokens, or a little more, as a constant: the lanes past a panel's end are zero.
template <int Most = kFewTokens, int Tokens = 1, class F>
GOSSAMER_INLINE void with_few_tokens(int64_t tokens, F&& f) {
  if constexpr (Tokens < Most) {
    if (tokens > Tokens) return with_few_tokens<Most, Tokens * 2>(tokens, f);
  }
  f(std::integral_constant<int, Tokens>{});
}

// group_product() by vectors.
template <class T, class P>
void vector_group_product(const Weight<T>& w, int64_t n, int64_t count, const Panel<P>& panel, SumOf<P>* c,
                          int64_t c_stride, P* pack, bool add) {
  const bool columns = runs_along_rows(w);
  if (panel.width <= kFewTokens && (columns || w.col_stride == 1)) {
    return with_few_tokens(panel.width, [&](auto tokens) {
      if (columns) return few_tokens_of<tokens, true>(w, n, count, panel, c, c_stride, add);
      few_tokens_of<tokens, false>(w, n, count, panel, c, c_stride, add);
    });
  }
  // With few tokens the weights' way from memory is all that counts, and few long streams come faster than many short ones.
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

// c[i][token] = Σ_k w(n+i, k) · panel[k][token] for i < count, added to what c holds where `add` is set; c must have room for
// count rounded up to a multiple of kRowUnit.
template <class T, class P>
void group_product(const Weight<T>& w, int64_t n, int64_t count, const Panel<P>& panel, SumOf<P>* c, int64_t c_stride, P* pack,
                   bool add = false) {
  if constexpr (kTiled<P>) {
    tiled_group_product(w, n, count, panel, c, c_stride, pack, add);
  } else {
    vector_group_product(w, n, count, panel, c, c_stride, pack, add);
  }
}

// Results of so many bytes are not in the caches when they are written, nor when they are read next.
constexpr int64_t kPastCaches = 16 << 20;

// Where a weight gradient goes: straight to `out`, or, when the expert's rows come in several chunks, first into
// `partial`, whose rows are `width` values (and which is null where `out` itself can hold partial sums).
template <class T>
struct GradientSink {
  T* out;
  Accumulator<T>* partial;
  int64_t stride, width;
  bool first, last;
  bool past_caches = false;  // whether results are too many for the caches, which would read what is overwritten

  T* at(int64_t row, int64_t column) const { return out + row * stride + column; }
  Accumulator<T>* partial_at(int64_t row, int64_t column) const { return partial + row * width + column; }
};

// Rows of a weight gradient that are worked on together: by tiles so many that the other panel comes from the second-level cache for
// several of them.
template <class P>
constexpr int kOuterRows = kTiled<P> ? 2 * kGroup : kGroup;

// Blocks of tokens that a weight gradient sums in registers before it adds to memory, about the longest segment.
template <class P>
constexpr int64_t kOuterBlocks = (kDepth + kPanelWidth<P> - 1) / kPanelWidth<P>;

// to = before + Σ_token a[i][token] · b[token] over the blocks first .. last of a, rounded to what `to` holds; `before` may be
// null. Its sums must live in registers, so each form is a function of its own.
template <int Rows, int Vecs, class P, class O>
__attribute__((noinline)) void outer_blocks(const Panel<P>& a, int64_t i, int64_t first, int64_t last, const P* b,
                                            const SumOf<P>* before, int64_t before_stride, O* to, int64_t to_stride) {
  using S = SumOf<P>;
  Vec<S> sum[Rows][Vecs] = {};
  for (int64_t block = first; block < last; ++block) {
    const int64_t token = block * kPanelWidth<P>, stride = a.block_vectors(block) * kLanes<P>;
    accumulate<P>(sum, a.block(block) + i * stride, stride, 1, b + token * Vecs * kLanes<P>,
                  std::min<int64_t>(kPanelWidth<P>, a.width - token));
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) {
      const int64_t at = v * kLanes<S>;
      store_sums(to + r * to_stride + at, before ? load(before + r * before_stride + at) + sum[r][v] : sum[r][v]);
    }
  }
}

// The tile of `rows` rows, of Rows that are computed, and the block of columns at `column`.
template <int Rows, int Vecs, class T, class P>
GOSSAMER_INLINE void outer_block(const Panel<P>& a, int64_t i, int rows, const P* b, const GradientSink<T>& sink,
                                 int64_t column, int64_t columns) {
  using S = SumOf<P>;
  constexpr int width = Vecs * kLanes<S>;
  alignas(64) S own[Rows * width];
  // Calls f(sums, row, column, valid lanes) for the vectors of the tile that there are.
  const auto each = [&](auto&& f) {
    for (int r = 0; r < rows; ++r) {
      for (int64_t at = 0; at < std::min<int64_t>(width, columns - column); at += kLanes<S>) {
        const int valid = static_cast<int>(std::min<int64_t>(kLanes<S>, columns - column - at));
        f(own + r * width + at, i + r, column + at, valid);
      }
    }
  };
  // Whole tiles of sums come straight from where they are kept, and go there.
  const bool whole = rows == Rows && column + width <= columns;
  S* kept = own;
  int64_t kept_stride = width;
  if constexpr (std::is_same_v<T, S>) {
    if (whole) {
      kept = sink.at(i, column);
      kept_stride = sink.stride;
    }
  } else if (whole && sink.partial) {
    kept = sink.partial_at(i, column);
    kept_stride = sink.width;
  }
  if (!whole) {
    std::fill_n(own, Rows * width, S{0});
    // Earlier sums come first here as well, so that a value's bits do not tell where its tile ends.
    if (!sink.first) {
      each([&](S* sum, int64_t row, int64_t at, int valid) {
        store(sum, sink.partial ? load_valid(sink.partial_at(row, at), valid) : load_valid(sink.at(row, at), valid));
      });
    }
  }
  const int64_t blocks = a.num_blocks();
  for (int64_t block = 0; block < blocks; block += kOuterBlocks<P>) {
    const int64_t last = std::min(blocks, block + kOuterBlocks<P>);
    const S* before = block > 0 || !sink.first ? kept : nullptr;
    if (whole && sink.last && last == blocks) {
      outer_blocks<Rows, Vecs>(a, i, block, last, b, before, kept_stride, sink.at(i, column), sink.stride);
    } else {
      outer_blocks<Rows, Vecs>(a, i, block, last, b, before, kept_stride, kept, kept_stride);
    }
  }
  if (whole) return;
  each([&](S* sum, int64_t row, int64_t at, int valid) {
    if (sink.partial && !sink.last) {
      store_valid(sink.partial_at(row, at), load(sum), valid);
    } else {
      store_valid_sums(sink.at(row, at), load(sum), valid);
    }
  });
}

// The same by tiles, for up to two tiles of rows: the panels hold whole ones along the tokens.
template <int Vecs, class T, class P>
void tiled_outer_block([[maybe_unused]] const Panel<P>& a, [[maybe_unused]] int64_t i, [[maybe_unused]] int rows,
                       [[maybe_unused]] const P* b, [[maybe_unused]] const GradientSink<T>& sink, [[maybe_unused]] int64_t column,
                       [[maybe_unused]] int64_t columns) {
#if GOSSAMER_AMX
  constexpr int width = Vecs * kLanes<float>;
  alignas(64) float own[kGroup * width];
  const auto each = [&](auto&& f) {
    const int64_t all = std::min<int64_t>(width, columns - column);
    for (int r = 0; r < rows; ++r) {
      for (int64_t at = 0; at < all; at += kLanes<float>) {
        f(own + r * width + at, i + r, column + at, static_cast<int>(std::min<int64_t>(kLanes<float>, all - at)));
      }
    }
  };
  if (!sink.first) {
    each([&](float* sum, int64_t row, int64_t at, int valid) {
      store(sum, sink.partial ? load_valid(sink.partial_at(row, at), valid) : load_valid(sink.at(row, at), valid));
    });
  }
  const auto product = [&](auto height) {
    using Sums = TileSums<height, Vecs>;
    constexpr int64_t own_stride = width * sizeof(float);
    fence_memory();
    if (sink.first) {
      Sums::zero();
    } else {
      Sums::load(own, own_stride);
    }
    for (int64_t block = 0; block < a.num_blocks(); ++block) {
      const int64_t vectors = a.block_vectors(block), stride = vectors * kLanes<P>;
      for (int64_t v = 0; v < vectors; ++v) {
        const char* left = reinterpret_cast<const char*>(a.block(block) + i * stride + v * kLanes<P>);
        Sums::add(left, stride * sizeof(P), b + (block * kPanelWidth<P> + v * kLanes<P>) * width);
      }
    }
    Sums::store(own, own_stride);
    fence_memory();
  };
  if (rows > kTileSide) {
    product(std::integral_constant<int, 2>{});
  } else {
    product(std::integral_constant<int, 1>{});
  }
  if constexpr (Vecs == 2 && std::is_same_v<T, BFloat16>) {
    const auto line = [&](int r) { return sink.at(i + r, column); };
    const bool whole = sink.past_caches && sink.last && column + width <= columns && sink.stride * sizeof(T) % 64 == 0;
    if (whole && reinterpret_cast<uintptr_t>(line(0)) % 64 == 0) {
      for (int r = 0; r < rows; ++r) {
        const float* sum = own + r * width;
        const auto out = _mm512_cvtne2ps_pbh((__m512)load(sum + kLanes<float>), (__m512)load(sum));
        _mm512_stream_si512(reinterpret_cast<__m512i*>(line(r)), (__m512i)out);
      }
      return;
    }
  }
  each([&](float* sum, int64_t row, int64_t at, int valid) {
    if (sink.partial && !sink.last) {
      store_valid(sink.partial_at(row, at), load(sum), valid);
    } else {
      store_valid_sums(sink.at(row, at), load(sum), valid);
    }
  });
#endif
}

// Fetches what is next written of a gradient's rows first .. last, a block of columns from `next` on.
template <class P, class T>
GOSSAMER_INLINE void prefetch_gradient(const GradientSink<T>& sink, int64_t first, int64_t last, int64_t next, int64_t width) {
  const int64_t columns = std::min<int64_t>(kPanelWidth<P>, width - next);
  for (int64_t r = first; r < last; ++r) {
    if (sink.partial) {
      prefetch_lines<0, Fetch::kWriteLater>(sink.partial_at(r, next), columns * sizeof(Accumulator<T>));
    } else {
      prefetch_lines<0, Fetch::kWriteLater>(sink.at(r, next), columns * sizeof(T));
    }
  }
}

// out[i][j] = Σ_token a[i][token] · b[token][j] for the rows first <= i < last of a panel with tokens as columns: a few
// rows, which the first-level cache holds, with one block of b after the other. The results go out to distant rows of
// memory, so what the next block writes is fetched meanwhile.
template <class T, class P>
void outer_product(const Panel<P>& a, int64_t first, int64_t last, const Panel<P>& b, const GradientSink<T>& sink) {
  for (int64_t block = 0; block < b.num_blocks(); ++block) {
    const int64_t column = block * kPanelWidth<P>, next = column + kPanelWidth<P>;
    with_vectors<P>(b.block_vectors(block), [&](auto vectors) {
      if constexpr (kTiled<P>) {
        for (int64_t i = first; i < last; i += kGroup) {
          const int rows = static_cast<int>(std::min<int64_t>(kGroup, last - i));
          if (sink.partial || !sink.past_caches) prefetch_gradient<P>(sink, i, i + rows, next, b.width);
          tiled_outer_block<vectors>(a, i, rows, b.block(block), sink, column, b.width);
        }
      } else {
        for_tiles<kTileRows<vectors>>(last - first, [&](auto tile, int64_t i) {
          const int rows = static_cast<int>(std::min<int64_t>(tile, last - first - i));
          prefetch_gradient<P>(sink, first + i, first + i + rows, next, b.width);
          outer_block<tile, vectors>(a, first + i, rows, b.block(block), sink, column, b.width);
        });
      }
    });
  }
}
