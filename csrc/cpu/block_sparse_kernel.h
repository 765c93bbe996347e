// Products with block-sparse matrices of one instruction set.
//
// Every value is a sum along the depth in the order of its block row's list. A new partial sum starts every segment_length()
// terms, and, in a sampled product whose operands are packed in pieces, at each piece. So a value does not depend on the
// threads and, except for these pieces, not on other rows and columns.
#pragma once

#include "cpu/activation_kernel.h"
#include "cpu/block_sparse.h"
#include "cpu/grouped_matmul_kernel.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// The blocks of one list as a product reads them, in packed values: block j is at base + place(j) · size, and its element (i,
// k) at i·row + k·step.
template <class P>
struct BlockSource {
  const P* base;
  const int32_t* order;
  int64_t origin, size, row, step;

  const P* at(int64_t j) const { return base + (order ? order[j] : j - origin) * size; }
};

// c (+)= Σ_j block(j)'s first Rows rows · the panel's rows at indices[j], over j = first .. last, for one block of Vecs vectors
// of a panel. With ByRows a block's rows are contiguous, otherwise its columns. bn and segment count packed values.
template <int Rows, int Vecs, bool ByRows, class P>
__attribute__((noinline)) void sparse_rows(const BlockSource<P>& s, const int32_t* indices, int64_t first, int64_t last, int bn,
                                           int segment, const P* panel, bool fresh, SumOf<P>* c, int64_t c_stride) {
  using S = SumOf<P>;
  constexpr int width = Vecs * kLanes<P>;
  const int64_t row = ByRows ? s.row : 1, step = ByRows ? 1 : s.step;
  const int piece = std::min(segment, bn);
  Vec<S> sum[Rows][Vecs] = {};
  int terms = 0;
  const auto flush = [&] {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) {
        S* to = c + i * c_stride + v * kLanes<S>;
        store(to, fresh ? sum[i][v] : load(to) + sum[i][v]);
        sum[i][v] = Vec<S>{};
      }
    }
    fresh = false;
    terms = 0;
  };
  for (int64_t j = first; j < last; ++j) {
    const P* a = s.at(j);
    const P* b = panel + static_cast<int64_t>(indices[j]) * bn * width;
    for (int k = 0; k < bn; k += piece) {
      if (terms == segment) flush();
      accumulate<P>(sum, a + k * step, row, step, b + k * width, piece);
      terms += piece;
    }
  }
  if (terms > 0 || fresh) flush();
}

// Packs rows i0 .. i0+rows of the blocks first .. last, each in its memory order.
template <class T, class P>
void pack_blocks(const BlockProductArgs& a, int64_t i0, int64_t rows, int64_t first, int64_t last, P* out) {
  constexpr int64_t lanes = kLanes<P>, terms = kTerms<P>;
  const T* values = static_cast<const T*>(a.values) + i0 * a.row_stride;
  for (int64_t j = first; j < last; ++j) {
    const T* from = values + a.lists.place(j) * a.bm * a.bn;
    if (a.col_stride == 1) {
      for (int64_t i = 0; i < rows; ++i, out += a.bn / terms) {
        for (int64_t k = 0; k < a.bn; k += lanes * terms)
          store(out + k / terms, load_terms<P>(from + i * a.row_stride + k, a.bn - k));
      }
      continue;
    }
    for (int64_t k = 0; k < a.bn; k += terms, out += rows) {
      const T* line = from + k * a.col_stride;
      for (int64_t i = 0; i < rows; i += lanes) store(out + i, load_lanes<P>(line + i, line + a.col_stride + i, lanes));
    }
  }
}

// Adds the bias to rows x columns values of c, which are those from (row, column) of the result on, and applies the
// activation. c is read and written in whole vectors; bias has `columns` valid values when it runs along them.
template <class T, class S>
void finish(const Epilogue& epilogue, S* c, int64_t c_stride, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  const T* bias = static_cast<const T*>(epilogue.bias.base);
  const auto each = [&](auto&& f) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t t = 0; t < columns; t += kLanes<S>) {
        S* at = c + i * c_stride + t;
        store(at, f(load(at), i, t));
      }
    }
  };
  if (bias && epilogue.bias_by_rows) {
    each([&](Vec<S> v, int64_t i, int64_t) { return v + splat(static_cast<S>(to_scalar(bias[row + i]))); });
  } else if (bias) {
    each([&](Vec<S> v, int64_t, int64_t t) {
      return v + load_valid(bias + column + t, static_cast<int>(std::min<int64_t>(kLanes<S>, columns - t)));
    });
  }
  if (epilogue.activation < 0) return;
  const ActivationForm form{epilogue.activation, false, false, 0, 0};
  visit_activation<S>(
      form, [&](auto activation) { each([&](Vec<S> v, int64_t, int64_t) { return activation(GateUp<S>{v, v}).value; }); });
}

// Packs a panel's columns of b from `begin` on; each thread packs what it will use first.
template <class T, class P>
void pack_operand(const BlockProductArgs& a, const Panel<P>& panel, int64_t begin, const T** rows, Team team) {
  const T* base = static_cast<const T*>(a.b.base);
  if (a.b.col_stride == 1) {
    for (int64_t k = 0; k < a.depth; ++k) rows[k] = base + a.b.offset(k, a.b.row_stride) + begin;
    const auto mine = team.share(panel.width, kPanelWidth<P>);
    pack_as_rows(panel, rows, a.depth, mine.begin, mine.end);
    return;
  }
  const auto pack = [&](const Panel<P>& columns, int64_t from, int64_t first, int64_t last) {
    a.b.for_parts(first, last, 1, [&](int64_t k, int64_t end, int64_t shift) {
      for (int64_t i = 0; i < columns.width; ++i) rows[i] = base + (begin + from + i) * a.b.col_stride + shift;
      pack_as_columns(columns, rows, k, end);
    });
  };
  if (panel.num_blocks() < team.size) {
    const auto mine = team.share(a.depth, kLanes<P> * kTerms<P>);
    return pack(panel, 0, mine.begin, mine.end);
  }
  const auto mine = team.share(panel.width, kPanelWidth<P>);
  if (mine.begin == mine.end) return;
  pack({panel.data + mine.begin * panel.depth, panel.depth, mine.end - mine.begin}, mine.begin, 0, a.depth);
}

// Whether a product has so few columns that rows of blocks should fill the lanes, reading each block once in its memory order.
// The sums have the bits of sparse_rows().
template <class P>
bool has_few_columns(const BlockProductArgs& a) {
  constexpr int64_t lanes = kLanes<P>;
  return a.n <= lanes && a.col_stride == 1 && a.bm % lanes == 0 && a.bn % (lanes * kTerms<P>) == 0;
}

// Packs this thread's share of the operand of few columns: x[k · Columns + column].
template <int Columns, class T, class P>
void pack_few_columns(const BlockProductArgs& a, P* x, Team team) {
  const T* base = static_cast<const T*>(a.b.base);
  const auto mine = team.share(a.depth, kLanes<P> * kTerms<P>);
  a.b.for_parts(mine.begin, mine.end, a.b.row_stride, [&](int64_t first, int64_t last, int64_t shift) {
    for (int column = 0; column < Columns; ++column) {
      const T* from = base + column * a.b.col_stride + shift;
      for (int64_t k = first; k < last; k += kTerms<P>) {
        P& to = x[k / kTerms<P> * Columns + column];
        to = column < a.n ? packed_value<P>(from + k * a.b.row_stride, a.b.row_stride, last - k) : P{};
      }
    }
  });
}

// c[row][column] = kLanes rows from i0 on of a list, times the operand of pack_few_columns().
template <int Columns, class T, class P>
__attribute__((noinline)) void few_columns_product(const BlockProductArgs& a, int64_t list, int64_t i0, const P* x, SumOf<P>* c,
                                                   int64_t c_stride) {
  using S = SumOf<P>;
  constexpr int lanes = kLanes<P>, step = lanes * kTerms<P>;
  const int64_t first = a.lists.offsets[list], last = a.lists.offsets[list + 1], size = a.bm * a.bn;
  const int segment = segment_of<P>((last - first) * a.bn);
  const T* values = static_cast<const T*>(a.values) + i0 * a.row_stride;
  Vec<S> total[Columns] = {}, sum[Columns] = {};
  int terms = 0;
  bool fresh = true;
  const auto flush = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int t = 0; t < Columns; ++t) {
      total[t] = fresh ? sum[t] : total[t] + sum[t];
      sum[t] = Vec<S>{};
    }
    fresh = false;
    terms = 0;
  };
  for (int64_t j = first; j < last; ++j) {
    const T* block = values + a.lists.place(j) * size;
    // The data to read next: the same rows of the next block, or the next rows of the first block.
    const T* next =
        j + 1 < last ? values + a.lists.place(j + 1) * size : values + a.lists.place(first) * size + lanes * a.row_stride;
    const P* factors = x + a.lists.indices[j] * (a.bn / kTerms<P>)*Columns;
    for (int64_t k = 0; k < a.bn; k += step) {
      Vec<P> v[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        __builtin_prefetch(next + i * a.row_stride + k, 0, 2);
        v[i] = load_terms<P>(block + i * a.row_stride + k, step);
      }
      transpose<P>(v);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
#pragma GCC unroll 16
        for (int t = 0; t < Columns; ++t) sum[t] = fma(splat(factors[i * Columns + t]), v[i], sum[t]);
      }
      factors += lanes * Columns;
      terms += lanes;
      if (terms == segment) flush();
    }
  }
  if (terms > 0) flush();
  Vec<S> out[kLanes<S>] = {};
  for (int t = 0; t < Columns; ++t) out[t] = total[t];
  transpose<S>(out);
  for (int i = 0; i < lanes; ++i) store(c + i * c_stride, out[i]);
}

template <class T>
void block_product_typed(const BlockProductArgs& a, void* shared, int num_threads, Team team) {
  using S = Accumulator<T>;
  using P = Operand<T>;
  constexpr int64_t c_stride = kPanelWidth<P>, terms = kTerms<P>;
  // Number of terms packed at a time: a multiple of every segment and block.
  constexpr int64_t packed_terms = 256;
  Arena arena(shared);
  BlockProductBuffers<P> buffers(arena, a, num_threads);
  const bool by_rows = a.col_stride == 1;
  const bool in_place = sizeof(T) * terms == sizeof(P) && (by_rows || terms == 1);
  const auto rows = std::make_unique<const T*[]>(std::max(a.depth, buffers.chunk));
  const auto pack = std::make_unique<P[]>(in_place ? 0 : kGroup * packed_terms / terms);
  alignas(64) S c[kGroup * c_stride];
  const int64_t group = group_rows(a.bm), groups = a.rows() / group;
  T* y = static_cast<T*>(a.y);
  // Stores rows row .. row + count of c, which have `columns` columns from `column` on, in the result.
  const auto put = [&](int64_t row, int64_t count, int64_t column, int64_t columns) {
    finish<T>(a.epilogue, c, c_stride, row, count, column, columns);
    if (a.y_by_columns) {
      T* to = y + a.y_offset(row, column);
      for_transposed(c, c_stride, count, columns,
                     [&](int64_t t, int64_t i, Vec<S> v, int valid) { store_valid(to + t * a.y_part + i, v, valid); });
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t t = 0; t < columns; t += kLanes<S>) {
        const int valid = static_cast<int>(std::min<int64_t>(kLanes<S>, columns - t));
        store_valid(y + a.y_offset(row + i, column + t), load(c + i * c_stride + t), valid);
      }
    }
  };
  if (has_few_columns<P>(a)) {
    buffers.queue.restart(team);
    with_few_tokens<kLanes<P>>(a.n, [&](auto columns) { pack_few_columns<columns, T>(a, buffers.panel, team); });
    team.barrier();
    buffers.queue.each(team, a.rows(), kLanes<P>, [&](int64_t row, int64_t) {
      with_few_tokens<kLanes<P>>(
          a.n, [&](auto columns) { few_columns_product<columns, T>(a, row / a.bm, row % a.bm, buffers.panel, c, c_stride); });
      put(row, kLanes<P>, 0, a.n);
    });
    return;
  }
  for (int64_t begin = 0; begin < a.n; begin += buffers.chunk) {
    const Panel<P> panel{buffers.panel, a.depth / terms, std::min(buffers.chunk, a.n - begin)};
    team.barrier();
    buffers.queue.restart(team);
    pack_operand(a, panel, begin, rows.get(), team);
    team.barrier();
    buffers.queue.each(team, panel.num_blocks() * groups, 1, [&](int64_t item, int64_t) {
      const int64_t block = item / groups, row = item % groups * group, list = row / a.bm, i0 = row % a.bm;
      const int64_t first = a.lists.offsets[list], last = a.lists.offsets[list + 1];
      const int64_t column = block * kPanelWidth<P>, columns = std::min<int64_t>(kPanelWidth<P>, panel.width - column);
      const int segment = segment_of<P>((last - first) * a.bn), bn = static_cast<int>(a.bn / terms);
      with_vectors<P>(panel.block_vectors(block), [&](auto vectors) {
        const auto product = [&](const BlockSource<P>& s, int64_t from, int64_t to) {
          for_tiles(group, [&](auto tile, int64_t i) {
            BlockSource<P> rows_of = s;
            rows_of.base += i * s.row;
            const auto form = by_rows ? sparse_rows<tile, vectors, true, P> : sparse_rows<tile, vectors, false, P>;
            form(rows_of, a.lists.indices, from, to, bn, segment, panel.block(block), from == first, c + i * c_stride,
                 c_stride);
          });
        };
        if (in_place) {
          const P* base = static_cast<const P*>(a.values) + i0 * a.row_stride / terms;
          product({base, a.lists.order, 0, a.bm * a.bn / terms, a.row_stride / terms, a.col_stride}, first, last);
          return;
        }
        int64_t from = first;
        do {
          const int64_t to = std::min(last, from + packed_terms / a.bn);
          pack_blocks<T>(a, i0, group, from, to, pack.get());
          product({pack.get(), nullptr, from, group * bn, by_rows ? bn : 1, by_rows ? 1 : group}, from, to);
          from = to;
        } while (from < last);
      });
      put(row, group, begin + column, columns);
    });
  }
}

// Packs `terms` terms from `begin` on of an operand whose blocked dimension goes into the lanes, this thread's share.
template <class T, class P, int Vecs>
void pack_terms(const PartedMatrix& m, bool terms_in_rows, const Panel<P, Vecs>& panel, int64_t begin, int64_t terms,
                const T** rows, Team team) {
  const T* base = static_cast<const T*>(m.base);
  const int64_t term_stride = terms_in_rows ? m.row_stride : m.col_stride;
  const int64_t width_stride = terms_in_rows ? m.col_stride : m.row_stride;
  const auto mine = team.share(panel.width, Panel<P, Vecs>::kWidth);
  if (mine.begin == mine.end) return;
  if (width_stride == 1) {
    m.for_parts(mine.begin, mine.end, 1, [&](int64_t first, int64_t last, int64_t shift) {
      for (int64_t k = 0; k < terms; ++k) rows[k] = base + (begin + k) * term_stride + shift;
      pack_as_rows(panel, rows, terms, first, last);
    });
    return;
  }
  for (int64_t i = mine.begin; i < mine.end; ++i) rows[i] = base + m.offset(i, width_stride) + begin * term_stride;
  const Panel<P, Vecs> part{panel.data + mine.begin * panel.depth, panel.depth, mine.end - mine.begin};
  pack_as_columns(part, rows + mine.begin, 0, terms);
}

// Vectors across a panel so that its width divides blocks of a size.
template <class P, class F>
GOSSAMER_INLINE void with_side(int64_t size, F&& f) {
  if constexpr (2 * kLanes<P> > 16) {
    if (size % (2 * kLanes<P>) != 0) return f(std::integral_constant<int, 1>{});
  }
  f(std::integral_constant<int, 2>{});
}

// c += rows x width values, `stride` apart.
template <class T, class S>
void add_rows(const T* from, int64_t stride, int64_t rows, int64_t width, S* c) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t t = 0; t < width; t += kLanes<S>)
      store(c + i * width + t, load(c + i * width + t) + load(from + i * stride + t));
  }
}

template <class T, class S>
void store_rows(const S* c, int64_t rows, int64_t width, T* to, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t t = 0; t < width; t += kLanes<S>) store(to + i * stride + t, load(c + i * width + t));
  }
}

// c = Σ_k pa[k][row+i] · pb[k][column+j] for i < group and the columns of one block of pb; a part of both operands that
// the first-level cache holds is worked on at a time.
template <class P, int VecsA, int VecsB>
void sampled_tile(const Panel<P, VecsA>& pa, int64_t row, const Panel<P, VecsB>& pb, int64_t column, int64_t group, int segment,
                  SumOf<P>* c) {
  constexpr int a_width = Panel<P, VecsA>::kWidth, width = Panel<P, VecsB>::kWidth;
  if (pa.depth == 0) std::fill(c, c + group * width, SumOf<P>{0});
  for (int64_t k = 0; k < pa.depth; k += kDepth) {
    const int depth = static_cast<int>(std::min<int64_t>(kDepth, pa.depth - k));
    for_tiles(group, [&](auto tile, int64_t i) {
      const P* a = pa.block((row + i) / a_width) + k * a_width + (row + i) % a_width;
      block_product<tile, VecsB, 1, a_width>(a, 0, pb.at(k, column), depth, segment, k == 0, c + i * width, width);
    });
  }
}

// Zeroes this thread's share of the values from the last block on.
template <class T>
void zero_tail(const SampledProductArgs& a, Team team) {
  const int64_t live = a.lists.offsets[a.lists.count], size = a.bm * a.bn;
  const auto tail = team.share((a.nnz - live) * size);
  // Unlike memset, which may take no null pointer, also for values without a block.
  std::fill_n(static_cast<T*>(a.values) + live * size + tail.begin, tail.end - tail.begin, T{});
}

template <int VecsA, int VecsB, class T>
void sampled_product_typed(const SampledProductArgs& a, void* shared, int num_threads, Team team) {
  using S = Accumulator<T>;
  using P = Operand<T>;
  constexpr int64_t width = Panel<P, VecsB>::kWidth;
  Arena arena(shared);
  SampledProductBuffers<P> buffers(arena, a, num_threads);
  const auto rows = std::make_unique<const T*[]>(std::max({a.rows(), a.cols, buffers.chunk}));
  alignas(64) S c[kGroup * width];
  const int64_t group = group_rows(a.bm), live = a.lists.offsets[a.lists.count], size = a.bm * a.bn;
  const int segment = segment_of<P>(a.depth);
  T* values = static_cast<T*>(a.values);
  S* partial = nullptr;
  if constexpr (!std::is_same_v<T, S>) partial = buffers.partial;
  zero_tail<T>(a, team);
  // About a hundred thousand vector multiplications per unit, so that the queue's cost is negligible.
  const int64_t unit = std::max<int64_t>(1, (int64_t{1} << 20) / std::max<int64_t>(1, size * buffers.chunk / kLanes<S>) / 8);
  for (int64_t begin = 0; begin == 0 || begin < a.depth; begin += buffers.chunk) {
    const int64_t depth = std::min(buffers.chunk, a.depth - begin);
    const bool first = begin == 0, last = begin + buffers.chunk >= a.depth;
    const Panel<P, VecsA> pa{buffers.a, packed_depth<P>(depth), a.rows()};
    const Panel<P, VecsB> pb{buffers.b, packed_depth<P>(depth), a.cols};
    team.barrier();
    buffers.queue.restart(team);
    pack_terms(PartedMatrix{a.a, std::max<int64_t>(1, a.rows()), 0}, false, pa, begin, depth, rows.get(), team);
    pack_terms(a.b, true, pb, begin, depth, rows.get(), team);
    team.barrier();
    buffers.queue.each(team, live, unit, [&](int64_t j, int64_t end) {
      for (; j < end; ++j) {
        for (int64_t i0 = 0; i0 < a.bm; i0 += group) {
          for (int64_t j0 = 0; j0 < a.bn; j0 += width) {
            const int64_t row = a.rows_of[j] * a.bm + i0, column = a.lists.indices[j] * a.bn + j0;
            sampled_tile(pa, row, pb, column, group, segment, c);
            const int64_t place = j * size + i0 * a.bn + j0;
            if (!first) {
              partial ? add_rows(partial + place, a.bn, group, width, c) : add_rows(values + place, a.bn, group, width, c);
            }
            if (last) finish<T>(a.epilogue, c, width, row, group, column, width);
            partial && !last ? store_rows(c, group, width, partial + place, a.bn)
                             : store_rows(c, group, width, values + place, a.bn);
          }
        }
      }
    });
  }
}

void block_product(const BlockProductArgs& args, void* shared, int num_threads, Team team) {
  visit_float(args.dtype,
              [&](auto tag) { block_product_typed<typename decltype(tag)::type>(args, shared, num_threads, team); });
}

void sampled_product(const SampledProductArgs& args, void* shared, int num_threads, Team team) {
  visit_float(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_side<Operand<T>>(args.bm, [&](auto a) {
      with_side<Operand<T>>(args.bn, [&](auto b) { sampled_product_typed<a, b, T>(args, shared, num_threads, team); });
    });
  });
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
