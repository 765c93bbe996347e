// Sums of composed rows and their gradient, for one instruction set.
//
// Ids are decoded to rows one block at a time, a block ahead of the rows being read, so that these can be prefetched.
#pragma once

#include "cpu/isa_begin.h"
#include "cpu/gather_compose.h"

#include "cpu/isa_target.h"

#include "cpu/gather_reduce_kernel.h"
#include "cpu/map_ids_kernel.h"
#include "cpu/vec.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Tables up to this many bytes stay in the second-level cache, and their rows are not prefetched.
constexpr int64_t kCachedBytes = int64_t{3} << 18;
// Number of decoded rows that can be read ahead of any position.
constexpr int64_t kRowsAhead = 32;

// `n` lanes of S: a vector, a part of one, or a single number.
template <class S, int n>
struct LanesOf {
  typedef S type __attribute__((vector_size(n * sizeof(S))));
};
template <class S>
struct LanesOf<S, 1> {
  using type = S;
};

template <int n, class T>
GOSSAMER_INLINE auto load_lanes_of(const T* from) {
  using S = Accumulator<T>;
  if constexpr (n == kLanes<S>) {
    return load(from);
  } else if constexpr (std::is_same_v<T, S>) {
    typename LanesOf<S, n>::type v;
    std::memcpy(&v, from, sizeof v);
    return v;
  } else if constexpr (n == 1) {
    return static_cast<S>(to_scalar(*from));
  } else {
    typename LanesOf<S, n>::type v;
    for (int i = 0; i < n; ++i) v[i] = to_scalar(from[i]);
    return v;
  }
}

template <class S, class V>
GOSSAMER_INLINE void store_lanes_of(S* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

template <int n>
using Count = std::integral_constant<int, n>;

// Calls f(lanes, vectors, column) for the vectors, parts of vectors and numbers that cover `dim` columns of elements T. Those of
// 16 bits are widened one by one in parts of vectors, so they have fewer of them. With kPairs, also two vectors at a time.
template <class T, bool kPairs = false, class F>
GOSSAMER_INLINE void cover(int64_t dim, F&& f) {
  using S = Accumulator<T>;
  constexpr int n = kLanes<S>;
  int64_t column = 0;
  const auto take = [&](auto lanes, auto vectors) __attribute__((always_inline)) {
    constexpr int size = decltype(lanes)::value * decltype(vectors)::value;
    for (; column + size <= dim; column += size) f(lanes, vectors, column);
  };
  if constexpr (std::is_same_v<T, S>) take(Count<n>{}, Count<4>{});
  if constexpr (kPairs) take(Count<n>{}, Count<2>{});
  take(Count<n>{}, Count<1>{});
  if constexpr (n > 8 && std::is_same_v<T, S>) take(Count<8>{}, Count<1>{});
  if constexpr (n > 4) take(Count<4>{}, Count<1>{});
  if constexpr (n > 2 && std::is_same_v<T, S>) take(Count<2>{}, Count<1>{});
  take(Count<1>{}, Count<1>{});
}

// A ring of decoded positions: the row of each part, times `scale`, and the weight.
template <class S>
class PartRows {
 public:
  PartRows(const ComposeArgs& args, int64_t begin, int64_t end, int64_t scale = 1)
      : args_(args),
        parts_(args.parts),
        begin_(begin),
        end_(end),
        decoded_(begin),
        scale_(scale),
        num_ids_(static_cast<uint64_t>(parts_.num_ids())),
        array_(parts_.wrap ? args.num_rows : 1) {
    // Rows of many parts would not fit the first-level cache.
    block_ = kIdsPerBlock;
    while (block_ > 32 && block_ * parts_.maps.count > 2048) block_ /= 2;
    slots_ = 2 * block_;
    pitch_ = slots_ + kRowsAhead;
    ring_.reset(new int64_t[pitch_ * parts_.maps.count]());
    weights_.reset(new S[slots_]);
    if (!args.bags.weights) std::fill_n(weights_.get(), slots_, S{1});
  }

  // Decodes ahead of position p; returns the end of the positions from p on, up to `end`, that can be read and lie in a row.
  int64_t reach(int64_t p, int64_t end) {
    while (decoded_ < end_ && decoded_ + block_ <= p + slots_) decode();
    return std::min({end, decoded_, p + slots_ - slot(p)});
  }

  int64_t num_parts() const { return parts_.maps.count; }
  // The row of a part at a position: -1 where its id contributes nothing, below that for a block to be read element by element.
  int64_t row(int64_t part, int64_t p) const { return ring_[part * pitch_ + slot(p)]; }
  // The same for a position at or after p, for prefetching.
  int64_t later(int64_t part, int64_t p) const { return row(part, std::min(p, decoded_ - 1)); }
  S weight(int64_t p) const { return weights_[slot(p)]; }
  // The same for the positions from p on, up to the result of reach(); the kRowsAhead entries after them are also rows of the
  // part.
  const int64_t* rows(int64_t part, int64_t p) const { return &ring_[part * pitch_ + slot(p)]; }
  const S* weights(int64_t p) const { return &weights_[slot(p)]; }

  // Element i of a block whose row is -2 or below.
  int64_t element(int64_t row, int64_t i) const {
    const int64_t place = -2 - row + i;
    return (place >= parts_.maps.prime ? place - parts_.maps.prime : place) % args_.num_rows;
  }

  bool live(uint64_t id) const {
    const int64_t padding = args_.bags.padding_idx;
    // -1 stands for no padding, and is an id of maps that take any.
    return (num_ids_ == 0 || id < num_ids_) && (padding < 0 || static_cast<int64_t>(id) != padding);
  }

  // Number of contributing ids of a whole bag.
  int64_t count(int64_t begin, int64_t end) const {
    int64_t found = 0;
    for (int64_t p = begin; p < end; ++p) found += live(static_cast<uint64_t>(args_.bags.index[p]));
    return found;
  }

 private:
  int64_t slot(int64_t p) const { return (p - begin_) & (slots_ - 1); }

  void say(PartsFault fault) {
    if (args_.fault) __atomic_store_n(args_.fault, static_cast<int32_t>(fault), __ATOMIC_RELAXED);
  }

  void read_ids(int64_t at, int64_t count, uint64_t* x) const {
    if (args_.bags.index.wide) {
      std::copy_n(static_cast<const uint64_t*>(args_.bags.index.base) + at, count, x);
    } else {
      const int32_t* ids = static_cast<const int32_t*>(args_.bags.index.base) + at;
      for (int64_t i = 0; i < count; ++i) x[i] = static_cast<uint64_t>(int64_t{ids[i]});
    }
  }

  void decode() {
    uint64_t x[kIdsPerBlock];
    int64_t skipped[kIdsPerBlock], num_skipped = 0;
    const int64_t at = decoded_, count = std::min(block_, end_ - at), to = slot(at);
    read_ids(at, count, x);
    if (args_.bags.padding_idx >= 0 || (num_ids_ > 0 && largest_of(x, count) >= num_ids_)) {
      for (int64_t i = 0; i < count; ++i) {
        if (live(x[i])) continue;
        if (num_ids_ > 0 && x[i] >= num_ids_ && !args_.bags.drop) say(PartsFault::kId);
        skipped[num_skipped++] = i;
        x[i] = 0;
      }
    }
    if (args_.bags.weights) {
      visit_float(args_.bags.weights.dtype, [&](auto tag) {
        const auto* from = static_cast<const typename decltype(tag)::type*>(args_.bags.weights.base) + at;
        for (int64_t i = 0; i < count; ++i) weights_[to + i] = static_cast<S>(to_scalar(from[i]));
      });
    }
    if (parts_.num_coded > 0) {
      read_codes(x, count, to);
      prefetch_codes(at + count);
    }
    if (parts_.num_coded < parts_.maps.count) {
      map_block(parts_.maps, parts_.num_coded, x, count,
                [&](int64_t part, const uint64_t* value) __attribute__((always_inline)) {
                  const int64_t base = parts_.maps.maps[part].base, scale = scale_;
                  int64_t* rows = &ring_[part * pitch_ + to];
                  if (parts_.wrap) {
                    place_blocks(value, count, rows);
                  } else {
                    for (int64_t i = 0; i < count; ++i) rows[i] = (static_cast<int64_t>(value[i]) + base) * scale;
                  }
                });
    }
    for (int64_t i = 0; i < num_skipped; ++i) {
      for (int64_t part = 0; part < parts_.maps.count; ++part) ring_[part * pitch_ + to + skipped[i]] = -1;
    }
    if (to == 0) {
      for (int64_t part = 0; part < parts_.maps.count; ++part) {
        std::copy_n(&ring_[part * pitch_], kRowsAhead, &ring_[part * pitch_ + slots_]);
      }
    }
    decoded_ += count;
  }

  // Blocks that start at these places before they are taken modulo the array's size.
  void place_blocks(const uint64_t* value, int64_t count, int64_t* rows) const {
    const bool takes = array_.takes(static_cast<uint64_t>(parts_.maps.prime));
    for (int64_t i = 0; i < count; ++i) {
      const auto place = static_cast<int64_t>(value[i]);
      const int64_t start = takes ? array_.remainder(place) : place % args_.num_rows;
      const bool whole = place + parts_.columns <= parts_.maps.prime && start + parts_.columns <= args_.num_rows;
      rows[i] = whole ? start : -2 - place;
    }
  }

  const CodeList& list_of(uint64_t& id) const {
    if (id < static_cast<uint64_t>(parts_.often.num_ids)) return parts_.often;
    id -= static_cast<uint64_t>(parts_.often.num_ids);
    return parts_.seldom;
  }

  void read_codes(const uint64_t* x, int64_t count, int64_t to) {
    const CodeList& list = parts_.often;
    const bool windows = parts_.seldom.num_ids == 0 && list.num_ids * list.width >= 8;
    uint64_t window[kIdsPerBlock];
    int64_t held = -1;  // first byte that the windows hold of an id's codes
    bool bad = false;
    for (int64_t part = 0; part < parts_.num_coded; ++part) {
      const IdMap& map = parts_.maps.maps[part];
      const int64_t all = parts_.composition == Composition::kMatmul && part == 1 ? args_.second_rows : args_.num_rows;
      const int64_t size = std::min(map.modulus, all - map.base), bit = part * list.bits;
      int64_t* rows = &ring_[part * pitch_ + to];
      if (!windows) {
        bad |= read_part(x, count, part, map.base, size, rows);
        continue;
      }
      if (held < 0 || bit + list.bits > 8 * held + 64) {
        held = bit / 8;
        read_windows(x, count, held, window);
      }
      // Uses local variables only, because stores to rows may alias other members.
      const auto shift = static_cast<int>(bit - 8 * held);
      const int64_t mask = (int64_t{1} << list.bits) - 1, base = map.base, scale = scale_;
      int64_t largest = 0;
      for (int64_t i = 0; i < count; ++i) {
        const auto code = static_cast<int64_t>(window[i] >> shift) & mask;
        largest = std::max(largest, code);
        rows[i] = (base + std::min(code, size - 1)) * scale;
      }
      bad |= largest >= size;
    }
    if (bad) say(PartsFault::kCode);
  }

  // Eight bytes of codes for each id; bytes past the end of the list are zero.
  void read_windows(const uint64_t* x, int64_t count, int64_t byte, uint64_t* window) const {
    const CodeList& list = parts_.often;
    const int64_t last = list.num_ids * list.width - 8;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = static_cast<int64_t>(x[i]) * list.width + byte, from = std::min(at, last);
      std::memcpy(&window[i], list.bytes + from, 8);
      window[i] >>= 8 * (at - from);
    }
  }

  // The rows of one part with two lists of codes; returns whether a code is not below `size`.
  bool read_part(const uint64_t* x, int64_t count, int64_t part, int64_t base, int64_t size, int64_t* rows) const {
    bool bad = false;
    for (int64_t i = 0; i < count; ++i) {
      uint64_t id = x[i];
      const CodeList& own = list_of(id);
      const auto code = static_cast<int64_t>(code_at(own, static_cast<int64_t>(id), part));
      bad |= code >= size;
      rows[i] = (base + (code >= size ? 0 : code)) * scale_;
    }
    return bad;
  }

  static uint64_t code_at(const CodeList& list, int64_t id, int64_t part) {
    const int64_t bit = part * list.bits, byte = bit / 8;
    const uint8_t* row = list.bytes + id * list.width;
    // A code spans at most five bytes; bytes past the list are not read.
    const int64_t left = (list.num_ids - id) * list.width - byte;
    uint64_t window = 0;
    if (left >= 8) {
      std::memcpy(&window, row + byte, 8);
    } else {
      std::memcpy(&window, row + byte, left);
    }
    return (window >> (bit % 8)) & ((uint64_t{1} << list.bits) - 1);
  }

  // Prefetched into the second-level cache, like prefetch_row.
  void prefetch_codes(int64_t at) const {
    const int64_t count = std::min(block_, end_ - at);
    if (count <= 0) return;
    uint64_t x[kIdsPerBlock];
    read_ids(at, count, x);
    for (int64_t i = 0; i < count; ++i) {
      if (x[i] >= num_ids_) continue;
      const CodeList& list = list_of(x[i]);
      __builtin_prefetch(list.bytes + static_cast<int64_t>(x[i]) * list.width, 0, 2);
    }
  }

  const ComposeArgs& args_;
  const Parts& parts_;
  int64_t begin_, end_, decoded_, scale_, block_, slots_, pitch_;
  uint64_t num_ids_;
  Divisor array_;
  std::unique_ptr<int64_t[]> ring_;
  std::unique_ptr<S[]> weights_;
};

template <class T>
GOSSAMER_INLINE void prefetch_part(const ComposeArgs& a, const PartRows<Accumulator<T>>& rows, int64_t part, int64_t p,
                                   int64_t bytes) {
  const int64_t row = std::max<int64_t>(rows.later(part, p), 0);
  prefetch_lines<1, Fetch::kReadLater>(static_cast<const T*>(a.table.base) + row * a.table.row_stride, bytes);
}

// Adds the composed vectors of positions [p, until), times their weights, to sums of all D columns; kParts is 0 for any number.
template <bool kMultiply, int kParts, class T, class S = Accumulator<T>>
void add_rows(const ComposeArgs& a, const PartRows<S>& rows, int64_t p, int64_t until, int64_t fetched, S* sums) {
  const int64_t parts = kParts > 0 ? kParts : rows.num_parts(), stride = a.table.row_stride, ahead = gather_ahead(fetched);
  const S* weights = rows.weights(p);
  const int64_t* row[kParts > 0 ? kParts : 1];
  for (int part = 0; part < kParts; ++part) row[part] = rows.rows(part, p);
  if (kParts == 0) row[0] = rows.rows(0, p);
  cover<T>(a.dim, [&](auto lanes, auto vectors, int64_t column) __attribute__((always_inline)) {
    constexpr int n = decltype(lanes)::value, kVectors = decltype(vectors)::value;
    using V = decltype(load_lanes_of<n>(static_cast<const T*>(nullptr)));
    const T* table = static_cast<const T*>(a.table.base) + column;
    V sum[kVectors];
    for (int v = 0; v < kVectors; ++v) std::memcpy(&sum[v], sums + column + v * n, sizeof(V));
    for (int64_t i = 0; i < until - p; ++i) {
      if (fetched > 0 && column == 0) {
        for (int64_t part = 0; part < parts; ++part) prefetch_part<T>(a, rows, part, p + i + ahead, fetched);
      }
      if (row[0][i] < 0) continue;
      const T* from = table + row[0][i] * stride;
      V found[kVectors];
      for (int v = 0; v < kVectors; ++v) found[v] = load_lanes_of<n>(from + v * n);
      for (int64_t part = 1; part < parts; ++part) {
        from = table + (kParts > 0 ? row[part] : rows.rows(part, p))[i] * stride;
        for (int v = 0; v < kVectors; ++v) {
          const V more = load_lanes_of<n>(from + v * n);
          found[v] = kMultiply ? found[v] * more : found[v] + more;
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        sum[v] += found[v] * weights[i];
      }
    }
    for (int v = 0; v < kVectors; ++v) store_lanes_of(sums + column + v * n, sum[v]);
  });
}

// The same of concatenated vectors, for kParts parts of equal `columns` from `first` on.
template <int kParts, class T, class S = Accumulator<T>>
void add_joined(const ComposeArgs& a, const PartRows<S>& rows, int64_t p, int64_t until, int64_t fetched, int64_t first,
                int64_t columns, S* sums) {
  const int64_t stride = a.table.row_stride, ahead = gather_ahead(fetched);
  const T* base = static_cast<const T*>(a.table.base);
  const S* weights = rows.weights(p);
  const int64_t* row[kParts];
  for (int part = 0; part < kParts; ++part) row[part] = rows.rows(first + part, p);
  sums += first * a.parts.columns;
  cover<T>(columns, [&](auto lanes, auto vectors, int64_t column) __attribute__((always_inline)) {
    constexpr int n = decltype(lanes)::value, kVectors = decltype(vectors)::value;
    using V = decltype(load_lanes_of<n>(static_cast<const T*>(nullptr)));
    V sum[kParts][kVectors];
    const auto each = [&](auto&& f) __attribute__((always_inline)) {
      for (int part = 0; part < kParts; ++part) {
        for (int v = 0; v < kVectors; ++v) f(sum[part][v], sums + part * columns + column + v * n);
      }
    };
    each([](V& own, S* at) { std::memcpy(&own, at, sizeof(V)); });
    const auto add = [&](int part, int64_t i, const T* from) __attribute__((always_inline)) {
      for (int v = 0; v < kVectors; ++v) {
        sum[part][v] += load_lanes_of<n>(from + v * n) * weights[i];
      }
    };
    for (int64_t i = 0; i < until - p; ++i) {
      for (int part = 0; part < kParts; ++part) {
        if (fetched > 0 && column == 0) prefetch_part<T>(a, rows, first + part, p + i + ahead, fetched);
        const int64_t at = row[part][i];
        if (__builtin_expect(at >= 0, 1)) {
          add(part, i, base + at * stride + column);
        } else if (at < -1) {
          T apart[kVectors * n];
          for (int c = 0; c < kVectors * n; ++c) apart[c] = base[rows.element(at, column + c)];
          add(part, i, apart);
        }
      }
    }
    each([](V& own, S* at) { store_lanes_of(at, own); });
  });
}

// All parts, four at a time: their sums are independent, and one pass reads the weights once.
template <class T, class S = Accumulator<T>>
void add_joined(const ComposeArgs& a, const PartRows<S>& rows, int64_t p, int64_t until, int64_t fetched, S* sums) {
  const int64_t parts = rows.num_parts(), columns = a.parts.columns, whole = a.dim / columns;
  int64_t part = 0;
  for (; part + 4 <= whole; part += 4) add_joined<4, T>(a, rows, p, until, fetched, part, columns, sums);
  for (; part + 2 <= whole; part += 2) add_joined<2, T>(a, rows, p, until, fetched, part, columns, sums);
  for (; part < whole; ++part) add_joined<1, T>(a, rows, p, until, fetched, part, columns, sums);
  if (part < parts) add_joined<1, T>(a, rows, p, until, fetched, part, a.dim - part * columns, sums);
}

// The same of products of two small matrices, kRows rows of the first at a time.
template <int kRows, class T, class S = Accumulator<T>>
void add_product_rows(const ComposeArgs& a, const PartRows<S>& rows, int64_t p, int64_t until, int64_t fetched, int64_t first,
                      S* sums) {
  const int64_t depth = a.inner, width = a.width, ahead = gather_ahead(fetched);
  const T* left_base = static_cast<const T*>(a.table.base) + first * depth;
  // A product waits for the one before in its row and column, so few rows need more columns at once.
  cover<T, kRows <= 2>(width, [&](auto lanes, auto vectors, int64_t column) __attribute__((always_inline)) {
    constexpr int n = decltype(lanes)::value, kVectors = decltype(vectors)::value;
    using V = decltype(load_lanes_of<n>(static_cast<const T*>(nullptr)));
    const T* right_base = static_cast<const T*>(a.second.base) + column;
    S* to = sums + first * width + column;
    V sum[kRows][kVectors];
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v) std::memcpy(&sum[i][v], to + i * width + v * n, sizeof(V));
    }
    for (int64_t q = p; q < until; ++q) {
      if (fetched > 0 && first == 0 && column == 0) prefetch_part<T>(a, rows, 0, q + ahead, fetched);
      const int64_t row = rows.row(0, q);
      if (row < 0) continue;
      const T* left = left_base + row * a.table.row_stride;
      const T* right = right_base + rows.row(1, q) * a.second.row_stride;
      V found[kRows][kVectors] = {};
      for (int64_t r = 0; r < depth; ++r) {
        V term[kVectors];
        for (int v = 0; v < kVectors; ++v) term[v] = load_lanes_of<n>(right + r * width + v * n);
        for (int i = 0; i < kRows; ++i) {
          const S factor = static_cast<S>(to_scalar(left[i * depth + r]));
          for (int v = 0; v < kVectors; ++v) found[i][v] += term[v] * factor;
        }
      }
      const S weight = rows.weight(q);
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVectors; ++v) sum[i][v] += found[i][v] * weight;
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v) store_lanes_of(to + i * width + v * n, sum[i][v]);
    }
  });
}

#if defined(__x86_64__) && GOSSAMER_VECTOR_BYTES == 64
// The same of four rows of the first and four columns of the second matrix, whose product is one vector. The depth is a multiple of
// four.
void add_square_products(const ComposeArgs& a, const PartRows<float>& rows, int64_t p, int64_t until, int64_t fetched,
                         int64_t first, float* sums) {
  const int64_t depth = a.inner, ahead = gather_ahead(fetched);
  const float* left_base = static_cast<const float*>(a.table.base) + first * depth;
  const float* right_base = static_cast<const float*>(a.second.base);
  Vec<float> sum = load(sums + 4 * first);
  for (int64_t q = p; q < until; ++q) {
    if (fetched > 0 && first == 0) prefetch_part<float>(a, rows, 0, q + ahead, fetched);
    const int64_t row = rows.row(0, q);
    if (row < 0) continue;
    const float* left = left_base + row * a.table.row_stride;
    const float* right = right_base + rows.row(1, q) * a.second.row_stride;
    // Two sums, so that a product waits less for the one before.
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int64_t r = 0; r < depth; r += 4) {
      __m512 rows_of_left = _mm512_castps128_ps512(_mm_loadu_ps(left + r));
      rows_of_left = _mm512_insertf32x4(rows_of_left, _mm_loadu_ps(left + depth + r), 1);
      rows_of_left = _mm512_insertf32x4(rows_of_left, _mm_loadu_ps(left + 2 * depth + r), 2);
      rows_of_left = _mm512_insertf32x4(rows_of_left, _mm_loadu_ps(left + 3 * depth + r), 3);
      const auto term = [&](int64_t i) __attribute__((always_inline)) {
        return _mm512_broadcast_f32x4(_mm_loadu_ps(right + 4 * (r + i)));
      };
      even = _mm512_fmadd_ps(_mm512_permute_ps(rows_of_left, 0x00), term(0), even);
      odd = _mm512_fmadd_ps(_mm512_permute_ps(rows_of_left, 0x55), term(1), odd);
      even = _mm512_fmadd_ps(_mm512_permute_ps(rows_of_left, 0xaa), term(2), even);
      odd = _mm512_fmadd_ps(_mm512_permute_ps(rows_of_left, 0xff), term(3), odd);
    }
    sum += (Vec<float>)(even + odd) * rows.weight(q);
  }
  store(sums + 4 * first, sum);
}
#endif

template <class T, class S = Accumulator<T>>
void add_products(const ComposeArgs& a, const PartRows<S>& rows, int64_t p, int64_t until, int64_t fetched, S* sums) {
  const int64_t height = a.dim / a.width;
  int64_t first = 0;
#if defined(__x86_64__) && GOSSAMER_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) {
    const bool square = a.width == 4 && a.inner % 4 == 0;
    for (; square && first + 4 <= height; first += 4) add_square_products(a, rows, p, until, fetched, first, sums);
  }
#endif
  for (; first + 4 <= height; first += 4) add_product_rows<4, T>(a, rows, p, until, fetched, first, sums);
  for (; first + 2 <= height; first += 2) add_product_rows<2, T>(a, rows, p, until, fetched, first, sums);
  for (; first < height; ++first) add_product_rows<1, T>(a, rows, p, until, fetched, first, sums);
}

template <class T, class S = Accumulator<T>>
void add_composed(const ComposeArgs& a, const PartRows<S>& rows, int64_t p, int64_t until, int64_t fetched, S* sums) {
  const int64_t parts = rows.num_parts();
  switch (a.parts.composition) {
    case Composition::kAdd:
      if (parts == 1) return add_rows<false, 1, T>(a, rows, p, until, fetched, sums);
      if (parts == 2) return add_rows<false, 2, T>(a, rows, p, until, fetched, sums);
      return add_rows<false, 0, T>(a, rows, p, until, fetched, sums);
    case Composition::kMultiply:
      if (parts == 2) return add_rows<true, 2, T>(a, rows, p, until, fetched, sums);
      return add_rows<true, 0, T>(a, rows, p, until, fetched, sums);
    case Composition::kConcatenate:
      return add_joined<T>(a, rows, p, until, fetched, sums);
    case Composition::kMatmul:
      return add_products<T>(a, rows, p, until, fetched, sums);
  }
}

// Vectors of kVectors vectors: rows of one part, or sums or products of those of kParts.
template <bool kMultiply, int kParts, int kVectors, class T>
struct Combined {
  using S = Accumulator<T>;
  using V = Vec<S>;
  static constexpr int kRows = kParts, kSums = kVectors, kBytes = kVectors * kLanes<S> * sizeof(T);
  static constexpr bool kAnywhere = false;  // whether rows begin anywhere in a line

  // Vector v of what the rows of position i compose.
  GOSSAMER_INLINE V value(const T* table, const int64_t* const (&row)[kParts], int64_t i, int v) {
    V found = load(table + row[0][i] + v * kLanes<S>);
    for (int part = 1; part < kParts; ++part) {
      const V more = load(table + row[part][i] + v * kLanes<S>);
      found = kMultiply ? found * more : found + more;
    }
    return found;
  }
};

// Vectors of kParts rows of n columns one behind the other.
template <int kParts, int n, class T>
struct Joined {
  using S = Accumulator<T>;
  using V = decltype(load_lanes_of<n>(static_cast<const T*>(nullptr)));
  static constexpr int kRows = kParts, kSums = kParts, kBytes = n * sizeof(T);
  static constexpr bool kAnywhere = true;

  GOSSAMER_INLINE V value(const T* table, const int64_t* const (&row)[kParts], int64_t i, int part) {
    return load_lanes_of<n>(table + row[part][i]);
  }
};

// Adds `count` positions from p on, which reach() gave, to sums. A function of its own, which calls no other: compilers keep
// variables that live across calls in memory, also in the loops between.
template <class Form, bool kFetch, class T, class S = Accumulator<T>>
__attribute__((noinline)) void add_short(const T* table, const PartRows<S>& rows, int64_t p, int64_t count,
                                         typename Form::V* sums) {
  constexpr int64_t ahead = std::min(kRowsAhead, gather_ahead(Form::kBytes));
  const int64_t* row[Form::kRows];
  for (int part = 0; part < Form::kRows; ++part) row[part] = rows.rows(part, p);
  const S* weights = rows.weights(p);
  typename Form::V sum[Form::kSums];
  for (int v = 0; v < Form::kSums; ++v) sum[v] = sums[v];
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (kFetch) {
      for (int part = 0; part < Form::kRows; ++part) {
        // Addresses of skipped ids may be before the table, but are not read.
        const char* from = reinterpret_cast<const char*>(table + row[part][i + ahead]);
        for (int byte = 0; byte < Form::kBytes; byte += 64) __builtin_prefetch(from + byte, 0, 2);
        if constexpr (Form::kAnywhere) __builtin_prefetch(from + Form::kBytes - 1, 0, 2);
      }
    }
    if (row[0][i] < 0) continue;
    for (int v = 0; v < Form::kSums; ++v) sum[v] += Form::value(table, row, i, v) * weights[i];
  }
  for (int v = 0; v < Form::kSums; ++v) sums[v] = sum[v];
}

// Bags of vectors that stay in registers while they are summed.
template <class Form, bool kFetch, class T>
void compose_short(const ComposeArgs& a, int64_t first_bag, int64_t last_bag) {
  using S = Accumulator<T>;
  using V = typename Form::V;
  const Bags& bags = a.bags;
  const T* table = static_cast<const T*>(a.table.base);
  PartRows<S> rows(a, bags.begin(first_bag), bags.end(last_bag - 1), a.table.row_stride);
  constexpr int n = sizeof(V) / sizeof(S);
  for (int64_t bag = first_bag; bag < last_bag; ++bag) {
    const int64_t begin = bags.begin(bag), end = bags.end(bag);
    V sum[Form::kSums] = {};
    for (int64_t p = begin; p < end;) {
      const int64_t until = rows.reach(p, end);
      add_short<Form, kFetch>(table, rows, p, until - p, sum);
      p = until;
    }
    if (bags.mean) {
      const S divisor = static_cast<S>(std::max<int64_t>(rows.count(begin, end), 1));
      for (auto& v : sum) v /= divisor;
    }
    const auto write = [&](auto* out) __attribute__((always_inline)) {
      for (int v = 0; v < Form::kSums; ++v) {
        if constexpr (std::is_same_v<decltype(out), S*>) {
          store_lanes_of(out + v * n, sum[v]);
        } else {
          store(out + v * n, sum[v]);
        }
      }
    };
    if (a.out.dtype == a.table.dtype) {
      write(static_cast<T*>(a.out.base) + bag * a.out.row_stride);
    } else {
      write(static_cast<S*>(a.out.base) + bag * a.out.row_stride);
    }
  }
}

template <class Form, class T>
bool compose_as(const ComposeArgs& a, int64_t first_bag, int64_t last_bag) {
  const int64_t bytes = a.num_rows * a.table.row_stride * static_cast<int64_t>(sizeof(T));
  const auto compose = bytes > kCachedBytes ? compose_short<Form, true, T> : compose_short<Form, false, T>;
  compose(a, first_bag, last_bag);
  return true;
}

// Calls compose_short if it applies; otherwise returns false.
template <class T>
bool compose_as_short(const ComposeArgs& a, int64_t first_bag, int64_t last_bag) {
  using S = Accumulator<T>;
  constexpr int n = kLanes<S>;
  const Parts& parts = a.parts;
  const int64_t count = parts.maps.count;
  if (parts.composition == Composition::kConcatenate) {
    // A block that wraps around is not contiguous.
    if constexpr (std::is_same_v<T, S>) {
      if (parts.wrap || count * parts.columns != a.dim) return false;
      if (count == 4 && parts.columns == 4) return compose_as<Joined<4, 4, T>, T>(a, first_bag, last_bag);
      if constexpr (n >= 8) {
        if (count == 2 && parts.columns == 8) return compose_as<Joined<2, 8, T>, T>(a, first_bag, last_bag);
      }
      if (count == 1 && parts.columns == n) return compose_as<Joined<1, n, T>, T>(a, first_bag, last_bag);
      if (count == 2 && parts.columns == n) return compose_as<Joined<2, n, T>, T>(a, first_bag, last_bag);
    }
    return false;
  }
  const auto of_size = [&](auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    if (parts.composition == Composition::kAdd) {
      if (count == 1) return compose_as<Combined<false, 1, kVectors, T>, T>(a, first_bag, last_bag);
      if (count == 2) return compose_as<Combined<false, 2, kVectors, T>, T>(a, first_bag, last_bag);
    } else if (parts.composition == Composition::kMultiply) {
      if (count == 2) return compose_as<Combined<true, 2, kVectors, T>, T>(a, first_bag, last_bag);
    }
    return false;
  };
  if (a.dim == n) return of_size(std::integral_constant<int, 1>{});
  if (a.dim == 2 * n) return of_size(std::integral_constant<int, 2>{});
  if (a.dim == 4 * n) return of_size(std::integral_constant<int, 4>{});
  return false;
}

template <class T>
void compose_bags(const ComposeArgs& a, int64_t first_bag, int64_t last_bag) {
  using S = Accumulator<T>;
  if (first_bag >= last_bag) return;
  if constexpr (kShortRows) {
    if (compose_as_short<T>(a, first_bag, last_bag)) return;
  }
  const Bags& bags = a.bags;
  PartRows<S> rows(a, bags.begin(first_bag), bags.end(last_bag - 1));
  const int64_t row_bytes = a.parts.columns * static_cast<int64_t>(sizeof(T));
  const int64_t fetched = a.num_rows * a.table.row_stride * static_cast<int64_t>(sizeof(T)) > kCachedBytes ? row_bytes : 0;
  std::vector<S> sums(a.dim);
  for (int64_t bag = first_bag; bag < last_bag; ++bag) {
    const int64_t begin = bags.begin(bag), end = bags.end(bag);
    std::fill(sums.begin(), sums.end(), S{0});
    for (int64_t p = begin; p < end;) {
      const int64_t until = rows.reach(p, end);
      add_composed<T>(a, rows, p, until, fetched, sums.data());
      p = until;
    }
    const S divisor = bags.mean ? static_cast<S>(std::max<int64_t>(rows.count(begin, end), 1)) : S{1};
    const auto write = [&](auto* out) {
      for (int64_t c = 0; c < a.dim; ++c) from_scalar(sums[c] / divisor, out[c]);
    };
    if (a.out.dtype == a.table.dtype) {
      write(static_cast<T*>(a.out.base) + bag * a.out.row_stride);
    } else {
      write(static_cast<S*>(a.out.base) + bag * a.out.row_stride);
    }
  }
}

// The gradient of each factor of a product: `dout`, times the position's factor, times the other rows.
template <class T, class S = Accumulator<T>>
void factor_gradients(const ComposeArgs& a, const PartRows<S>& rows, int64_t p, const S* dout, S factor, S* to) {
  const T* table = static_cast<const T*>(a.table.base);
  for (int64_t part = 0; part < rows.num_parts(); ++part, to += a.dim) {
    cover<T>(a.dim, [&](auto lanes, auto vectors, int64_t column) __attribute__((always_inline)) {
      constexpr int n = decltype(lanes)::value, kVectors = decltype(vectors)::value;
      for (int v = 0; v < kVectors; ++v) {
        const int64_t c = column + v * n;
        auto found = load_lanes_of<n>(dout + c) * factor;
        for (int64_t other = 0; other < rows.num_parts(); ++other) {
          if (other != part) found *= load_lanes_of<n>(table + rows.row(other, p) * a.table.row_stride + c);
        }
        store_lanes_of(to + c, found);
      }
    });
  }
}

// The row of each part at the positions [begin, end), which bags do not matter to.
template <class S, class Row>
void list_rows(PartRows<S>& rows, int64_t begin, int64_t end, Row* to) {
  const int64_t parts = rows.num_parts();
  for (int64_t p = begin; p < end;) {
    const int64_t until = rows.reach(p, end);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t* row = rows.rows(part, p);
      if (parts == 1) {
        for (int64_t i = 0; i < until - p; ++i) to[p + i] = static_cast<Row>(row[i]);
      } else {
        for (int64_t i = 0; i < until - p; ++i) to[(p + i) * parts + part] = static_cast<Row>(row[i]);
      }
    }
    p = until;
  }
}

template <class T>
void gradient_of_bags(const ComposeArgs& a, int64_t first_bag, int64_t last_bag) {
  using S = Accumulator<T>;
  if (first_bag >= last_bag) return;
  const ComposeGradient& g = *a.gradient;
  const Bags& bags = a.bags;
  const Parts& parts = a.parts;
  PartRows<S> rows(a, bags.begin(first_bag), bags.end(last_bag - 1));
  const int64_t num_parts = parts.maps.count;
  if (g.rows && !g.elements && !g.part_gradients && !g.weight_gradients) {
    const int64_t begin = bags.begin(first_bag), end = bags.end(last_bag - 1);
    return g.wide_rows ? list_rows(rows, begin, end, static_cast<int64_t*>(g.rows))
                       : list_rows(rows, begin, end, static_cast<int32_t*>(g.rows));
  }
  std::vector<S> sums(a.dim);
  const auto write_rows = [&](int64_t p, auto* to) {
    if (!g.elements) {
      to += p * num_parts;
      for (int64_t part = 0; part < num_parts; ++part) to[part] = rows.row(part, p);
      return;
    }
    to += p * a.dim;
    for (int64_t c = 0; c < a.dim; ++c) {
      const int64_t row = rows.row(c / parts.columns, p), i = c % parts.columns;
      to[c] = row < -1 ? rows.element(row, i) : row < 0 ? -1 : row + i;
    }
  };
  for (int64_t bag = first_bag; bag < last_bag; ++bag) {
    const int64_t begin = bags.begin(bag), end = bags.end(bag);
    const S divisor = bags.mean ? static_cast<S>(std::max<int64_t>(rows.count(begin, end), 1)) : S{1};
    const S* dout = static_cast<const S*>(g.dout.base) + bag * g.dout.row_stride;
    for (int64_t p = begin; p < end;) {
      const int64_t until = rows.reach(p, end);
      for (; p < until; ++p) {
        if (g.rows && g.wide_rows) write_rows(p, static_cast<int64_t*>(g.rows));
        if (g.rows && !g.wide_rows) write_rows(p, static_cast<int32_t*>(g.rows));
        if (rows.row(0, p) == -1) continue;
        if (g.part_gradients) {
          S* to = static_cast<S*>(g.part_gradients) + p * num_parts * a.dim;
          factor_gradients<T>(a, rows, p, dout, rows.weight(p) / divisor, to);
        }
        if (g.weight_gradients) {
          std::fill(sums.begin(), sums.end(), S{0});
          add_composed<T>(a, rows, p, p + 1, 0, sums.data());
          S dots[8] = {};
          for (int64_t c = 0; c < a.dim; ++c) dots[c % 8] += sums[c] * dout[c];
          const S dot = ((dots[0] + dots[4]) + (dots[2] + dots[6])) + ((dots[1] + dots[5]) + (dots[3] + dots[7]));
          visit_float(g.weight_gradients.dtype, [&](auto tag) {
            from_scalar(dot / divisor, static_cast<typename decltype(tag)::type*>(g.weight_gradients.base)[p]);
          });
        }
      }
    }
  }
}

// Adds to the rows of positions [p, until) of composed vectors the bag's gradient, times their weights and, for a product, the other
// rows. Only the values of tables of factors are read.
template <bool kMultiply, class T, class S = Accumulator<T>>
void add_gradients(const ComposeArgs& a, const PartRows<S>& rows, int64_t p, int64_t until, const S* dout, S* sums) {
  const int64_t parts = rows.num_parts(), stride = a.table.row_stride;
  const S* weights = rows.weights(p);
  cover<T>(a.dim, [&](auto lanes, auto vectors, int64_t column) __attribute__((always_inline)) {
    constexpr int n = decltype(lanes)::value, kVectors = decltype(vectors)::value;
    using V = decltype(load_lanes_of<n>(static_cast<const T*>(nullptr)));
    const T* table = static_cast<const T*>(a.table.base) + column;
    V whole[kVectors];
    for (int v = 0; v < kVectors; ++v) whole[v] = load_lanes_of<n>(dout + column + v * n);
    for (int64_t i = 0; i < until - p; ++i) {
      if (rows.rows(0, p)[i] < 0) continue;
      V own[kVectors];
      for (int v = 0; v < kVectors; ++v) own[v] = whole[v] * weights[i];
      for (int64_t part = 0; part < parts; ++part) {
        V add[kVectors];
        for (int v = 0; v < kVectors; ++v) add[v] = own[v];
        if constexpr (kMultiply) {
          for (int64_t other = 0; other < parts; ++other) {
            const T* from = table + rows.rows(other, p)[i] * stride;
            for (int v = 0; v < kVectors && other != part; ++v) add[v] *= load_lanes_of<n>(from + v * n);
          }
        }
        S* to = sums + rows.rows(part, p)[i] * a.dim + column;
        for (int v = 0; v < kVectors; ++v) store_lanes_of(to + v * n, load_lanes_of<n>(to + v * n) + add[v]);
      }
    }
  });
}

// The same of concatenated vectors.
template <class T, class S = Accumulator<T>>
void add_joined_gradients(const ComposeArgs& a, const PartRows<S>& rows, int64_t p, int64_t until, const S* dout, S* sums) {
  const int64_t columns = a.parts.columns;
  const S* weights = rows.weights(p);
  for (int64_t part = 0; part < rows.num_parts(); ++part) {
    const int64_t* row = rows.rows(part, p);
    cover<S>(columns, [&](auto lanes, auto vectors, int64_t column) __attribute__((always_inline)) {
      constexpr int n = decltype(lanes)::value, kVectors = decltype(vectors)::value;
      using V = decltype(load_lanes_of<n>(static_cast<const S*>(nullptr)));
      V own[kVectors];
      for (int v = 0; v < kVectors; ++v) own[v] = load_lanes_of<n>(dout + part * columns + column + v * n);
      for (int64_t i = 0; i < until - p; ++i) {
        if (row[i] < 0) continue;
        S* to = sums + row[i] * columns + column;
        for (int v = 0; v < kVectors; ++v) store_lanes_of(to + v * n, load_lanes_of<n>(to + v * n) + own[v] * weights[i]);
      }
    });
  }
}

template <class T>
void sum_gradients(const ComposeArgs& a, int64_t first_bag, int64_t last_bag) {
  using S = Accumulator<T>;
  if (first_bag >= last_bag) return;
  const RowSums& to = *a.row_sums;
  const Bags& bags = a.bags;
  PartRows<S> rows(a, bags.begin(first_bag), bags.end(last_bag - 1));
  S* const sums = static_cast<S*>(to.sums);
  std::vector<S> share(a.dim);
  for (int64_t bag = first_bag; bag < last_bag; ++bag) {
    const int64_t begin = bags.begin(bag), end = bags.end(bag);
    const S* dout = static_cast<const S*>(to.dout.base) + bag * to.dout.row_stride;
    if (bags.mean) {
      const S divisor = static_cast<S>(std::max<int64_t>(rows.count(begin, end), 1));
      for (int64_t c = 0; c < a.dim; ++c) share[c] = dout[c] / divisor;
      dout = share.data();
    }
    for (int64_t p = begin; p < end;) {
      const int64_t until = rows.reach(p, end);
      for (int64_t part = 0; part < rows.num_parts(); ++part) {
        const int64_t* row = rows.rows(part, p);
        for (int64_t i = 0; i < until - p; ++i) {
          if (row[i] >= 0) to.touched[row[i]] = 1;
        }
      }
      if (a.parts.composition == Composition::kAdd) {
        add_gradients<false, T>(a, rows, p, until, dout, sums);
      } else if (a.parts.composition == Composition::kMultiply) {
        add_gradients<true, T>(a, rows, p, until, dout, sums);
      } else {
        add_joined_gradients<T>(a, rows, p, until, dout, sums);
      }
      p = until;
    }
  }
}

// gather_reduce with one row per id, or with composed rows.
void gather_rows(const GatherArgs& args, int64_t first_bag, int64_t last_bag) {
  if (!args.composed) return gather_reduce(args, first_bag, last_bag);
  const ComposeArgs& a = *args.composed;
  visit_float(a.table.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (a.row_sums) return sum_gradients<T>(a, first_bag, last_bag);
    a.gradient ? gradient_of_bags<T>(a, first_bag, last_bag) : compose_bags<T>(a, first_bag, last_bag);
  });
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
