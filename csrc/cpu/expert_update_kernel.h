// Low-rank updates of expert weights, inside expert_mlp.
#pragma once

#include "cpu/expert_mlp.h"
#include "cpu/grouped_matmul_kernel.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Number of a factor's rows per piece of work: few, so that every thread gets some even for a small rank.
constexpr int kRankUnit = 8;

// Destinations of a chunk's r low-rank rows: sums with tokens as columns, and packed forms for products with a factor (`c`) and
// for sums over tokens (`t`), each of which may be absent or share memory with the sums.
template <class P>
struct LowRankPanels {
  Panel<SumOf<P>> sums;
  Panel<P> c, t;
};

template <class P>
LowRankPanels<P> low_rank_panels(const LowRankMemory<P>& memory, int64_t rank, int64_t tokens) {
  return {{memory.sums, rank, tokens}, {memory.c, packed_depth<P>(rank), tokens}, {memory.t, rank, packed_depth<P>(tokens)}};
}

// low[j][token] = scale · Σ_k w(j, k) · x[k][token], for the r rows of a factor; also stored without the scale in `save` (·,
// r), one row per token, if given.
template <class T, class P, class S>
void low_rank_rows(const Weight<T>& w, const Panel<P>& x, double scale, const LowRankPanels<P>& low, S* save, WorkQueue& queue,
                   Team team, S* c, int64_t c_stride, P* pack) {
  queue.each(team, w.num_rows, kRankUnit, [&](int64_t j, int64_t end) {
    group_product(w, j, end - j, x, c, c_stride, pack);
    for (int64_t i = 0; i < end - j; ++i) {
      for (int64_t t = 0; t < x.width; t += kLanes<S>) {
        store(low.sums.at(j + i, t), load(c + i * c_stride + t) * static_cast<S>(scale));
      }
    }
    if constexpr (!std::is_same_v<P, S>) {
      if (low.c.data) pack_along_rows(low.c, low.sums, j, end);
      if (low.t.data) pack_along_tokens(low.t, low.sums, j, end);
    }
    if (!save) return;
    for_transposed(c, c_stride, end - j, x.width, [&](int64_t token, int64_t column, Vec<S> v, int valid) {
      store_valid(save + token * w.num_rows + j + column, v, valid);
    });
  });
}

// This thread's share of the low-rank rows that a forward pass saved, `scale` times each token's factor if there are any,
// with tokens as rows.
template <class P, int Vectors, class S>
void pack_low_rank_rows(const Panel<P, Vectors>& panel, const S* saved, const S* factors, double scale, int64_t tokens,
                        Team team) {
  const auto value = [&](int64_t token, int64_t j) {
    const int valid = static_cast<int>(std::min<int64_t>(kLanes<S>, panel.width - j));
    const S factor = static_cast<S>(scale) * (factors ? factors[token] : S{1});
    return load_valid(saved + token * panel.width + j, valid) * factor;
  };
  const auto mine = team.share(tokens, kTerms<P>);
  for (int64_t token = mine.begin; token < mine.end; token += kTerms<P>) {
    for (int64_t j = 0; j < panel.width; j += kLanes<S>) {
      const Vec<S> next = kTerms<P> > 1 && token + 1 < tokens ? value(token + 1, j) : Vec<S>{};
      store(panel.at(token / kTerms<P>, j), pack_lanes<P>(value(token, j), next));
    }
  }
  if (mine.end == tokens) zero_past(panel, packed_depth<P>(tokens), 0, panel.width);
}

// out[expert] = Σ_token columns[·][token] · rows[token][·] over the expert's chunks.
template <class P>
void factor_gradient(WorkQueue& queue, Team team, int64_t unit, const Panel<P>& columns, const RowPanel<P>& rows, void* out,
                     DType dtype, SumOf<P>* partial, const Chunk& chunk) {
  visit_float(dtype, [&](auto tag) {
    using G = typename decltype(tag)::type;
    if constexpr (std::is_same_v<Accumulator<G>, SumOf<P>>) {
      G* to = static_cast<G*>(out) + chunk.expert * columns.depth * rows.width;
      const GradientSink<G> sink{to,        chunk.first && chunk.last ? nullptr : partial, rows.width, rows.width, chunk.first,
                                 chunk.last};
      queue.each(team, columns.depth, unit,
                 [&](int64_t begin, int64_t end) { outer_product(columns, begin, end, rows, sink); });
    }
  });
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
