// The dropout mask of the low-rank operators; see python/gossamer/ops/_philox.py.
#pragma once

#include "cpu/low_rank.h"
#include "cpu/vec.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

typedef uint64_t Words __attribute__((vector_size(GOSSAMER_VECTOR_BYTES)));
constexpr int kWordLanes = GOSSAMER_VECTOR_BYTES / sizeof(uint64_t);

// Multiplies the low halves of 64-bit lanes.
GOSSAMER_INLINE Words multiply_low_halves(Words a, Words b) {
#if GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
  return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif GOSSAMER_F16C
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Turns each counter into its four random words, in the low halves of the lanes.
GOSSAMER_INLINE void philox(Words (&c)[4], uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Words p0 = multiply_low_halves(c[0], Words{} + 0xd2511f53u);
    const Words p1 = multiply_low_halves(c[2], Words{} + 0xcd9e8d57u);
    c[0] = (p1 >> 32) ^ c[1] ^ k0;
    c[2] = (p0 >> 32) ^ c[3] ^ k1;
    c[1] = p1;
    c[3] = p0;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
}

// Whether each column first .. first + count of a row is kept; `first` is a multiple of 4, and out has room for 32 extra.
GOSSAMER_INLINE void keep_columns(const Dropout& dropout, int64_t row, int64_t first, int64_t count, bool* out) {
  Words lane;
  for (int i = 0; i < kWordLanes; ++i) lane[i] = i;
  const Words low = Words{} + static_cast<uint64_t>(row & 0xffffffff), high = Words{} + static_cast<uint64_t>(row >> 32);
  for (int64_t at = 0; at < count; at += 4 * kWordLanes) {
    Words c[4] = {lane + static_cast<uint64_t>((first + at) / 4), Words{}, low, high};
    philox(c, dropout.seed);
    for (int word = 0; word < 4; ++word) {
      const Words words = c[word] & 0xffffffffu;
      for (int i = 0; i < kWordLanes; ++i) out[at + 4 * i + word] = words[i] >= dropout.threshold;
    }
  }
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
