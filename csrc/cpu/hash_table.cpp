#include "cpu/hash_table.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <vector>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/sparse_update.h"

namespace gossamer {
namespace {

using namespace hash_table;

// Below this many keys per thread, starting it costs more than it saves.
constexpr int64_t kKeysPerThread = 4096;
// The new keys of a batch are cut into at most this many groups of whole partitions.
constexpr int64_t kMaxGroups = 256;
// Rows this many positions ahead are prefetched.
constexpr int64_t kAhead = 24;
// Keys that are searched for before what belongs to their slots is written, while it is in the caches.
constexpr int64_t kServedAtOnce = 512;

// While keys are searched for, rows of at most kFetchedRow bytes are fetched, as many as fit into a part of the second-level cache.
constexpr int64_t kFetchedRow = 1024, kFetchedBytes = 128 << 10;

// Into the second-level cache, where a core waits for several times as many lines as it can for the first level.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
inline void prefetch_bytes(const char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch(p + i);
}

// Keys or positions, uninitialised.
class Numbers {
 public:
  explicit Numbers(int64_t count) : memory_(allocate_scratch(count * sizeof(int64_t))) {}

  int64_t* data() const { return reinterpret_cast<int64_t*>(memory_.get()); }
  int64_t& operator[](int64_t i) const { return data()[i]; }

 private:
  Scratch memory_;
};

// Positions of a batch, in order.
struct Positions {
  Numbers at;
  int64_t size = 0;
};

// Positions sorted by group of partitions, in order within a group, with their keys.
class Groups {
 public:
  Groups(const HashInsertArgs& a, const Positions& missing, int threads) : keys_(missing.size), positions_(missing.size) {
    while (((a.table.num_partitions - 1) >> shift_) >= kMaxGroups) ++shift_;
    const int64_t groups = threads > 1 ? ((a.table.num_partitions - 1) >> shift_) + 1 : 1;
    const int64_t count = missing.size;
    const Numbers& positions = missing.at;
    begins_.assign(groups + 1, 0);
    begins_[groups] = count;
    leaving_.resize(groups);
    counts_.resize(groups);
    if (groups == 1) {
      for (int64_t i = 0; i < count; ++i) put(i, a, positions[i]);
      return;
    }
    std::vector<int64_t> places(static_cast<size_t>(threads) * groups, 0);
    parallel_team(threads, [&](Team team) {
      const auto [begin, end] = team.share(count);
      int64_t* place = places.data() + team.thread * groups;
      for (int64_t i = begin; i < end; ++i) ++place[group_of(a.table, a.keys[positions[i]])];
      team.barrier();
      if (team.thread == 0) {
        int64_t sum = 0;
        for (int64_t g = 0; g < groups; ++g) {
          begins_[g] = sum;
          for (int t = 0; t < team.size; ++t) {
            const int64_t mine = places[t * groups + g];
            places[t * groups + g] = sum;
            sum += mine;
          }
        }
      }
      team.barrier();
      for (int64_t i = begin; i < end; ++i) put(place[group_of(a.table, a.keys[positions[i]])]++, a, positions[i]);
    });
  }

  int64_t size() const { return static_cast<int64_t>(leaving_.size()); }

  void insert_missing(const HashInsertArgs& a, int64_t group) {
    std::array<Place, kBlock> places;
    HashInsertCounts counts;
    const bool pins = a.batch.policy != Evict::kNone && !stamps(a.batch.policy);
    for (int64_t from = begins_[group]; from < begins_[group + 1]; from += kBlock) {
      const int64_t size = std::min(kBlock, begins_[group + 1] - from);
      for (int64_t i = 0; i < size; ++i) {
        fetch(a.table, places[i] = place_of(a.table, keys_[from + i]), pins);
        prefetch(a.results.slots + positions_[from + i]);
        prefetch(a.results.status + positions_[from + i]);
      }
      for (int64_t i = 0; i < size; ++i) fetch_slots(a.table, places[i]);
      for (int64_t i = 0; i < size; ++i) {
        const int64_t position = positions_[from + i];
        if (hash_table::insert_missing(a.table, a.batch, a.results, position, keys_[from + i], places[i], true)) {
          note(a, position, counts);
        } else {
          leaving_[group].push_back(position);
        }
      }
    }
    counts_[group] = counts;
  }

  // The outcome of all positions; positions that left their partitions are processed here, in order.
  HashInsertCounts finish(const HashInsertArgs& a) {
    HashInsertCounts sum;
    for (const HashInsertCounts& some : counts_) {
      sum.inserted += some.inserted;
      sum.evicted += some.evicted;
      sum.refused += some.refused;
    }
    for (const int64_t position : leaving()) {
      const int64_t key = a.keys[position];
      hash_table::insert_missing(a.table, a.batch, a.results, position, key, place_of(a.table, key), false);
      note(a, position, sum);
    }
    return sum;
  }

 private:
  static void note(const HashInsertArgs& a, int64_t position, HashInsertCounts& counts) {
    const uint8_t status = a.results.status[position];
    counts.inserted += status >= kInserted;
    counts.evicted += status == kReplaced;
    counts.refused += status == kRefused;
    if (a.marks && status != kRefused) a.marks[a.results.slots[position]] = a.mark;
  }

  // The positions that could not be processed within their partition, in order.
  std::vector<int64_t> leaving() const {
    std::vector<int64_t> all;
    for (const auto& some : leaving_) all.insert(all.end(), some.begin(), some.end());
    std::sort(all.begin(), all.end());
    return all;
  }

  // Number of keys in flight: enough that their cache misses overlap.
  static constexpr int64_t kBlock = 32;

  static void fetch(const Table& t, const Place& place, bool pins) {
    const int64_t first = first_bucket(t, place), second = second_bucket(t, place);
    prefetch(t.digests + first * kSlots);
    prefetch(t.digests + second * kSlots);
    prefetch(&t.buckets[second]);
    if (pins) prefetch(&t.buckets[first]);
  }

  // Prefetches the data of a claim: in a full partition all scores and keys of both buckets, since any may be the victim;
  // otherwise the slot that it will take.
  static void fetch_slots(const Table& t, const Place& place) {
    const int64_t first = first_bucket(t, place), second = second_bucket(t, place);
    if (t.scores && t.fill[place.partition] >= t.quota[place.partition]) {
      for (const int64_t bucket : {first, second}) {
        prefetch_bytes(reinterpret_cast<const char*>(t.scores + bucket * kSlots), kSlots * 8);
        prefetch_bytes(reinterpret_cast<const char*>(t.keys + bucket * kSlots), kSlots * 8);
      }
      return;
    }
    if (const int64_t slot = empty_slot(t, first, second); slot >= 0) {
      prefetch(t.keys + slot);
      if (t.scores) prefetch(t.scores + slot);
    }
  }

  void put(int64_t at, const HashInsertArgs& a, int64_t position) {
    keys_[at] = a.keys[position];
    positions_[at] = position;
  }

  int64_t group_of(const Table& t, int64_t key) const {
    const uint64_t h = mix(static_cast<uint64_t>(key));
    return static_cast<int64_t>(((h >> 32) * static_cast<uint64_t>(t.num_partitions)) >> 32) >> shift_;
  }

  Numbers keys_, positions_;
  std::vector<int64_t> begins_;
  std::vector<std::vector<int64_t>> leaving_;
  std::vector<HashInsertCounts> counts_;
  int shift_ = 0;
};

// Calls f(i) for the positions whose slots belong to this thread, in order of positions; each slot has one thread. Stripes are
// whole buckets.
template <class F>
void each_owned(Team team, const int64_t* slots, int64_t count, int64_t stripe, F&& f) {
  for (int64_t i = 0; i < count; ++i) {
    if (slots[i] >= 0 && (team.size == 1 || slots[i] / stripe % team.size == team.thread)) f(i);
  }
}

// Other threads may write the same value there.
template <class T>
void set_shared(T* at, T value) {
  __atomic_store_n(at, value, __ATOMIC_RELAXED);
}

// Marks the rows of keys that were present.
void mark_present(const HashInsertArgs& a, int threads) {
  parallel_ranges(a.count, kKeysPerThread, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (a.results.status[i] == kHit) set_shared(&a.marks[a.results.slots[i]], a.mark);
    }
  });
}

// write(slots[i]) for the positions [from, stop), except -1, which is looked for only if there is any.
template <class F>
void each_found(const int64_t* slots, int64_t from, int64_t stop, bool any_absent, const F& write) {
  if (!any_absent) {
    for (int64_t i = from; i < stop; ++i) write(slots[i]);
    return;
  }
  for (int64_t i = from; i < stop; ++i) {
    if (slots[i] >= 0) write(slots[i]);
  }
}

// Processes the keys that are in the table, and marks their rows if `marks` is set; returns the positions of the others.
Positions serve_present(const HashInsertArgs& a, bool marks, int threads) {
  Positions missing{Numbers(a.count)};
  std::vector<Team::Range> found(threads);
  const Evict policy = a.batch.policy;
  const HashFindArgs find{a.table, a.keys, a.results.slots, stamps(policy), marks ? a.marks : nullptr};
  parallel_team(threads, [&](Team team) {
    const auto [begin, end] = team.share(a.count);
    const int64_t* const slots = a.results.slots;
    uint8_t* __restrict const status = a.results.status;
    int64_t *const scores = a.table.scores, stamp = a.batch.stamp, next = begin;
    for (int64_t from = begin; from < end; from += kServedAtOnce) {
      const int64_t stop = std::min(end, from + kServedAtOnce);
      kernels().tables.hash_find(find, from, stop);
      int64_t least = 0;
      for (int64_t i = from; i < stop; ++i) {
        least = std::min(least, slots[i]);
        status[i] = slots[i] >= 0 ? kHit : kRefused;
      }
      if (stamps(policy)) {
        each_found(slots, from, stop, least < 0, [&](int64_t slot) { set_shared(scores + slot, stamp); });
      }
      if (marks) {
        // Most often it is the same as in the last batch: a line that is only read need not be written back.
        each_found(slots, from, stop, least < 0, [&](int64_t slot) {
          if (__atomic_load_n(a.marks + slot, __ATOMIC_RELAXED) != a.mark) set_shared(a.marks + slot, a.mark);
        });
      }
      if (least >= 0) continue;
      for (int64_t i = from; i < stop; ++i) {
        if (slots[i] < 0) missing.at[next++] = i;
      }
    }
    found[team.thread] = {begin, next};
    if (policy == Evict::kNone || stamps(policy)) return;
    team.barrier();
    each_owned(team, a.results.slots, a.count, 4 * kSlots,
               [&](int64_t i) { touch(a.table, a.batch, a.results.slots[i], given_score(a.batch, i)); });
  });
  for (const auto [begin, end] : found) {
    std::memmove(missing.at.data() + missing.size, missing.at.data() + begin, (end - begin) * sizeof(int64_t));
    missing.size += end - begin;
  }
  return missing;
}

int64_t count_distinct(const HashInsertArgs& a, const Positions& positions) {
  std::vector<int64_t> keys(positions.size);
  for (int64_t i = 0; i < positions.size; ++i) keys[i] = a.keys[positions.at[i]];
  std::sort(keys.begin(), keys.end());
  return std::unique(keys.begin(), keys.end()) - keys.begin();
}

int threads_for(int64_t count, int num_threads) {
  return static_cast<int>(std::clamp<int64_t>(count / kKeysPerThread, 1, num_threads));
}

}  // namespace

void hash_table_find(const Table& table, IndexArray keys, int64_t count, int64_t* slots, int num_threads) {
  const HashFindArgs args{table, keys, slots, false, nullptr};
  parallel_ranges(count, kKeysPerThread, num_threads,
                  [&](int64_t begin, int64_t end) { kernels().tables.hash_find(args, begin, end); });
}

void hash_table_reduce(const Table& table, IndexArray keys, int64_t* slots, const GatherArgs& args, int num_threads) {
  const TableKernels& tables = kernels().tables;
  const int64_t row_bytes = args.dim * static_cast<int64_t>(element_size(args.table.dtype));
  over_bags(args.bags, args.dim, num_threads, [&](int64_t first, int64_t last) {
    if (first == last) return;
    const int64_t start = args.bags.begin(first), count = args.bags.end(last - 1) - start;
    HashFindArgs find{table, keys, slots, false, nullptr};
    GatherArgs block = args;
    // Slots of later bags are not yet known, and must not be read.
    block.bags.num_positions = start + count;
    if (row_bytes > kFetchedRow ||
        rows_are_near(count, args.num_rows * row_bytes, [&](int64_t i) { return keys[start + i]; })) {
      tables.hash_find(find, start, start + count);
      tables.gather_reduce(block, first, last);
      return;
    }
    // The search for the keys of a block of bags fetches their rows into the second-level cache, while it computes.
    const int64_t most = std::clamp<int64_t>(kFetchedBytes / std::max<int64_t>(row_bytes, 1), 64, kServedAtOnce);
    find.rows = static_cast<const char*>(args.table.base);
    find.row_bytes = row_bytes;
    block.fetched = true;
    while (first < last) {
      int64_t stop = first + 1;
      while (stop < last && args.bags.end(stop) - args.bags.begin(first) <= most) ++stop;
      block.bags.num_positions = args.bags.end(stop - 1);
      tables.hash_find(find, args.bags.begin(first), block.bags.num_positions);
      tables.gather_reduce(block, first, stop);
      first = stop;
    }
  });
}

HashInsertCounts hash_table_insert(const HashInsertArgs& a, int num_threads) {
  // A batch that may not fit marks nothing until it is known to fit.
  const bool may_fail = a.batch.policy == Evict::kNone && a.count > a.room;
  const int all_threads = threads_for(a.count, num_threads);
  const Positions missing = serve_present(a, a.marks && !may_fail, all_threads);
  const int64_t absent = missing.size;
  HashInsertCounts counts;
  if (a.batch.policy == Evict::kNone && absent > a.room) {
    const int64_t distinct = count_distinct(a, missing);
    if (distinct > a.room) {
      counts.too_many = distinct;
      return counts;
    }
  }
  if (a.marks && may_fail) mark_present(a, all_threads);
  if (absent == 0) return counts;
  const int threads = threads_for(absent, num_threads);
  Groups groups(a, missing, threads);
  std::atomic<int64_t> next{0};
  parallel_team(threads, [&](Team) {
    for (int64_t g; (g = next.fetch_add(1, std::memory_order_relaxed)) < groups.size();) groups.insert_missing(a, g);
  });
  counts = groups.finish(a);
  // Memory of victims is only touched if victims are requested.
  for (int64_t i = 0; counts.evicted > 0 && i < a.count; ++i) {
    if (a.results.status[i] != kReplaced) a.results.victim_keys[i] = a.results.victim_scores[i] = 0;
  }
  return counts;
}

void gather_rows(const char* table, int64_t row_bytes, const int64_t* slots, int64_t count, char* out, int num_threads) {
  parallel_ranges(count, kKeysPerThread, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i + kAhead < end && slots[i + kAhead] >= 0) {
        prefetch_bytes(table + slots[i + kAhead] * row_bytes, std::min<int64_t>(row_bytes, 512));
      }
      if (slots[i] >= 0) {
        std::memcpy(out + i * row_bytes, table + slots[i] * row_bytes, row_bytes);
      } else {
        std::memset(out + i * row_bytes, 0, row_bytes);
      }
    }
  });
}

void start_rows(char* table, int64_t row_bytes, const int64_t* slots, const uint8_t* status, int64_t count, const char* rows,
                int num_threads) {
  // A batch creates a row only once.
  parallel_ranges(count, kKeysPerThread, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i + kAhead < end && status[i + kAhead] >= kInserted) {
        prefetch_bytes(table + slots[i + kAhead] * row_bytes, std::min<int64_t>(row_bytes, 512));
      }
      if (status[i] < kInserted) continue;
      if (rows) {
        std::memcpy(table + slots[i] * row_bytes, rows + i * row_bytes, row_bytes);
      } else {
        std::memset(table + slots[i] * row_bytes, 0, row_bytes);
      }
    }
  });
}

namespace {

template <class T>
void mark(T* array, const int64_t* slots, int64_t count, T value, int num_threads) {
  parallel_ranges(count, kKeysPerThread, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i + kAhead < end && slots[i + kAhead] >= 0) __builtin_prefetch(array + slots[i + kAhead], 1, 2);
      if (slots[i] >= 0) set_shared(array + slots[i], value);
    }
  });
}

}  // namespace

void uniform_rows(void* table, DType dtype, int64_t dim, const int64_t* slots, IndexArray keys, int64_t count, uint64_t seed,
                  double bound, int num_threads) {
  const uint64_t common = mix64(mix64(seed));
  visit_float(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_ranges(count, kKeysPerThread, num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const uint64_t key = mix64(common + static_cast<uint64_t>(keys[i]) * kGolden);
        const auto low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
        T* row = static_cast<T*>(table) + slots[i] * dim;
        for (int64_t c = 0; c < dim; ++c) {
          uint32_t x = (low + static_cast<uint32_t>(c) * 0x9E3779B9u) ^ high;
          x = (x ^ (x >> 16)) * 0x21F0AAADu;
          x = (x ^ (x >> 15)) * 0x735A2D97u;
          x ^= x >> 15;
          from_scalar(static_cast<float>((((x >> 8) + 0.5) * 0x1p-23 - 1) * bound), row[c]);
        }
      }
    });
  });
}

void mark_slots(int64_t* array, const int64_t* slots, int64_t count, int64_t value, int num_threads) {
  mark(array, slots, count, value, num_threads);
}

void mark_slots(uint8_t* array, const int64_t* slots, int64_t count, uint8_t value, int num_threads) {
  mark(array, slots, count, value, num_threads);
}

void scatter_rows(char* table, int64_t row_bytes, const int64_t* slots, int64_t count, const char* rows, int num_threads) {
  const int64_t stripe = std::max<int64_t>(64, (256 + row_bytes - 1) / row_bytes);
  parallel_team(threads_for(count, num_threads), [&](Team team) {
    each_owned(team, slots, count, stripe, [&](int64_t i) {
      if (i + kAhead < count && slots[i + kAhead] >= 0) {
        prefetch_bytes(table + slots[i + kAhead] * row_bytes, std::min<int64_t>(row_bytes, 512));
      }
      std::memcpy(table + slots[i] * row_bytes, rows + i * row_bytes, row_bytes);
    });
  });
}

}  // namespace gossamer
