// Vectors of one instruction set, built on the compilers' vector extension: the same source serves every architecture.
#pragma once

#include "cpu/isa_target.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

template <class S>
struct VecTraits {
  using Bits = std::conditional_t<sizeof(S) == 4, int32_t, int64_t>;
  typedef S Vec __attribute__((vector_size(GOSSAMER_VECTOR_BYTES)));
  typedef S HalfVec __attribute__((vector_size(GOSSAMER_VECTOR_BYTES / 2)));
  typedef Bits BitsVec __attribute__((vector_size(GOSSAMER_VECTOR_BYTES)));
};

// Lanes and types: Vec<S> holds kLanes<S> values of float or double, Mask<S> what comparing two gives.
template <class S>
using Vec = typename VecTraits<S>::Vec;
template <class S>
using Mask = typename VecTraits<S>::BitsVec;
template <class S>
constexpr int kLanes = GOSSAMER_VECTOR_BYTES / sizeof(S);

typedef uint32_t UInts __attribute__((vector_size(GOSSAMER_VECTOR_BYTES)));
typedef uint32_t HalfUInts __attribute__((vector_size(GOSSAMER_VECTOR_BYTES / 2)));
template <>
struct VecTraits<BFloat16Pair> {
  using Vec = UInts;
  using HalfVec = HalfUInts;
};

// The lower half of a vector. On processors that execute a vector as two halves, the last tokens of a panel cost half as much if
// they fit into one.
template <class S>
using HalfVec = typename VecTraits<S>::HalfVec;
template <class P>
constexpr bool kHasHalves = GOSSAMER_VECTOR_BYTES == 64 && GOSSAMER_F16C && sizeof(P) == sizeof(float);
template <class T>
using Operand = PackedAs<T, GOSSAMER_BF16_DOT>;

typedef uint16_t Halves __attribute__((vector_size(GOSSAMER_VECTOR_BYTES / 2)));
typedef uint16_t Terms __attribute__((vector_size(GOSSAMER_VECTOR_BYTES)));

#define GOSSAMER_INLINE static inline __attribute__((always_inline))

template <class S>
GOSSAMER_INLINE Vec<S> splat(S value) {
  return value - Vec<S>{};
}
GOSSAMER_INLINE UInts splat(BFloat16Pair value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits - UInts{};
}

template <class V, class S>
GOSSAMER_INLINE V load_bytes(const S* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class P>
GOSSAMER_INLINE HalfVec<P> splat_half(P value) {
  SumOf<P> bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (HalfVec<P>)(bits - HalfVec<SumOf<P>>{});
}

template <class P>
GOSSAMER_INLINE HalfVec<P> lower_half(Vec<P> v) {
  HalfVec<P> half;
  std::memcpy(&half, &v, sizeof half);
  return half;
}

// The half vector, extended by zeros.
template <class V>
GOSSAMER_INLINE auto widened(V half) {
  constexpr int n = sizeof(half) / sizeof(half[0]);
  return [&]<size_t... I>(std::index_sequence<I...>) {
    return __builtin_shufflevector(half, V{}, I...);
  }(std::make_index_sequence<2 * n>{});
}

GOSSAMER_INLINE Vec<float> load(const float* from) { return load_bytes<Vec<float>>(from); }
GOSSAMER_INLINE Vec<double> load(const double* from) { return load_bytes<Vec<double>>(from); }
GOSSAMER_INLINE void store(float* to, Vec<float> v) { std::memcpy(to, &v, sizeof v); }
GOSSAMER_INLINE void store(double* to, Vec<double> v) { std::memcpy(to, &v, sizeof v); }
GOSSAMER_INLINE UInts load(const BFloat16Pair* from) { return load_bytes<UInts>(from); }
GOSSAMER_INLINE void store(BFloat16Pair* to, UInts v) { std::memcpy(to, &v, sizeof v); }

// Widens 16-bit codes to 32-bit lanes. Uses the processor's instruction where there is one; compilers emit five instead.
GOSSAMER_INLINE UInts load_wide(const void* from) {
#if GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
  return (UInts)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
#elif GOSSAMER_F16C
  return (UInts)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
#else
  return __builtin_convertvector(load_bytes<Halves>(from), UInts);
#endif
}

GOSSAMER_INLINE Vec<float> load(const BFloat16* from) { return (Vec<float>)(load_wide(from) << 16); }

// Each lane's bfloat16, in the low half.
GOSSAMER_INLINE UInts bfloat16_bits(Vec<float> v) {
  const UInts bits = (UInts)v;
  const UInts rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return v == v ? rounded : 0x7fc0u - UInts{};
}

GOSSAMER_INLINE void store(BFloat16* to, Vec<float> v) {
  const Halves out = __builtin_convertvector(bfloat16_bits(v), Halves);
  std::memcpy(to, &out, sizeof out);
}

#if GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
GOSSAMER_INLINE Vec<float> load(const Float16* from) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
GOSSAMER_INLINE void store(Float16* to, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif GOSSAMER_F16C
GOSSAMER_INLINE Vec<float> load(const Float16* from) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
GOSSAMER_INLINE void store(Float16* to, Vec<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
GOSSAMER_INLINE Vec<float> load(const Float16* from) {
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_scalar(from[i]);
  return v;
}
GOSSAMER_INLINE void store(Float16* to, Vec<float> v) {
  for (int i = 0; i < kLanes<float>; ++i) from_scalar(v[i], to[i]);
}
#endif

// Codes widen to whole numbers, and whole numbers in their range become codes.
typedef int8_t Codes8 __attribute__((vector_size(GOSSAMER_VECTOR_BYTES / 4)));
typedef int16_t Codes16 __attribute__((vector_size(GOSSAMER_VECTOR_BYTES / 2)));

GOSSAMER_INLINE Vec<float> load(const int8_t* from) {
#if GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif GOSSAMER_F16C
  return (Vec<float>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(load_bytes<Codes8>(from), Vec<float>);
#endif
}
GOSSAMER_INLINE Vec<float> load(const int16_t* from) {
#if GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif GOSSAMER_F16C
  return (Vec<float>)_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(load_bytes<Codes16>(from), Vec<float>);
#endif
}
GOSSAMER_INLINE void store(int8_t* to, Vec<float> v) {
  const Codes8 out = __builtin_convertvector(__builtin_convertvector(v, VecTraits<float>::BitsVec), Codes8);
  std::memcpy(to, &out, sizeof out);
}
GOSSAMER_INLINE void store(int16_t* to, Vec<float> v) {
  const Codes16 out = __builtin_convertvector(__builtin_convertvector(v, VecTraits<float>::BitsVec), Codes16);
  std::memcpy(to, &out, sizeof out);
}

// a·b + c with one rounding where the instruction set has it. Left to the compiler, some loops would fuse and others not, and sums
// that promise equal bits would differ.
#if GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
GOSSAMER_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return (Vec<float>)_mm512_fmadd_ps(a, b, c); }
GOSSAMER_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return (Vec<double>)_mm512_fmadd_pd(a, b, c); }
#elif GOSSAMER_F16C
GOSSAMER_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return (Vec<float>)_mm256_fmadd_ps(a, b, c); }
GOSSAMER_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return (Vec<double>)_mm256_fmadd_pd(a, b, c); }
#elif defined(__FP_FAST_FMAF) && defined(__FP_FAST_FMA)
GOSSAMER_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  for (int i = 0; i < kLanes<float>; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
GOSSAMER_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  for (int i = 0; i < kLanes<double>; ++i) c[i] = __builtin_fma(a[i], b[i], c[i]);
  return c;
}
#else
template <class V>
GOSSAMER_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}
#endif

#if GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
GOSSAMER_INLINE HalfVec<float> fma(HalfVec<float> a, HalfVec<float> b, HalfVec<float> c) {
  return (HalfVec<float>)_mm256_fmadd_ps(a, b, c);
}
#endif

#if GOSSAMER_BF16_DOT
// Multiplies and adds both terms in the processor's order, the same for all lanes; the instruction flushes subnormals to zero.
GOSSAMER_INLINE Vec<float> fma(UInts a, UInts b, Vec<float> c) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}
GOSSAMER_INLINE HalfVec<float> fma(HalfUInts a, HalfUInts b, HalfVec<float> c) {
  return (HalfVec<float>)_mm256_dpbf16_ps((__m256)c, (__m256bh)a, (__m256bh)b);
}
// The same with one pair for all lanes, broadcast as the instruction loads it: a broadcast of its own would take a turn of a vector
// unit, and compilers make one.
GOSSAMER_INLINE Vec<float> fma_splat(UInts a, const BFloat16Pair& b, Vec<float> c) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(a), "m"(b));
  return c;
}
#endif

// The first n lanes, the others zero.
template <class T>
GOSSAMER_INLINE Vec<Accumulator<T>> load_some(const T* from, int n) {
  T buffer[kLanes<Accumulator<T>>] = {};
  std::memcpy(buffer, from, n * sizeof(T));
  return load(buffer);
}

template <class T>
GOSSAMER_INLINE void store_some(T* to, Vec<Accumulator<T>> v, int n) {
  T buffer[kLanes<Accumulator<T>>];
  store(buffer, v);
  std::memcpy(to, buffer, n * sizeof(T));
}

// The next kLanes packed values of a contiguous row with `terms` terms left; values past its end are zero.
template <class P, class T>
GOSSAMER_INLINE Vec<P> load_terms(const T* from, int64_t terms) {
  constexpr int n = kLanes<P>;
  if constexpr (std::is_same_v<P, BFloat16Pair>) {
    if (terms >= 2 * n) return load_bytes<UInts>(from);
    BFloat16Pair buffer[n] = {};
    if (terms > 0) std::memcpy(static_cast<void*>(buffer), from, terms * sizeof(T));
    return load(buffer);
  } else {
    return terms >= n ? load(from) : terms > 0 ? load_some(from, static_cast<int>(terms)) : Vec<P>{};
  }
}

// One packed value per lane, with terms from the rows `first` and `second` at the same column; `second` is null past the last
// term, and `lanes` columns exist.
template <class P, class T>
GOSSAMER_INLINE Vec<P> load_lanes(const T* first, [[maybe_unused]] const T* second, int lanes) {
  constexpr int n = kLanes<P>;
  if constexpr (std::is_same_v<P, BFloat16Pair>) {
    const auto bits = [&](const T* from) { return (UInts)(lanes == n ? load(from) : load_some(from, lanes)); };
    return second ? (bits(first) >> 16) | bits(second) : bits(first) >> 16;
  } else {
    return lanes == n ? load(first) : load_some(first, lanes);
  }
}

// The same for two consecutive vectors of lanes, all of which exist.
template <class P, class T>
GOSSAMER_INLINE std::pair<Vec<P>, Vec<P>> load_two_lanes(const T* first, [[maybe_unused]] const T* second) {
  constexpr int n = kLanes<P>;
  if constexpr (std::is_same_v<P, BFloat16Pair>) {
    const Terms a = load_bytes<Terms>(first), b = second ? load_bytes<Terms>(second) : Terms{};
    return [&]<int... I>(std::integer_sequence<int, I...>) {
      return std::pair{(UInts)__builtin_shufflevector(a, b, (I / 2 + I % 2 * 2 * n)...),
                       (UInts)__builtin_shufflevector(a, b, (n + I / 2 + I % 2 * 2 * n)...)};
    }(std::make_integer_sequence<int, 2 * n>{});
  } else {
    return {load(first), load(first + n)};
  }
}

// One packed value per lane from consecutive sums; `second` is unused where a packed value has one term.
template <class P>
GOSSAMER_INLINE Vec<P> pack_lanes(Vec<SumOf<P>> first, [[maybe_unused]] Vec<SumOf<P>> second) {
  if constexpr (!std::is_same_v<P, BFloat16Pair>) {
    return first;
  } else {
#if GOSSAMER_BF16_DOT
    const Terms both = (Terms)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    return [&]<int... I>(std::integer_sequence<int, I...>) {
      return (UInts)__builtin_shufflevector(both, both, (I / 2 + I % 2 * kLanes<P>)...);
    }(std::make_integer_sequence<int, 2 * kLanes<P>>{});
#else
    return bfloat16_bits(first) | bfloat16_bits(second) << 16;
#endif
  }
}

// Stores sums of products, or values that only products will read. On processors that multiply pairs of bfloat16, rounding is an
// instruction too, and it flushes subnormals to zero as the product does.
template <class T, class V>
GOSSAMER_INLINE void store_sums(T* to, V v) {
#if GOSSAMER_BF16_DOT
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __m256bh out = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(to, &out, sizeof out);
    return;
  }
#endif
  store(to, v);
}

// Whether Vecs vectors of sums fill whole cache lines as O, which stream_sums() writes.
template <class O, int Vecs>
constexpr bool kStreams = GOSSAMER_VECTOR_BYTES == 64 && GOSSAMER_F16C && Vecs * kLanes<Accumulator<O>> * sizeof(O) % 64 == 0;

// store_sums() of whole lines past the caches, which would read them first; order_streams() comes before another thread reads them.
template <class O, int Vecs>
GOSSAMER_INLINE void stream_sums([[maybe_unused]] O* to, [[maybe_unused]] const Vec<Accumulator<O>> (&v)[Vecs]) {
#if GOSSAMER_VECTOR_BYTES == 64 && GOSSAMER_F16C
  static_assert(kStreams<O, Vecs>);
  constexpr int per_line = std::is_same_v<O, Accumulator<O>> ? 1 : 2;
#pragma GCC unroll 4
  for (int i = 0; i < Vecs; i += per_line) {
    __m512i line;
    if constexpr (per_line == 1) {
      line = (__m512i)v[i];
    } else if constexpr (std::is_same_v<O, Float16>) {
      const __m256i low = _mm512_cvtps_ph((__m512)v[i], _MM_FROUND_TO_NEAREST_INT);
      line = _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm512_cvtps_ph((__m512)v[i + 1], _MM_FROUND_TO_NEAREST_INT), 1);
    } else {
#if GOSSAMER_BF16_DOT
      line = (__m512i)_mm512_cvtne2ps_pbh((__m512)v[i + 1], (__m512)v[i]);
#else
      const __m256i low = _mm512_cvtepi32_epi16((__m512i)bfloat16_bits(v[i]));
      line = _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm512_cvtepi32_epi16((__m512i)bfloat16_bits(v[i + 1])), 1);
#endif
    }
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i * kLanes<Accumulator<O>>), line);
  }
#endif
}

GOSSAMER_INLINE void order_streams() {
#if GOSSAMER_F16C
  _mm_sfence();
#endif
}

// The sum of all lanes in a fixed order: the upper half is added to the lower until one lane is left.
template <class S>
GOSSAMER_INLINE S sum_lanes(Vec<S> v) {
  const auto add_upper = [&](auto half) __attribute__((always_inline)) {
    v += [&]<size_t... I>(std::index_sequence<I...>) __attribute__((always_inline)) {
      return __builtin_shufflevector(v, v, ((I + decltype(half)::value) % kLanes<S>)...);
    }(std::make_index_sequence<kLanes<S>>{});
  };
  if constexpr (kLanes<S> >= 16) add_upper(std::integral_constant<size_t, 8>{});
  if constexpr (kLanes<S> >= 8) add_upper(std::integral_constant<size_t, 4>{});
  if constexpr (kLanes<S> >= 4) add_upper(std::integral_constant<size_t, 2>{});
  add_upper(std::integral_constant<size_t, 1>{});
  return v[0];
}

#if defined(__x86_64__) && GOSSAMER_VECTOR_BYTES == 64
GOSSAMER_INLINE Vec<float> vsqrt(Vec<float> x) { return (Vec<float>)_mm512_sqrt_ps((__m512)x); }
GOSSAMER_INLINE Vec<double> vsqrt(Vec<double> x) { return (Vec<double>)_mm512_sqrt_pd((__m512d)x); }
#elif defined(__x86_64__) && GOSSAMER_VECTOR_BYTES == 32
GOSSAMER_INLINE Vec<float> vsqrt(Vec<float> x) { return (Vec<float>)_mm256_sqrt_ps((__m256)x); }
GOSSAMER_INLINE Vec<double> vsqrt(Vec<double> x) { return (Vec<double>)_mm256_sqrt_pd((__m256d)x); }
#else
template <class V>
GOSSAMER_INLINE V vsqrt(V x) {
  for (size_t i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = std::sqrt(x[i]);
  return x;
}
#endif

// Outside the range of normal numbers the exponential saturates near the largest or smallest normal, never at infinity or zero.
GOSSAMER_INLINE Vec<double> vexp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i] > 708.0 ? 708.0 : x[i] < -708.0 ? -708.0 : x[i]);
  return x;
}

// With an error of about one ulp.
GOSSAMER_INLINE Vec<float> vexp(Vec<float> x) {
  x = x > 88.0f ? splat(88.0f) : x;
  x = x < -87.0f ? splat(-87.0f) : x;
  // Adding 1.5·2^23 rounds to an integer and leaves it in the low bits.
  const Vec<float> shifted = x * 1.44269504f + 12582912.0f;
  const Vec<float> n = shifted - 12582912.0f;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> q = splat(0.00139336884f);
  q = q * r + 0.00836320547f;
  q = q * r + 0.0416664646f;
  q = q * r + 0.166665768f;
  q = q * r + 0.5f;
  const Vec<float> mantissa = r * r * q + r + 1.0f;
  const Vec<float> power = (Vec<float>)(((UInts)shifted << 23) + 0x3f800000u);
  return mantissa * power;
}

GOSSAMER_INLINE Vec<double> verf(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::erf(x[i]);
  return x;
}

// erf with an absolute error of about 1e-7: an odd polynomial up to 1, then 1 − exp(polynomial).
GOSSAMER_INLINE Vec<float> verf(Vec<float> x) {
  const Vec<float> s = x * x;
  Vec<float> small = splat(7.88249712e-05f);
  for (const float c : {-0.000801885499f, 0.00518931194f, -0.0268543288f, 0.112835975f, -0.376126269f, 1.12837917f}) {
    small = small * s + c;
  }
  Vec<float> t = x < 0.0f ? -x : x;
  t = t > 4.0f ? splat(4.0f) : t;
  Vec<float> large = splat(1.39520608e-05f);
  for (const float c :
       {-0.000329196857f, 0.00352458532f, -0.0229789534f, 0.104162702f, 0.637938417f, 1.12677134f, 0.000502260482f}) {
    large = large * t + c;
  }
  large = 1.0f - vexp(-large);
  large = x < 0.0f ? -large : large;
  return s < 1.0f ? small * x : large;
}

// Why lines are prefetched: to be read at once (first-level cache), or to be read or written after other work (second-level
// cache).
enum class Fetch { kRead, kReadLater, kWriteLater };

// Prefetches `bytes`, at least kAtLeast. The first lines are unrolled, since a loop over a short row costs as much as its sum.
template <int kAtLeast = 1, Fetch kFetch = Fetch::kRead>
GOSSAMER_INLINE void prefetch_lines(const void* from, int64_t bytes) {
  constexpr int known = (kAtLeast + 63) / 64 * 64, write = kFetch == Fetch::kWriteLater, level = kFetch == Fetch::kRead ? 3 : 2;
  const char* at = static_cast<const char*>(from);
#pragma GCC unroll 16
  for (int line = 0; line < known; line += 64) __builtin_prefetch(at + line, write, level);
  for (int64_t line = known; line < bytes; line += 64) __builtin_prefetch(at + line, write, level);
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
