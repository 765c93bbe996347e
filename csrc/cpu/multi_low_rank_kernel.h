// Many low-rank updates and their gradients for one instruction set.
//
// The products here are skinny: r columns from long rows, or long rows from r columns. Rows are read in place, a few at a time.
// Factors are packed with their narrow side along the depth or in the lanes; for a few rows packing does not pay, and factors
// are used in registers.
#pragma once

#include "cpu/grouped_matmul_kernel.h"
#include "cpu/multi_low_rank.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Packs w(n .. n+panel.width, k .. k+panel.depth): the weight's rows in lanes, its columns along the depth.
template <class T, class S>
void pack_factor(const Weight<T>& w, int64_t n, int64_t k, const Panel<S>& panel, const T** runs) {
  const T* from = w.base + n * w.row_stride + k * w.col_stride;
  if (w.col_stride == 1) {
    for (int64_t i = 0; i < panel.width; ++i) runs[i] = from + i * w.row_stride;
    pack_as_columns(panel, runs, 0, panel.depth);
  } else {
    for (int64_t i = 0; i < panel.depth; ++i) runs[i] = from + i * w.col_stride;
    pack_as_rows(panel, runs, panel.depth, 0, panel.width);
  }
}

// How much of a factor to pack at a time, in whole units: as much as fits the second-level cache, so that rows stream by
// once.
GOSSAMER_INLINE int64_t factor_span(int64_t narrow, int64_t unit) {
  return std::max<int64_t>(1, kFactorPack / (narrow * unit)) * unit;
}

// Up to this many rows of an adapter, packing its factors does not pay.
constexpr int kDirectRows = 8;

// sum[i] = Σ_k value(i, k) · w(n .. n+lanes, k) for first <= k < last, in order, as block_product sums; `valid` of these rows of
// the weight exist.
template <class S, int Rows, class T, class Value>
GOSSAMER_INLINE void direct_sum(Vec<S> (&sum)[Rows], const Weight<T>& w, int64_t n, int valid, int64_t first, int64_t last,
                                Value&& value) {
  constexpr int lanes = kLanes<S>;
  const T* from = w.base + n * w.row_stride;
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) sum[i] = Vec<S>{};
  const auto add = [&](int64_t k, Vec<S> weights) {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) sum[i] = fma(splat(value(i, k)), weights, sum[i]);
  };
  if (w.col_stride != 1) {
    for (int64_t k = first; k < last; ++k)
      add(k, load_lanes<S>(from + k * w.col_stride, static_cast<const T*>(nullptr), valid));
    return;
  }
  for (int64_t k = first; k < last; k += lanes) {
    Vec<S> v[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) v[i] = i >= valid ? Vec<S>{} : load_terms<S>(from + i * w.row_stride + k, last - k);
    transpose<S>(v);
    if (last - k >= lanes) {
#pragma GCC unroll 16
      for (int j = 0; j < lanes; ++j) add(k + j, v[j]);
    } else {
      for (int j = 0; j < last - k; ++j) add(k + j, v[j]);
    }
  }
}

// shrink() for a few rows.
template <int Rows, class T, class S>
__attribute__((noinline)) void shrink_directly(const T* const* rows, int64_t count, const Weight<T>& w, S* s, int64_t stride,
                                               const MultiLowRankBuffers<T>& own) {
  constexpr int lanes = kLanes<S>;
  const int segment = segment_length(w.depth);
  for (int64_t first = 0; first < w.depth; first += segment) {
    const int64_t last = std::min<int64_t>(w.depth, first + segment);
    const S* values[Rows];
    for (int i = 0; i < Rows; ++i) {
      const T* from = rows[std::min<int64_t>(i, count - 1)] + first;
      if constexpr (std::is_same_v<T, S>) {
        values[i] = from;
      } else {
        S* to = own.rows + i * kDepth;
        for (int64_t k = 0; k < last - first; k += lanes) store(to + k, load_terms<S>(from + k, last - first - k));
        values[i] = to;
      }
    }
    for (int64_t n = 0; n < w.num_rows; n += lanes) {
      Vec<S> sum[Rows];
      direct_sum<S>(sum, w, n, static_cast<int>(std::min<int64_t>(lanes, w.num_rows - n)), first, last,
                    [&](int i, int64_t k) { return values[i][k - first]; });
      for (int i = 0; i < Rows && i < count; ++i) {
        S* to = s + i * stride + n;
        store(to, first == 0 ? sum[i] : load(to) + sum[i]);
      }
    }
  }
}

// expand() for a few rows.
template <int Rows, class T, class S, class F>
__attribute__((noinline)) void expand_directly(const S* s, int64_t stride, int64_t count, const Weight<T>& w, const F& f) {
  constexpr int lanes = kLanes<S>;
  const int segment = segment_length(w.depth);
  const S* values[Rows];
  for (int i = 0; i < Rows; ++i) values[i] = s + std::min<int64_t>(i, count - 1) * stride;
  for (int64_t n = 0; n < w.num_rows; n += lanes) {
    const int valid = static_cast<int>(std::min<int64_t>(lanes, w.num_rows - n));
    Vec<S> total[Rows] = {};
    for (int64_t first = 0; first < w.depth; first += segment) {
      Vec<S> sum[Rows];
      direct_sum<S>(sum, w, n, valid, first, std::min<int64_t>(w.depth, first + segment),
                    [&](int i, int64_t k) { return values[i][k]; });
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) total[i] = first == 0 ? sum[i] : total[i] + sum[i];
    }
    for (int i = 0; i < Rows && i < count; ++i) f(i, n, total[i], valid);
  }
}

// s[i][j] = Σ_k rows[i][k] · w(j, k) for `count` rows; s has room for a multiple of 4 of them.
template <class T, class S>
void shrink(const T* const* rows, int64_t count, const Weight<T>& w, S* s, int64_t stride, const MultiLowRankBuffers<T>& own) {
  if (count <= kDirectRows) {
    return with_few_tokens<kDirectRows>(count, [&](auto few) { shrink_directly<few>(rows, count, w, s, stride, own); });
  }
  constexpr int lanes = kLanes<S>;
  const int segment = segment_length(w.depth);
  const int64_t span = factor_span(stride, kDepth);
  for (int64_t first = 0; first < w.depth; first += span) {
    const Panel<S> factor{own.pack, std::min(span, w.depth - first), w.num_rows};
    pack_factor(w, 0, first, factor, own.runs);
    for_tiles(count, [&](auto tile, int64_t i) {
      for (int64_t k = 0; k < factor.depth; k += kDepth) {
        const int depth = static_cast<int>(std::min<int64_t>(kDepth, factor.depth - k));
        for (int t = 0; t < tile; ++t) {
          const T* from = rows[std::min(i + t, count - 1)] + first + k;
          for (int j = 0; j < depth; j += lanes) {
            store(own.rows + t * kDepth + j, load_valid(from + j, std::min(lanes, depth - j)));
          }
        }
        for (int64_t block = 0; block < factor.num_blocks(); ++block) {
          with_vectors<S>(factor.block_vectors(block), [&](auto vectors) {
            block_product<tile, vectors, kDepth, 1>(own.rows, 0, factor.block(block) + k * vectors * lanes, depth, segment,
                                                    first + k == 0, s + i * stride + block * kPanelWidth<S>, stride);
          });
        }
      }
    });
  }
}

// Calls f(i, n, vector, valid lanes) over Σ_j s[i][j] · w(n, j) for `count` rows of s.
template <class T, class S, class F>
GOSSAMER_INLINE void expand(const S* s, int64_t stride, int64_t count, const Weight<T>& w, const MultiLowRankBuffers<T>& own,
                            F&& f) {
  if (count <= kDirectRows) {
    return with_few_tokens<kDirectRows>(count, [&](auto few) { expand_directly<few, T, S>(s, stride, count, w, f); });
  }
  constexpr int lanes = kLanes<S>;
  const int segment = segment_length(w.depth), depth = static_cast<int>(w.depth);
  const int64_t span = factor_span(w.depth, kPanelWidth<S>);
  for (int64_t first = 0; first < w.num_rows; first += span) {
    const Panel<S> factor{own.pack, w.depth, std::min(span, w.num_rows - first)};
    pack_factor(w, first, 0, factor, own.runs);
    for_tiles(count, [&](auto tile, int64_t i) {
      for (int64_t block = 0; block < factor.num_blocks(); ++block) {
        with_vectors<S>(factor.block_vectors(block), [&](auto vectors) {
          constexpr int c_stride = vectors * lanes;
          alignas(64) S c[tile * c_stride];
          block_product<tile, vectors, 0, 1>(s + i * stride, stride, factor.block(block), depth, segment, true, c, c_stride);
          for (int t = 0; t < tile && i + t < count; ++t) {
            for (int v = 0; v < vectors; ++v) {
              const int64_t column = block * kPanelWidth<S> + v * lanes;
              const int valid = static_cast<int>(std::min<int64_t>(lanes, factor.width - column));
              f(i + t, first + column, load(c + t * c_stride + v * lanes), valid);
            }
          }
        });
      }
    });
  }
}

// Calls f(adapter, first row, end row) for this thread's chunks of the adapters' rows.
template <class F>
void each_adapter_chunk(const Groups& groups, int64_t limit, WorkQueue& queue, Team team, F&& f) {
  int64_t count = 0;
  for_chunks(groups, limit, [&](const Chunk&) { ++count; }, kAdapterUnit);
  const auto chunks = std::make_unique<Chunk[]>(count);
  int64_t next = 0;
  for_chunks(groups, limit, [&](const Chunk& chunk) { chunks[next++] = chunk; }, kAdapterUnit);
  queue.each(team, count, 1, [&](int64_t i, int64_t) { f(chunks[i]); });
}

template <class T>
T* slot_row(const FloatMatrix& m, const Groups& groups, int64_t r) {
  return static_cast<T*>(m.base) + groups.slots[r] * m.row_stride;
}

// Zeroes this thread's share of the rows without adapter.
template <class T>
void zero_unadapted(const FloatMatrix& m, int64_t width, const Groups& groups, Team team) {
  for (int64_t r = groups.offsets[groups.num_experts] + team.thread; r < groups.num_rows; r += team.size) {
    std::memset(static_cast<void*>(slot_row<T>(m, groups, r)), 0, width * sizeof(T));
  }
}

template <class T>
class MultiLowRank {
  using S = Accumulator<T>;

 public:
  MultiLowRank(const MultiLowRankArgs& args, void* shared, int num_threads, Team t)
      : a(args), team(t), limit(adapter_chunk(args.groups.num_rows, num_threads)), stride((args.rank + 31) / 32 * 32) {
    Arena queues(shared);
    for (WorkQueue* queue : {&chunks, &da_columns, &db_columns}) *queue = take_queue(queues, num_threads);
    Arena plan;
    MultiLowRankBuffers<T>(plan, args, limit);
    memory = allocate_scratch(plan.used());
    Arena arena(memory.get());
    own = std::make_unique<MultiLowRankBuffers<T>>(arena, args, limit);
    rows = std::make_unique<const T*[]>(limit);
    for (WorkQueue* queue : {&chunks, &da_columns, &db_columns}) queue->restart(team);
    team.barrier();
  }

  void forward(const FloatMatrix& y, bool add) {
    if (!add) zero_unadapted<T>(y, a.n, a.groups, team);
    each_adapter_chunk(a.groups, limit, chunks, team, [&](const Chunk& chunk) {
      const int64_t rank = a.rank_of(chunk.expert);
      reduce(a.x, chunk, expert_weight<T>(a.a, chunk.expert, rank, a.c), rank);
      if (a.s) keep(chunk, rank, a.s);
      scale_rows(chunk, rank);
      spread(chunk, expert_weight<T>(a.b, chunk.expert, a.n, rank), rank, y, add);
    });
  }

  void backward(const MultiLowRankBackwardArgs& args) {
    if (args.dx) zero_unadapted<T>(args.dx, a.c, a.groups, team);
    if (args.ds) {
      each_adapter_chunk(a.groups, limit, chunks, team, [&](const Chunk& chunk) {
        const int64_t rank = a.rank_of(chunk.expert);
        reduce(args.dy, chunk, expert_weight_t<T>(a.b, chunk.expert, a.n, rank), rank);
        scale_rows(chunk, rank);
        keep(chunk, rank, args.ds);
        if (args.dx) spread(chunk, expert_weight_t<T>(a.a, chunk.expert, rank, a.c), rank, args.dx, false);
      });
      team.barrier();
    }
    visit_float(args.factor_dtype, [&](auto tag) {
      using G = typename decltype(tag)::type;
      if constexpr (std::is_same_v<Accumulator<G>, S>) {
        if (args.da) factor_gradients<G, false>(da_columns, args.ds, a.x, a.c, static_cast<G*>(args.da));
        if (args.db) factor_gradients<G, true>(db_columns, a.s, args.dy, a.n, static_cast<G*>(args.db));
      }
    });
  }

 private:
  // own->s = source · wᵀ.
  void reduce(const FloatMatrix& source, const Chunk& chunk, const Weight<T>& w, int64_t rank) {
    if (rank == 0) return;
    for (int64_t i = 0; i < chunk.size(); ++i) rows[i] = slot_row<T>(source, a.groups, chunk.begin + i);
    shrink<T, S>(rows.get(), chunk.size(), w, own->s, stride, *own);
  }

  void scale_rows(const Chunk& chunk, int64_t rank) {
    const S scale = static_cast<S>(a.scale_of(chunk.expert));
    for (int64_t i = 0; i < chunk.size(); ++i) {
      for (int64_t j = 0; j < rank; ++j) own->s[i * stride + j] *= scale;
    }
  }

  void keep(const Chunk& chunk, int64_t rank, void* out) {
    for (int64_t i = 0; i < chunk.size(); ++i) {
      S* to = static_cast<S*>(out) + (chunk.begin + i) * a.rank;
      std::copy_n(own->s + i * stride, rank, to);
      std::fill(to + rank, to + a.rank, S{0});
    }
  }

  // out (+)= own->s · wᵀ.
  void spread(const Chunk& chunk, const Weight<T>& w, int64_t rank, const FloatMatrix& out, bool add) {
    if (rank == 0) {
      if (add) return;
      for (int64_t r = chunk.begin; r < chunk.end; ++r) {
        std::memset(static_cast<void*>(slot_row<T>(out, a.groups, r)), 0, w.num_rows * sizeof(T));
      }
      return;
    }
    expand<T, S>(own->s, stride, chunk.size(), w, *own, [&](int64_t i, int64_t n, Vec<S> v, int valid) {
      T* to = slot_row<T>(out, a.groups, chunk.begin + i) + n;
      store_valid(to, add ? load_valid(to, valid) + v : v, valid);
    });
  }

  // out[adapter] = Σ_r small[r]ᵀ wide[r] over its rows, (r, width), or its transpose times the adapter's scale.
  template <class G, bool Transposed>
  void factor_gradients(WorkQueue& queue, const void* small, const FloatMatrix& wide, int64_t width, G* out) {
    const int64_t pieces = (width + kFactorColumns - 1) / kFactorColumns;
    queue.each(team, a.groups.num_experts * pieces, 1, [&](int64_t piece, int64_t) {
      const int64_t adapter = piece / pieces, column = piece % pieces * kFactorColumns;
      const int64_t columns = std::min(kFactorColumns, width - column), rank = a.rank_of(adapter);
      const int64_t begin = a.groups.offsets[adapter], end = a.groups.offsets[adapter + 1];
      const int64_t live = begin == end ? 0 : rank;
      const S factor = Transposed ? static_cast<S>(a.scale_of(adapter)) : S{1};
      for (int64_t r = begin; r < end && live > 0; r += kFactorRows) {
        add_rows(static_cast<const S*>(small), wide, r, std::min(end, r + kFactorRows), column, columns, rank, factor,
                 r == begin);
      }
      G* to = out + adapter * a.rank * width;
      if constexpr (Transposed) {
        if (live > 0) {
          for_transposed(own->sum, kSumStride, live, columns, [&](int64_t n, int64_t j, Vec<S> v, int valid) {
            store_valid(to + (column + n) * a.rank + j, v, valid);
          });
        }
        for (int64_t n = column; n < column + columns; ++n) zero(to + n * a.rank + live, a.rank - live);
      } else {
        for (int64_t j = 0; j < live; ++j) {
          for (int64_t c = 0; c < columns; c += kLanes<S>) {
            const int valid = static_cast<int>(std::min<int64_t>(kLanes<S>, columns - c));
            store_valid(to + j * width + column + c, load(own->sum + j * kSumStride + c), valid);
          }
        }
        for (int64_t j = live; j < a.rank; ++j) zero(to + j * width + column, columns);
      }
    });
  }

  template <class G>
  static void zero(G* to, int64_t count) {
    std::memset(static_cast<void*>(to), 0, count * sizeof(G));
  }

  // sum[j][c] (+)= Σ_r factor · small[r][j] · wide[r][column + c] for the rows begin .. end.
  void add_rows(const S* small, const FloatMatrix& wide, int64_t begin, int64_t end, int64_t column, int64_t columns,
                int64_t rank, S factor, bool first) {
    const int depth = static_cast<int>(end - begin);
    for (int i = 0; i < depth; ++i) own->runs[i] = slot_row<T>(wide, a.groups, begin + i) + column;
    const Panel<S> panel{own->pack, depth, columns};
    pack_as_rows(panel, own->runs, depth, 0, columns);
    for (int64_t j = 0; j < rank; j += kGroup) {
      const int64_t count = std::min<int64_t>(kGroup, rank - j);
      for (int i = 0; i < depth; ++i) {
        S* to = own->rows + i * kGroup;
        for (int64_t k = 0; k < kGroup; ++k) to[k] = k < count ? factor * small[(begin + i) * a.rank + j + k] : S{0};
      }
      for_tiles(count, [&](auto tile, int64_t i) {
        for (int64_t block = 0; block < panel.num_blocks(); ++block) {
          with_vectors<S>(panel.block_vectors(block), [&](auto vectors) {
            block_product<tile, vectors, 1, kGroup>(own->rows + i, 0, panel.block(block), depth, kFactorRows, first,
                                                    own->sum + (j + i) * kSumStride + block * kPanelWidth<S>, kSumStride);
          });
        }
      });
    }
  }

  static constexpr int64_t kSumStride = kFactorColumns + 32;

  const MultiLowRankArgs& a;
  Team team;
  int64_t limit, stride;
  WorkQueue chunks, da_columns, db_columns;
  Scratch memory;
  std::unique_ptr<MultiLowRankBuffers<T>> own;
  std::unique_ptr<const T*[]> rows;
};

void multi_low_rank(const MultiLowRankForwardArgs& args, void* shared, int num_threads, Team team) {
  visit_float(args.dtype, [&](auto tag) {
    MultiLowRank<typename decltype(tag)::type>(args, shared, num_threads, team).forward(args.y, args.add);
  });
}

void multi_low_rank_backward(const MultiLowRankBackwardArgs& args, void* shared, int num_threads, Team team) {
  visit_float(args.dtype,
              [&](auto tag) { MultiLowRank<typename decltype(tag)::type>(args, shared, num_threads, team).backward(args); });
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
