// Sums over tokens: outer products of panels, which are weight gradients.
#pragma once

#include "cpu/tile_gemm.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Results of this many bytes are not in a cache when they are written, nor when they are next read.
constexpr int64_t kPastCaches = 16 << 20;

// Destination of a weight gradient: directly `out`, or, if the expert's rows come in several chunks, first `partial`, whose
// rows are `width` values (null if `out` itself can hold partial sums).
template <class T>
struct GradientSink {
  T* out;
  Accumulator<T>* partial;
  int64_t stride, width;
  bool first, last;
  bool past_caches =
      false;  // whether to write past the caches: results too large for them would be read before being overwritten

  // Whether blocks of columns begin and end with cache lines.
  bool by_lines() const { return reinterpret_cast<uintptr_t>(out) % 64 == 0 && stride * sizeof(T) % 64 == 0; }

  T* at(int64_t row, int64_t column) const { return out + row * stride + column; }
  Accumulator<T>* partial_at(int64_t row, int64_t column) const { return partial + row * width + column; }
};

// Rows of a weight gradient processed together. Tiles take twice as many, so that more of them share each read of the other panel
// from the second-level cache.
template <class P>
constexpr int kOuterRows = kTiled<P> ? 2 * kGroup : kGroup;

// Blocks of tokens that a weight gradient sums in registers before adding to memory, about the longest segment.
template <class P>
constexpr int64_t kOuterBlocks = (kDepth + kPanelWidth<P> - 1) / kPanelWidth<P>;

// Vectors of a block of the right operand: as many as whole cache lines of a gradient in bfloat16 are made of.
template <class P>
constexpr int kOuterVectors = kTerms<P> > 1 ? 2 : kBlockVectors<P>;
template <class P>
using RowPanel = Panel<P, kOuterVectors<P>>;

// to = before + Σ_token a[i][token] · b[token] over the blocks first .. last of a, rounded to the type of `to`; `before` may be
// null. With Stream, `to` is written past the caches. Each form is a separate function, so that its sums stay in registers.
template <int Rows, int Vecs, bool Stream = false, class P, class O>
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
      if (before) sum[r][v] = load(before + r * before_stride + at) + sum[r][v];
      if constexpr (!Stream) store_sums(to + r * to_stride + at, sum[r][v]);
    }
    if constexpr (Stream) stream_sums(to + r * to_stride, sum[r]);
  }
}

// One tile: `rows` valid rows of the Rows computed, and the block of columns at `column`.
template <int Rows, int Vecs, class T, class P>
GOSSAMER_INLINE void outer_block(const Panel<P>& a, int64_t i, int rows, const P* b, const GradientSink<T>& sink,
                                 int64_t column, int64_t columns) {
  using S = SumOf<P>;
  constexpr int width = Vecs * kLanes<S>;
  alignas(64) S own[Rows * width];
  // Calls f(sums, row, column, valid lanes) for the valid vectors of the tile.
  const auto each = [&](auto&& f) {
    for (int r = 0; r < rows; ++r) {
      for (int64_t at = 0; at < std::min<int64_t>(width, columns - column); at += kLanes<S>) {
        const int valid = static_cast<int>(std::min<int64_t>(kLanes<S>, columns - column - at));
        f(own + r * width + at, i + r, column + at, valid);
      }
    }
  };
  // Whole tiles of sums are loaded and stored in place.
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
    // Earlier sums are added first here too, so that a value's bits do not depend on its position in a tile.
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
      if constexpr (kStreams<T, Vecs>) {
        // Sums that were kept in place are in the caches.
        if (sink.past_caches && (!std::is_same_v<T, S> || !before)) {
          outer_blocks<Rows, Vecs, true>(a, i, block, last, b, before, kept_stride, sink.at(i, column), sink.stride);
          continue;
        }
      }
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

// The same by tiles, for up to two tiles of rows; panels are zero-padded to whole tiles along the tokens.
template <int Vecs, class T, class P>
void tiled_outer_block([[maybe_unused]] const Panel<P>& a, [[maybe_unused]] int64_t i, [[maybe_unused]] int rows,
                       [[maybe_unused]] const P* b, [[maybe_unused]] const GradientSink<T>& sink,
                       [[maybe_unused]] int64_t column, [[maybe_unused]] int64_t columns) {
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
        Sums::add(left, stride * sizeof(P), b + (block * kPanelWidth<P> + v * kLanes<P>)*width);
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

// Prefetches the block of columns from `next` on in a gradient's rows first .. last, which is written next.
template <class T>
GOSSAMER_INLINE void prefetch_gradient(const GradientSink<T>& sink, int64_t first, int64_t last, int64_t next,
                                       int64_t columns) {
  for (int64_t r = first; r < last; ++r) {
    if (sink.partial) {
      prefetch_lines<0, Fetch::kWriteLater>(sink.partial_at(r, next), columns * sizeof(Accumulator<T>));
    } else {
      prefetch_lines<0, Fetch::kWriteLater>(sink.at(r, next), columns * sizeof(T));
    }
  }
}

// out[i][j] = Σ_token a[i][token] · b[token][j] for the rows first <= i < last of a panel with tokens as columns. The few rows of a
// stay in the first-level cache while the blocks of b pass by. Results go to distant rows of memory, so the destination of the
// next block is prefetched.
template <class T, class P, int Vectors>
void outer_product(const Panel<P>& a, int64_t first, int64_t last, const Panel<P, Vectors>& b, const GradientSink<T>& given) {
  GradientSink<T> sink = given;
  sink.past_caches = given.past_caches && given.by_lines();
  const bool fetches = sink.partial || !sink.past_caches;
  for (int64_t block = 0; block < b.num_blocks(); ++block) {
    const int64_t column = block * b.kWidth, next = column + b.kWidth;
    const int64_t next_columns = fetches ? std::min<int64_t>(b.kWidth, b.width - next) : 0;
    with_vectors<P, Vectors>(b.block_vectors(block), [&](auto vectors) {
      if constexpr (kTiled<P>) {
        for (int64_t i = first; i < last; i += kGroup) {
          const int rows = static_cast<int>(std::min<int64_t>(kGroup, last - i));
          if (next_columns > 0) prefetch_gradient(sink, i, i + rows, next, next_columns);
          tiled_outer_block<vectors>(a, i, rows, b.block(block), sink, column, b.width);
        }
      } else {
        constexpr int height =
            Vectors < kBlockVectors<P> ? GOSSAMER_TILE_ROWS * kBlockVectors<P> / Vectors / 4 * 4 : kTileRows<vectors>;
        for_tiles<height>(last - first, [&](auto tile, int64_t i) {
          const int rows = static_cast<int>(std::min<int64_t>(tile, last - first - i));
          if (next_columns > 0) prefetch_gradient(sink, first + i, first + i + rows, next, next_columns);
          outer_block<tile, vectors>(a, first + i, rows, b.block(block), sink, column, b.width);
        });
      }
    });
  }
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
