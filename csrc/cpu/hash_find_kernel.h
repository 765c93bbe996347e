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

  struct Block {
    int64_t key[kBlock];
    // The first slots of both buckets, and the digest in each byte of a word.
    int64_t first[kBlock], second[kBlock], digest[kBlock];
    int64_t slot[kBlock];
  };

  static void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

  void hash(Block& b, int64_t from, int64_t size) const {
    for (int64_t i = 0; i < size; ++i) b.key[i] = a_.keys[from + i];
    for (int64_t i = size; i < kBlock; ++i) b.key[i] = b.key[0];
    const hash_table::Table t = t_;
    for (int64_t i = 0; i < kBlock; ++i) {
      const hash_table::Place place = hash_table::place_of(t, b.key[i]);
      b.first[i] = hash_table::first_bucket(t, place) * hash_table::kSlots;
      b.second[i] = hash_table::second_bucket(t, place) * hash_table::kSlots;
      b.digest[i] = place.digest;
    }
    for (int64_t i = 0; i < kBlock; ++i) {
      fetch(t.digests + b.first[i]);
      fetch(t.digests + b.second[i]);
    }
  }

  void look(Block& b) const {
    for (int64_t i = 0; i < kBlock; ++i) {
      const auto digest = static_cast<uint8_t>(b.digest[i]);
      const uint32_t here = hash_table::match(t_.digests + b.first[i], digest),
                     there = hash_table::match(t_.digests + b.second[i], digest);
      const int64_t bucket = here ? b.first[i] : b.second[i];
      const uint32_t mask = here ? here : there;
      if (__builtin_expect(mask == 0, 0)) {
        b.slot[i] = hash_table::kAbsent;
        fetch(&t_.buckets[b.second[i] / hash_table::kSlots]);
        continue;
      }
      const int64_t slot = bucket + hash_table::lowest_bit(mask);
      b.slot[i] = slot;
      fetch(t_.keys + slot);
      if (t_.scores && a_.scores) fetch(t_.scores + slot);
      if (a_.beside) fetch(a_.beside + slot);
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
