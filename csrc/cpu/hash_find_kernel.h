// The search of keys in a hash table, for one instruction set.
//
// Keys go in blocks through three steps: hashes, in a loop that the compiler turns into vectors; digests of both home buckets, which
// give a key's likely slot without a branch; and the key at that slot. Each step fetches what the next one reads, which arrives while
// other blocks take theirs.
#pragma once

#include "cpu/hash_table.h"
#include "cpu/vec.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

class HashSearch {
 public:
  explicit HashSearch(const HashFindArgs& args) : a_(args), t_(args.table) {}

  void run(int64_t begin, int64_t end) {
    const int64_t blocks = (end - begin + kBlock - 1) / kBlock;
    const auto size = [&](int64_t block) { return std::min(kBlock, end - begin - block * kBlock); };
    for (int64_t block = 0; block < blocks + 2; ++block) {
      const int64_t matched = block - 1, served = block - 2;
      if (block < blocks) hash(ring_[block % kRing], begin + block * kBlock, size(block));
      if (matched >= 0 && matched < blocks) look(ring_[matched % kRing]);
      if (served >= 0) serve(ring_[served % kRing], begin + served * kBlock, size(served));
    }
  }

 private:
  // One bit of a word for each key of a block.
  static constexpr int64_t kBlock = 64, kRing = 4;

  typedef uint64_t Words __attribute__((vector_size(GOSSAMER_VECTOR_BYTES)));
  typedef int64_t Slots __attribute__((vector_size(GOSSAMER_VECTOR_BYTES)));
  static constexpr int64_t kWords = GOSSAMER_VECTOR_BYTES / sizeof(uint64_t);
  typedef int32_t Masks __attribute__((vector_size(GOSSAMER_VECTOR_BYTES / 2)));
  typedef float Floats __attribute__((vector_size(GOSSAMER_VECTOR_BYTES / 2)));

  struct Block {
    int64_t key[kBlock];
    // The first slots of both buckets, and the digest.
    int64_t first[kBlock], second[kBlock], digest[kBlock];
    int64_t slot[kBlock];
    uint32_t mask[kBlock];  // of match()
  };

  // Vectors wrote what scalar instructions read next. Compilers would rather move each element out of its vector register.
  static void written(const Block& b) { __asm__ volatile("" : : "r"(&b) : "memory"); }

  static void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

  void hash(Block& b, int64_t from, int64_t size) const {
    if (size == kBlock && a_.keys.wide && a_.keys.stride == 1) {
      // Of a constant size: for a loop GCC emits a string instruction, which waits for all prefetches before it.
      std::memcpy(b.key, static_cast<const int64_t*>(a_.keys.base) + from, sizeof b.key);
    } else {
      for (int64_t i = 0; i < kBlock; ++i) b.key[i] = a_.keys[from + std::min(i, size - 1)];
    }
    const hash_table::Table t = t_;
    for (int64_t i = 0; i < kBlock; i += kWords) place(t, b, i);
    written(b);
    for (int64_t i = 0; i < kBlock; ++i) {
      fetch(t.digests + b.first[i]);
      fetch(t.digests + b.second[i]);
    }
  }

  // Products of the lower half of each word.
  static inline __attribute__((always_inline)) Words lower_product(Words a, Words b) {
#if GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
    return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif GOSSAMER_F16C
    return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xffffffffull) * (b & 0xffffffffull);
#endif
  }

  // place_of() of kWords keys. By hand, since compilers choose shorter vectors.
  static void place(const hash_table::Table& t, Block& b, int64_t at) {
    const Words size = Words{} + static_cast<uint64_t>(t.partition_buckets);
    const Words partitions = Words{} + static_cast<uint64_t>(t.num_partitions);
    const auto several = static_cast<uint64_t>(t.partition_buckets > 1);
    Words h = load_bytes<Words>(b.key + at);
    h = (h ^ (h >> 33)) * 0xff51afd7ed558ccdull;
    h = (h ^ (h >> 33)) * 0xc4ceb9fe1a85ec53ull;
    h ^= h >> 33;
    const Words spread = lower_product(h >> 32, partitions), first = lower_product(spread, size) >> 32;
    Words second = lower_product(h, size - 1) >> 32;
    // One more unless second < first, where the difference borrows.
    second += ((second - first) >> 63 ^ 1ull) & several;
    const Words base = lower_product(spread >> 32, size), low = h & 0xffffull;
    const auto put = [at](int64_t* to, Words values) { std::memcpy(to + at, &values, sizeof values); };
    put(b.first, (base + first) * hash_table::kSlots);
    put(b.second, (base + second) * hash_table::kSlots);
    put(b.digest, 1 + (((low << 8) - low) >> 16));
  }

  // Bit i is set where digest i of the first bucket, or digest i - kSlots of the second, is that of key `at`.
  uint32_t match(const Block& b, int64_t at) const {
    const uint8_t *first = t_.digests + b.first[at], *second = t_.digests + b.second[at];
    const auto digest = static_cast<uint8_t>(b.digest[at]);
#if GOSSAMER_F16C
    const __m256i both =
        _mm256_inserti128_si256(_mm256_castsi128_si256(load_bytes<__m128i>(first)), load_bytes<__m128i>(second), 1);
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(both, _mm256_set1_epi8(static_cast<char>(digest)))));
#else
    return hash_table::match(first, digest) | hash_table::match(second, digest) << hash_table::kSlots;
#endif
  }

  void look(Block& b) const {
    for (int64_t i = 0; i < kBlock; ++i) b.mask[i] = match(b, i);
    written(b);
    bool absent = false;
    for (int64_t i = 0; i < kBlock; i += kWords) absent |= take_lowest(b, i);
    written(b);
    if (__builtin_expect(absent, 0)) {
      for (int64_t i = 0; i < kBlock; ++i) fetch(&t_.buckets[b.second[i] / hash_table::kSlots]);
    }
    // Addresses for absent keys are before the arrays, but are not read.
    const auto fetch_all = [&](const int64_t* array) {
      for (int64_t i = 0; i < kBlock; ++i) fetch(array + b.slot[i]);
    };
    fetch_all(t_.keys);
    if (t_.scores && a_.scores) fetch_all(t_.scores);
    if (a_.beside) fetch_all(a_.beside);
    if (const char* const rows = a_.rows) {
      const int64_t row_bytes = a_.row_bytes;
      for (int64_t i = 0; i < kBlock; ++i) prefetch_lines<1, Fetch::kReadLater>(rows + b.slot[i] * row_bytes, row_bytes);
    }
  }

  // The slots of the lowest bits of kWords masks, kAbsent without one. Returns whether any is.
  static bool take_lowest(Block& b, int64_t at) {
#if GOSSAMER_F16C
    const Masks mask = load_bytes<Masks>(b.mask + at), lowest = mask & -mask;
    // The exponent of a power of two as a float; that of zero is below any.
    const Masks exponent = ((Masks) __builtin_convertvector(lowest, Floats) >> 23 & 0xff) - 127;
    const Slots bit = __builtin_convertvector(exponent, Slots);
    const Slots first = load_bytes<Slots>(b.first + at), second = load_bytes<Slots>(b.second + at) - hash_table::kSlots;
    const Slots absent = bit < 0, slot = (bit + (bit < hash_table::kSlots ? first : second)) | absent;
    std::memcpy(b.slot + at, &slot, sizeof slot);
#if GOSSAMER_VECTOR_BYTES == 64
    return _mm512_movepi64_mask((__m512i)absent) != 0;
#else
    return _mm256_movemask_epi8((__m256i)absent) != 0;
#endif
#else
    bool absent = false;
    for (int64_t i = at; i < at + kWords; ++i) {
      const int bit = hash_table::lowest_bit(b.mask[i] | uint32_t{1} << 31);
      b.slot[i] = b.mask[i] == 0 ? hash_table::kAbsent
                                 : bit + (bit < hash_table::kSlots ? b.first[i] : b.second[i] - hash_table::kSlots);
      absent |= b.mask[i] == 0;
    }
    return absent;
#endif
  }

  // Bit i is set where slot i has key i.
  uint64_t found(const Block& b) const {
    const int64_t* const keys = t_.keys;
    uint64_t bits = 0;
#if GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
    for (int64_t i = 0; i < kBlock; i += kWords) {
      const __m512i slot = load_bytes<__m512i>(b.slot + i);
      const __mmask8 there = _mm512_cmpge_epi64_mask(slot, _mm512_setzero_si512());
      const __m512i key = _mm512_mask_i64gather_epi64(slot, there, slot, keys, sizeof *keys);
      bits |= uint64_t{_mm512_mask_cmpeq_epi64_mask(there, key, load_bytes<__m512i>(b.key + i))} << i;
    }
#else
    for (int64_t i = 0; i < kBlock; ++i) {
      const int64_t slot = b.slot[i];
      bits |= static_cast<uint64_t>(slot >= 0 && keys[slot] == b.key[i]) << i;
    }
#endif
    return bits;
  }

  void serve(const Block& b, int64_t from, int64_t size) const {
    uint64_t left = ~found(b);
    if (size == kBlock) {
      std::memcpy(a_.slots + from, b.slot, sizeof b.slot);
    } else {
      std::copy_n(b.slot, size, a_.slots + from);
      left &= (uint64_t{1} << size) - 1;
    }
    for (; left; left &= left - 1) {
      const int i = __builtin_ctzll(left);
      a_.slots[from + i] = search(b, i);
    }
  }

  // The slot of a key whose digest another one has too, which is farther along its chain, or which is not there.
  __attribute__((noinline)) int64_t search(const Block& b, int64_t at) const {
    const int64_t key = b.key[at];
    for (uint32_t mask = b.mask[at] & (b.mask[at] - 1); mask; mask &= mask - 1) {
      const int bit = hash_table::lowest_bit(mask);
      const int64_t slot = bit + (bit < hash_table::kSlots ? b.first[at] : b.second[at] - hash_table::kSlots);
      if (t_.keys[slot] == key) return slot;
    }
    return hash_table::find(t_, key, hash_table::place_of(t_, key));
  }

  const HashFindArgs& a_;
  const hash_table::Table& t_;
  Block ring_[kRing];
};

void hash_find(const HashFindArgs& args, int64_t begin, int64_t end) { HashSearch(args).run(begin, end); }

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
