#include "cpu/hash_table.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"

namespace gossamer {
namespace {

using namespace hash_table;

// Keys in flight at a time: enough for the misses of one to hide those of the others.
constexpr int kBlock = 32;
// Below this many keys a thread, starting it costs more than it saves.
constexpr int64_t kKeysPerThread = 4096;
// The batch is cut into at most this many groups of whole partitions.
constexpr int64_t kMaxGroups = 256;

inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void prefetch_bytes(const char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch(p + i);
}

// The places of a block of keys, and what a search will read of them on its way.
struct Block {
  std::array<int64_t, kBlock> keys, positions;
  std::array<Place, kBlock> places;
  int size = 0;

  void add(int64_t key, int64_t position) {
    keys[size] = key;
    positions[size++] = position;
  }

  void fetch(const Table& t) {
    for (int i = 0; i < size; ++i) {
      const Place place = places[i] = place_of(t, keys[i]);
      const int64_t first = first_bucket(t, place), second = second_bucket(t, place);
      prefetch(t.digests + first * kSlots);
      prefetch(t.digests + second * kSlots);
      prefetch(&t.buckets[second]);
    }
    for (int i = 0; i < size; ++i) {
      int64_t bucket = first_bucket(t, places[i]);
      uint32_t mask = match(t.digests + bucket * kSlots, places[i].digest);
      if (!mask) {
        bucket = second_bucket(t, places[i]);
        mask = match(t.digests + bucket * kSlots, places[i].digest);
      }
      if (mask) {
        const int64_t slot = bucket * kSlots + lowest_bit(mask);
        prefetch(t.keys + slot);
        if (t.scores) {
          prefetch(t.scores + slot);
          prefetch(&t.buckets[bucket]);
        }
      }
    }
  }

  // What finding a victim reads: all scores of both buckets.
  void fetch_scores(const Table& t) const {
    for (int i = 0; i < size; ++i) {
      if (t.fill[places[i].partition] < t.quota[places[i].partition]) continue;
      const auto* first = reinterpret_cast<const char*>(t.scores + first_bucket(t, places[i]) * kSlots);
      const auto* second = reinterpret_cast<const char*>(t.scores + second_bucket(t, places[i]) * kSlots);
      prefetch_bytes(first, kSlots * 8);
      prefetch_bytes(second, kSlots * 8);
      prefetch(&t.buckets[first_bucket(t, places[i])]);
    }
  }
};

// A batch sorted by group of partitions, in order within a group.
class Groups {
 public:
  Groups(const HashInsertArgs& a, int threads) : keys_(a.count), positions_(a.count), begins_(2, 0) {
    shift_ = 0;
    while (((a.table.num_partitions - 1) >> shift_) >= kMaxGroups) ++shift_;
    const int64_t groups = threads > 1 ? ((a.table.num_partitions - 1) >> shift_) + 1 : 1;
    begins_.assign(groups + 1, 0);
    begins_[groups] = a.count;
    missing_.assign(groups, 0);
    leaving_.resize(groups);
    if (groups == 1) {
      for (int64_t i = 0; i < a.count; ++i) {
        keys_[i] = a.keys[i];
        positions_[i] = i;
      }
      return;
    }
    std::vector<int64_t> places(static_cast<size_t>(threads) * groups, 0);
    parallel_team(threads, [&](Team team) {
      const auto [begin, end] = team.share(a.count);
      int64_t* place = places.data() + team.thread * groups;
      for (int64_t i = begin; i < end; ++i) ++place[group_of(a.table, a.keys[i])];
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
      for (int64_t i = begin; i < end; ++i) {
        const int64_t key = a.keys[i];
        const int64_t to = place[group_of(a.table, key)]++;
        keys_[to] = key;
        positions_[to] = i;
      }
    });
  }

  int64_t size() const { return static_cast<int64_t>(missing_.size()); }

  // Serves the group's keys that are in the table, and keeps the others.
  void serve_present(const HashInsertArgs& a, int64_t group) {
    int64_t kept = begins_[group];
    Block block;
    for (int64_t from = begins_[group]; from < begins_[group + 1]; from += kBlock) {
      load(block, from, begins_[group + 1]);
      block.fetch(a.table);
      for (int i = 0; i < block.size; ++i) {
        const int64_t position = block.positions[i];
        const int64_t slot = find(a.table, block.keys[i], block.places[i], true);
        a.results.slots[position] = slot;
        if (slot >= 0) {
          touch(a.table, a.batch, slot, given_score(a.batch, position));
          a.results.status[position] = kHit;
        } else if (slot == kLeaves) {
          leaving_[group].push_back(position);
        } else {
          keep(kept++, block, i);
        }
      }
    }
    missing_[group] = kept - begins_[group];
  }

  void insert_missing(const HashInsertArgs& a, int64_t group) {
    Block block;
    const int64_t begin = begins_[group], end = begin + missing_[group];
    for (int64_t from = begin; from < end; from += kBlock) {
      load(block, from, end);
      block.fetch(a.table);
      if (a.table.scores) block.fetch_scores(a.table);
      for (int i = 0; i < block.size; ++i) {
        if (!hash_table::insert_missing(a.table, a.batch, a.results, block.positions[i], block.keys[i], block.places[i],
                                        true)) {
          leaving_[group].push_back(block.positions[i]);
        }
      }
    }
  }

  // The positions whose search leaves its partition, in order; they are taken out.
  std::vector<int64_t> take_leaving() {
    std::vector<int64_t> all;
    for (auto& some : leaving_) {
      all.insert(all.end(), some.begin(), some.end());
      some.clear();
    }
    std::sort(all.begin(), all.end());
    return all;
  }

  int64_t missing() const {
    int64_t sum = 0;
    for (const int64_t count : missing_) sum += count;
    return sum;
  }

  void append_missing_keys(std::vector<int64_t>& keys) const {
    for (int64_t g = 0; g < size(); ++g) {
      keys.insert(keys.end(), keys_.begin() + begins_[g], keys_.begin() + begins_[g] + missing_[g]);
    }
  }

 private:
  int64_t group_of(const Table& t, int64_t key) const {
    const uint64_t h = mix(static_cast<uint64_t>(key));
    return static_cast<int64_t>(((h >> 32) * static_cast<uint64_t>(t.num_partitions)) >> 32) >> shift_;
  }

  void load(Block& block, int64_t from, int64_t end) const {
    block.size = 0;
    for (int64_t i = from; i < std::min<int64_t>(from + kBlock, end); ++i) block.add(keys_[i], positions_[i]);
  }

  void keep(int64_t at, const Block& block, int i) {
    keys_[at] = block.keys[i];
    positions_[at] = block.positions[i];
  }

  std::vector<int64_t> keys_, positions_, begins_, missing_;
  std::vector<std::vector<int64_t>> leaving_;
  int shift_ = 0;
};

// Keys whose chain has left its partition, one after another.
std::vector<int64_t> serve_leaving_present(const HashInsertArgs& a, const std::vector<int64_t>& positions) {
  std::vector<int64_t> missing;
  for (const int64_t position : positions) {
    const int64_t key = a.keys[position];
    const int64_t slot = find(a.table, key, place_of(a.table, key));
    a.results.slots[position] = slot;
    if (slot >= 0) {
      touch(a.table, a.batch, slot, given_score(a.batch, position));
      a.results.status[position] = kHit;
    } else {
      missing.push_back(position);
    }
  }
  return missing;
}

int threads_for(int64_t count, int num_threads) {
  return static_cast<int>(std::clamp<int64_t>(count / kKeysPerThread, 1, num_threads));
}

}  // namespace

void hash_table_find(const Table& table, IndexArray keys, int64_t count, int64_t* slots, int num_threads) {
  parallel_ranges(count, kKeysPerThread, num_threads, [&](int64_t begin, int64_t end) {
    Block block;
    for (int64_t from = begin; from < end; from += kBlock) {
      block.size = 0;
      for (int64_t i = from; i < std::min<int64_t>(from + kBlock, end); ++i) block.add(keys[i], i);
      block.fetch(table);
      for (int i = 0; i < block.size; ++i) slots[from + i] = find(table, block.keys[i], block.places[i]);
    }
  });
}

int64_t hash_table_insert(const HashInsertArgs& a, int num_threads) {
  const int threads = threads_for(a.count, num_threads);
  Groups groups(a, threads);
  const auto each_group = [&](auto&& serve) {
    std::atomic<int64_t> next{0};
    parallel_team(threads, [&](Team) {
      for (int64_t g; (g = next.fetch_add(1, std::memory_order_relaxed)) < groups.size();) serve(g);
    });
  };
  each_group([&](int64_t g) { groups.serve_present(a, g); });
  std::vector<int64_t> leaving = serve_leaving_present(a, groups.take_leaving());
  if (a.batch.policy == Evict::kNone && groups.missing() + static_cast<int64_t>(leaving.size()) > a.room) {
    std::vector<int64_t> fresh;
    groups.append_missing_keys(fresh);
    for (const int64_t position : leaving) fresh.push_back(a.keys[position]);
    std::sort(fresh.begin(), fresh.end());
    const int64_t distinct = std::unique(fresh.begin(), fresh.end()) - fresh.begin();
    if (distinct > a.room) return distinct;
  }
  each_group([&](int64_t g) { groups.insert_missing(a, g); });
  for (const int64_t position : groups.take_leaving()) leaving.push_back(position);
  std::sort(leaving.begin(), leaving.end());
  for (const int64_t position : leaving) {
    const int64_t key = a.keys[position];
    hash_table::insert_missing(a.table, a.batch, a.results, position, key, place_of(a.table, key), false);
  }
  return -1;
}

void gather_rows(const char* table, int64_t row_bytes, const int64_t* slots, int64_t count, char* out, int num_threads) {
  parallel_ranges(count, kKeysPerThread, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i + kBlock < end && slots[i + kBlock] >= 0) {
        prefetch_bytes(table + slots[i + kBlock] * row_bytes, std::min<int64_t>(row_bytes, 512));
      }
      if (slots[i] >= 0) {
        std::memcpy(out + i * row_bytes, table + slots[i] * row_bytes, row_bytes);
      } else {
        std::memset(out + i * row_bytes, 0, row_bytes);
      }
    }
  });
}

void scatter_rows(char* table, int64_t row_bytes, const int64_t* slots, int64_t count, const char* rows,
                  int num_threads) {
  const int threads = threads_for(count, num_threads);
  // A thread writes the rows that are its own by their slot, so that one row has one writer, in the order of the batch.
  const int64_t stripe = std::max<int64_t>(64, (256 + row_bytes - 1) / row_bytes);
  parallel_team(threads, [&](Team team) {
    for (int64_t i = 0; i < count; ++i) {
      if (slots[i] >= 0 && (team.size == 1 || slots[i] / stripe % team.size == team.thread)) {
        std::memcpy(table + slots[i] * row_bytes, rows + i * row_bytes, row_bytes);
      }
    }
  });
}

}  // namespace gossamer
