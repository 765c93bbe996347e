// grouped_matmul and its weight gradient for one instruction set.
#pragma once

#include "cpu/grouped_matmul.h"
#include "cpu/outer_product.h"
#include "cpu/quantized_kernel.h"
#include "cpu/rows_product.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Rows begin .. end of one expert's rows.
struct Chunk {
  int64_t expert, begin, end;
  bool first, last;

  int64_t size() const { return end - begin; }
};

// Calls f for each chunk of at most `limit` rows, a multiple of `unit`, of the experts that have rows, experts and rows
// ascending.
template <class F>
GOSSAMER_INLINE void for_chunks(const Groups& groups, int64_t limit, F&& f, int64_t unit = kEvenUnit) {
  for (int64_t e = 0; e < groups.num_experts; ++e) {
    const int64_t begin = groups.offsets[e], end = groups.offsets[e + 1];
    if (begin == end) continue;
    const int64_t size = even_chunk(end - begin, limit, unit);
    for (int64_t r = begin; r < end; r += size) {
      f(Chunk{e, r, std::min(end, r + size), r == begin, r + size >= end});
    }
  }
}

template <class T>
const T* gathered_row(const GatheredRows& rows, const Groups& groups, int64_t r) {
  const int64_t row = rows.divisor == 0 ? r : groups.slots[r] / rows.divisor;
  return static_cast<const T*>(rows.matrix.base) + row * rows.matrix.row_stride;
}

template <class T>
void gather_pointers(const GatheredRows& rows, const Groups& groups, const Chunk& chunk, const T** out) {
  for (int64_t r = chunk.begin; r < chunk.end; ++r) out[r - chunk.begin] = gathered_row<T>(rows, groups, r);
}

template <class T>
Weight<T> expert_weight(const ExpertWeights& w, int64_t expert, int64_t rows, int64_t cols) {
  return {static_cast<const T*>(w.base) + expert * w.expert_stride, w.row_stride, w.col_stride, rows, cols};
}

// The same weight transposed.
template <class T>
Weight<T> expert_weight_t(const ExpertWeights& w, int64_t expert, int64_t rows, int64_t cols) {
  return {static_cast<const T*>(w.base) + expert * w.expert_stride, w.col_stride, w.row_stride, cols, rows};
}

// A thread's own memory: the current tile of weights and the products of up to two groups of rows.
template <class P>
struct ThreadBuffers {
  using S = SumOf<P>;
  static constexpr int64_t kMaxChunk = 512;
  // Leaves the memory as it is: clearing it would take a few microseconds of every call.
  ThreadBuffers() {}
  alignas(64) P pack[kPackSize<P>];
  alignas(64) S c[2 * kGroup * (kMaxChunk + kLanes<S>)];

  // Rows of c are an odd number of vectors apart, so that a tile's rows do not share a cache set.
  static int64_t c_stride(int64_t chunk) { return ((chunk + kLanes<S> - 1) / kLanes<S> | 1) * kLanes<S>; }
};

// Adds a bias to sums whose rows are c_stride and whose tokens token_stride apart.
template <class S>
void add_bias(const FloatMatrix& bias, int64_t expert, int64_t n, int64_t count, S* c, int64_t c_stride, int64_t tokens,
              int64_t token_stride = 1) {
  if (!bias) return;
  for (int64_t i = 0; i < count; ++i) {
    const S value = static_cast<S>(bias.at(expert, n + i));
    for (int64_t t = 0; t < tokens; ++t) c[i * c_stride + t * token_stride] += value;
  }
}

// The product with the weights that weight_of(expert) gives.
template <class T, class WeightOf>
void grouped_product(const GroupedMatmulArgs& a, void* shared, int num_threads, Team team, WeightOf&& weight_of) {
  using S = Accumulator<T>;
  using P = Operand<T>;
  Arena arena(shared);
  GroupedBuffers<P> buffers(arena, a, num_threads);
  const auto own = std::make_unique<ThreadBuffers<P>>();
  const auto rows = std::make_unique<const T*[]>(buffers.chunk);
  T* y = static_cast<T*>(a.y);
  constexpr bool may_go_by_rows = kByRows<P> && std::is_same_v<decltype(weight_of(int64_t{})), Weight<T>>;
  const auto by_rows_at = [&](int64_t tokens) {
    return may_go_by_rows && goes_by_rows<P>(expert_weight<T>(a.weight, 0, a.n, a.c), tokens);
  };
  auto operands = operand_memory<P>(a.c, buffers.chunk, weight_of(0));
  const RowsMemory<P> rows_memory(by_rows_at(buffers.chunk) ? buffers.chunk : 0);
  const auto y_row = [&](int64_t r) { return y + (a.y_grouped ? r : a.groups.slots[r]) * a.n; };
  for_chunks(a.groups, buffers.chunk, [&](const Chunk& chunk) {
    const int64_t m = chunk.size(), c_stride = own->c_stride(buffers.chunk);
    const Panel<P> panel{buffers.x, packed_depth<P>(a.c), m};
    gather_pointers<T>(a.x, a.groups, chunk, rows.get());
    team.barrier();
    buffers.queue.restart(team);
    const auto packed = team.share(a.c, kPanelWidth<P>);
    const bool by_rows = by_rows_at(m);
    const PackedRows<P> tile_rows{buffers.x, a.c, m};
    if (kTiled<P> && by_rows) {
      copy_rows(tile_rows, rows.get(), packed.begin, packed.end);
    } else {
      pack_as_columns(panel, rows.get(), packed.begin, packed.end);
    }
    team.barrier();
    const auto w = weight_of(chunk.expert);
    if constexpr (may_go_by_rows) {
      if (by_rows) {
        const auto nothing = [](int64_t, int64_t) {};
        shared_rows_product(buffers.queue, team, w, tile_rows, panel, rows_memory, nothing,
                            [&](int64_t i, int64_t count, const S* c) {
                              alignas(64) S bias[kGroup] = {};
                              for (int64_t j = 0; a.bias && j < count; ++j)
                                bias[j] = static_cast<S>(a.bias.at(chunk.expert, i + j));
                              for (int64_t t = 0; t < m; ++t) {
                                for (int64_t j = 0; j < count; j += kLanes<S>) {
                                  const int valid = static_cast<int>(std::min<int64_t>(kLanes<S>, count - j));
                                  const Vec<S> sum = load(c + t * kGroup + j);
                                  store_valid(y_row(chunk.begin + t) + i + j, a.bias ? sum + load(bias + j) : sum, valid);
                                }
                              }
                            });
        return;
      }
    }
    const auto x = operands.operand(w, panel);
    buffers.queue.each(team, a.n, kGroup, [&](int64_t n, int64_t last) {
      const int64_t count = last - n;
      group_product(w, n, count, x, own->c, c_stride, own->pack);
      add_bias(a.bias, chunk.expert, n, count, own->c, c_stride, m);
      for_transposed(own->c, c_stride, count, m, [&](int64_t token, int64_t column, Vec<S> v, int valid) {
        store_valid(y_row(chunk.begin + token) + n + column, v, valid);
      });
    });
  });
  for (int64_t r = a.groups.offsets[a.groups.num_experts] + team.thread; r < a.groups.num_rows; r += team.size) {
    std::memset(static_cast<void*>(y_row(r)), 0, a.n * sizeof(T));
  }
}

// Zeroes this thread's share of the gradients (rows x cols values each) of the experts without rows.
template <class T>
void zero_empty(const Groups& groups, void* gradient, int64_t rows, int64_t cols, Team team) {
  const auto mine = team.share(rows, kGroup);
  for (int64_t e = 0; e < groups.num_experts; ++e) {
    if (groups.offsets[e] != groups.offsets[e + 1]) continue;
    // Unlike memset, which may take no null pointer, also for matrices without elements.
    std::fill_n(static_cast<T*>(gradient) + (e * rows + mine.begin) * cols, (mine.end - mine.begin) * cols, T{});
  }
}

// Sums over the tokens of a panel with tokens as columns, each token times its factor (1 without factors; factors are zero past
// the last token), for the rows first .. last: partial[i] carries them from chunk to chunk.
template <class T, class S>
void sum_tokens(const Panel<S>& panel, const S* factors, int64_t first, int64_t last, const Chunk& chunk, S* partial,
                T* gradient) {
  for (int64_t i = first; i < last; ++i) {
    // Several short chains of additions: see segment_length().
    Vec<S> sums[4] = {};
    for (int64_t t = 0; t < panel.width; t += kLanes<S>) {
      const Vec<S> value = load(panel.at(i, t));
      sums[t / kLanes<S> % 4] += factors ? load(factors + t) * value : value;
    }
    const S sum = sum_lanes<S>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    partial[i] = chunk.first ? sum : partial[i] + sum;
    if (chunk.last) from_scalar(partial[i], gradient[i]);
  }
}

template <class T>
void grouped_dweight(const GroupedDweightArgs& a, void* shared, int num_threads, Team team) {
  using S = Accumulator<T>;
  using P = Operand<T>;
  Arena arena(shared);
  GroupedBuffers<P> buffers(arena, a, num_threads);
  const auto rows = std::make_unique<const T*[]>(buffers.chunk);
  const auto bias = std::make_unique<S[]>(a.n);
  // The gradient's rows come from the panel with tokens as columns, its columns from the one with tokens as rows.
  const int64_t n = a.transposed ? a.c : a.n, c = a.transposed ? a.n : a.c;
  const GatheredRows& row_source = a.transposed ? a.x : a.dy;
  const GatheredRows& column_source = a.transposed ? a.dy : a.x;
  const auto bias_rows = team.share(a.n, kPanelWidth<P>);
  const bool sums_apart = a.dbias && (a.transposed || !std::is_same_v<P, S>);
  zero_empty<T>(a.groups, a.dweight, n, c, team);
  if (a.dbias && team.thread == 0) zero_empty<T>(a.groups, a.dbias, 1, a.n, Team{0, 1});
  for_chunks(a.groups, buffers.chunk, [&](const Chunk& chunk) {
    const int64_t m = chunk.size();
    const Panel<P> as_columns{a.transposed ? buffers.x : buffers.dy, n, packed_depth<P>(m)};
    const RowPanel<P> as_rows{a.transposed ? buffers.dy : buffers.x, tile_depth<P>(m), c};
    const Panel<S> dy_columns = sums_apart ? Panel<S>{buffers.dy_sums, a.n, m} : sums_of(as_columns);
    team.barrier();
    buffers.queue.restart(team);
    gather_pointers<T>(row_source, a.groups, chunk, rows.get());
    auto packed = team.share(n, kPanelWidth<P>);
    pack_as_terms(as_columns, rows.get(), m, packed.begin, packed.end);
    if (sums_apart && !a.transposed) pack_as_columns(dy_columns, rows.get(), packed.begin, packed.end);
    gather_pointers<T>(column_source, a.groups, chunk, rows.get());
    packed = team.share(c, kPanelWidth<P>);
    pack_as_rows(as_rows, rows.get(), m, packed.begin, packed.end);
    if (sums_apart && a.transposed) pack_as_columns(dy_columns, rows.get(), packed.begin, packed.end);
    team.barrier();
    const bool whole = chunk.first && chunk.last;
    const GradientSink<T> sink{static_cast<T*>(a.dweight) + chunk.expert * n * c,
                               std::is_same_v<T, S> || whole ? nullptr : buffers.partial,
                               c,
                               c,
                               chunk.first,
                               chunk.last,
                               a.groups.num_experts * n * c * static_cast<int64_t>(sizeof(T)) > kPastCaches};
    buffers.queue.each(team, n, kOuterRows<P>,
                       [&](int64_t begin, int64_t end) { outer_product(as_columns, begin, end, as_rows, sink); });
    if (sink.past_caches) order_streams();
    if (!a.dbias) return;
    sum_tokens(dy_columns, static_cast<const S*>(nullptr), bias_rows.begin, bias_rows.end, chunk, bias.get(),
               static_cast<T*>(a.dbias) + chunk.expert * a.n);
  });
}

void grouped_matmul(const GroupedMatmulArgs& args, void* shared, int num_threads, Team team) {
  visit_values(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    grouped_product<T>(args, shared, num_threads, team,
                       [&](int64_t expert) { return expert_weight<T>(args.weight, expert, args.n, args.c); });
  });
}

void grouped_matmul_dweight(const GroupedDweightArgs& args, void* shared, int num_threads, Team team) {
  visit_values(args.dtype, [&](auto tag) { grouped_dweight<typename decltype(tag)::type>(args, shared, num_threads, team); });
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
