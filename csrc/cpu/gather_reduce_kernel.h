// gather_reduce and gather_dot of one instruction set; see isa_kernels.h.

// Rows this many positions ahead are prefetched: table rows are scattered, so no hardware prefetcher finds them.
constexpr int64_t kGatherAhead = 8;

template <class Index>
struct LiveIds {
  const Index* ids;
  int64_t limit, padding_idx, end;

  explicit LiveIds(const Bags& bags)
      : ids(static_cast<const Index*>(bags.index.base)),
        limit(bags.limit),
        padding_idx(bags.padding_idx),
        end(bags.num_positions) {}

  // The id at a position, or -1 where it contributes nothing.
  int64_t operator[](int64_t position) const {
    const int64_t id = ids[position];
    return id < limit && id != padding_idx ? id : -1;
  }
};

template <class T, class Index>
GOSSAMER_INLINE void prefetch_row(const T* table, int64_t stride, const LiveIds<Index>& live, int64_t position,
                                  int64_t bytes) {
  if (position >= live.end) return;
  const int64_t id = live.ids[position];
  if (id < 0 || id >= live.limit) return;
  const char* row = reinterpret_cast<const char*>(table + id * stride);
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(row + line);
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

// Sums kVectors vectors of columns (or, when some > 0, one vector of `some` columns) of one bag's rows.
template <int kVectors, class T, class Index>
GOSSAMER_INLINE void reduce_columns(const GatherArgs& a, const LiveIds<Index>& live, int64_t begin, int64_t end,
                                    int64_t column, int some, T* out, int64_t prefetch_bytes) {
  using S = Accumulator<T>;
  const T* table = static_cast<const T*>(a.table.base) + column;
  Vec<S> sum[kVectors] = {};
  for (int64_t p = begin; p < end; ++p) {
    if (prefetch_bytes > 0) prefetch_row(table, a.table.row_stride, live, p + kGatherAhead, prefetch_bytes);
    const int64_t id = live[p];
    if (id < 0) continue;
    const T* row = table + id * a.table.row_stride;
    const S weight = a.weights ? static_cast<S>(weight_at(a.weights, p)) : S{1};
    if (some > 0) {
      sum[0] += load_some(row, some) * weight;
    } else {
      for (int v = 0; v < kVectors; ++v) sum[v] += load(row + v * kLanes<S>) * weight;
    }
  }
  if (some > 0) {
    store_some(out + column, sum[0], some);
  } else {
    for (int v = 0; v < kVectors; ++v) store(out + column + v * kLanes<S>, sum[v]);
  }
}

template <class T, class Index>
void reduce_bags(const GatherArgs& a, int64_t first_bag, int64_t last_bag) {
  using S = Accumulator<T>;
  constexpr int kWide = 8;
  const LiveIds<Index> live(a.bags);
  for (int64_t bag = first_bag; bag < last_bag; ++bag) {
    const int64_t begin = a.bags.begin(bag), end = a.bags.end(bag);
    T* out = static_cast<T*>(a.out) + bag * a.dim;
    int64_t column = 0;
    // The first pass over a bag fetches whole rows ahead, later passes find them in cache.
    int64_t prefetch_bytes = a.dim * static_cast<int64_t>(sizeof(T));
    for (; column + kWide * kLanes<S> <= a.dim; column += kWide * kLanes<S>) {
      reduce_columns<kWide>(a, live, begin, end, column, 0, out, prefetch_bytes);
      prefetch_bytes = 0;
    }
    for (; column + kLanes<S> <= a.dim; column += kLanes<S>) {
      reduce_columns<1>(a, live, begin, end, column, 0, out, prefetch_bytes);
      prefetch_bytes = 0;
    }
    if (column < a.dim) {
      reduce_columns<1>(a, live, begin, end, column, static_cast<int>(a.dim - column), out, prefetch_bytes);
    }
  }
}

template <class T, class Index>
void dot_bags(const GatherDotArgs& a, int64_t first_bag, int64_t last_bag) {
  using S = Accumulator<T>;
  const LiveIds<Index> live(a.bags);
  const T* table = static_cast<const T*>(a.table.base);
  visit_float(a.out.dtype, [&](auto tag) {
    auto* out = static_cast<typename decltype(tag)::type*>(a.out.base);
    for (int64_t bag = first_bag; bag < last_bag; ++bag) {
      const T* dout = static_cast<const T*>(a.dout.base) + bag * a.dout.row_stride;
      for (int64_t p = a.bags.begin(bag); p < a.bags.end(bag); ++p) {
        prefetch_row(table, a.table.row_stride, live, p + kGatherAhead, a.dim * static_cast<int64_t>(sizeof(T)));
        const int64_t id = live[p];
        S dot = 0;
        if (id >= 0) {
          const T* row = table + id * a.table.row_stride;
          Vec<S> sum[2] = {};
          int64_t column = 0;
          for (; column + 2 * kLanes<S> <= a.dim; column += 2 * kLanes<S>) {
            sum[0] += load(row + column) * load(dout + column);
            sum[1] += load(row + column + kLanes<S>) * load(dout + column + kLanes<S>);
          }
          for (; column < a.dim; column += kLanes<S>) {
            const int some = static_cast<int>(a.dim - column < kLanes<S> ? a.dim - column : kLanes<S>);
            sum[0] += load_some(row + column, some) * load_some(dout + column, some);
          }
          dot = sum_lanes<S>(sum[0] + sum[1]);
        }
        from_scalar(dot, out[p]);
      }
    }
  });
}

void gather_reduce(const GatherArgs& args, int64_t first_bag, int64_t last_bag) {
  visit_float(args.table.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (args.bags.index.wide) {
      reduce_bags<T, int64_t>(args, first_bag, last_bag);
    } else {
      reduce_bags<T, int32_t>(args, first_bag, last_bag);
    }
  });
}

void gather_dot(const GatherDotArgs& args, int64_t first_bag, int64_t last_bag) {
  visit_float(args.table.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (args.bags.index.wide) {
      dot_bags<T, int64_t>(args, first_bag, last_bag);
    } else {
      dot_bags<T, int32_t>(args, first_bag, last_bag);
    }
  });
}
