// Matrix products on panels. Included by isa_kernels.h.
//
// Every output value is a sum along depth in order, with a fresh sum every segment_length() terms, whatever the other rows
// and columns are: a token's result does not depend on its place in a batch, nor on the number of threads.

// Terms of a product that are packed at a time, a multiple of every segment length.
constexpr int kDepth = 128;

// One long chain of additions in float loses several times what the dot products of BLAS lose, which keep a sum per
// lane; segments of about the square root of the depth do not.
inline int segment_length(int64_t depth) { return depth < 256 ? 16 : 64; }

// Weight rows that are worked on together: the unit in which threads share a product.
constexpr int kGroup = 32;

// sum[i][v] += a(i, k) · b[k][v] over k, a(i, k) at a[i·a_row + k·a_step].
template <class S, int Rows, int Vecs>
GOSSAMER_INLINE void accumulate(Vec<S> (&sum)[Rows][Vecs], const S* a, int64_t a_row, int64_t a_step, const S* b,
                                int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec<S> column[Vecs];
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) column[v] = load(b + v * kLanes<S>);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) sum[i][v] = fma(splat(a[i * a_row]), column[v], sum[i][v]);
    }
    a += a_step;
    b += Vecs * kLanes<S>;
  }
}

// One expert's weight, w(n, k) at base[n·row_stride + k·col_stride].
template <class T>
struct Weight {
  const T* base;
  int64_t row_stride, col_stride;
  int64_t num_rows, depth;
};

// Copies w(n .. n+count, k .. k+depth) to the accumulator's type as [kGroup][kDepth]; missing rows are zero.
template <class T, class S>
void pack_rows(const Weight<T>& w, int64_t n, int count, int64_t k, int depth, S* out) {
  constexpr int lanes = kLanes<S>;
  const T* from = w.base + n * w.row_stride + k * w.col_stride;
  for (int i = 0; i < (count + 3) / 4 * 4; ++i) {
    S* to = out + i * kDepth;
    const T* row = from + i * w.row_stride;
    if (i >= count) {
      for (int j = 0; j < depth; ++j) to[j] = S{0};
    } else if (w.col_stride == 1) {
      int j = 0;
      for (; j + lanes <= depth; j += lanes) store(to + j, load(row + j));
      for (; j < depth; ++j) to[j] = to_scalar(row[j]);
    } else {
      for (int j = 0; j < depth; ++j) to[j] = to_scalar(row[j * w.col_stride]);
    }
  }
}

// The same of a weight that is contiguous in n, as [depth][kGroup].
template <class T, class S>
void pack_columns(const Weight<T>& w, int64_t n, int count, int64_t k, int depth, S* out) {
  constexpr int lanes = kLanes<S>;
  const T* from = w.base + n + k * w.col_stride;
  for (int i = 0; i < depth; ++i) {
    const T* row = from + i * w.col_stride;
    S* to = out + i * kGroup;
    if (count == kGroup) {
      for (int j = 0; j < kGroup; j += lanes) store(to + j, load(row + j));
    } else {
      for (int j = 0; j < kGroup; ++j) to[j] = j < count ? static_cast<S>(to_scalar(row[j])) : S{0};
    }
  }
}

// Fetches runs first .. last, `stride` apart and `length` values long, of a weight into the second-level cache. Weights are read once, from far away: the next block comes while this one is worked on.
template <class T>
GOSSAMER_INLINE void prefetch_runs(const T* base, int64_t stride, int64_t first, int64_t last, int64_t length) {
  for (int64_t i = first; i < last; ++i) {
    const char* line = reinterpret_cast<const char*>(base + i * stride);
    for (int64_t j = 0; j < length * static_cast<int64_t>(sizeof(T)); j += 64) __builtin_prefetch(line + j, 0, 2);
  }
}

template <class S>
constexpr int kPackSize = kDepth * kGroup;

// What a block product fetches into cache as it goes: `rows` runs of memory, `stride` bytes apart, `step` bytes for each k.
struct Ahead {
  const char* base;
  int64_t stride;
  int rows, step;
};

// c (+)= Σ_k a(i, k) · b[k] for a tile of Rows rows and one block of Vecs vectors, a(i, k) at a[i·ARow + k·AStep], or at
// a[i·a_row + k] where ARow is 0. Its sums must live in registers, so each form is a function of its own.
template <int Rows, int Vecs, int ARow, int AStep, class S>
__attribute__((noinline)) void block_product(const S* a, [[maybe_unused]] int64_t a_row, const S* b, int depth, int segment,
                                             bool first, S* c, int64_t c_stride, const Ahead& ahead = {}) {
  for (int k = 0; k < depth; k += segment) {
    for (int i = 0; i < ahead.rows; ++i) {
      const char* line = ahead.base + i * ahead.stride + k * ahead.step;
      for (int j = 0; j < segment * ahead.step; j += 64) __builtin_prefetch(line + j, 0, 2);
    }
    Vec<S> sum[Rows][Vecs] = {};
    accumulate<S>(sum, a + k * AStep, ARow > 0 ? ARow : a_row, AStep, b + k * Vecs * kLanes<S>, std::min(segment, depth - k));
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

// Calls f with the height of each next tile and its place until `count` rows are covered, rounded up to a multiple of 4.
static_assert(GOSSAMER_TILE_ROWS % 4 == 0 && kGroup % GOSSAMER_TILE_ROWS == 0);
template <class F>
GOSSAMER_INLINE void for_tiles(int64_t count, F&& f) {
  int64_t done = 0;
  while (count - done >= GOSSAMER_TILE_ROWS) {
    f(std::integral_constant<int, GOSSAMER_TILE_ROWS>{}, done);
    done += GOSSAMER_TILE_ROWS;
  }
  for (; done < count; done += 4) f(std::integral_constant<int, 4>{}, done);
}

// How a group of a weight's rows is read: in place, or copied to the accumulator's type in its own order of memory.
enum class Read { kInPlace, kRows, kColumns };

// c[i][token] = Σ_k w(n+i, k) · panel[k][token] for i < count <= kGroup. A part of the weight's group and a block of the
// panel, kDepth deep, are worked on together in the first-level cache; the next `unit` rows are fetched meanwhile.
template <Read read, class T, class S>
void group_product_of(const Weight<T>& w, int64_t n, int count, int unit, const Panel<S>& panel, S* c, int64_t c_stride,
                      S* pack) {
  constexpr bool columns = read == Read::kColumns;
  constexpr int a_row = read == Read::kInPlace ? 0 : columns ? 1 : kDepth;
  const int segment = segment_length(w.depth);
  const int64_t blocks = panel.num_blocks();
  for (int64_t k = 0; k < w.depth; k += kDepth) {
    const int depth = static_cast<int>(std::min<int64_t>(kDepth, w.depth - k));
    const bool more = k + kDepth < w.depth;
    const int64_t next_n = more ? n : n + count, next_k = more ? k + kDepth : 0;
    const int64_t next_rows = more ? count : std::clamp<int64_t>(w.num_rows - next_n, 0, unit);
    const int64_t next_depth = std::min<int64_t>(kDepth, w.depth - next_k);
    const int64_t runs = columns ? next_depth : next_rows, run_length = columns ? next_rows : next_depth;
    const T* next = w.base + next_n * w.row_stride + next_k * w.col_stride;
    const S* a = pack;
    if constexpr (read == Read::kInPlace) {
      a = w.base + n * w.row_stride + k;
    } else if constexpr (columns) {
      pack_columns(w, n, count, k, depth, pack);
    } else {
      pack_rows(w, n, count, k, depth, pack);
    }
    for (int64_t block = 0; block < blocks; ++block) {
      const bool along_rows = blocks == 1 && !columns && w.col_stride == 1;
      if (!along_rows && (columns || w.col_stride == 1)) {
        prefetch_runs(next, columns ? w.col_stride : w.row_stride, runs * block / blocks, runs * (block + 1) / blocks, run_length);
      }
      with_vectors(panel.block_vectors(block), [&](auto vectors) {
        const S* b = panel.block(block) + k * vectors * kLanes<S>;
        const Ahead ahead{reinterpret_cast<const char*>(next), w.row_stride * static_cast<int64_t>(sizeof(T)),
                          along_rows ? static_cast<int>(next_rows) : 0, static_cast<int>(sizeof(T))};
        for_tiles(count, [&](auto tile, int64_t i) {
          block_product<tile, vectors, a_row, columns ? kGroup : 1>(a + i * (a_row > 0 ? a_row : w.row_stride), w.row_stride, b,
                                                                    depth, segment, k == 0,
                                                                    c + i * c_stride + block * kPanelWidth<S>, c_stride,
                                                                    i == 0 ? ahead : Ahead{});
        });
      });
    }
  }
}

// Up to so many tokens weights, not tokens, go into the vector lanes, most of which would be empty.
constexpr int kFewTokens = GOSSAMER_VECTOR_BYTES / sizeof(double);

// Adds the terms first .. last of the kLanes weight rows at `from` to sum[token]: block_product's sums, with rows in the
// lanes. `rows` of these rows exist and `next_rows` of those after them, which are fetched meanwhile.
template <int Tokens, bool Columns, class T, class S>
GOSSAMER_INLINE void accumulate_few(Vec<S> (&sum)[Tokens], const Weight<T>& w, const T* from, int rows, int next_rows,
                                    int64_t first, int64_t last, const Panel<S>& panel) {
  constexpr int n = kLanes<S>;
  const S* x = panel.data + first * n;
  const auto add = [&](Vec<S> weights) {
#pragma GCC unroll 16
    for (int t = 0; t < Tokens; ++t) sum[t] = fma(splat(x[t]), weights, sum[t]);
    x += n;
  };
  if constexpr (Columns) {
    for (int64_t k = first; k < last; ++k) {
      const T* run = from + k * w.col_stride;
      __builtin_prefetch(run + n, 0, 2);
      add(rows == n ? load(run) : load_some(run, rows));
    }
  } else {
    for (int64_t k = first; k < last; k += n) {
      const int terms = static_cast<int>(std::min<int64_t>(n, last - k));
      const T* row = from + k;
      for (int i = 0; i < next_rows; ++i) __builtin_prefetch(row + (n + i) * w.row_stride, 0, 2);
      Vec<S> v[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) {
        v[i] = i >= rows ? Vec<S>{} : terms == n ? load(row + i * w.row_stride) : load_some(row + i * w.row_stride, terms);
      }
      transpose<S>(v);
      if (terms == n) {
#pragma GCC unroll 16
        for (int j = 0; j < n; ++j) add(v[j]);
      } else {
        for (int j = 0; j < terms; ++j) add(v[j]);
      }
    }
  }
}

// group_product for a panel of Tokens tokens, of a weight that is contiguous along its depth or, in columns, its rows.
template <int Tokens, bool Columns, class T, class S>
__attribute__((noinline)) void few_tokens_product(const Weight<T>& w, int64_t n, int64_t count, const Panel<S>& panel, S* c,
                                                  int64_t c_stride) {
  constexpr int lanes = kLanes<S>;
  const int segment = segment_length(w.depth);
  for (int64_t i = 0; i < count; i += lanes) {
    const int rows = static_cast<int>(std::min<int64_t>(lanes, count - i));
    const int next_rows = static_cast<int>(std::clamp<int64_t>(w.num_rows - (n + i + lanes), 0, lanes));
    Vec<S> total[Tokens] = {};
    for (int64_t k = 0; k < w.depth; k += segment) {
      Vec<S> sum[Tokens] = {};
      accumulate_few<Tokens, Columns>(sum, w, w.base + (n + i) * w.row_stride, rows, next_rows, k,
                                      std::min<int64_t>(w.depth, k + segment), panel);
      for (int t = 0; t < Tokens; ++t) total[t] = k == 0 ? sum[t] : total[t] + sum[t];
    }
    Vec<S> v[lanes] = {};
    for (int t = 0; t < Tokens; ++t) v[t] = total[t];
    transpose<S>(v);
    for (int r = 0; r < rows; ++r) store(c + (i + r) * c_stride, v[r]);
  }
}

// Calls few_tokens_product for the panel's number of tokens, or a little more: the lanes past the end are zero.
template <bool Columns, int Tokens = 1, class T, class S>
void few_tokens(const Weight<T>& w, int64_t n, int64_t count, const Panel<S>& panel, S* c, int64_t c_stride) {
  if constexpr (Tokens < kFewTokens) {
    if (panel.width > Tokens) return few_tokens<Columns, Tokens * 2>(w, n, count, panel, c, c_stride);
  }
  few_tokens_product<Tokens, Columns>(w, n, count, panel, c, c_stride);
}

// c[i][token] = Σ_k w(n+i, k) · panel[k][token] for i < count; c must have room for count rounded up to a multiple of 4.
template <class T, class S>
void group_product(const Weight<T>& w, int64_t n, int64_t count, const Panel<S>& panel, S* c, int64_t c_stride, S* pack) {
  const bool columns = w.row_stride == 1 && w.col_stride != 1;
  if (panel.width <= kFewTokens && columns) return few_tokens<true>(w, n, count, panel, c, c_stride);
  if (panel.width <= kFewTokens && w.col_stride == 1) return few_tokens<false>(w, n, count, panel, c, c_stride);
  // With few tokens the weights' way from memory is all that counts, and few long streams come faster than many short ones.
  const int unit = panel.num_blocks() == 1 && !columns ? GOSSAMER_TILE_ROWS : kGroup;
  for (int64_t i = 0; i < count; i += unit) {
    const int rows = static_cast<int>(std::min<int64_t>(unit, count - i));
    S* to = c + i * c_stride;
    if (columns) {
      group_product_of<Read::kColumns>(w, n + i, rows, unit, panel, to, c_stride, pack);
      continue;
    }
    if constexpr (std::is_same_v<T, S>) {
      if (w.col_stride == 1 && rows % 4 == 0) {
        group_product_of<Read::kInPlace>(w, n + i, rows, unit, panel, to, c_stride, pack);
        continue;
      }
    }
    group_product_of<Read::kRows>(w, n + i, rows, unit, panel, to, c_stride, pack);
  }
}

// Where a weight gradient goes: straight to `out`, or, when the expert's rows come in several chunks, first into
// `partial` (which is null where `out` itself can hold partial sums).
template <class T>
struct GradientSink {
  T* out;
  Accumulator<T>* partial;
  int64_t stride;
  bool first, last;
};

template <int Rows, int Vecs, class T, class S>
GOSSAMER_INLINE void outer_block(const Panel<S>& a, int64_t i, int rows, const S* b, const GradientSink<T>& sink,
                                 int64_t column, int64_t columns) {
  constexpr int c_stride = Vecs * kLanes<S>;
  alignas(64) S c[Rows * c_stride];
  for (int64_t block = 0; block < a.num_blocks(); ++block) {
    const int64_t token = block * kPanelWidth<S>;
    const int depth = static_cast<int>(std::min<int64_t>(kPanelWidth<S>, a.width - token));
    with_vectors(a.block_vectors(block), [&](auto vectors) {
      constexpr int stride = vectors * kLanes<S>;
      block_product<Rows, Vecs, stride, 1>(a.block(block) + i * stride, 0, b + token * c_stride, depth, kPanelWidth<S>,
                                           block == 0, c, c_stride);
    });
  }
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < Vecs; ++v) {
      const int64_t place = (i + r) * sink.stride + column + v * kLanes<S>;
      const int valid = static_cast<int>(std::min<int64_t>(kLanes<S>, columns - column - v * kLanes<S>));
      if (valid <= 0) break;
      Vec<S> value = load(c + r * c_stride + v * kLanes<S>);
      if (!sink.first) value += sink.partial ? load_valid(sink.partial + place, valid) : load_valid(sink.out + place, valid);
      if (sink.partial && !sink.last) {
        store_valid(sink.partial + place, value, valid);
      } else {
        store_valid(sink.out + place, value, valid);
      }
    }
  }
}

// out[i][j] = Σ_token a[i][token] · b[token][j] for the rows first <= i < last of a panel with tokens as columns. A tile of
// rows sweeps all columns before the next, because its results go out to distant rows of memory, one stream a row.
template <class T, class S>
void outer_product(const Panel<S>& a, int64_t first, int64_t last, const Panel<S>& b, const GradientSink<T>& sink) {
  for_tiles(last - first, [&](auto tile, int64_t i) {
    const int rows = static_cast<int>(std::min<int64_t>(tile, last - first - i));
    for (int64_t block = 0; block < b.num_blocks(); ++block) {
      const int64_t column = block * kPanelWidth<S>;
      with_vectors(b.block_vectors(block), [&](auto vectors) {
        outer_block<tile, vectors>(a, first + i, rows, b.block(block), sink, column, b.width);
      });
    }
  });
}
