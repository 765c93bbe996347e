// Matrix products on panels by tiles, and the choice between them and those by vectors.
#pragma once

#include "cpu/gemm.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

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

// c (+)= left · panel from depth `from` on, for `count` rows of packed values, `stride` values apart; rows up to a multiple of 16 may
// be read. The rest of the depth after whole tiles is added last.
template <class P>
void tiled_product(const P* left, int64_t stride, int count, const Panel<P>& panel, int64_t from, int depth, bool fresh,
                   float* c, int64_t c_stride, [[maybe_unused]] LinesAhead ahead) {
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
        block_product<tile, vectors, 0, 1>(left + i * stride + done, stride, b + done * vectors * kLanes<P>, depth - done,
                                           kDepth, fresh && done == 0, to + i * c_stride, c_stride);
      });
    });
  }
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
void tiled_group_product(const Weight<T>& w, int64_t n, int64_t count, const Panel<P>& panel, float* c, int64_t c_stride,
                         P* pack, bool add) {
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
      tiled_product(reinterpret_cast<const P*>(from), w.row_stride / kTerms<P>, rows, panel, 0, depth, !add, to, c_stride,
                    ahead);
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

// c[i][token] = Σ_k w(n+i, k) · panel[k][token] for i < count, added to c if `add` is set; c must have room for count rounded up to
// a multiple of kRowUnit.
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

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
