// gather_reduce, gather_max and gather_dot for one instruction set.
#pragma once

#include "cpu/gather_reduce.h"
#include "cpu/vec.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// The first n lanes, the others zero: loaded with a mask if there are masks; otherwise only partial vectors go through memory.
template <class T>
GOSSAMER_INLINE Vec<Accumulator<T>> load_first(const T* from, int n) {
#if GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
  const uint32_t lanes = (1u << n) - 1;
  if constexpr (std::is_same_v<T, float>) {
    return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), from);
  } else if constexpr (std::is_same_v<T, double>) {
    return (Vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes), from);
  } else if constexpr (sizeof(T) == 1) {
    return (Vec<float>)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(static_cast<__mmask16>(lanes), from)));
  } else {
    const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(lanes), from);
    if constexpr (std::is_same_v<T, int16_t>) return (Vec<float>)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(bits));
    if constexpr (std::is_same_v<T, BFloat16>) return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
    if constexpr (std::is_same_v<T, Float16>) return (Vec<float>)_mm512_cvtph_ps(bits);
  }
#else
  return n == kLanes<Accumulator<T>> ? load(from) : load_some(from, n);
#endif
}

// load_first() of at most kMost lanes by a load of no more, since one that reaches into the next cache line costs two even if no lane
// of it is wanted.
template <int kMost, class T>
GOSSAMER_INLINE Vec<Accumulator<T>> load_few(const T* from, int n) {
#if GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
  const uint32_t lanes = (1u << n) - 1;
  constexpr bool half = kMost <= kLanes<Accumulator<T>> / 2, quarter = kMost <= kLanes<Accumulator<T>> / 4;
  if constexpr (std::is_same_v<T, float> && quarter) {
    return (Vec<float>)_mm512_zextps128_ps512(_mm_maskz_loadu_ps(static_cast<__mmask8>(lanes), from));
  } else if constexpr (std::is_same_v<T, float> && half) {
    return (Vec<float>)_mm512_zextps256_ps512(_mm256_maskz_loadu_ps(static_cast<__mmask8>(lanes), from));
  } else if constexpr (std::is_same_v<T, double> && half) {
    return (Vec<double>)_mm512_zextpd256_pd512(_mm256_maskz_loadu_pd(static_cast<__mmask8>(lanes), from));
  } else if constexpr (sizeof(T) == 2 && half) {
    const __m128i bits = _mm_maskz_loadu_epi16(static_cast<__mmask8>(lanes), from);
    __m256 values;
    if constexpr (std::is_same_v<T, int16_t>) values = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(bits));
    if constexpr (std::is_same_v<T, BFloat16>) values = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    if constexpr (std::is_same_v<T, Float16>) values = _mm256_cvtph_ps(bits);
    return (Vec<float>)_mm512_zextps256_ps512(values);
  }
#endif
  return load_first(from, n);
}

template <class T>
GOSSAMER_INLINE void store_first(T* to, Vec<Accumulator<T>> v, int n) {
  if (n == kLanes<Accumulator<T>>) return store(to, v);
#if GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
  const uint32_t lanes = (1u << n) - 1;
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(lanes), (__m512)v);
  } else if constexpr (std::is_same_v<T, double>) {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>(lanes), (__m512d)v);
  } else if constexpr (sizeof(T) == 1) {
    store_some(to, v, n);
  } else {
    T buffer[kLanes<float>];
    store(buffer, v);
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(lanes), load_bytes<__m256i>(buffer));
  }
#else
  store_some(to, v, n);
#endif
}

// Whether short rows have kernels of their own. An install for a machine with a better instruction set does without in the generic
// kernels, which it never chooses by default.
#if defined(GOSSAMER_SPARE_GENERIC) && GOSSAMER_VECTOR_BYTES == 16
constexpr bool kShortRows = false;
#else
constexpr bool kShortRows = true;
#endif

// Rows this many positions ahead are prefetched, since hardware prefetchers do not find scattered rows. They go into the
// second-level cache, where a core can wait for several times as many lines as in the first level. Fewer long rows are
// prefetched: more lines than the core can wait for at once gain nothing.
GOSSAMER_INLINE constexpr int64_t gather_ahead(int64_t row_bytes) {
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
  // With so many row lines in flight, the hardware prefetcher fetches ids too late: they took a third of the time.
  __builtin_prefetch(live.ids + position + 64);
  // For an invalid id, any row is prefetched: a branch would cost more than it saves.
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

// The table that bags read and the columns that they write: the same for all bags, or one per feature.
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

// The factor of a row's codes in addition to the weight; 1 for a row of floats.
template <class T>
GOSSAMER_INLINE Accumulator<T> scale_of(const RowScales& scales, int64_t row) {
  if constexpr (kIsCode<T>) {
    return scales[row];
  } else {
    return 1;
  }
}

// Number of positions whose ids and weights are checked together.
constexpr int64_t kChunk = 256;

// The lists of ids that one thread reduces. Ids are checked in vectors ahead of the bags. Sums then need no checks for a bag
// whose ids all contribute; for other bags they read a copy without the ids that do not.
template <class T, class Index, bool kWeighted>
class Lists {
  using S = Accumulator<T>;
  using Unsigned = std::make_unsigned_t<Index>;
  typedef Unsigned Ids __attribute__((vector_size(GOSSAMER_VECTOR_BYTES)));
  static constexpr int kIds = GOSSAMER_VECTOR_BYTES / sizeof(Index);

 public:
  // Contributing ids and their weights.
  struct Run {
    const Index* ids;
    const S* weights;
    int64_t count;
    bool in_place;  // whether these are consecutive positions of the list
  };

  Lists(const Bags& bags, int64_t num_rows, bool* suspect) : live_(bags, num_rows), weights_(bags.weights), suspect_(suspect) {}

  int64_t end() const { return live_.end; }

  // The end of the positions from `begin` on that all contribute, as far as they have been checked: at least up to `end` if these do.
  int64_t sound_until(int64_t begin, int64_t end) {
    if (begin < from_ || end > until_) check(begin, end, 4 * kChunk);
    return until_;
  }

  // The positions from `begin` to `end`, at most kChunk, valid until the next call. If the run is not in place, fetch(id) was
  // called for the ids `ahead` of them.
  template <class F>
  inline __attribute__((always_inline)) Run run(int64_t begin, int64_t end, int64_t ahead, const F& fetch) {
    if (begin < from_ || end > until_) check(begin, end, kChunk);
    if (end > until_) return live_run(begin, end, ahead, fetch);
    return {live_.ids + begin, kWeighted ? weights_at(begin, end) : nullptr, end - begin, true};
  }

 private:
  // Finds how many positions from `begin` on contribute without a gap, at least up to `end` if all of them do.
  __attribute__((noinline)) void check(int64_t begin, int64_t end, int64_t least) {
    const int64_t stop = std::min(live_.end, std::max(end, begin + least));
    constexpr auto largest = static_cast<uint64_t>(std::numeric_limits<Index>::max()) + 1;
    const auto limit = static_cast<Unsigned>(std::min(live_.limit, largest));
    const auto padding = static_cast<Unsigned>(live_.padding_idx);
    constexpr int64_t together = 8 * kIds;
    from_ = until_ = begin;
    for (; until_ + together <= stop && sound_weights(until_, until_ + together); until_ += together) {
      auto bad = Ids{} > Ids{};
      for (int64_t i = 0; i < together; i += kIds) {
        __builtin_prefetch(live_.ids + until_ + 2 * kChunk + i);
        const Ids ids = load_bytes<Ids>(live_.ids + until_ + i);
        bad |= ids >= limit;
        if (live_.padding_idx >= 0) bad |= ids == padding;
      }
      Index any = 0;
      for (int i = 0; i < kIds; ++i) any |= bad[i];
      if (any) break;
    }
    while (until_ < stop && live_[until_] >= 0 && sound_weights(until_, until_ + 1)) ++until_;
  }

  // Whether no weight is NaN, if that is to be checked.
  bool sound_weights(int64_t begin, int64_t end) const {
    if (!kWeighted || !suspect_) return true;
    return visit_float(weights_.dtype, [&](auto tag) {
      const auto* from = static_cast<const typename decltype(tag)::type*>(weights_.base);
      int nan = 0;
      for (int64_t p = begin; p < end; ++p) {
        const auto weight = to_scalar(from[p]);
        nan |= weight != weight;
      }
      return nan == 0;
    });
  }

  const S* weights_at(int64_t begin, int64_t end) {
    if (weights_.dtype == (sizeof(S) == 8 ? DType::kFloat64 : DType::kFloat32)) {
      return static_cast<const S*>(weights_.base) + begin;
    }
    visit_float(weights_.dtype, [&](auto tag) {
      using W = typename decltype(tag)::type;
      const W* from = static_cast<const W*>(weights_.base) + begin;
      if constexpr (std::is_same_v<Accumulator<W>, S>) {
        for (int64_t i = 0; i < end - begin; i += kLanes<S>) {
          store(own_weights_ + i, load_first(from + i, static_cast<int>(std::min<int64_t>(kLanes<S>, end - begin - i))));
        }
      } else {
        for (int64_t i = 0; i < end - begin; ++i) own_weights_[i] = static_cast<S>(to_scalar(from[i]));
      }
    });
    return own_weights_;
  }

  template <class F>
  __attribute__((noinline)) Run live_run(int64_t begin, int64_t end, int64_t ahead, const F& fetch) {
    int64_t count = 0;
    bool suspect = false;
    for (int64_t p = begin; p < end; ++p) {
      if (p + ahead < live_.end) fetch(live_.ids[p + ahead]);
      own_ids_[count] = live_.ids[p];
      if constexpr (kWeighted) {
        own_weights_[count] = static_cast<S>(weight_at(weights_, p));
        suspect |= own_weights_[count] != own_weights_[count];
      }
      count += live_[p] >= 0;
      suspect |= live_.outside(p);
    }
    if (suspect && suspect_) __atomic_store_n(suspect_, true, __ATOMIC_RELAXED);
    return {own_ids_, own_weights_, count, false};
  }

  LiveIds<Index> live_;
  int64_t from_ = 0, until_ = 0;
  FloatMatrix weights_;
  bool* suspect_;
  Index own_ids_[kChunk];
  S own_weights_[kChunk];
};

// Rows with more bytes than this are long.
constexpr int64_t kLongRow = 2048;

// Rows of at most so many bytes are prefetched into the first-level cache if most are in the nearer caches, or if all are in the
// second-level one. Longer ones go no nearer than the second level, since fewer lines can be in flight into the first.
constexpr int64_t kNearRow = 128, kFetchedRow = 256;
// So few instructions are executed for each row of at most kCloseRow bytes that the processor reads enough rows ahead by itself, if
// they come from a cache: from a table of kCloseBytes, or of four times as much if most of its rows that are read are near.
constexpr int64_t kCloseRow = 16, kCloseBytes = int64_t{4} << 20;

// A table, and bags of ids of its rows.
template <class T>
struct BagRange {
  BagTable<T> from;  // position of the first bag
  int64_t first_bag, last_bag;
  bool near;   // whether most rows are in the nearer caches
  bool close;  // whether rows need no prefetching
};

// The sum of kVectors vectors of columns of rows. The last of them has `last` lanes, kMost or fewer; if kMost is 0, all.
template <int kVectors, int kMost, class T>
class VectorSums {
  using S = Accumulator<T>;
  static constexpr int n = kLanes<S>, kWhole = kMost == 0 ? kVectors : kVectors - 1;
  // Two vectors of bfloat16 are widened together, the even columns by a shift and the odd ones by a mask, which takes fewer
  // instructions than each half by itself.
  static constexpr int kPaired = std::is_same_v<T, BFloat16> && GOSSAMER_VECTOR_BYTES == 64 ? kWhole / 2 * 2 : 0;

 public:
  static constexpr int kBytes = kVectors * n * static_cast<int>(sizeof(T));
  static constexpr int64_t kStride = 0;  // rows may be wider

  explicit VectorSums(int last) : last_(last) {}

  template <bool kScaled>
  __attribute__((always_inline)) void add(const T* row, S weight) {
    for (int v = 0; v < kPaired; v += 2) {
      const UInts both = load_bytes<UInts>(row + v * n);
      add_to<kScaled>(sum_[v], (Vec<S>)(both << 16), weight);
      add_to<kScaled>(sum_[v + 1], (Vec<S>)(both & 0xffff0000u), weight);
    }
    for (int v = kPaired; v < kWhole; ++v) add_to<kScaled>(sum_[v], load(row + v * n), weight);
    if constexpr (kWhole < kVectors) add_to<kScaled>(sum_[kWhole], load_few<kMost>(row + kWhole * n, last_), weight);
  }

  __attribute__((always_inline)) void divide(S divisor) {
    for (int v = 0; v < kVectors; ++v) sum_[v] /= divisor;
  }

  template <class O>
  __attribute__((always_inline)) void write(O* out) const {
    for (int v = 0; v < kPaired; v += 2) {
      if constexpr (std::is_same_v<O, BFloat16>) {
        const UInts both = bfloat16_bits(sum_[v]) | bfloat16_bits(sum_[v + 1]) << 16;
        std::memcpy(static_cast<void*>(out + v * n), &both, sizeof both);
      } else {
        [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
          store(out + v * n, __builtin_shufflevector(sum_[v], sum_[v + 1], (I / 2 + I % 2 * n)...));
          store(out + v * n + n, __builtin_shufflevector(sum_[v], sum_[v + 1], (n / 2 + I / 2 + I % 2 * n)...));
        }(std::make_integer_sequence<int, n>{});
      }
    }
    for (int v = kPaired; v < kWhole; ++v) store(out + v * n, sum_[v]);
    if constexpr (kWhole < kVectors) store_first(out + kWhole * n, sum_[kWhole], last_);
  }

 private:
  template <bool kScaled>
  static __attribute__((always_inline)) void add_to(Vec<S>& sum, Vec<S> value, S weight) {
    if constexpr (kScaled) {
      sum = fma(value, splat(weight), sum);
    } else {
      sum += value;
    }
  }

  Vec<S> sum_[kVectors] = {};
  int last_;
};

#if GOSSAMER_F16C
// Vectors of so many columns; GCC takes no vector size that depends on a template's argument.
template <int kColumns>
struct Narrow;
template <>
struct Narrow<4> {
  typedef float Values __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  typedef uint16_t Half __attribute__((vector_size(8)));
};
template <>
struct Narrow<8> {
  typedef float Values __attribute__((vector_size(32)));
  typedef uint32_t Bits __attribute__((vector_size(32)));
  typedef uint16_t Half __attribute__((vector_size(16)));
};
template <>
struct Narrow<16> {
  typedef float Values __attribute__((vector_size(64)));
  typedef uint32_t Bits __attribute__((vector_size(64)));
  typedef uint16_t Half __attribute__((vector_size(32)));
};

// The sum of contiguous rows of kColumns columns, at most a vector, in a register no wider than they are and loaded without a mask.
template <int kColumns, class T>
class NarrowSums {
  using S = float;
  using Values = typename Narrow<kColumns>::Values;
  using Bits = typename Narrow<kColumns>::Bits;
  using Half = typename Narrow<kColumns>::Half;

 public:
  static constexpr int kBytes = kColumns * static_cast<int>(sizeof(T));
  static constexpr int64_t kStride = kColumns;

  explicit NarrowSums(int) {}

  template <bool kScaled>
  __attribute__((always_inline)) void add(const T* row, S weight) {
    const Values value = widen(row);
    if constexpr (!kScaled) {
      sum_ += value;
    } else if constexpr (kColumns == 4) {
      sum_ = (Values)_mm_fmadd_ps((__m128)value, _mm_set1_ps(weight), (__m128)sum_);
    } else if constexpr (kColumns == 8) {
      sum_ = (Values)_mm256_fmadd_ps((__m256)value, _mm256_set1_ps(weight), (__m256)sum_);
    } else {
      sum_ = fma(value, splat(weight), sum_);
    }
  }

  __attribute__((always_inline)) void divide(S divisor) { sum_ /= divisor; }

  template <class O>
  __attribute__((always_inline)) void write(O* out) const {
    if constexpr (kColumns == kLanes<S>) {
      store(out, sum_);
    } else if constexpr (std::is_same_v<O, float>) {
      std::memcpy(out, &sum_, sizeof sum_);
    } else {
      Half halves;
      if constexpr (std::is_same_v<O, BFloat16>) {
        const Bits bits = (Bits)sum_, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        halves = __builtin_convertvector(sum_ == sum_ ? rounded : Bits{} + 0x7fc0u, Half);
      } else if constexpr (kColumns == 4) {
        const __m128i packed = _mm_cvtps_ph((__m128)sum_, _MM_FROUND_TO_NEAREST_INT);
        std::memcpy(&halves, &packed, sizeof halves);
      } else {
        halves = (Half)_mm256_cvtps_ph((__m256)sum_, _MM_FROUND_TO_NEAREST_INT);
      }
      std::memcpy(static_cast<void*>(out), &halves, sizeof halves);
    }
  }

 private:
  static __attribute__((always_inline)) Values widen(const T* row) {
    if constexpr (kColumns == kLanes<S>) {
      return load(row);
    } else if constexpr (std::is_same_v<T, float>) {
      return load_bytes<Values>(row);
    } else if constexpr (kColumns == 4) {
      const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row));
      if constexpr (std::is_same_v<T, Float16>) return (Values)_mm_cvtph_ps(bits);
      return (Values)_mm_slli_epi32(_mm_cvtepu16_epi32(bits), 16);
    } else {
      const __m128i bits = load_bytes<__m128i>(row);
      if constexpr (std::is_same_v<T, Float16>) return (Values)_mm256_cvtph_ps(bits);
      return (Values)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
    }
  }

  Values sum_ = {};
};
#endif

// Reduces bags of columns of rows, summed by Sums; the last vector of columns has `last` lanes.
template <class Sums, bool kWeighted, class T, class Index, class O>
__attribute__((noinline)) void reduce_columns(const GatherArgs& a, Lists<T, Index, kWeighted>& lists, const BagRange<T>& range,
                                              int64_t column, int last, O* out) {
  using S = Accumulator<T>;
  constexpr int kBytes = Sums::kBytes;
  // With several passes over the columns, the first pass prefetches whole rows; for long rows every pass prefetches its own
  // columns.
  const int64_t row_bytes = range.from.dim * static_cast<int64_t>(sizeof(T));
  const bool own = row_bytes <= kBytes || row_bytes > kLongRow, fetches = own ? !range.close : column == 0;
  const int64_t fetch_bytes = own ? kBytes : row_bytes;
  const int64_t ahead = fetches ? gather_ahead(fetch_bytes) : std::numeric_limits<int64_t>::max() / 2;
  const T* table = range.from.rows + column;
  const int64_t stride = Sums::kStride ? Sums::kStride : range.from.stride;
  const RowScales scales = range.from.scales;
  // For an id that does not contribute, the address may be outside the table, but it is not read.
  const auto place = [=](Index id) __attribute__((always_inline)) {
    const uint64_t element = static_cast<uint64_t>(int64_t{id}) * static_cast<uint64_t>(stride);
    return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(table) + element * sizeof(T));
  };
  const bool near = range.near && kBytes <= (a.fetched ? kFetchedRow : kNearRow);
  const auto fetch = [=](Index id) __attribute__((always_inline)) {
    if (near) {
      prefetch_lines<kBytes, Fetch::kRead>(place(id), kBytes);
    } else {
      prefetch_lines<kBytes, Fetch::kReadLater>(place(id), fetch_bytes);
    }
    if constexpr (kIsCode<T>) {
      const uint64_t number = static_cast<uint64_t>(int64_t{id}) * static_cast<uint64_t>(scales.stride);
      prefetch_lines<1, Fetch::kReadLater>(
          reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(scales.base) + number * sizeof(float)), 1);
    }
  };
  int64_t begin = a.bags.begin(range.first_bag);
  out += range.from.row_of_output * a.out.row_stride + range.from.column + column;
  for (int64_t bag = range.first_bag; bag < range.last_bag; ++bag, out += a.out.row_stride) {
    const int64_t end = a.bags.end(bag);
    // Long bags consist of several runs. The first run is found before the sums exist, so that the call need not save their
    // registers.
    int64_t stop = std::min(end, begin + kChunk), live = 0;
    auto run = lists.run(begin, stop, ahead, fetch);
    Sums sums(last);
    while (true) {
      const auto add = [&](int64_t i) __attribute__((always_inline)) {
        [[maybe_unused]] S weight = scale_of<T>(scales, run.ids[i]);
        if constexpr (kWeighted) weight *= run.weights[i];
        sums.template add<kWeighted || kIsCode<T>>(table + int64_t{run.ids[i]} * stride, weight);
      };
      const auto fetch_and_add = [&](int64_t i) __attribute__((always_inline)) {
        fetch(run.ids[i + ahead]);
        add(i);
      };
      int64_t i = 0;
      if (run.in_place) {
        const int64_t fetched = std::min(run.count, lists.end() - ahead - begin);
        if constexpr (kBytes <= 64) {
          for (; i + 4 <= fetched; i += 4) {
            fetch_and_add(i);
            fetch_and_add(i + 1);
            fetch_and_add(i + 2);
            fetch_and_add(i + 3);
          }
        }
        for (; i < fetched; ++i) fetch_and_add(i);
      }
      if constexpr (kBytes <= 32) {
        for (; i + 4 <= run.count; i += 4) {
          add(i);
          add(i + 1);
          add(i + 2);
          add(i + 3);
        }
      }
      for (; i < run.count; ++i) add(i);
      live += run.count;
      begin = stop;
      if (__builtin_expect(begin == end, 1)) break;
      stop = std::min(end, begin + kChunk);
      run = lists.run(begin, stop, ahead, fetch);
    }
    if (range.from.mean) sums.divide(static_cast<S>(std::max<int64_t>(live, 1)));
    sums.write(out);
  }
}

#if GOSSAMER_F16C
// Bags that end by `until`, whose ids all contribute and whose rows need no prefetching, from one that begins at `begin`. Returns the
// first bag left over. So little happens in each bag that all of it stays in registers.
template <class Sums, bool kOffsets, class T, class Index, class O>
__attribute__((noinline)) int64_t reduce_sound(const Bags& bags, const BagRange<T>& range, int64_t bag, int64_t begin,
                                               int64_t until, O* out, int64_t out_stride) {
  const T* const table = range.from.rows;
  const Index* at = static_cast<const Index*>(bags.index.base) + begin;
  const Index* const limit = at + (until - begin);
  const int64_t size = bags.bag_size, last_bag = range.last_bag;
  const bool mean = range.from.mean;
  for (; bag < last_bag; ++bag, out += out_stride) {
    const int64_t count = kOffsets ? bags.end(bag) - bags.begin(bag) : size;
    const Index* const stop = at + count;
    if (stop > limit) break;
    Sums sums(0);
    const auto add = [&](Index id)
                         __attribute__((always_inline)) { sums.template add<false>(table + int64_t{id} * Sums::kStride, 1); };
    for (; at + 4 <= stop; at += 4) {
      add(at[0]);
      add(at[1]);
      add(at[2]);
      add(at[3]);
    }
    for (; at < stop; ++at) add(*at);
    if (mean) sums.divide(static_cast<Accumulator<T>>(std::max<int64_t>(count, 1)));
    sums.write(out);
  }
  return bag;
}

// Reduces bags of narrow rows that need no prefetching.
template <class Sums, class T, class Index, class O>
void reduce_close(const GatherArgs& a, Lists<T, Index, false>& lists, const BagRange<T>& range, O* out) {
  const int64_t stride = a.out.row_stride;
  BagRange<T> part = range;
  for (int64_t bag = range.first_bag; bag < range.last_bag; ++bag) {
    const int64_t begin = a.bags.begin(bag), until = lists.sound_until(begin, a.bags.end(bag));
    O* const to = out + (range.from.row_of_output + bag - range.first_bag) * stride + range.from.column;
    bag = a.bags.offsets ? reduce_sound<Sums, true, T, Index>(a.bags, range, bag, begin, until, to, stride)
                         : reduce_sound<Sums, false, T, Index>(a.bags, range, bag, begin, until, to, stride);
    if (bag == range.last_bag) break;
    // A bag that ends later, or in which not all ids contribute.
    if (a.bags.end(bag) <= lists.sound_until(a.bags.begin(bag), a.bags.end(bag))) {
      --bag;
      continue;
    }
    part.from.row_of_output = range.from.row_of_output + bag - range.first_bag;
    part.first_bag = bag;
    part.last_bag = bag + 1;
    reduce_columns<Sums>(a, lists, part, 0, 0, out);
  }
}
#endif

template <bool kWeighted, class T, class Index, class O>
void reduce_range(const GatherArgs& a, const BagRange<T>& range) {
  constexpr int n = kLanes<Accumulator<T>>;
  Lists<T, Index, kWeighted> lists(a.bags, range.from.num_rows, a.suspect);
  O* out = static_cast<O*>(a.out.base);
  const int64_t dim = range.from.dim;
#if GOSSAMER_F16C
  if constexpr (!kIsCode<T> && !std::is_same_v<T, double>) {
    if (range.from.stride == dim) {
      if constexpr (!kWeighted) {
        if (range.close && dim == 4) return reduce_close<NarrowSums<4, T>>(a, lists, range, out);
        if (range.close && dim == 8) return reduce_close<NarrowSums<8, T>>(a, lists, range, out);
      }
      if (dim == 4) return reduce_columns<NarrowSums<4, T>>(a, lists, range, 0, 4, out);
      if (dim == 8) return reduce_columns<NarrowSums<8, T>>(a, lists, range, 0, 8, out);
      if constexpr (n == 16) {
        if (dim == 16) return reduce_columns<NarrowSums<16, T>>(a, lists, range, 0, 16, out);
      }
    }
  }
#endif
  // Rows of more columns than one pass sums are reduced bag by bag, so that a later pass finds the ids in the caches.
  const int64_t step = dim <= 4 * n || dim == 8 * n ? range.last_bag - range.first_bag : 1;
  BagRange<T> part = range;
  for (int64_t bag = range.first_bag; bag < range.last_bag; bag += step) {
    part.from.row_of_output = range.from.row_of_output + bag - range.first_bag;
    part.first_bag = bag;
    part.last_bag = bag + step;
    int64_t column = 0;
    const auto pass = [&](auto vectors, auto most) __attribute__((always_inline)) {
      constexpr int kVectors = decltype(vectors)::value, kMost = decltype(most)::value;
      const int last = static_cast<int>(std::min<int64_t>(n, dim - column - (kVectors - 1) * n));
      reduce_columns<VectorSums<kVectors, kMost, T>>(a, lists, part, column, last, out);
      column += kVectors * n;
    };
    // Where load_few() has loads of its own.
    constexpr bool narrow = GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64 && sizeof(T) > 1;
    constexpr std::integral_constant<int, 0> whole;
    constexpr std::integral_constant<int, n> all;
    constexpr std::integral_constant<int, narrow ? n / 2 : n> half;
    constexpr std::integral_constant<int, narrow && sizeof(T) == 4 ? n / 4 : half> quarter;
    if constexpr (kShortRows) {
      while (column + 8 * n <= dim) pass(std::integral_constant<int, 8>{}, whole);
      while (column + 4 * n <= dim) pass(std::integral_constant<int, 4>{}, whole);
      if (column + 3 * n < dim) {
        pass(std::integral_constant<int, 4>{}, all);
      } else if (column + 2 * n < dim) {
        pass(std::integral_constant<int, 3>{}, all);
      } else if (column + 2 * n == dim) {
        pass(std::integral_constant<int, 2>{}, whole);
      } else if (column + n < dim) {
        pass(std::integral_constant<int, 2>{}, all);
      } else if (column + half < dim) {
        pass(std::integral_constant<int, 1>{}, all);
      } else if (column + quarter < dim) {
        pass(std::integral_constant<int, 1>{}, half);
      } else if (column < dim) {
        pass(std::integral_constant<int, 1>{}, quarter);
      }
    } else {
      while (column + 4 * n <= dim) pass(std::integral_constant<int, 4>{}, whole);
      while (column < dim) pass(std::integral_constant<int, 1>{}, all);
    }
  }
}

template <bool kWeighted, class T, class Index, class O>
void reduce_bags(const GatherArgs& a, int64_t first_bag, int64_t last_bag) {
  const int64_t each = a.bags.features ? a.bags.bags_per_feature() : a.bags.num_bags;
  while (first_bag < last_bag) {
    const int64_t stop = std::min(last_bag, (first_bag / each + 1) * each);
    BagTable<T> from = bag_table<T>(a.table, a.num_rows, a.dim, a.bags, first_bag);
    if constexpr (kIsCode<T>) from.scales = a.scales;
    const int64_t begin = a.bags.begin(first_bag), bytes = from.num_rows * from.dim * static_cast<int64_t>(sizeof(T));
    const Index* ids = static_cast<const Index*>(a.bags.index.base) + begin;
    const bool near = a.fetched || rows_are_near(a.bags.end(stop - 1) - begin, bytes, [=](int64_t i) { return ids[i]; });
    const int64_t row_bytes = from.dim * static_cast<int64_t>(sizeof(T));
    const bool close =
        (a.fetched && row_bytes > kFetchedRow) || (row_bytes <= kCloseRow && bytes <= (near ? 4 : 1) * kCloseBytes);
    reduce_range<kWeighted, T, Index, O>(a, {from, first_bag, stop, near, close});
    first_bag = stop;
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

// Σ row[i] · other[i], summed in an order that depends on dim alone.
template <class T, class G>
GOSSAMER_INLINE Accumulator<T> row_dot(const T* row, const G* other, int64_t dim) {
  using S = Accumulator<T>;
  constexpr int n = kLanes<S>;
  Vec<S> sum[4] = {};
  int64_t column = 0;
  const auto add = [&](auto vectors) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(vectors)::value;
    for (; column + kVectors * n <= dim; column += kVectors * n) {
      for (int v = 0; v < kVectors; ++v) sum[v] += load(row + column + v * n) * load(other + column + v * n);
    }
  };
  add(std::integral_constant<int, 4>{});
  sum[0] += sum[2];
  sum[1] += sum[3];
  add(std::integral_constant<int, 2>{});
  for (; column < dim; column += n) {
    const int some = static_cast<int>(std::min<int64_t>(n, dim - column));
    sum[0] += load_first(row + column, some) * load_first(other + column, some);
  }
  return sum_lanes<S>(sum[0] + sum[1]);
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
          dot = row_dot(from.rows + id * from.stride, dout, dim) / divisor;
          if constexpr (kIsCode<T>) dot *= a.scales[id];
        }
        from_scalar(dot, out[p]);
      }
    }
  });
}

// Calls f with tags of the table's type, the index's type, and the other array's type: T or T's accumulator, and always the
// accumulator for codes.
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
