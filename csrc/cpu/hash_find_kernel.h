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
    for (int64_t block = 0; block < blocks + 2 * kLag; ++block) {
      const int64_t matched = block - kLag, served = matched - kLag;
      if (block < blocks) hash(ring_[block % kRing], begin + block * kBlock, size(block));
      if (matched >= 0 && matched < blocks) look(ring_[matched % kRing]);
      if (served >= 0) serve(ring_[served % kRing], begin + served * kBlock, size(served));
    }
  }

 private:
  static constexpr int64_t kBlock = 16, kLag = 2, kRing = 8;

  typedef uint64_t Words __attribute__((vector_size(GOSSAMER_VECTOR_BYTES)));
  static constexpr int64_t kWords = GOSSAMER_VECTOR_BYTES / sizeof(uint64_t);

  struct Block {
    int64_t key[kBlock];
    // The first slots of both buckets, and the digest in each byte of a word.
    int64_t first[kBlock], second[kBlock], digest[kBlock];
    int64_t slot[kBlock];
  };

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
    for (int64_t i = 0; i < kBlock; ++i) {
      fetch(t.digests + b.first[i]);
      fetch(t.digests + b.second[i]);
    }
  }

  // place_of() of kWords keys. By hand, since compilers choose shorter vectors.
  static void place(const hash_table::Table& t, Block& b, int64_t at) {
    const auto size = static_cast<uint64_t>(t.partition_buckets), partitions = static_cast<uint64_t>(t.num_partitions);
    const auto several = static_cast<uint64_t>(size > 1);
    Words h = load_bytes<Words>(b.key + at);
    h = (h ^ (h >> 33)) * 0xff51afd7ed558ccdull;
    h = (h ^ (h >> 33)) * 0xc4ceb9fe1a85ec53ull;
    h ^= h >> 33;
    const Words spread = (h >> 32) * partitions, low = h & 0xffffffffull, first = (spread & 0xffffffffull) * size >> 32;
    Words second = low * (size - 1) >> 32;
    // One more unless second < first, where the difference borrows.
    second += ((second - first) >> 63 ^ 1ull) & several;
    const Words base = (spread >> 32) * size;
    const auto put = [at](int64_t* to, Words values) { std::memcpy(to + at, &values, sizeof values); };
    put(b.first, (base + first) * hash_table::kSlots);
    put(b.second, (base + second) * hash_table::kSlots);
    put(b.digest, 1 + ((low & 0xffffull) * 255ull >> 16));
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
    const char* const rows = a_.rows;
    const int64_t row_bytes = a_.row_bytes;
    for (int64_t i = 0; i < kBlock; ++i) {
      const uint32_t mask = match(b, i);
      if (__builtin_expect(mask == 0, 0)) {
        b.slot[i] = hash_table::kAbsent;
        fetch(&t_.buckets[b.second[i] / hash_table::kSlots]);
        continue;
      }
      const int bit = hash_table::lowest_bit(mask);
      const int64_t slot = bit + (bit < hash_table::kSlots ? b.first[i] : b.second[i] - hash_table::kSlots);
      b.slot[i] = slot;
      fetch(t_.keys + slot);
      if (t_.scores && a_.scores) fetch(t_.scores + slot);
      if (a_.beside) fetch(a_.beside + slot);
      if (rows) prefetch_lines<1, Fetch::kReadLater>(rows + slot * row_bytes, row_bytes);
    }
  }

  void serve(const Block& b, int64_t from, int64_t size) const {
    for (int64_t i = 0; i < size; ++i) {
      const int64_t slot = b.slot[i];
      const bool found = slot >= 0 && t_.keys[slot] == b.key[i];
      a_.slots[from + i] = __builtin_expect(found, 1) ? slot : search(b.key[i]);
    }
  }

  // A key whose digest another one has too, which is farther along its chain, or which is not there.
  __attribute__((noinline)) int64_t search(int64_t key) const {
    return hash_table::find(t_, key, hash_table::place_of(t_, key));
  }

  const HashFindArgs& a_;
  const hash_table::Table& t_;
  Block ring_[kRing];
};

void hash_find(const HashFindArgs& args, int64_t begin, int64_t end) { HashSearch(args).run(begin, end); }

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
