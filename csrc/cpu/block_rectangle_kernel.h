// Products with block-sparse matrices whose blocks form rectangles, for one instruction set.
//
// A rectangle is a dense matrix: its rows go into vector lanes, one panel at a time, and the dense operand is read in place,
// once per panel. The sums have the bits of block_sparse_kernel.h, except for sampled products that are computed in pieces
// there, sums of outer products, sums without padding, and sums by tiles.
#pragma once

#include "cpu/block_sparse_kernel.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Number of groups of columns at the end of a thread's share that are distributed in quarters.
constexpr int64_t kQuarteredGroups = 1;

// Calls f(rectangle, first row, last row, end of the padding after them) for pieces of at most `limit` rows without padding.
template <class Args, class F>
GOSSAMER_INLINE void for_rectangle_rows(const Args& a, int64_t limit, F&& f) {
  for (const Rectangle* r = a.rectangles; r < a.rectangles + a.num_rectangles; ++r) {
    const int64_t begin = r->first * a.bm, end = begin + r->rows, size = even_chunk(r->rows, limit);
    for (int64_t row = begin; row < end; row += size) {
      f(*r, row, std::min(end, row + size), row + size < end ? row + size : r->last * a.bm);
    }
  }
}

// Packs rows begin .. end of a rectangle's blocks with the rows in lanes, or unchanged as the left operand of tiles; each
// thread packs some block columns.
template <class T, class P>
void pack_rectangle(const BlockProductArgs& a, const Rectangle& r, int64_t begin, int64_t end, const Panel<P>& panel,
                    const PackedRows<P>* left, const T** rows, Team team) {
  const auto block = [&](int64_t list, int64_t column) {
    return static_cast<const T*>(a.values) + a.lists.place(a.lists.offsets[list] + column) * a.bm * a.bn;
  };
  if (a.col_stride == 1) {
    const auto mine = team.share(r.count);
    for (int64_t column = mine.begin; column < mine.end; ++column) {
      for (int64_t row = begin; row < end; ++row) {
        rows[row - begin] = block(row / a.bm, column) + row % a.bm * a.row_stride - column * a.bn;
      }
      const int64_t first = column * a.bn, last = std::min(first + a.bn, r.depth);
      left ? copy_rows(*left, rows, first, last) : pack_as_columns(panel, rows, first, last);
    }
    return;
  }
  const auto mine = team.share(end - begin, kPanelWidth<P>);
  for (int64_t at = begin + mine.begin; at < begin + mine.end;) {
    const int64_t list = at / a.bm, next = std::min(begin + mine.end, (list + 1) * a.bm);
    for (int64_t k = 0; k < r.depth; ++k) rows[k] = block(list, k / a.bn) + k % a.bn * a.col_stride - (list * a.bm - begin);
    pack_as_rows(panel, rows, r.depth, at - begin, next - begin);
    at = next;
  }
}

// Applies bias and activation to columns n .. n + count and `width` rows from `row` on of the result, whose rows are the lanes
// of c; a bias by rows runs along the lanes.
template <class T, class S>
void finish_tile(const Epilogue& epilogue, int64_t n, int64_t count, int64_t row, int64_t width, S* c, int64_t c_stride) {
  finish<T>({epilogue.bias, !epilogue.bias_by_rows, epilogue.activation}, c, c_stride, n, count, row, width);
}

// c = the product of a panel, whose first row is `row`, with `count` rows of a weight, which give columns n and on of the
// result, with bias and activation applied.
template <class T, class P, class S>
void rectangle_tile(const Weight<T>& w, int64_t at, int64_t count, const Panel<P>& panel, const Epilogue& epilogue, int64_t n,
                    int64_t row, S* c, int64_t c_stride, P* pack) {
  group_product(w, at, count, panel, c, c_stride, pack);
  finish_tile<T>(epilogue, n, count, row, panel.width, c, c_stride);
}

template <class T>
void rectangle_product_typed(const RectangleProductArgs& a, void* shared, int num_threads, Team team) {
  using S = Accumulator<T>;
  using P = Operand<T>;
  Arena arena(shared);
  RectangleBuffers<P> buffers(arena, a, num_threads);
  const auto own = std::make_unique<ThreadBuffers<P>>();
  const auto rows = std::make_unique<const T*[]>(std::max(a.max_depth(), buffers.chunk));
  T* y = static_cast<T*>(a.y);
  // Tiles take the rectangle's rows as the left operand if rows of the dense operand are contiguous and blocks are whole
  // vectors.
  const bool whole_vectors = a.col_stride == 1 && a.bn % (kLanes<P> * kTerms<P>) == 0;
  const auto by_rows_at = [&](int64_t rows) {
    return (!kTiled<P> || whole_vectors) && goes_by_rows<P>(Weight<T>{nullptr, a.b.col_stride, a.b.row_stride, a.n, 0}, rows);
  };
  const RowsMemory<P> rows_memory(by_rows_at(buffers.chunk) ? buffers.chunk : 0);
  for_rectangle_rows(a, buffers.chunk, [&](const Rectangle& r, int64_t row, int64_t end, int64_t padded) {
    const int64_t depth = r.depth, m = end - row, c_stride = own->c_stride(buffers.chunk);
    const Panel<P> panel{buffers.panel, packed_depth<P>(depth), m};
    const T* b = static_cast<const T*>(a.b.base) + a.b.offset(r.column * a.bn, a.b.row_stride);
    const Weight<T> w{b, a.b.col_stride, a.b.row_stride, a.n, depth};
    team.barrier();
    buffers.queue.restart(team);
    const bool by_rows = by_rows_at(m);
    const PackedRows<P> left{buffers.panel, depth, m};
    pack_rectangle(a, r, row, end, panel, kTiled<P> && by_rows ? &left : nullptr, rows.get(), team);
    team.barrier();
    // The destination is fetched into the cache while the results are computed.
    const auto fetch_results = [&](int64_t n, int64_t count) {
      for (int64_t i = 0; i < m && !a.y_by_columns; ++i) {
        prefetch_lines<1, Fetch::kWriteLater>(y + a.y_offset(row + i, n), count * sizeof(T));
      }
    };
    const auto put_results = [&](int64_t n, int64_t count) {
      if (a.y_by_columns) {
        // Parts consist of whole blocks, so none ends within a vector.
        for (int64_t t = 0; t < m; t += kLanes<S>) {
          T* to = y + a.y_offset(row + t, n);
          const int valid = static_cast<int>(std::min<int64_t>(kLanes<S>, m - t));
          for (int64_t i = 0; i < count; ++i) store_valid(to + i * a.y_part, load(own->c + i * c_stride + t), valid);
        }
        for (int64_t i = 0; i < count && end < padded; ++i) std::fill_n(y + a.y_offset(end, n + i), padded - end, T{});
        return;
      }
      for (int64_t i = end; i < padded; ++i) std::fill_n(y + a.y_offset(i, n), count, T{});
      for_transposed(own->c, c_stride, count, m, [&](int64_t i, int64_t column, Vec<S> v, int valid) {
        store_valid(y + a.y_offset(row + i, n + column), v, valid);
      });
    };
    if constexpr (kByRows<P>) {
      if (by_rows) {
        const auto fetch = [&](int64_t n, int64_t last) { fetch_results(n, std::min<int64_t>(kGroup, last - n)); };
        shared_rows_product(buffers.queue, team, w, left, panel, rows_memory, fetch, [&](int64_t i, int64_t count, const S* c) {
          transpose_tokens(c, kGroup, m, count, own->c, c_stride);
          finish_tile<T>(a.epilogue, i, count, row, m, own->c, c_stride);
          put_results(i, count);
          if (i + count < a.n) fetch(i + count, a.n);
        });
        return;
      }
    }
    buffers.queue.each(
        team, a.n, kGroup,
        [&](int64_t n, int64_t last) {
          fetch_results(n, last - n);
          rectangle_tile(w, n, last - n, panel, a.epilogue, n, row, own->c, c_stride, own->pack);
          put_results(n, last - n);
        },
        quartered<P>(w, m, kQuarteredGroups));
  });
}

// Zeroes this thread's share of rows first .. last of y.
template <class T>
void zero_rows(const BlockProductArgs& a, int64_t first, int64_t last, T* y, Team team) {
  if (!a.y_by_columns) {
    const auto mine = team.share((last - first) * a.n);
    std::fill_n(y + first * a.n + mine.begin, mine.end - mine.begin, T{});
    return;
  }
  const auto mine = team.share(a.n);
  for (int64_t row = first; row < last; row += a.bm) {
    for (int64_t n = mine.begin; n < mine.end; ++n) std::fill_n(y + a.y_offset(row, n), a.bm, T{});
  }
}

// y = sᵀ·b as sums of outer products along the rows of s, some rows and some columns at a time: y's rows, whichever they are,
// come from the left panel and its columns from the right one.
template <class T>
void outer_rectangles_typed(const RectangleProductArgs& a, void* shared, int num_threads, Team team) {
  using S = Accumulator<T>;
  using P = Operand<T>;
  Arena arena(shared);
  OuterRectangleBuffers<P> buffers(arena, a, num_threads);
  const auto rows = std::make_unique<const T*[]>(kOuterTerms);
  const T* b = static_cast<const T*>(a.b.base);
  T* y = static_cast<T*>(a.y);
  const auto sum = [&](const Rectangle& r, int64_t n, int64_t width) {
    const int64_t height = (r.last - r.first) * a.bm, depth = r.depth, row = r.first * a.bm;
    T* out = y + a.y_offset(row, n);
    for (int64_t begin = 0; begin < depth; begin += kOuterTerms) {
      const int64_t m = std::min(kOuterTerms, depth - begin);
      const Panel<P> left{buffers.left, a.y_by_columns ? width : height, packed_depth<P>(m)};
      const Panel<P> right{buffers.right, tile_depth<P>(m), a.y_by_columns ? height : width};
      const auto pack = [&](bool as_left, int64_t first, int64_t last) {
        as_left ? pack_as_terms(left, rows.get(), m, first, last) : pack_as_rows(right, rows.get(), m, first, last);
      };
      team.barrier();
      buffers.queue.restart(team);
      const auto lists = team.share(r.last - r.first);
      for (int64_t list = lists.begin; list < lists.end; ++list) {
        for (int64_t k = 0; k < m; ++k) {
          const int64_t block = a.lists.place(a.lists.offsets[r.first + list] + (begin + k) / a.bn);
          rows[k] = static_cast<const T*>(a.values) + (block * a.bn + (begin + k) % a.bn) * a.bm - list * a.bm;
        }
        pack(!a.y_by_columns, list * a.bm, (list + 1) * a.bm);
      }
      for (int64_t k = 0; k < m; ++k) rows[k] = b + a.b.offset(r.column * a.bn + begin + k, a.b.row_stride) + n;
      const auto mine = team.share(width, kPanelWidth<P>);
      pack(a.y_by_columns, mine.begin, mine.end);
      team.barrier();
      const bool first = begin == 0, last = begin + m == depth;
      S* partial = std::is_same_v<T, S> || (first && last) ? nullptr : buffers.partial;
      const GradientSink<T> sink{out, partial, a.y_by_columns ? a.y_part : a.n, right.width, first, last};
      buffers.queue.each(team, left.depth, kGroup, [&](int64_t i, int64_t end) { outer_product(left, i, end, right, sink); });
    }
  };
  for (const Rectangle* r = a.rectangles; r < a.rectangles + a.num_rectangles; ++r) {
    if (r->count == 0) zero_rows(a, r->first * a.bm, r->last * a.bm, y, team);
    for (int64_t n = 0; n < a.n; n += kOuterColumns) sum(*r, n, std::min(kOuterColumns, a.n - n));
  }
}

template <class T>
void sampled_rectangles_typed(const SampledRectanglesArgs& a, void* shared, int num_threads, Team team) {
  using S = Accumulator<T>;
  using P = Operand<T>;
  Arena arena(shared);
  RectangleBuffers<P> buffers(arena, a, num_threads);
  const auto own = std::make_unique<ThreadBuffers<P>>();
  const auto rows = std::make_unique<const T*[]>(std::max(a.depth, buffers.chunk));
  const auto places = std::make_unique<T*[]>(buffers.chunk + a.bm);
  const auto zeros = std::make_unique<T[]>(a.a_rows ? a.depth : 0);
  const T* left = static_cast<const T*>(a.a.base);
  T* values = static_cast<T*>(a.values);
  zero_tail<T>(a, team);
  for_rectangle_rows(a, buffers.chunk, [&](const Rectangle& r, int64_t row, int64_t end, int64_t padded) {
    if (r.count == 0) return;
    const int64_t m = end - row, c_stride = own->c_stride(buffers.chunk), columns = r.count * a.bn, column = r.column * a.bn;
    const Panel<P> panel{buffers.panel, packed_depth<P>(a.depth), m};
    const T* b = static_cast<const T*>(a.b.base) + a.b.offset(column, a.b.col_stride);
    const Weight<T> w{b, a.b.col_stride, a.b.row_stride, columns, a.depth};
    team.barrier();
    buffers.queue.restart(team);
    // For a single column, or without row indices, the strides are arbitrary.
    if (a.a_rows || a.a.col_stride == 1) {
      for (int64_t i = 0; i < m; ++i) {
        const int64_t from = a.a_rows ? a.a_rows[row + i] : row + i;
        rows[i] = a.a_rows && (from < 0 || from >= a.num_a) ? zeros.get() : left + from * a.a.row_stride;
      }
      const auto mine = team.share(a.depth, kPanelWidth<P>);
      pack_as_columns(panel, rows.get(), mine.begin, mine.end);
    } else {
      for (int64_t k = 0; k < a.depth; ++k) rows[k] = left + row + k * a.a.col_stride;
      const auto mine = team.share(m, kPanelWidth<P>);
      pack_as_rows(panel, rows.get(), a.depth, mine.begin, mine.end);
    }
    // Positions of rows in the first block column; other block columns have the same offset for all rows. This costs one
    // division per row and chunk.
    for (int64_t i = 0; i < padded - row; ++i) {
      places[i] = values + (a.lists.offsets[(row + i) / a.bm] * a.bm + (row + i) % a.bm) * a.bn;
    }
    team.barrier();
    buffers.queue.each(
        team, columns, kGroup,
        [&](int64_t n, int64_t last) {
          const int64_t count = last - n;
          // A vector lies within a block, whose sides are powers of two.
          const auto place = [&](int64_t i, int64_t at) { return places[i] + (at & -a.bn) * a.bm + (at & (a.bn - 1)); };
          for (int64_t i = 0; i < m; ++i) prefetch_lines<1, Fetch::kWriteLater>(place(i, n), count * sizeof(T));
          rectangle_tile(w, n, count, panel, a.epilogue, column + n, row, own->c, c_stride, own->pack);
          for_transposed(own->c, c_stride, count, m,
                         [&](int64_t i, int64_t at, Vec<S> v, int valid) { store_valid(place(i, n + at), v, valid); });
          for (int64_t i = m; i < padded - row; ++i) {
            for (int64_t at = 0; at < count; at += kLanes<S>) {
              store_valid(place(i, n + at), Vec<S>{}, static_cast<int>(std::min<int64_t>(kLanes<S>, count - at)));
            }
          }
        },
        quartered<P>(w, m, kQuarteredGroups));
  });
}

void rectangle_product(const RectangleProductArgs& args, void* shared, int num_threads, Team team) {
  visit_values(args.dtype,
               [&](auto tag) { rectangle_product_typed<typename decltype(tag)::type>(args, shared, num_threads, team); });
}

void outer_rectangles(const RectangleProductArgs& args, void* shared, int num_threads, Team team) {
  visit_values(args.dtype,
               [&](auto tag) { outer_rectangles_typed<typename decltype(tag)::type>(args, shared, num_threads, team); });
}

void sampled_rectangles(const SampledRectanglesArgs& args, void* shared, int num_threads, Team team) {
  visit_values(args.dtype,
               [&](auto tag) { sampled_rectangles_typed<typename decltype(tag)::type>(args, shared, num_threads, team); });
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
