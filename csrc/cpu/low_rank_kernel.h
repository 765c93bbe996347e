// The products of low_rank of one instruction set.
#pragma once

#include "cpu/expert_update_kernel.h"
#include "cpu/grouped_matmul_kernel.h"
#include "cpu/low_rank.h"
#include "cpu/philox_kernel.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Rows first .. last of a matrix of `depth` rows, `first` a multiple of kLanes, become rows of a panel.
template <class T, class P>
void pack_matrix(const FloatMatrix& m, int64_t depth, const Panel<P>& panel, int64_t first, int64_t last) {
  const T* base = static_cast<const T*>(m.base);
  if (m.col_stride != 1) {
    const auto columns = std::make_unique<const T*[]>(panel.width);
    for (int64_t j = 0; j < panel.width; ++j) columns[j] = base + j * m.col_stride;
    return pack_as_columns(panel, columns.get(), first, last);
  }
  // Rows of a whole matrix are pages apart: the next lines, and their page-table entries, are prefetched early enough.
  constexpr int64_t ahead = 16;
  for (int64_t k = first; k < last; k += kTerms<P>) {
    const T* row = base + k * m.row_stride;
    const T* next = k + 1 < depth ? row + m.row_stride : nullptr;
    for (int64_t i = k + ahead; i < std::min(k + ahead + kTerms<P>, last); ++i) {
      prefetch_lines<1>(base + i * m.row_stride, panel.width * sizeof(T));
    }
    pack_run(panel, k / kTerms<P>, row, next, 0, panel.width);
  }
}

// Rows first .. last of a matrix of few columns, `first` a multiple of whole vectors of pairs, become terms of packed rows, one for
// each column.
template <class T, class P>
void pack_transposed_matrix(const FloatMatrix& m, const PackedRows<P>& to, int64_t first, int64_t last) {
  const T* base = static_cast<const T*>(m.base);
  if (m.row_stride != 1) {
    const Weight<T> columns{base, 1, m.row_stride, to.tokens, last};
    return pack_transposed(columns, 0, static_cast<int>(to.tokens), first, last - first, to.at(0, first / kTerms<P>),
                           to.stride());
  }
  const auto columns = std::make_unique<const T*[]>(to.tokens);
  for (int64_t j = 0; j < to.tokens; ++j) columns[j] = base + j * m.col_stride;
  copy_rows(to, columns.get(), first, last);
}

// A copy of rows first .. first + count of `big`, with dropped elements zero.
template <class T>
Weight<T> drop_rows(const RankProductArgs& a, int64_t first, int64_t count, T* out, bool* kept) {
  const T* big = static_cast<const T*>(a.big.base) + first * a.big.row_stride;
  if (a.transposed) {
    const int64_t before = first % 4;
    for (int64_t k = 0; k < a.depth; ++k) {
      keep_columns(a.dropout, k, first - before, before + count, kept);
      for (int64_t i = 0; i < kGroup; ++i) {
        out[k * kGroup + i] = i < count && kept[before + i] ? big[i * a.big.row_stride + k * a.big.col_stride] : T{};
      }
    }
    return {out, 1, kGroup, count, a.depth};
  }
  for (int64_t i = 0; i < count; ++i) {
    keep_columns(a.dropout, first + i, 0, a.depth, kept);
    for (int64_t k = 0; k < a.depth; ++k) {
      out[i * a.depth + k] = kept[k] ? big[i * a.big.row_stride + k * a.big.col_stride] : T{};
    }
  }
  return {out, a.depth, 1, count, a.depth};
}

// out(i, j) = factor · c[i][j] for `count` rows from `first` on.
template <class O, class S>
void store_product(const FloatMatrix& out, int64_t first, int64_t count, int64_t rank, const S* c, int64_t c_stride, S factor) {
  O* to = static_cast<O*>(out.base) + first * out.row_stride;
  if (out.col_stride != 1) {
    return for_transposed(c, c_stride, count, rank, [&](int64_t j, int64_t i, Vec<S> v, int valid) {
      store_valid(to + j * out.col_stride + i, v * factor, valid);
    });
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < rank; j += kLanes<S>) {
      const int valid = static_cast<int>(std::min<int64_t>(kLanes<S>, rank - j));
      store_valid(to + i * out.row_stride + j, load(c + i * c_stride + j) * factor, valid);
    }
  }
}

// group_product of rows that are contiguous in n, for a panel of a rank's few columns. The memory access decides the speed:
// rows are a whole matrix's stride apart, often a power of two, so a long piece of few rows is read at a time; more rows would
// evict each other from cache sets.
template <class T, class P>
void wide_product(const Weight<T>& w, int64_t n, int count, const Panel<P>& panel, SumOf<P>* c, int64_t c_stride, P* pack) {
  constexpr int depth = kPackSize<P> / kWide;
  constexpr int64_t step = depth * kTerms<P>;
  const int segment = std::min(depth, segment_of<P>(w.depth));
  for (int64_t k = 0; k < w.depth; k += step) {
    const int64_t terms = std::min(step, w.depth - k);
    // The next lines are prefetched while these are processed, some with each tile.
    const bool more = k + step < w.depth;
    const int64_t next_n = more ? n : n + count, next_k = more ? k + step : 0;
    const int64_t length = more ? count : std::clamp<int64_t>(w.num_rows - next_n, 0, count);
    const int64_t runs = length > 0 ? std::min(step, w.depth - next_k) : 0;
    const T* next = w.base + next_n + next_k * w.col_stride;
    const int packed = static_cast<int>(packed_depth<P>(terms));
    auto ahead = LinesAhead::of(next, length, w.col_stride, runs);
    ahead.share_among(num_tiles(panel, count));
    pack_columns<kWide>(w, n, count, k, terms, pack);
    for (int64_t block = 0; block < panel.num_blocks(); ++block) {
      with_block(panel, block, [&](auto vectors, auto half) {
        const P* b = panel.block(block) + k / kTerms<P> * vectors * kLanes<P>;
        for_tiles<kTileRows<vectors>>(count, [&](auto tile, int64_t i) {
          ahead.fetch();
          block_product<tile, vectors, 1, kWide, half>(pack + i, 0, b, packed, segment, k == 0,
                                                       c + i * c_stride + block * kPanelWidth<P>, c_stride);
        });
      });
    }
  }
}

// rank_product() for rows that are contiguous along a skinny product's sum: they are the columns, and the rank's few rows are
// the left operand.
template <class T, class P>
void rank_product_by_rows(const RankProductArgs& a, const Weight<T>& big, LowRankBuffers<P>& buffers, Team team) {
  using S = Accumulator<T>;
  const PackedRows<P> rows{buffers.panel, a.depth, a.rank};
  const Panel<P> panel{buffers.panel, packed_depth<P>(a.depth), a.rank};
  const RowsMemory<P> memory(std::max<int64_t>(1, a.rank));
  buffers.queue.restart(team);
  const auto packed = team.share(a.depth, kLanes<P> * kTerms<P>);
  if constexpr (kTiled<P>) {
    pack_transposed_matrix<T>(a.small, rows, packed.begin, packed.end);
  } else {
    pack_matrix<T>(a.small, a.depth, panel, packed.begin, packed.end);
  }
  team.barrier();
  const S factor = static_cast<S>(a.factor);
  const auto store = [&](auto tag, int64_t first, int64_t count, const S* sums) {
    using O = typename decltype(tag)::type;
    // The product is the transpose of the requested result.
    const FloatMatrix out{static_cast<O*>(a.out.base) + first * a.out.row_stride, a.out.col_stride, a.out.row_stride,
                          a.out.dtype};
    store_product<O>(out, 0, a.rank, count, sums, kGroup, factor);
  };
  const auto nothing = [](int64_t, int64_t) {};
  shared_rows_product(buffers.queue, team, big, rows, panel, memory, nothing, [&](int64_t i, int64_t count, const S* sums) {
    if (a.out.dtype == a.dtype) return store(TypeTag<T>{}, i, count, sums);
    if constexpr (std::is_same_v<S, float>) store(TypeTag<float>{}, i, count, sums);
  });
}

template <class T>
void rank_product_of(const RankProductArgs& a, void* shared, int num_threads, Team team) {
  using S = Accumulator<T>;
  using P = Operand<T>;
  Arena arena(shared);
  LowRankBuffers<P> buffers(arena, a, num_threads);
  const int64_t c_stride = (a.rank + kGroup - 1) / kGroup * kGroup + kLanes<S>;
  const bool wide = a.big.row_stride == 1 && a.big.col_stride != 1 && !a.dropout.on;
  const Weight<T> big{static_cast<const T*>(a.big.base), a.big.row_stride, a.big.col_stride, a.rows, a.depth};
  if constexpr (kByRows<P>) {
    if (wide) return rank_product_by_rows(a, big, buffers, team);
  }
  const auto c = std::make_unique<S[]>((wide ? kWide : kGroup) * c_stride);
  const auto pack = std::make_unique<P[]>(kPackSize<P>);
  const auto dropped = std::make_unique<T[]>(a.dropout.on ? kGroup * a.depth : 0);
  const auto kept = std::make_unique<bool[]>(a.dropout.on ? a.depth + 64 : 0);
  const Panel<P> panel{buffers.panel, packed_depth<P>(a.depth), a.rank};
  buffers.queue.restart(team);
  const auto packed = team.share(a.depth, kLanes<P>);
  pack_matrix<T>(a.small, a.depth, panel, packed.begin, packed.end);
  team.barrier();
  buffers.queue.each(team, a.rows, rank_unit(a.rows, num_threads, wide ? kWide : kGroup), [&](int64_t first, int64_t last) {
    const int64_t count = last - first;
    if (wide) {
      wide_product(big, first, static_cast<int>(count), panel, c.get(), c_stride, pack.get());
    } else if (a.dropout.on) {
      group_product(drop_rows<T>(a, first, count, dropped.get(), kept.get()), 0, count, panel, c.get(), c_stride, pack.get());
    } else {
      group_product(big, first, count, panel, c.get(), c_stride, pack.get());
    }
    const S factor = static_cast<S>(a.factor);
    if (a.out.dtype == a.dtype) return store_product<T>(a.out, first, count, a.rank, c.get(), c_stride, factor);
    if constexpr (std::is_same_v<S, float>) store_product<float>(a.out, first, count, a.rank, c.get(), c_stride, factor);
  });
}

// Replaces the update by its sum with a tile of the layer's product: `count` rows of `width` values.
template <class S>
void add_update(const LowRankArgs& a, const S* base, S* update, int64_t c_stride, int64_t count, int64_t width) {
  if (!a.left) return;
  const S factor = static_cast<S>(a.factor);
  for (int64_t i = 0; i < count; ++i) {
    S* to = update + i * c_stride;
    const S* from = base + i * c_stride;
    for (int64_t j = 0; j < width; j += kLanes<S>) {
      store(to + j, load(to + j) * factor + load(from + j));
    }
  }
}

// y += factor · Σ_k left[i][k] · b[k] for a tile of Rows rows and one block of Vecs whole vectors, with the sums in registers.
template <int Rows, int Vecs, class T, class P>
__attribute__((noinline)) void add_to_tile(const P* left, const P* b, int64_t depth, SumOf<P> factor, T* y, int64_t y_stride) {
  using S = SumOf<P>;
  Vec<S> sum[Rows][Vecs] = {};
  accumulate<P>(sum, left, kDepth, 1, b, depth);
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) {
      T* to = y + i * y_stride + v * kLanes<S>;
      store_sums(to, fma(sum[i][v], splat(factor), load(to)));
    }
  }
}

// The same by tiles for up to two tiles of rows, whose packed values are zero past the depth, as those of b are.
template <int Vecs, class T, class P>
void add_tiles([[maybe_unused]] const P* left, [[maybe_unused]] int rows, [[maybe_unused]] const P* b,
               [[maybe_unused]] int64_t depth, [[maybe_unused]] float factor, [[maybe_unused]] T* y,
               [[maybe_unused]] int64_t y_stride, [[maybe_unused]] float* c) {
#if GOSSAMER_AMX
  constexpr int width = Vecs * kLanes<float>;
  const auto product = rows > kTileSide ? tile_product<2, Vecs> : tile_product<1, Vecs>;
  LinesAhead none;
  product(reinterpret_cast<const char*>(left), kDepth * sizeof(P), b, depth / kTileSide, true, c, width * sizeof(float), none);
  for (int i = 0; i < rows; ++i) {
    T* to = y + i * y_stride;
    __builtin_prefetch(to + width, 1, 2);
#pragma GCC unroll 4
    for (int v = 0; v < width; v += kLanes<float>)
      store_sums(to + v, fma(load(c + i * width + v), splat(factor), load(to + v)));
  }
#endif
}

// Adds the update to the rows of y, which the threads share. Columns are the lanes.
template <class T>
void low_rank_update(const LowRankArgs& a, LowRankBuffers<Operand<T>>& buffers, ThreadBuffers<Operand<T>>& own, bool* kept,
                     Team team) {
  using S = Accumulator<T>;
  using P = Operand<T>;
  const int64_t depth = packed_depth<P>(a.rank);
  const Panel<P> right{buffers.update, tile_depth<P>(a.rank), a.columns};
  const int64_t c_stride = own.c_stride(kPanelWidth<P>);
  const auto block_of = [&](int64_t block) {
    const int64_t width = std::min<int64_t>(kPanelWidth<P>, a.columns - block * kPanelWidth<P>);
    return Panel<P>{right.block(block), right.depth, width};
  };
  buffers.queue.restart(team);
  const auto packed = team.share(right.num_blocks());
  for (int64_t block = packed.begin; block < packed.end; ++block) {
    FloatMatrix from = a.right;
    from.base = const_cast<T*>(static_cast<const T*>(from.base) + block * kPanelWidth<P> * from.col_stride);
    pack_matrix<T>(from, a.rank, block_of(block), 0, a.rank);
    zero_past(block_of(block), depth, 0, block_of(block).width);
  }
  team.barrier();
  const Weight<T> left{static_cast<const T*>(a.left.base), a.left.row_stride, 1, a.rows, a.rank};
  const S factor = static_cast<S>(a.factor);
  const bool in_registers = !a.dropout.on && depth <= segment_of<P>(a.rank);
  buffers.queue.each(team, a.rows, rank_unit(a.rows, team.size, kGroup), [&](int64_t i, int64_t last) {
    T* y = static_cast<T*>(a.y.base) + i * a.y.row_stride;
    const int64_t tiled = !in_registers ? 0 : kTiled<P> ? last - i : (last - i) / 4 * 4;
    const int64_t whole = a.columns % kLanes<S> == 0 ? right.num_blocks() : a.columns / kPanelWidth<P>;  // blocks
    if (tiled > 0) pack_rows(left, i, static_cast<int>(tiled), 0, a.rank, own.pack);
    if constexpr (kTiled<P>) {
      for (int64_t block = 0; block < (tiled > 0 ? whole : 0); ++block) {
        with_vectors<P>(right.block_vectors(block), [&](auto vectors) {
          T* to = y + block * kPanelWidth<P>;
          add_tiles<vectors>(own.pack, static_cast<int>(tiled), right.block(block), right.depth, factor, to, a.y.row_stride,
                             own.c);
        });
      }
    } else {
      for_tiles<GOSSAMER_TILE_ROWS>(tiled, [&](auto tile, int64_t r) {
        for (int64_t block = 0; block < whole; ++block) {
          with_vectors<P>(right.block_vectors(block), [&](auto vectors) {
            T* to = y + r * a.y.row_stride + block * kPanelWidth<P>;
            add_to_tile<tile, vectors>(own.pack + r * kDepth, right.block(block), depth, factor, to, a.y.row_stride);
          });
        }
      });
    }
    for (int64_t block = tiled == last - i ? whole : 0; block < right.num_blocks(); ++block) {
      const Panel<P> panel = block_of(block);
      const int64_t first = i + (block < whole ? tiled : 0);
      group_product(left, first, last - first, panel, own.c, c_stride, own.pack);
      for (int64_t r = 0; r < last - first; ++r) {
        S* update = own.c + r * c_stride;
        if (a.dropout.on) {
          keep_columns(a.dropout, first + r, block * kPanelWidth<P>, panel.width, kept);
          for (int64_t j = 0; j < panel.width; ++j) update[j] = kept[j] ? update[j] : S{0};
        }
        T* to = static_cast<T*>(a.y.base) + (first + r) * a.y.row_stride + block * kPanelWidth<P>;
        for (int64_t j = 0; j < panel.width; j += kLanes<S>) {
          const int valid = static_cast<int>(std::min<int64_t>(kLanes<S>, panel.width - j));
          store_valid_sums(to + j, fma(load(update + j), splat(factor), load_valid(to + j, valid)), valid);
        }
      }
    }
  });
}

// Columns first .. end of the result, `first` a multiple of 4, for a weight that is contiguous along them: they are the lanes,
// and the rows of x are read in place.
template <class T>
void low_rank_columns(const LowRankArgs& a, LowRankBuffers<Operand<T>>& buffers, ThreadBuffers<Operand<T>>& own, bool* kept,
                      int64_t first, int64_t end) {
  using S = Accumulator<T>;
  using P = Operand<T>;
  const int64_t m = end - first, c_stride = own.c_stride(buffers.chunk);
  const auto pack = [&](FloatMatrix from, const Panel<P>& panel, int64_t depth) {
    from.base = const_cast<T*>(static_cast<const T*>(from.base) + first * from.col_stride);
    pack_matrix<T>(from, depth, panel, 0, depth);
  };
  const Panel<P> panel{buffers.panel, packed_depth<P>(a.depth), m}, update{buffers.update, packed_depth<P>(a.rank), m};
  pack({a.weight.base, a.weight.col_stride, a.weight.row_stride, a.dtype}, panel, a.depth);
  if (a.left) pack(a.right, update, a.rank);
  const Weight<T> x{static_cast<const T*>(a.x.base), a.x.row_stride, 1, a.rows, a.depth};
  const Weight<T> left{static_cast<const T*>(a.left.base), a.left.row_stride, 1, a.rows, a.rank};
  alignas(64) S bias[ThreadBuffers<P>::kMaxChunk] = {};
  for (int64_t j = 0; j < (a.bias ? m : 0); ++j) bias[j] = static_cast<S>(a.bias.at(0, first + j));
  for (int64_t i = 0; i < a.rows; i += kGroup) {
    const int64_t count = std::min<int64_t>(kGroup, a.rows - i);
    // The result's rows are fetched into the cache while they are computed.
    for (int64_t r = 0; r < count; ++r) {
      prefetch_lines<1, Fetch::kWriteLater>(static_cast<T*>(a.y.base) + (i + r) * a.y.row_stride + first, m * sizeof(T));
    }
    S *base = own.c, *sum = a.left ? own.c + kGroup * c_stride : base;
    if (a.left) group_product(left, i, count, update, sum, c_stride, own.pack);
    group_product(x, i, count, panel, base, c_stride, own.pack);
    for (int64_t r = 0; r < (a.bias ? count : 0); ++r) {
      S* to = base + r * c_stride;
      for (int64_t j = 0; j < m; j += kLanes<S>) store(to + j, load(to + j) + load(bias + j));
    }
    if (a.dropout.on) {
      for (int64_t r = 0; r < count; ++r) {
        keep_columns(a.dropout, i + r, first, m, kept);
        for (int64_t j = 0; j < m; ++j) {
          if (!kept[j]) sum[r * c_stride + j] = S{0};
        }
      }
    }
    add_update(a, base, sum, c_stride, count, m);
    for (int64_t r = 0; r < count; ++r) {
      T* to = static_cast<T*>(a.y.base) + (i + r) * a.y.row_stride + first;
      for (int64_t j = 0; j < m; j += kLanes<S>) {
        store_valid_sums(to + j, load(sum + r * c_stride + j), static_cast<int>(std::min<int64_t>(kLanes<S>, m - j)));
      }
    }
  }
}

// Rows first .. end of the result, worked on by a team.
template <class T, class W>
void low_rank_rows_of(const LowRankArgs& a, const W& weight, LowRankBuffers<Operand<T>>& buffers,
                      ThreadBuffers<Operand<T>>& own, OperandMemory<Operand<T>>& operands, bool* kept, const T** rows,
                      int64_t first, int64_t end, Team team) {
  using S = Accumulator<T>;
  using P = Operand<T>;
  const Weight<T> a_weight{static_cast<const T*>(a.a.base), a.a.row_stride, a.a.col_stride, a.rank, a.depth};
  const Weight<T> right{static_cast<const T*>(a.right.base), a.right.col_stride, a.right.row_stride, a.columns, a.rank};
  const int64_t m = end - first, c_stride = own.c_stride(buffers.chunk);
  const auto find_rows = [&](const FloatMatrix& from) {
    for (int64_t i = 0; i < m; ++i) rows[i] = static_cast<const T*>(from.base) + (first + i) * from.row_stride;
  };
  const auto pack = [&](const FloatMatrix& from, const Panel<P>& panel, int64_t terms) {
    find_rows(from);
    const auto part = team.share(terms, kPanelWidth<P>);
    pack_as_columns(panel, rows, part.begin, part.end);
  };
  const Panel<P> panel{buffers.panel, packed_depth<P>(a.depth), m}, left{buffers.update, packed_depth<P>(a.rank), m};
  team.barrier();
  buffers.queue.restart(team);
  buffers.left_queue.restart(team);
  // A panel has room for more rows than a few, and half of it would come from another core's cache.
  bool in_place = false;
  if constexpr (std::is_same_v<W, QuantizedMatrix>) in_place = operands.reads_rows(weight, m) && !a.a;
  if (!in_place) pack(a.x, panel, a.depth);
  if (a.a) {
    team.barrier();
    buffers.left_queue.each(team, a.rank, kRankUnit, [&](int64_t j, int64_t last) {
      group_product(a_weight, j, last - j, panel, own.c, c_stride, own.pack);
      for_transposed(own.c, c_stride, last - j, m, [&](int64_t token, int64_t column, Vec<S> v, int valid) {
        T* to = static_cast<T*>(a.left.base) + (first + token) * a.left.row_stride + j + column;
        store_valid(to, v * static_cast<S>(a.left_factor), valid);
      });
    });
    team.barrier();
  }
  if (a.left) pack(a.left, left, a.rank);
  team.barrier();
  const auto x = [&] {
    if constexpr (std::is_same_v<W, QuantizedMatrix>) {
      if (in_place) {
        find_rows(a.x);
        return operands.operand_of_rows(rows, a.depth, m);
      }
    }
    return operands.operand(weight, panel);
  }();
  buffers.queue.each(team, a.columns, kGroup, [&](int64_t n, int64_t last) {
    const int64_t count = last - n;
    // The result's rows are fetched into the cache while it is computed.
    for (int64_t i = 0; i < m; ++i) {
      prefetch_lines<1, Fetch::kWriteLater>(static_cast<T*>(a.y.base) + (first + i) * a.y.row_stride + n, count * sizeof(T));
    }
    S *base = own.c, *update = a.left ? own.c + kGroup * c_stride : base;
    if (a.left) group_product(right, n, count, left, update, c_stride, own.pack);
    group_product(weight, n, count, x, base, c_stride, own.pack);
    add_bias(a.bias, 0, n, count, base, c_stride, m);
    if (a.dropout.on) {
      for (int64_t i = 0; i < m; ++i) keep_columns(a.dropout, first + i, n, count, kept + i * kGroup);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t token = 0; token < m; ++token) {
          if (!kept[token * kGroup + i]) update[i * c_stride + token] = S{0};
        }
      }
    }
    add_update(a, base, update, c_stride, count, m);
    for_transposed(update, c_stride, count, m, [&](int64_t token, int64_t column, Vec<S> v, int valid) {
      T* to = static_cast<T*>(a.y.base) + (first + token) * a.y.row_stride + n + column;
      store_valid_sums(to, v, valid);
    });
  });
}

template <class T, class W>
void low_rank_matmul_of(const LowRankArgs& a, const W& weight, void* shared, int num_threads, Team team) {
  using P = Operand<T>;
  Arena arena(shared);
  LowRankBuffers<P> buffers(arena, a, num_threads);
  const auto own = std::make_unique<ThreadBuffers<P>>();
  const auto rows = std::make_unique<const T*[]>(buffers.chunk);
  const auto kept = std::make_unique<bool[]>(a.dropout.on ? std::max<int64_t>(buffers.chunk * kGroup, kPanelWidth<P>) + 64 : 0);
  auto operands = operand_memory<P>(a.depth, buffers.chunk, weight);
  if (buffers.form == LowRankForm::kUpdate) return low_rank_update<T>(a, buffers, *own, kept.get(), team);
  if (buffers.form == LowRankForm::kShared) {
    for (int64_t first = 0; first < a.rows; first += buffers.chunk) {
      const int64_t end = std::min(a.rows, first + buffers.chunk);
      low_rank_rows_of<T>(a, weight, buffers, *own, operands, kept.get(), rows.get(), first, end, team);
    }
    return;
  }
  buffers.chunks.restart(team);
  if (buffers.left_product) rank_product_of<T>(a.left_product(), buffers.left_product, num_threads, team);
  buffers.keep_own(team.thread);
  team.barrier();
  const bool by_rows = buffers.form == LowRankForm::kByRows;
  buffers.chunks.each(
      team, by_rows ? a.rows : a.columns, buffers.chunk,
      [&](int64_t first, int64_t end) {
        if (by_rows) {
          low_rank_rows_of<T>(a, weight, buffers, *own, operands, kept.get(), rows.get(), first, end, Team{0, 1});
        } else {
          low_rank_columns<T>(a, buffers, *own, kept.get(), first, end);
        }
      },
      buffers.quartered);
}

void rank_product(const RankProductArgs& args, void* shared, int num_threads, Team team) {
  visit_values(args.dtype, [&](auto tag) { rank_product_of<typename decltype(tag)::type>(args, shared, num_threads, team); });
}

void low_rank_matmul(const LowRankArgs& args, void* shared, int num_threads, Team team) {
  visit_values(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (args.quantized.data)
      return low_rank_matmul_of<T>(args, QuantizedMatrix{&args.quantized, 0, false}, shared, num_threads, team);
    const FloatMatrix& w = args.weight;
    const Weight<T> weight{static_cast<const T*>(w.base), w.row_stride, w.col_stride, args.columns, args.depth};
    low_rank_matmul_of<T>(args, weight, shared, num_threads, team);
  });
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
