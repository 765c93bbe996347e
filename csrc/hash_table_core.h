// Probing of the hash table, shared by host and device: where a key may be, and which slot a new key takes.
//
// Slots form buckets of 16, and buckets form partitions of equal size. A key has two home buckets in one partition. When both
// are full, probing continues from the second one around its partition and, if nothing is evicted, over the whole table. A
// bucket records how far such chains reach, so that a search knows where to stop. Each slot has a one-byte digest, which
// distinguishes most keys and is zero for an empty slot; so every key is valid.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GOSSAMER_HD __host__ __device__ __forceinline__
#else
#define GOSSAMER_HD inline
#endif
#if defined(__SSE2__) && !defined(__CUDA_ARCH__)
#include <emmintrin.h>
#endif

namespace gossamer::hash_table {

constexpr int kSlots = 16;
constexpr uint32_t kAllSlots = 0xffff;
// While the first bucket has this much room, keys go there without looking at the second; most searches then end in it.
constexpr int kRoomy = 4;
constexpr int64_t kAbsent = -1;
// The search would leave the key's partition, which only one thread may do.
constexpr int64_t kLeaves = -2;

enum class Evict : int { kNone = 0, kLru = 1, kLfu = 2, kEpochLru = 3, kEpochLfu = 4, kScore = 5 };

// The outcome of one position of a batch.
enum Status : uint8_t { kRefused = 0, kHit = 1, kInserted = 2, kReplaced = 3 };

struct Bucket {
  uint32_t reach;   // longest chain of a key whose second bucket this is
  uint32_t serial;  // batch that `pinned` belongs to
  uint32_t pinned;  // slots that this batch has touched and must not evict, if scores do not record it
};

struct Table {
  uint8_t* digests;      // (slots,)
  int64_t* keys;         // (slots,)
  int64_t* scores;       // (slots,), null where nothing is evicted
  Bucket* buckets;       // (slots / 16,)
  int32_t* fill;         // (partitions,) live slots
  const int32_t* quota;  // (partitions,) number of live slots from which a new key evicts
  int64_t num_partitions, partition_buckets;

  GOSSAMER_HD int64_t num_buckets() const { return num_partitions * partition_buckets; }
};

// How a batch sets scores and evicts. `scores` is per position: increments for the frequency policies, scores for kScore.
struct Batch {
  Evict policy;
  int64_t stamp;
  uint32_t serial;
  const int64_t* scores;
};

struct Place {
  int64_t partition;
  uint32_t local1, local2;  // buckets within the partition
  uint8_t digest;
};

// The finalizer of MurmurHash3: a bijection in which every bit depends on every other.
GOSSAMER_HD uint64_t mix(uint64_t h) {
  h = (h ^ (h >> 33)) * 0xff51afd7ed558ccdull;
  h = (h ^ (h >> 33)) * 0xc4ceb9fe1a85ec53ull;
  return h ^ (h >> 33);
}

GOSSAMER_HD Place place_of(const Table& t, int64_t key) {
  const uint64_t h = mix(static_cast<uint64_t>(key));
  const uint64_t spread = (h >> 32) * static_cast<uint64_t>(t.num_partitions);
  const auto size = static_cast<uint64_t>(t.partition_buckets);
  const uint64_t low = h & 0xffffffffu;
  Place place;
  place.partition = static_cast<int64_t>(spread >> 32);
  place.local1 = static_cast<uint32_t>(((spread & 0xffffffffu) * size) >> 32);
  place.local2 = static_cast<uint32_t>((low * (size - 1)) >> 32);
  place.local2 += size > 1 && place.local2 >= place.local1;
  place.digest = static_cast<uint8_t>(1 + ((low & 0xffff) * 255 >> 16));
  return place;
}

GOSSAMER_HD int64_t first_bucket(const Table& t, const Place& p) { return p.partition * t.partition_buckets + p.local1; }
GOSSAMER_HD int64_t second_bucket(const Table& t, const Place& p) { return p.partition * t.partition_buckets + p.local2; }

// The j-th bucket after the second one.
GOSSAMER_HD int64_t chain_bucket(const Table& t, const Place& p, int64_t j) {
  const int64_t begin = p.partition * t.partition_buckets, size = t.partition_buckets;
  if (j < size) return begin + (p.local2 + j < size ? p.local2 + j : p.local2 + j - size);
  const int64_t bucket = begin + j, all = t.num_buckets();
  return bucket < all ? bucket : bucket - all;
}

// Bit i is set where digest i of a bucket equals `digest`.
GOSSAMER_HD uint32_t match(const uint8_t* digests, uint8_t digest) {
#if defined(__CUDA_ARCH__)
  const uint4 four = *reinterpret_cast<const uint4*>(digests);
  const uint32_t wanted = digest * 0x01010101u;
  const uint32_t words[4] = {four.x, four.y, four.z, four.w};
  uint32_t mask = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Equal bytes become 0xff; the product gathers the lowest bit of each byte in the top four bits.
    mask |= (((__vcmpeq4(words[i], wanted) & 0x01010101u) * 0x10204080u) >> 28) << (4 * i);
  }
  return mask;
#elif defined(__SSE2__)
  const __m128i all = _mm_load_si128(reinterpret_cast<const __m128i*>(digests));
  // Broadcast in a general register: compilers would send the byte through memory and stall.
  const __m128i wanted = _mm_set1_epi32(static_cast<int>(digest * 0x01010101u));
  return static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(all, wanted)));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kSlots; ++i) mask |= static_cast<uint32_t>(digests[i] == digest) << i;
  return mask;
#endif
}

GOSSAMER_HD int lowest_bit(uint32_t mask) {
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int>(mask)) - 1;
#else
  return __builtin_ctz(mask);
#endif
}

GOSSAMER_HD int count_bits(uint32_t mask) {
#if defined(__CUDA_ARCH__)
  return __popc(mask);
#else
  // The builtin becomes a library call if the baseline architecture lacks the instruction.
  mask -= mask >> 1 & 0x55555555u;
  mask = (mask & 0x33333333u) + (mask >> 2 & 0x33333333u);
  return static_cast<int>(((mask + (mask >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24);
#endif
}

GOSSAMER_HD int64_t find_in(const Table& t, int64_t bucket, int64_t key, uint8_t digest) {
  for (uint32_t mask = match(t.digests + bucket * kSlots, digest); mask; mask &= mask - 1) {
    const int64_t slot = bucket * kSlots + lowest_bit(mask);
    if (t.keys[slot] == key) return slot;
  }
  return kAbsent;
}

// Returns the key's slot or kAbsent; with `stay`, kLeaves if the search would leave the partition.
GOSSAMER_HD int64_t find(const Table& t, int64_t key, const Place& place, bool stay = false) {
  const int64_t first = first_bucket(t, place), second = second_bucket(t, place);
  int64_t slot = find_in(t, first, key, place.digest);
  if (slot >= 0) return slot;
  if (second != first && (slot = find_in(t, second, key, place.digest)) >= 0) return slot;
  const int64_t reach = t.buckets[second].reach;
  const int64_t last = stay && reach >= t.partition_buckets ? t.partition_buckets - 1 : reach;
  for (int64_t j = 1; j <= last; ++j) {
    slot = find_in(t, chain_bucket(t, place, j), key, place.digest);
    if (slot >= 0) return slot;
  }
  return last < reach ? kLeaves : kAbsent;
}

// Whether the score alone shows that the batch touched a slot, since no other batch sets the same score.
GOSSAMER_HD bool stamps(Evict policy) { return policy == Evict::kLru || policy == Evict::kEpochLru; }

// Prevents the batch from evicting a slot that it touched, if the score does not show it.
GOSSAMER_HD void pin(const Table& t, const Batch& batch, int64_t slot) {
  if (stamps(batch.policy)) return;
  Bucket& bucket = t.buckets[slot / kSlots];
  if (bucket.serial != batch.serial) {
    bucket.serial = batch.serial;
    bucket.pinned = 0;
  }
  bucket.pinned |= 1u << (slot % kSlots);
}

GOSSAMER_HD int64_t add_saturating(int64_t a, int64_t b, int64_t most) { return b > most - a ? most : a + b; }

// The score of a position of the batch, or its increment.
GOSSAMER_HD int64_t given_score(const Batch& batch, int64_t position) { return batch.scores ? batch.scores[position] : 1; }

// The score of a new key, or of one that had `old`.
GOSSAMER_HD int64_t next_score(const Batch& batch, int64_t given, bool is_new, int64_t old) {
  constexpr int64_t kMost = INT64_MAX, kLow = 0xffffffff;
  switch (batch.policy) {
    case Evict::kLfu:
      return is_new ? given : add_saturating(old, given, kMost);
    case Evict::kEpochLfu:
      return batch.stamp | add_saturating(is_new ? 0 : old & kLow, given < kLow ? given : kLow, kLow);
    case Evict::kScore:
      return given;
    default:
      return batch.stamp;
  }
}

GOSSAMER_HD void touch(const Table& t, const Batch& batch, int64_t slot, int64_t given) {
  if (batch.policy == Evict::kNone) return;
  pin(t, batch, slot);
  t.scores[slot] = next_score(batch, given, false, t.scores[slot]);
}

// Finds the lowest score among a bucket's live slots that the batch has not touched; the first of equals wins.
GOSSAMER_HD void find_victim(const Table& t, const Batch& batch, int64_t bucket, int64_t* slot, int64_t* score) {
  const Bucket& b = t.buckets[bucket];
  uint32_t mask = kAllSlots & ~match(t.digests + bucket * kSlots, 0);
  const bool by_stamp = stamps(batch.policy);
  if (!by_stamp && b.serial == batch.serial) mask &= ~b.pinned;
  const int64_t* scores = t.scores + bucket * kSlots;
  bool any = *slot >= 0;
  // Selections instead of branches: which score is lowest is hard to predict.
  for (int i = 0; i < kSlots; ++i) {
    const int64_t candidate = scores[i];
    const bool free = (mask >> i & 1u) & !(by_stamp & (candidate == batch.stamp));
    const bool better = free & (!any | (candidate < *score));
    *score = better ? candidate : *score;
    *slot = better ? bucket * kSlots + i : *slot;
    any |= better;
  }
}

// The inserting thread or, on a GPU, warp, whose lanes share the search for a victim and otherwise all read the same data; see
// cuda/hash_table.cu.
struct OneThread {
  GOSSAMER_HD bool leads() const { return true; }
  // Separates the reads of all lanes from the writes of the leader.
  GOSSAMER_HD void settle() const {}
  // The victim among the slots of two buckets, which may be one.
  GOSSAMER_HD void find_victim(const Table& t, const Batch& batch, int64_t first, int64_t second, int64_t* slot,
                               int64_t* score) const {
    hash_table::find_victim(t, batch, first, slot, score);
    if (second != first) hash_table::find_victim(t, batch, second, slot, score);
  }
};

// An empty slot in a key's own buckets, or kAbsent.
GOSSAMER_HD int64_t empty_slot(const Table& t, int64_t first, int64_t second) {
  const uint32_t free1 = match(t.digests + first * kSlots, 0), free2 = match(t.digests + second * kSlots, 0);
  const int room1 = count_bits(free1), room2 = count_bits(free2);
  if (room1 >= kRoomy || (room1 > 0 && room1 >= room2)) return first * kSlots + lowest_bit(free1);
  return room2 > 0 ? second * kSlots + lowest_bit(free2) : kAbsent;
}

struct Claim {
  int64_t slot;  // kAbsent: refused; kLeaves: no room in the partition
  bool evicts;
  int64_t reach;  // how far along its chain that is
};

// Returns the slot that a new key takes; with `stay`, within its partition.
template <class Lanes>
GOSSAMER_HD Claim claim(const Table& t, const Batch& batch, const Place& place, int64_t score, bool stay, const Lanes& lanes) {
  const int64_t first = first_bucket(t, place), second = second_bucket(t, place);
  const bool evicts = batch.policy != Evict::kNone;
  const bool full = evicts && t.fill[place.partition] >= t.quota[place.partition];
  if (!full) {
    const int64_t slot = empty_slot(t, first, second);
    if (slot >= 0) return {slot, false, 0};
  } else {
    int64_t victim = kAbsent, lowest = 0;
    lanes.find_victim(t, batch, first, second, &victim, &lowest);
    if (victim >= 0) {
      if (batch.policy == Evict::kScore && score < lowest) return {kAbsent, false, 0};
      return {victim, true, 0};
    }
  }
  const int64_t end = evicts || stay ? t.partition_buckets : t.num_buckets();
  for (int64_t j = 1; j < end; ++j) {
    const int64_t bucket = chain_bucket(t, place, j);
    int64_t slot = kAbsent, lowest = 0;
    if (full) {
      lanes.find_victim(t, batch, bucket, bucket, &slot, &lowest);
      if (slot >= 0 && batch.policy == Evict::kScore && score < lowest) slot = kAbsent;
    } else if (const uint32_t free = match(t.digests + bucket * kSlots, 0)) {
      slot = bucket * kSlots + lowest_bit(free);
    }
    if (slot >= 0) return {slot, full, j};
  }
  return {stay && !evicts ? kLeaves : kAbsent, false, 0};
}

// The report of a batch, per position.
struct Results {
  int64_t* slots;
  uint8_t* status;
  int64_t* victim_keys;  // null where nothing is evicted
  int64_t* victim_scores;
};

// Serves a key that was absent when the batch began: inserts it unless an earlier position has. Returns false if that would leave
// the partition.
template <class Lanes = OneThread>
GOSSAMER_HD bool insert_missing(const Table& t, const Batch& batch, const Results& out, int64_t position, int64_t key,
                                const Place& place, bool stay, const Lanes& lanes = {}) {
  int64_t slot = find(t, key, place, stay);
  if (slot == kLeaves) return false;
  if (slot >= 0) {
    lanes.settle();
    if (lanes.leads()) {
      touch(t, batch, slot, given_score(batch, position));
      out.slots[position] = slot;
      out.status[position] = kHit;
    }
    return true;
  }
  const int64_t score = next_score(batch, given_score(batch, position), true, 0);
  const Claim claimed = claim(t, batch, place, score, stay, lanes);
  if (claimed.slot == kLeaves) return false;
  slot = claimed.slot;
  lanes.settle();
  if (!lanes.leads()) return true;
  out.slots[position] = slot;
  out.status[position] = slot < 0 ? kRefused : claimed.evicts ? kReplaced : kInserted;
  if (slot < 0) return true;
  Bucket& second = t.buckets[second_bucket(t, place)];
  if (second.reach < claimed.reach) second.reach = static_cast<uint32_t>(claimed.reach);
  if (claimed.evicts) {
    out.victim_keys[position] = t.keys[slot];
    out.victim_scores[position] = t.scores[slot];
  } else {
    t.fill[slot / kSlots / t.partition_buckets] += 1;
  }
  t.digests[slot] = place.digest;
  t.keys[slot] = key;
  if (batch.policy != Evict::kNone) {
    t.scores[slot] = score;
    pin(t, batch, slot);
  }
  return true;
}

}  // namespace gossamer::hash_table
