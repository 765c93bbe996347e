// Products with weights that are contiguous along their rows, with tokens in the rows of the result. Such a weight is packed without
// a transposition, several groups of its rows side by side, so that each read is long.
#pragma once

#include "cpu/memory.h"
#include "cpu/tile_gemm.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Values of a weight that rows_product() packs at a time. With tiles they span the whole depth and fit a second-level cache of a
// megabyte; with vectors they are one part of the depth for several groups of columns.
constexpr int64_t kTiledRowsPack = 1 << 16;
constexpr int64_t kRowGroups = 4;

// Which packed types use it. AVX2's sixteen registers hold too few sums for a group of columns: it is a third slower there.
template <class P>
constexpr bool kByRows = kTiled<P> || GOSSAMER_VECTOR_BYTES == 64;

// The most tokens for which products read a weight in place: those of one tile, since no other tile would share what is packed.
template <class P>
constexpr int kRowsTile = GOSSAMER_TILE_ROWS * GOSSAMER_TILE_VECTORS / 2 / 4 * 4;
// The most groups of columns in a unit of such a product, and the packed values in a part of its depth. Runs are long and rows few,
// because rows a power of two apart share few sets of the second-level cache, where many prefetched lines would evict each other.
constexpr int64_t kFewRowsGroups = 8;
constexpr int kFewRowsDepth = 32;
template <class P>
bool reads_in_place(int64_t tokens) {
  return kByRows<P> && !kTiled<P> && tokens <= kRowsTile<P> && 2 * kLanes<P> == kGroup;
}

template <class P, class T>
bool goes_by_rows(const Weight<T>& w, int64_t tokens) {
  return kByRows<P> && (kTerms<P> > 1 || tokens > kFewTokens || reads_in_place<P>(tokens)) && runs_along_rows(w);
}

// A thread's memory for products with at most `tokens` tokens.
template <class P>
class RowsMemory {
  using S = SumOf<P>;
  static constexpr int64_t kPack = kTiled<P> ? kTiledRowsPack : kRowGroups * kPackSize<P>;

 public:
  explicit RowsMemory(int64_t tokens = 0)
      : sums_size_((tokens + kTileSide - 1) / kTileSide * kTileSide * kGroup),
        memory_(tokens == 0 ? Scratch()
                            : allocate_scratch(kPack * sizeof(P) + (kTiled<P> ? 1 : kRowGroups) * sums_size_ * sizeof(S))) {}

  P* pack(int64_t group = 0) const { return reinterpret_cast<P*>(memory_.get()) + group * kPackSize<P>; }
  // Sums of a group, kGroup per token.
  S* sums(int64_t group = 0) const { return reinterpret_cast<S*>(memory_.get() + kPack * sizeof(P)) + group * sums_size_; }

 private:
  int64_t sums_size_;
  Scratch memory_;
};

// c[token][0 .. 16 · vectors] (+)= rows · b over `steps` tiles along the depth, from column `from` of the rows on; a row of c is
// kGroup values.
template <class P>
void tiles_of_rows([[maybe_unused]] const PackedRows<P>& rows, [[maybe_unused]] int64_t from, [[maybe_unused]] int64_t steps,
                   [[maybe_unused]] const P* b, [[maybe_unused]] int vectors, [[maybe_unused]] bool fresh,
                   [[maybe_unused]] float* c, [[maybe_unused]] LinesAhead& ahead) {
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

// Columns that rows_product() packs together from a weight that is contiguous along its rows: several cache lines per read, few
// enough to fit the buffer, and few enough that each thread has several pieces.
template <class P>
int64_t rows_product_unit(int64_t num_rows, [[maybe_unused]] int64_t depth, int threads) {
  int64_t most = num_rows / (4 * threads);
  if constexpr (kTiled<P>) most = std::min(most, kTiledRowsPack / std::max<int64_t>(1, tile_depth<P>(depth)));
  return std::clamp<int64_t>(most / kGroup * kGroup, kGroup, kRowGroups * kGroup);
}

// The same for a product with `tokens` tokens.
template <class P, class T>
int64_t rows_product_unit(const Weight<T>& w, int64_t tokens, int threads) {
  if (!reads_in_place<P>(tokens)) return rows_product_unit<P>(w.num_rows, w.depth, threads);
  return std::clamp<int64_t>(w.num_rows / (2 * threads) / kGroup * kGroup, kGroup, kFewRowsGroups * kGroup);
}

// Prefetches what a thread reads first in a product with `tokens` tokens.
template <class P, class T>
void fetch_first_columns(const Weight<T>& w, Team team, int64_t tokens) {
  if (kTiled<P> || !goes_by_rows<P>(w, tokens)) return;
  const int64_t unit = rows_product_unit<P>(w, tokens, team.size), first = team.share(w.num_rows, unit).begin;
  const int64_t bytes = std::clamp<int64_t>(w.num_rows - first, 0, unit) * sizeof(T);
  for (int64_t k = 0; k < std::min<int64_t>(w.depth, kFewRowsDepth * kTerms<P>); ++k) {
    prefetch_lines<0, Fetch::kReadLater>(w.base + first + k * w.col_stride, bytes);
  }
}

// Calls f(i, count, c) with c[token][j] = 0, the result of a product of depth zero.
template <class S, class F>
void empty_rows_product(int64_t n, int64_t end, int64_t tokens, S* c, F&& f) {
  std::fill_n(c, tokens * kGroup, S{0});
  for (int64_t i = n; i < end; i += kGroup) f(i, std::min<int64_t>(kGroup, end - i), c);
}

// Calls f(i, count, c) with c[token][j] = Σ_k rows[token][k] · w(i+j, k) by tiles, kGroup rows of a weight at a time of n .. end,
// one unit. The weight is contiguous along its rows: they are columns here, and are packed without being transposed.
template <class T, class P, class F>
void rows_product(const Weight<T>& w, int64_t n, int64_t end, const PackedRows<P>& rows, const RowsMemory<P>& memory, F&& f) {
  constexpr int64_t ahead_rows = 16, step = kTiledRowsPack / kGroup * kTerms<P>;
  float* c = memory.sums();
  if (w.depth == 0) return empty_rows_product(n, end, rows.tokens, c, f);
  const int64_t width = end - n;
  for (int64_t i = n, count = w.depth > step ? kGroup : width; i < end; i += count) {
    count = std::min(count, end - i);
    for (int64_t k = 0; k < w.depth; k += step) {
      const int64_t terms = std::min(step, w.depth - k);
      const Panel<P> panel{memory.pack(), tile_depth<P>(terms), count};
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

// sums[i] (+)= Σ_k a(i, k) · b(k) over part of a segment for Rows tokens and kGroup columns, with a(i, k) at a[i + k·kLanes] and the
// weight's row b(k) in place; rows of sums are kGroup values. The sum of a whole segment goes to c instead, added unless it is the
// first.
template <int Rows, class T, class P>
__attribute__((noinline)) void in_place_product(const P* a, const T* b, int64_t b_stride, int64_t terms, bool begins, bool ends,
                                                bool first, SumOf<P>* sums, SumOf<P>* c, LinesAhead& ahead) {
  using S = SumOf<P>;
  constexpr int lanes = kLanes<S>;
  LinesAhead lines = ahead;
  Vec<S> sum[Rows][2] = {};
  if (!begins) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      sum[i][0] = load(sums + i * kGroup);
      sum[i][1] = load(sums + i * kGroup + lanes);
    }
  }
  for (int64_t k = 0; k < terms; k += kTerms<P>) {
    const auto [low, high] = load_two_lanes<P>(b, k + 1 < terms ? b + b_stride : nullptr);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vec<P> value = splat(a[i]);
      sum[i][0] = fma(value, low, sum[i][0]);
      sum[i][1] = fma(value, high, sum[i][1]);
    }
    lines.fetch();
    a += kLanes<P>;
    b += kTerms<P> * b_stride;
  }
  S* to = ends ? c : sums;
  const bool add = ends && !first;
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      S* at = to + i * kGroup + v * lanes;
      store(at, add ? load(at) + sum[i][v] : sum[i][v]);
    }
  }
  ahead = lines;
}

// rows_product() by vectors for tokens of one tile.
template <class T, class P, class F>
void few_rows_product(const Weight<T>& w, int64_t n, int64_t end, const Panel<P>& rows, const RowsMemory<P>& memory, F&& f) {
  constexpr int64_t step = kFewRowsDepth * kTerms<P>, most = kRowsTile<P> * kGroup;
  const int64_t segment = segment_of<P>(w.depth) * kTerms<P>, width = end - n;
  // For each group, the sums of complete segments, followed by those of the current one.
  auto* c = reinterpret_cast<SumOf<P>*>(memory.pack());
  static_assert(kFewRowsGroups * 2 * most * sizeof(SumOf<P>) <= kRowGroups * kPackSize<P> * sizeof(P));
  for (int64_t k = 0, terms = 0; k < w.depth; k += terms) {
    terms = std::min({step, segment, w.depth - k});
    const bool begins = k % segment == 0, ends = (k + terms) % segment == 0 || k + terms == w.depth;
    const int64_t then = k + terms;
    auto ahead = then < w.depth
                     ? LinesAhead::of(w.base + n + then * w.col_stride, width, w.col_stride, std::min(terms, w.depth - then))
                     : LinesAhead::of(w.base + end, std::min(width, w.num_rows - end), w.col_stride, std::min(step, w.depth));
    ahead.share_among((width + kGroup - 1) / kGroup * ((terms + kTerms<P> - 1) / kTerms<P>));
    ahead.touch_runs();
    for (int64_t at = 0; at < width; at += kGroup) {
      const int64_t count = std::min<int64_t>(kGroup, width - at);
      SumOf<P>* to = c + at / kGroup * 2 * most;
      const T* from = w.base + n + at + k * w.col_stride;
      int64_t stride = w.col_stride;
      // The last columns may be fewer than a group; they are copied.
      alignas(64) T last[step * kGroup];
      if (count < kGroup) {
        for (int64_t j = 0; j < terms; ++j) {
          std::copy_n(from + j * stride, count, last + j * kGroup);
          std::fill_n(last + j * kGroup + count, kGroup - count, T{});
        }
        from = last;
        stride = kGroup;
      }
      const P* a = rows.block(0) + k / kTerms<P> * kLanes<P>;
      for_tiles<kRowsTile<P>>(rows.width, [&](auto tile, int64_t i) {
        SumOf<P>* sums = to + i * kGroup;
        in_place_product<tile>(a + i, from, stride, terms, begins, ends, k < segment, sums + most, sums, ahead);
      });
      if (then == w.depth) f(n + at, count, to);
    }
  }
}

// The same by vectors, with the rows as columns of a panel. Sums are those of group_product(), bit for bit.
template <class T, class P, class F>
void rows_product(const Weight<T>& w, int64_t n, int64_t end, const Panel<P>& rows, const RowsMemory<P>& memory, F&& f) {
  constexpr int64_t step = kDepth * kTerms<P>;
  // As many sums as there are registers: values of the rows are broadcast, and a group of columns is two vectors.
  constexpr int vectors = 2, tile_rows = kRowsTile<P>;
  using Columns = Panel<P, vectors>;
  if (w.depth == 0) return empty_rows_product(n, end, rows.width, memory.sums(), f);
  if (reads_in_place<P>(rows.width)) return few_rows_product(w, n, end, rows, memory, f);
  const int segment = segment_of<P>(w.depth);
  const int64_t width = end - n;
  const int64_t tiles = (width + Columns::kWidth - 1) / Columns::kWidth * ((rows.width + tile_rows - 1) / tile_rows);
  for (int64_t k = 0; k < w.depth; k += step) {
    const int64_t terms = std::min(step, w.depth - k);
    const auto depth = static_cast<int>(packed_depth<P>(terms));
    const auto columns = [&](int64_t at) {
      return Columns{memory.pack(at / kGroup), depth, std::min<int64_t>(kGroup, width - at)};
    };
    for (int64_t j = 0; j < terms; j += kTerms<P>) {
      const T* run = w.base + n + (k + j) * w.col_stride;
      const T* next = j + 1 < terms ? run + w.col_stride : nullptr;
      for (int64_t at = 0; at < width; at += kGroup) {
        const Columns group = columns(at);
        pack_run(group, j / kTerms<P>, run + at, next ? next + at : nullptr, 0, group.width);
      }
    }
    const bool more = k + step < w.depth;
    auto ahead =
        more ? LinesAhead::of(w.base + n + (k + step) * w.col_stride, width, w.col_stride, std::min(step, w.depth - k - step))
             : LinesAhead::of(w.base + end, std::min(width, w.num_rows - end), w.col_stride, std::min(step, w.depth));
    ahead.share_among(tiles * depth);
    ahead.touch_runs();
    for (int64_t at = 0; at < width; at += kGroup) {
      const Columns group = columns(at);
      SumOf<P>* c = memory.sums(at / kGroup);
      for (int64_t block = 0; block < rows.num_blocks(); ++block) {
        with_vectors<P>(rows.block_vectors(block), [&](auto token_vectors) {
          constexpr int a_step = token_vectors * kLanes<P>;
          const int64_t first = block * kPanelWidth<P>;
          const P* a = rows.block(block) + k / kTerms<P> * a_step;
          for_tiles<tile_rows>(std::min<int64_t>(kPanelWidth<P>, rows.width - first), [&](auto tile, int64_t i) {
            for (int64_t b = 0; b < group.num_blocks(); ++b) {
              SumOf<P>* to = c + (first + i) * kGroup + b * Columns::kWidth;
              const auto product = group.block_vectors(b) == 1 ? block_product<tile, 1, 1, a_step, false, P, LinesAhead&>
                                                               : block_product<tile, vectors, 1, a_step, false, P, LinesAhead&>;
              product(a + i, 0, group.block(b), depth, segment, k == 0, to, kGroup, ahead);
            }
          });
        });
      }
      if (!more) f(n + at, group.width, c);
    }
  }
}

// The same of all rows of a weight, which the threads share: tiles read the rows on the left as `tile_rows`, vectors as `panel`.
// before(i, end) is called before each unit.
template <class T, class P, class Before, class F>
void shared_rows_product(WorkQueue& queue, Team team, const Weight<T>& w, [[maybe_unused]] const PackedRows<P>& tile_rows,
                         [[maybe_unused]] const Panel<P>& panel, const RowsMemory<P>& memory, Before&& before, F&& f) {
  const int64_t unit = rows_product_unit<P>(w, panel.width, team.size);
  const auto product = [&](int64_t n, int64_t end) {
    before(n, end);
    if constexpr (kTiled<P>) {
      rows_product(w, n, end, tile_rows, memory, f);
    } else {
      rows_product(w, n, end, panel, memory, f);
    }
  };
  // A quarter of the largest unit is a group.
  queue.each(team, w.num_rows, unit, product, unit % (4 * kGroup) == 0 ? 1 : 0);
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
