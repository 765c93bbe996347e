// Matrix products on panels. Included by isa_kernels.h.
//
// Every output value is a sum along depth in order, with a fresh sum every segment_length() terms, whatever the other rows
// and columns are: a token's result does not depend on its place in a batch, nor on the number of threads.

// Terms of a product that are packed at a time, a multiple of every segment length.
constexpr int kDepth = 256;

// One long chain of additions in float loses several times what the dot products of BLAS lose, which keep a sum per
// lane; segments of about the square root of the depth do not.
inline int segment_length(int64_t depth) { return depth < 256 ? 16 : 32; }

// Weight rows that are worked on together: the unit in which threads share a product.
constexpr int kGroup = 32;

// sum[i][v] += a(i, k) · b[k][v] over k, a(i, k) at a[i·ARow + k·AStep].
template <class S, int Rows, int Vecs, int ARow, int AStep>
GOSSAMER_INLINE void accumulate(Vec<S> (&sum)[Rows][Vecs], const S* a, const S* b, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec<S> column[Vecs];
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) column[v] = load(b + v * kLanes<S>);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) sum[i][v] += a[i * ARow] * column[v];
    }
    a += AStep;
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

// Copies w(n .. n+Rows, k .. k+depth) to the accumulator's type as [Rows][kDepth]; missing rows are zero.
template <int Rows, class T, class S>
void pack_tile(const Weight<T>& w, int64_t n, int64_t k, int depth, S* out) {
  constexpr int lanes = kLanes<S>;
  const int rows = static_cast<int>(std::min<int64_t>(Rows, w.num_rows - n));
  const T* from = w.base + n * w.row_stride + k * w.col_stride;
  for (int i = 0; i < Rows; ++i) {
    S* to = out + i * kDepth;
    const T* row = from + i * w.row_stride;
    if (i >= rows) {
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

// Copies w(n .. n+count, k .. k+depth), its rows contiguous in n, as [depth][kGroup]; missing values are zero.
template <class T, class S>
void pack_group(const Weight<T>& w, int64_t n, int count, int64_t k, int depth, S* out) {
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

// c (+)= the product of a packed tile and one block of the panel.
template <int Rows, int Vecs, bool ByRow, class S>
GOSSAMER_INLINE void block_product(const S* a, const S* b, int depth, int segment, bool first, S* c, int64_t c_stride) {
  for (int k = 0; k < depth; k += segment) {
    Vec<S> sum[Rows][Vecs] = {};
    accumulate<S, Rows, Vecs, ByRow ? kDepth : 1, ByRow ? 1 : kGroup>(sum, a + (ByRow ? k : k * kGroup), b + k * Vecs * kLanes<S>,
                                                                    std::min(segment, depth - k));
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

// c (+)= the product of a packed tile and the panel's rows k .. k+depth; `between` runs before each block of tokens.
template <int Rows, bool ByRow, class S, class F>
GOSSAMER_INLINE void panel_product(const S* a, const Panel<S>& panel, int64_t k, int depth, S* c, int64_t c_stride,
                                   F&& between) {
  const int segment = segment_length(panel.depth);
  for (int64_t block = 0; block < panel.num_blocks(); ++block) {
    between(block);
    const int width = panel.block_width(block);
    const S* b = panel.block(block) + k * width;
    S* to = c + block * kPanelWidth<S>;
    if (width == kPanelWidth<S>) {
      block_product<Rows, 2, ByRow>(a, b, depth, segment, k == 0, to, c_stride);
    } else {
      block_product<Rows, 1, ByRow>(a, b, depth, segment, k == 0, to, c_stride);
    }
  }
}

// Calls f with the height of each next tile and its place until `count` rows are covered, rounded up to a multiple of 4.
template <class F>
GOSSAMER_INLINE void for_tiles(int64_t count, F&& f) {
  int64_t done = 0;
  while (count - done >= GOSSAMER_TILE_ROWS) {
    f(std::integral_constant<int, GOSSAMER_TILE_ROWS>{}, done);
    done += GOSSAMER_TILE_ROWS;
  }
  if constexpr (GOSSAMER_TILE_ROWS > 8) {
    if (count - done >= 8) {
      f(std::integral_constant<int, 8>{}, done);
      done += 8;
    }
  }
  for (; done < count; done += 4) f(std::integral_constant<int, 4>{}, done);
}

// c[i][token] = Σ_k w(n+i, k) · panel[k][token] for i < count <= 2·kGroup; c must have room for count rounded up to a
// multiple of 4. Either order of the weight's memory is kept, so packing it is a plain copy.
template <class T, class S>
void group_product(const Weight<T>& w, int64_t n, int64_t count, const Panel<S>& panel, S* c, int64_t c_stride, S* pack) {
  const auto rows_left = [&](int64_t row, int64_t most) { return std::clamp<int64_t>(w.num_rows - row, 0, most); };
  const auto depth_left = [&](int64_t k) { return std::min<int64_t>(kDepth, w.depth - k); };
  const int64_t blocks = panel.num_blocks();
  if (w.row_stride == 1 && w.col_stride != 1) {
    for (int64_t group = 0; group < count; group += kGroup) {
      const int rows = static_cast<int>(std::min<int64_t>(kGroup, count - group));
      for (int64_t k = 0; k < w.depth; k += kDepth) {
        const int depth = static_cast<int>(depth_left(k));
        const bool more = k + kDepth < w.depth;
        const int64_t next_n = more ? n + group : n + group + kGroup, next_k = more ? k + kDepth : 0;
        const int64_t next_rows = rows_left(next_n, kGroup), next_depth = next_rows > 0 ? depth_left(next_k) : 0;
        const T* next = w.base + next_n + next_k * w.col_stride;
        pack_group(w, n + group, rows, k, depth, pack);
        for_tiles(rows, [&](auto tile, int64_t i) {
          panel_product<tile, false>(pack + i, panel, k, depth, c + (group + i) * c_stride, c_stride, [&](int64_t block) {
            // Rows i .. i+tile of the group fetch in proportion to the time they take.
            const int64_t done = i * blocks + block * tile, all = kGroup * blocks;
            prefetch_runs(next, w.col_stride, next_depth * done / all, next_depth * (done + tile) / all, next_rows);
          });
        });
      }
    }
    return;
  }
  for_tiles(count, [&](auto tile, int64_t i) {
    for (int64_t k = 0; k < w.depth; k += kDepth) {
      const int depth = static_cast<int>(depth_left(k));
      const bool more = k + kDepth < w.depth;
      const int64_t next_n = more ? n + i : n + i + tile, next_k = more ? k + kDepth : 0;
      const T* next = w.base + next_n * w.row_stride + next_k;
      pack_tile<tile>(w, n + i, k, depth, pack);
      panel_product<tile, true>(pack, panel, k, depth, c + i * c_stride, c_stride, [&](int64_t block) {
        if (w.col_stride != 1) return;
        const int64_t rows = rows_left(next_n, tile);
        prefetch_runs(next, w.row_stride, rows * block / blocks, rows * (block + 1) / blocks, depth_left(next_k));
      });
    }
  });
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
  Vec<S> sum[Rows][Vecs] = {};
  for (int64_t block = 0; block < a.num_blocks(); ++block) {
    const int64_t token = block * kPanelWidth<S>;
    const int64_t depth = std::min<int64_t>(kPanelWidth<S>, a.width - token);
    const S* from = b + token * Vecs * kLanes<S>;
    if (a.block_width(block) == kPanelWidth<S>) {
      accumulate<S, Rows, Vecs, kPanelWidth<S>, 1>(sum, a.block(block) + i * kPanelWidth<S>, from, depth);
    } else {
      accumulate<S, Rows, Vecs, kLanes<S>, 1>(sum, a.block(block) + i * kLanes<S>, from, depth);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    if (r >= rows) break;
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) {
      const int64_t place = (i + r) * sink.stride + column + v * kLanes<S>;
      const int valid = static_cast<int>(std::min<int64_t>(kLanes<S>, columns - column - v * kLanes<S>));
      if (valid <= 0) break;
      Vec<S> value = sum[r][v];
      if (!sink.first) value += sink.partial ? load_valid(sink.partial + place, valid) : load_valid(sink.out + place, valid);
      if (sink.partial && !sink.last) {
        store_valid(sink.partial + place, value, valid);
      } else {
        store_valid(sink.out + place, value, valid);
      }
    }
  }
}

// out[i][j] = Σ_token a[i][token] · b[token][j] for the rows first <= i < last of a panel with tokens as columns.
template <class T, class S>
void outer_product(const Panel<S>& a, int64_t first, int64_t last, const Panel<S>& b, const GradientSink<T>& sink) {
  for_tiles(last - first, [&](auto tile, int64_t i) {
    const int rows = static_cast<int>(std::min<int64_t>(tile, last - first - i));
    for (int64_t block = 0; block < b.num_blocks(); ++block) {
      const int64_t column = block * kPanelWidth<S>;
      if (b.block_width(block) == kPanelWidth<S>) {
        outer_block<tile, 2>(a, first + i, rows, b.block(block), sink, column, b.width);
      } else {
        outer_block<tile, 1>(a, first + i, rows, b.block(block), sink, column, b.width);
      }
    }
  });
}
