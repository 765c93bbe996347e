// gather_reduce, gather_max and gather_dot of one instruction set.
#pragma once

#include "cpu/gather_reduce.h"
#include "cpu/vec.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Rows this many positions ahead are prefetched: table rows are scattered, so no hardware prefetcher finds them. Into the
// second-level cache: a core waits for several times as many lines there as it can for the first level. Long rows fewer:
// more lines than it can wait for at once gain nothing.
GOSSAMER_INLINE int64_t gather_ahead(int64_t row_bytes) {
  return std::clamp<int64_t>(8192 / std::max<int64_t>(row_bytes, 1), 4, 32);
}

template <class Index>
struct LiveIds {
  const Index* ids;
  uint64_t limit;
  int64_t padding_idx, end;

  LiveIds(const Bags& bags, int64_t num_rows)
      : ids(static_cast<const Index*>(bags.index.base)),
        limit(static_cast<uint64_t>(std::min(bags.limit, num_rows))),
        padding_idx(bags.padding_idx),
        end(bags.num_positions) {}

  // The id at a position, or -1 where it contributes nothing.
  int64_t operator[](int64_t position) const {
    const int64_t id = ids[position];
    return static_cast<uint64_t>(id) < limit && id != padding_idx ? id : -1;
  }

  bool outside(int64_t position) const { return static_cast<uint64_t>(int64_t{ids[position]}) >= limit; }

  int64_t count(int64_t begin, int64_t stop) const {
    int64_t live = 0;
    for (int64_t p = begin; p < stop; ++p) live += (*this)[p] >= 0;
    return live;
  }
};

template <int kAtLeast = 1, class T, class Index>
GOSSAMER_INLINE void prefetch_row(const T* table, int64_t stride, const LiveIds<Index>& live, int64_t position, int64_t bytes) {
  // The processor's own prefetcher of ids comes late beside so many lines of rows: a third of the time was spent on them.
  __builtin_prefetch(live.ids + position + 64);
  // Of an id that is not there, some row: a branch would cost more than it saves.
  const int64_t id = live.ids[std::min(position, live.end - 1)];
  prefetch_lines<kAtLeast, Fetch::kReadLater>(table + (static_cast<uint64_t>(id) < live.limit ? id : 0) * stride, bytes);
}

GOSSAMER_INLINE double weight_at(const FloatMatrix& weights, int64_t position) {
  switch (weights.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(weights.base)[position];
    case DType::kFloat64:
      return static_cast<const double*>(weights.base)[position];
    case DType::kBFloat16:
      return to_scalar(static_cast<const BFloat16*>(weights.base)[position]);
    default:
      return to_scalar(static_cast<const Float16*>(weights.base)[position]);
  }
}

// The table that bags read and the columns they write: one for all, or each feature's.
template <class T>
struct BagTable {
  const T* rows;
  int64_t stride, num_rows, dim, column, row_of_output;
  bool mean;
  RowScales scales = {};
};

template <class T>
GOSSAMER_INLINE BagTable<T> bag_table(const FloatMatrix& table, int64_t num_rows, int64_t dim, const Bags& bags, int64_t bag) {
  const T* base = static_cast<const T*>(table.base);
  if (!bags.features) return {base, table.row_stride, num_rows, dim, 0, bag, bags.mean};
  const int64_t each = bags.bags_per_feature();
  const Feature& f = bags.features[bag / each];
  return {base + f.element, f.dim, f.rows, f.dim, f.column, bag % each, f.mean != 0};
}

// What the codes of a row are multiplied with beside the weight; 1 for a row of numbers.
template <class T>
GOSSAMER_INLINE Accumulator<T> scale_of(const RowScales& scales, int64_t row) {
  if constexpr (kIsCode<T>) {
    return scales[row];
  } else {
    return 1;
  }
}

// Sums kVectors vectors of columns (or, when some > 0, one vector of `some` columns) of one bag's rows.
template <int kVectors, bool kWeighted, class T, class Index, class O>
GOSSAMER_INLINE void reduce_columns(const BagTable<T>& from, const FloatMatrix& weights, const LiveIds<Index>& live,
                                    int64_t begin, int64_t end, int64_t column, int some, Accumulator<T> divisor, O* out,
                                    int64_t prefetch_bytes, bool* outside) {
  using S = Accumulator<T>;
  const T* table = from.rows + column;
  // A pass of `some` columns of one vector has at least one of them.
  constexpr int kBytes = kVectors == 1 ? 1 : kVectors * kLanes<S> * static_cast<int>(sizeof(T));
  Vec<S> sum[kVectors] = {};
  const int64_t ahead = gather_ahead(prefetch_bytes);
  for (int64_t p = begin; p < end; ++p) {
    if (prefetch_bytes > 0) {
      prefetch_row<kBytes>(table, from.stride, live, p + ahead, prefetch_bytes);
      if constexpr (kIsCode<T>) prefetch_row(from.scales.base, from.scales.stride, live, p + ahead, 1);
    }
    const int64_t id = live[p];
    if (id < 0) {
      if (outside && live.outside(p)) __atomic_store_n(outside, true, __ATOMIC_RELAXED);
      continue;
    }
    const T* row = table + id * from.stride;
    if constexpr (kWeighted || kIsCode<T>) {
      S weight = scale_of<T>(from.scales, id);
      if constexpr (kWeighted) weight *= static_cast<S>(weight_at(weights, p));
      if (some > 0) {
        sum[0] += load_some(row, some) * weight;
      } else {
        for (int v = 0; v < kVectors; ++v) sum[v] += load(row + v * kLanes<S>) * weight;
      }
    } else if (some > 0) {
      sum[0] += load_some(row, some);
    } else {
      for (int v = 0; v < kVectors; ++v) sum[v] += load(row + v * kLanes<S>);
    }
  }
  if (some > 0) {
    store_some(out + column, sum[0] / divisor, some);
  } else {
    for (int v = 0; v < kVectors; ++v) store(out + column + v * kLanes<S>, sum[v] / divisor);
  }
}

template <bool kWeighted, class T, class Index, class O>
void reduce_bags(const GatherArgs& a, int64_t first_bag, int64_t last_bag) {
  using S = Accumulator<T>;
  for (int64_t bag = first_bag; bag < last_bag; ++bag) {
    BagTable<T> from = bag_table<T>(a.table, a.num_rows, a.dim, a.bags, bag);
    if constexpr (kIsCode<T>) from.scales = a.scales;
    const LiveIds<Index> live(a.bags, from.num_rows);
    const int64_t begin = a.bags.begin(bag), end = a.bags.end(bag), dim = from.dim;
    O* out = static_cast<O*>(a.out.base) + from.row_of_output * a.out.row_stride + from.column;
    S divisor = 1;
    if (from.mean) divisor = static_cast<S>(std::max<int64_t>(live.count(begin, end), 1));
    int64_t column = 0;
    // The first pass over a bag fetches whole rows ahead, later passes find them in cache.
    int64_t prefetch_bytes = dim * static_cast<int64_t>(sizeof(T));
    const auto pass = [&](auto vectors) __attribute__((always_inline)) {
      constexpr int kVectors = decltype(vectors)::value;
      reduce_columns<kVectors, kWeighted>(from, a.bags.weights, live, begin, end, column, 0, divisor, out, prefetch_bytes,
                                          a.outside);
      prefetch_bytes = 0;
      column += kVectors * kLanes<S>;
    };
    while (column + 8 * kLanes<S> <= dim) pass(std::integral_constant<int, 8>{});
    if (column + 4 * kLanes<S> <= dim) pass(std::integral_constant<int, 4>{});
    if (column + 2 * kLanes<S> <= dim) pass(std::integral_constant<int, 2>{});
    if (column + kLanes<S> <= dim) pass(std::integral_constant<int, 1>{});
    if (column < dim) {
      const int some = static_cast<int>(dim - column);
      reduce_columns<1, kWeighted>(from, a.bags.weights, live, begin, end, column, some, divisor, out, prefetch_bytes,
                                   a.outside);
    }
  }
}

template <class S>
GOSSAMER_INLINE Mask<S> splat_bits(int64_t value) {
  return Mask<S>{} + static_cast<typename VecTraits<S>::Bits>(value);
}

template <class T, class Index, class O>
void max_bags(const GatherMaxArgs& a, int64_t first_bag, int64_t last_bag) {
  using S = Accumulator<T>;
  const LiveIds<Index> live(a.bags, a.num_rows);
  const T* table = static_cast<const T*>(a.table.base);
  for (int64_t bag = first_bag; bag < last_bag; ++bag) {
    const int64_t begin = a.bags.begin(bag), end = a.bags.end(bag);
    O* out = static_cast<O*>(a.out.base) + bag * a.out.row_stride;
    int64_t first = begin;
    while (first < end && live[first] < 0) ++first;
    for (int64_t column = 0; column < a.dim; column += kLanes<S>) {
      const int some = static_cast<int>(std::min<int64_t>(a.dim - column, kLanes<S>));
      const auto read = [&](int64_t id) __attribute__((always_inline)) {
        const T* row = table + id * a.table.row_stride + column;
        return some == kLanes<S> ? load(row) : load_some(row, some);
      };
      Vec<S> best = {};
      Mask<S> at = Mask<S>{} - 1;
      if (first < end) {
        best = read(live[first]);
        at = splat_bits<S>(first - begin);
      }
      for (int64_t p = first + 1; p < end; ++p) {
        if (column == 0) prefetch_row(table, a.table.row_stride, live, p + gather_ahead(a.dim * sizeof(T)), a.dim * sizeof(T));
        const int64_t id = live[p];
        if (id < 0) continue;
        const Vec<S> value = read(id);
        const Mask<S> better = (value > best) | ((value != value) & (best == best));
        best = better ? value : best;
        at = better ? splat_bits<S>(p - begin) : at;
      }
      store_some(out + column, best, some);
      if (a.argmax) {
        for (int i = 0; i < some; ++i) a.argmax[bag * a.dim + column + i] = static_cast<int32_t>(at[i]);
      }
    }
  }
}

template <class T, class Index, class G>
void dot_bags(const GatherDotArgs& a, int64_t first_bag, int64_t last_bag) {
  using S = Accumulator<T>;
  visit_float(a.out.dtype, [&](auto tag) {
    auto* out = static_cast<typename decltype(tag)::type*>(a.out.base);
    for (int64_t bag = first_bag; bag < last_bag; ++bag) {
      const BagTable<T> from = bag_table<T>(a.table, a.num_rows, a.dim, a.bags, bag);
      const LiveIds<Index> live(a.bags, from.num_rows);
      const int64_t begin = a.bags.begin(bag), end = a.bags.end(bag), dim = from.dim;
      const G* dout = static_cast<const G*>(a.dout.base) + from.row_of_output * a.dout.row_stride + from.column;
      S divisor = 1;
      if (from.mean) divisor = static_cast<S>(std::max<int64_t>(live.count(begin, end), 1));
      const int64_t bytes = dim * static_cast<int64_t>(sizeof(T)), ahead = gather_ahead(bytes);
      for (int64_t p = begin; p < end; ++p) {
        prefetch_row(from.rows, from.stride, live, p + ahead, bytes);
        const int64_t id = live[p];
        S dot = 0;
        if (id >= 0) {
          const T* row = from.rows + id * from.stride;
          Vec<S> sum[2] = {};
          int64_t column = 0;
          for (; column + 2 * kLanes<S> <= dim; column += 2 * kLanes<S>) {
            sum[0] += load(row + column) * load(dout + column);
            sum[1] += load(row + column + kLanes<S>) * load(dout + column + kLanes<S>);
          }
          for (; column < dim; column += kLanes<S>) {
            const int some = static_cast<int>(dim - column < kLanes<S> ? dim - column : kLanes<S>);
            sum[0] += load_some(row + column, some) * load_some(dout + column, some);
          }
          dot = sum_lanes<S>(sum[0] + sum[1]) / divisor;
          if constexpr (kIsCode<T>) dot *= a.scales[id];
        }
        from_scalar(dot, out[p]);
      }
    }
  });
}

// Calls f with tags of a table's type, the index's, and the type of the other array, T or what T is accumulated in, as which
// it is beside codes.
template <bool kCodes, class F>
GOSSAMER_INLINE void visit_gather(DType table, DType other, bool wide, F&& f) {
  const auto with_table = [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto with_index = [&](auto index) {
      if constexpr (kIsCode<T>) {
        return f(tag, index, TypeTag<Accumulator<T>>{});
      } else if constexpr (!std::is_same_v<T, Accumulator<T>>) {
        if (other != table) return f(tag, index, TypeTag<Accumulator<T>>{});
      }
      f(tag, index, tag);
    };
    if (wide) {
      with_index(TypeTag<int64_t>{});
    } else {
      with_index(TypeTag<int32_t>{});
    }
  };
  if constexpr (kCodes) {
    visit_table(table, with_table);
  } else {
    visit_float(table, with_table);
  }
}

void gather_reduce(const GatherArgs& args, int64_t first_bag, int64_t last_bag) {
  visit_gather<true>(args.table.dtype, args.out.dtype, args.bags.index.wide, [&](auto table, auto index, auto out) {
    using Table = typename decltype(table)::type;
    using Index = typename decltype(index)::type;
    using Out = typename decltype(out)::type;
    if (args.bags.weights) {
      reduce_bags<true, Table, Index, Out>(args, first_bag, last_bag);
    } else {
      reduce_bags<false, Table, Index, Out>(args, first_bag, last_bag);
    }
  });
}

void gather_max(const GatherMaxArgs& args, int64_t first_bag, int64_t last_bag) {
  visit_gather<false>(args.table.dtype, args.out.dtype, args.bags.index.wide, [&](auto table, auto index, auto out) {
    max_bags<typename decltype(table)::type, typename decltype(index)::type, typename decltype(out)::type>(args, first_bag,
                                                                                                           last_bag);
  });
}

void gather_dot(const GatherDotArgs& args, int64_t first_bag, int64_t last_bag) {
  visit_gather<true>(args.table.dtype, args.dout.dtype, args.bags.index.wide, [&](auto table, auto index, auto dout) {
    dot_bags<typename decltype(table)::type, typename decltype(index)::type, typename decltype(dout)::type>(args, first_bag,
                                                                                                            last_bag);
  });
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
