// Matrix products on panels by tiles, and the choice between them and those by vectors. Included by isa_kernels.h.

// What rows_product() packs of a weight at a time, for a second-level cache of a megabyte and more.
constexpr int kRowsPackSize = 1 << 16;
constexpr size_t kRowsPackBytes = kRowsPackSize * sizeof(BFloat16Pair);

// Lines of memory that come while tiles are multiplied: of runs of `bytes`, `stride` apart, some with each step. Many at once
// would hold up the tiles.
struct LinesAhead {
  const char* run = nullptr;
  int64_t bytes = 0, stride = 0, runs = 0, at = 0, per_step = 0;

  template <class T>
  static LinesAhead of(const T* first, int64_t values, int64_t stride, int64_t runs) {
    if (values <= 0 || runs <= 0) return {};
    constexpr int64_t size = sizeof(T);
    return {reinterpret_cast<const char*>(first), values * size, stride * size, runs};
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
// c (+)= Σ_k left(i, k) · b[k] over whole tiles along the depth, for 16 · Rows rows and one block of Vecs vectors; strides are
// bytes.
template <int Rows, int Vecs>
__attribute__((noinline)) void tile_product(const char* left, int64_t left_stride, const BFloat16Pair* b, int64_t steps,
                                            bool fresh, float* c, int64_t c_stride, LinesAhead& ahead) {
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

// c (+)= left · panel from `from` on along its depth, for `count` rows of packed values that lie `stride` of them apart and are
// there up to a multiple of 16. What is left of the depth after whole tiles comes last.
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
      const char* rows = reinterpret_cast<const char*>(left);
      if (steps > 0) product(rows, stride * sizeof(P), b, steps, fresh, to, c_stride * sizeof(float), ahead);
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

// c[token][0 .. 16 · vectors] (+)= rows · b for `steps` tiles along the depth, from `from` on in the rows; rows of c are kGroup
// values.
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

// pack_rows() of a weight that is contiguous along its rows, which go `stride` packed values apart.
template <class T, class P>
void pack_transposed(const Weight<T>& w, int64_t n, int count, int64_t k, int64_t terms, P* out, int64_t stride = kDepth) {
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
      for (int j = 0; j < lanes; ++j) store(out + (i + j) * stride + t / per, v[j]);
    }
  }
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
      const int depth = static_cast<int>(packed_depth<P>(w.depth));
      const auto ahead = LinesAhead::of(next, w.depth, w.row_stride, next_rows);
      tiled_product(reinterpret_cast<const P*>(from), w.row_stride / kTerms<P>, rows, panel, 0, depth, !add, to, c_stride, ahead);
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
      const int depth = static_cast<int>(packed_depth<P>(terms));
      tiled_product(pack, kDepth, rows, panel, k / kTerms<P>, depth, !add && k == 0, to, c_stride, ahead);
    }
  }
}

// Columns of a weight that is contiguous along its rows which rows_product() packs together: runs of some lines of memory, but few
// enough that they fit, and that each thread has several such pieces.
template <class P>
int64_t rows_product_unit(int64_t num_rows, int64_t depth, int threads) {
  const int64_t fits = kRowsPackSize / std::max<int64_t>(1, tile_depth<P>(depth)), share = num_rows / (4 * threads);
  return std::clamp<int64_t>(std::min(fits, share) / kGroup * kGroup, kGroup, 4 * kGroup);
}

// Calls f(i, count, c) with c[token][j] = Σ_k rows[token][k] · w(i+j, k) by tiles, kGroup rows of a weight at a time of n .. end,
// one unit. The weight is contiguous along its rows: they are columns here, and are packed without being transposed. c has room
// for whole tiles of tokens, kGroup values each.
template <class T, class P, class F>
void rows_product(const Weight<T>& w, int64_t n, int64_t end, const PackedRows<P>& rows, float* c, P* pack, F&& f) {
  constexpr int64_t ahead_rows = 16;
  if (w.depth == 0) std::fill_n(c, rows.tokens * kGroup, 0.0f);
  for (int64_t i = n; w.depth == 0 && i < end; i += kGroup) f(i, std::min<int64_t>(kGroup, end - i), c);
  constexpr int64_t step = kRowsPackSize / kGroup * kTerms<P>;
  const int64_t width = end - n;
  for (int64_t i = n, count = w.depth > step ? kGroup : width; i < end; i += count) {
    count = std::min(count, end - i);
    for (int64_t k = 0; k < w.depth; k += step) {
      const int64_t terms = std::min(step, w.depth - k);
      const Panel<P> panel{pack, tile_depth<P>(terms), count};
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

// c[i][token] = Σ_k w(n+i, k) · panel[k][token] for i < count, added to what c holds where `add` is set; c must have room for
// count rounded up to a multiple of kRowUnit.
template <class T, class P>
void group_product(const Weight<T>& w, int64_t n, int64_t count, const Panel<P>& panel, SumOf<P>* c, int64_t c_stride, P* pack,
                   bool add = false) {
  if (w.depth == 0) {
    for (int64_t i = 0; i < (add ? 0 : count); ++i) std::fill_n(c + i * c_stride, panel.width, SumOf<P>{0});
    return;
  }
  if constexpr (kTiled<P>) {
    tiled_group_product(w, n, count, panel, c, c_stride, pack, add);
  } else {
    vector_group_product(w, n, count, panel, c, c_stride, pack, add);
  }
}
