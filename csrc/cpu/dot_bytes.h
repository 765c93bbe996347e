// Sums of products of bytes, and whole numbers nearest to floats, of one instruction set.
#pragma once

#include "cpu/vec.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

typedef int32_t SignedInts __attribute__((vector_size(GOSSAMER_VECTOR_BYTES)));

// Sums over the four bytes of each lane, those of a without sign.
GOSSAMER_INLINE SignedInts dot_bytes(UInts a, UInts b, SignedInts sum) {
#if GOSSAMER_VNNI
  return (SignedInts)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
  const __m512i even = _mm512_madd_epi16((__m512i)(a & 0x00ff00ffu), _mm512_srai_epi16(_mm512_slli_epi16((__m512i)b, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16((__m512i)a, 8), _mm512_srai_epi16((__m512i)b, 8));
  return sum + (SignedInts)_mm512_add_epi32(even, odd);
#elif GOSSAMER_F16C
  const __m256i even = _mm256_madd_epi16((__m256i)(a & 0x00ff00ffu), _mm256_srai_epi16(_mm256_slli_epi16((__m256i)b, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16((__m256i)a, 8), _mm256_srai_epi16((__m256i)b, 8));
  return sum + (SignedInts)_mm256_add_epi32(even, odd);
#else
  for (int shift = 0; shift < 32; shift += 8) {
    sum += (SignedInts)(a >> shift & 255u) * ((SignedInts)(b << (24 - shift)) >> 24);
  }
  return sum;
#endif
}

// Whole numbers nearest to v, of magnitudes up to 2^22, halves to even.
GOSSAMER_INLINE SignedInts nearest_codes(Vec<float> v) {
  const Vec<float> largest = splat(127.0f);
  v = v > largest ? largest : v;
  v = v < -largest ? -largest : v;
  return (SignedInts)(v + 0x1.8p23f) - 0x4b400000;
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
