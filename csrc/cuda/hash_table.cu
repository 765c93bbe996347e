// One warp per partition processes the keys of the partition in order. So no two warps write to one bucket at the same time, and the
// result does not depend on their order. Work that is independent of order is parallel over keys, slots or rows: searches, copies,
// and the touches of the recency policies, which all write the same stamp.
#include "cuda/hash_table.cuh"

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

namespace gossamer::cuda {
namespace {

using namespace hash_table;

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr unsigned kAll = 0xffffffffu;
// Status of a position whose search leaves its partition.
constexpr uint8_t kPending = 255;

__device__ int64_t load_key(const HashKeys& keys, int64_t i) {
  return keys.wide ? static_cast<const int64_t*>(keys.base)[i * keys.stride]
                   : static_cast<const int32_t*>(keys.base)[i * keys.stride];
}

__global__ void __launch_bounds__(kThreads) find_kernel(Table t, HashKeys keys, int64_t* slots) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= keys.count) return;
  const int64_t key = load_key(keys, i);
  slots[i] = find(t, key, place_of(t, key));
}

__global__ void __launch_bounds__(kThreads) partition_kernel(Table t, HashKeys keys, int32_t* partitions) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < keys.count) partitions[i] = static_cast<int32_t>(place_of(t, load_key(keys, i)).partition);
}

// Serves keys that are present, when no order matters; they need no warp of their partition.
__global__ void __launch_bounds__(kThreads)
    stamp_kernel(Table t, HashKeys keys, Batch batch, Results results, int32_t* partitions) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= keys.count) return;
  const int64_t key = load_key(keys, i);
  const Place place = place_of(t, key);
  const int64_t slot = find(t, key, place);
  results.slots[i] = slot;
  results.status[i] = slot >= 0 ? kHit : kRefused;
  partitions[i] = static_cast<int32_t>(slot >= 0 ? t.num_partitions : place.partition);
  if (slot >= 0 && stamps(batch.policy)) t.scores[slot] = batch.stamp;
}

// Touches the slots of a warp's lanes (-1 for none): equal slots once, with the last score or the sum of the increments, and slots
// of the same bucket one after another.
__device__ void touch_all(const Table& t, const Batch& batch, int64_t slot, int64_t position) {
  if (batch.policy == Evict::kNone) return;
  const int lane = threadIdx.x % kWarp;
  const unsigned peers = __match_any_sync(kAll, slot);
  int64_t given = slot >= 0 ? given_score(batch, position) : 0;
  if (batch.policy == Evict::kLfu || batch.policy == Evict::kEpochLfu) {
    int64_t sum = 0;
    for (int i = 0; i < kWarp; ++i) {
      const int64_t other = __shfl_sync(kAll, given, i);
      if (peers >> i & 1u) sum = add_saturating(sum, other, INT64_MAX);
    }
    given = sum;
  }
  const bool leads = slot >= 0 && lane == 31 - __clz(static_cast<int>(peers));
  const unsigned rivals = __match_any_sync(kAll, leads ? slot / kSlots : -1 - static_cast<int64_t>(lane));
  const int rank = __popc(rivals & ((1u << lane) - 1));
  for (int turn = 0; __any_sync(kAll, leads && rank >= turn); ++turn) {
    if (leads && rank == turn) touch(t, batch, slot, given);
    __syncwarp();
  }
}

__global__ void __launch_bounds__(kThreads, 4) present_kernel(Table t, HashBatch b) {
  const int64_t partition = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (partition >= t.num_partitions) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t end = b.begins[partition + 1];
  for (int64_t from = b.begins[partition]; from < end; from += kWarp) {
    const int64_t position = from + lane < end ? b.order[from + lane] : -1;
    int64_t slot = kAbsent;
    if (position >= 0) {
      const int64_t key = load_key(b.keys, position);
      // Nothing is inserted while this kernel runs, so a search may leave the partition. Scores and pins belong to the warp of a
      // partition, but policies under which searches leave have neither.
      slot = find(t, key, place_of(t, key));
      b.results.slots[position] = slot;
      b.results.status[position] = slot >= 0 ? kHit : kRefused;
    }
    touch_all(t, b.batch, slot, position);
  }
}

// A warp that inserts one key: each lane looks at one slot of the key's two buckets.
struct Warp {
  int lane;

  __device__ bool leads() const { return lane == 0; }
  __device__ void settle() const { __syncwarp(); }

  __device__ void find_victim(const Table& t, const Batch& batch, int64_t first, int64_t second, int64_t* slot,
                              int64_t* score) const {
    const bool in_first = lane < kSlots;
    const int64_t bucket = in_first ? first : second, mine = bucket * kSlots + lane % kSlots;
    const int64_t own = t.scores[mine];
    const Bucket b = t.buckets[bucket];
    const bool touched =
        stamps(batch.policy) ? own == batch.stamp : b.serial == batch.serial && (b.pinned >> (lane % kSlots) & 1u);
    bool any = (in_first || second != first) && t.digests[mine] != 0 && !touched;
    int best = lane;
    int64_t lowest = own;
    // The first of equals wins: it has the lower lane.
    for (int apart = kWarp / 2; apart > 0; apart /= 2) {
      const bool other_any = __shfl_xor_sync(kAll, any, apart);
      const int other = __shfl_xor_sync(kAll, best, apart);
      const int64_t other_score = __shfl_xor_sync(kAll, lowest, apart);
      if (other_any && (!any || other_score < lowest || (other_score == lowest && other < best))) {
        any = true;
        best = other;
        lowest = other_score;
      }
    }
    if (!any) return;
    *slot = (best < kSlots ? first : second) * kSlots + best % kSlots;
    *score = lowest;
  }
};

__global__ void __launch_bounds__(kThreads, 4) missing_kernel(Table t, HashBatch b) {
  const int64_t partition = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (partition >= t.num_partitions) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t end = b.begins[partition + 1];
  for (int64_t from = b.begins[partition]; from < end; from += kWarp) {
    const int64_t position = from + lane < end ? b.order[from + lane] : -1;
    const bool missing = position >= 0 && b.results.status[position] != kHit;
    const int64_t key = missing ? load_key(b.keys, position) : 0;
    for (unsigned rest = __ballot_sync(kAll, missing); rest; rest &= rest - 1) {
      const int source = lowest_bit(rest);
      const int64_t its_key = __shfl_sync(kAll, key, source), its_position = __shfl_sync(kAll, position, source);
      const bool served = insert_missing(t, b.batch, b.results, its_position, its_key, place_of(t, its_key), true, Warp{lane});
      if (!served && lane == 0) {
        b.results.status[its_position] = kPending;
        atomicAdd(b.leaving, 1);
      }
      __syncwarp();
    }
  }
}

// One warp finds the pending positions in order, and one lane processes them.
__global__ void __launch_bounds__(kWarp) finish_kernel(Table t, HashBatch b) {
  if (*b.leaving == 0) return;
  const int lane = threadIdx.x;
  for (int64_t from = 0; from < b.keys.count; from += kWarp) {
    const int64_t position = from + lane;
    const bool pending = position < b.keys.count && b.results.status[position] == kPending;
    for (unsigned rest = __ballot_sync(kAll, pending); rest; rest &= rest - 1) {
      if (lane == lowest_bit(rest)) {
        const int64_t key = load_key(b.keys, position);
        insert_missing(t, b.batch, b.results, position, key, place_of(t, key), false);
      }
      __syncwarp();
    }
  }
}

// Index is as narrow as the number of words allows, since each word costs a division by the words of a row.
template <class Word, class Index>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const Word* table, Index row_words, const int64_t* slots, Index words, Word* out) {
  const Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= words) return;
  const Index row = i / row_words;
  const int64_t slot = slots[row];
  out[i] = slot >= 0 ? table[slot * row_words + (i - row * row_words)] : Word{};
}

template <class Word, class Index>
__global__ void __launch_bounds__(kThreads)
    start_kernel(Word* table, Index row_words, const int64_t* slots, const uint8_t* status, Index words, const Word* rows) {
  const Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= words) return;
  const Index row = i / row_words;
  if (status[row] < kInserted) return;
  table[slots[row] * row_words + (i - row * row_words)] = rows ? rows[i] : Word{};
}

template <class Word, class Index>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(Word* table, Index row_words, const int64_t* slots, const int64_t* order, Index words, const Word* rows) {
  const Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= words) return;
  const Index row = i / row_words, column = i - row * row_words;
  const int64_t slot = slots[row];
  if (slot < 0 || ((row + 1) * row_words < words && slots[row + 1] == slot)) return;
  table[slot * row_words + column] = rows[order[row] * row_words + column];
}

template <class T>
__global__ void __launch_bounds__(kThreads) mark_kernel(T* array, int64_t size, const int64_t* slots, int64_t count, T value) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count && slots[i] >= 0 && slots[i] < size) array[slots[i]] = value;
}

// Launches at least `threads` threads, in blocks of kThreads or one smaller block. Returns null or a CUDA error message.
template <class... Params>
const char* launch(void (*kernel)(Params...), int64_t threads, int device, void* stream,
                   std::type_identity_t<Params>... params) {
  void* arguments[] = {&params...};
  const auto blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  const dim3 block(static_cast<unsigned>(std::min<int64_t>((threads + kWarp - 1) / kWarp * kWarp, kThreads)));
  // The statically linked CUDA runtime has its own current device.
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = cudaLaunchKernel(kernel, dim3(blocks), block, arguments, 0, static_cast<cudaStream_t>(stream));
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Calls f with the widest word that divides a row, whose storage is aligned to 16 bytes, the words of a row, and those of
// `count` rows.
template <class F>
const char* with_words(int64_t row_bytes, int64_t count, F&& f) {
  const auto with_index = [&](auto word) {
    const int64_t row_words = row_bytes / static_cast<int64_t>(sizeof(word)), words = count * row_words;
    if (words <= INT32_MAX) return f(word, static_cast<uint32_t>(row_words), static_cast<uint32_t>(words));
    return f(word, row_words, words);
  };
  if (row_bytes % 16 == 0) return with_index(uint4{});
  if (row_bytes % 4 == 0) return with_index(uint32_t{});
  return with_index(uint16_t{});
}

}  // namespace

const char* hash_table_partitions(const Table& table, const HashKeys& keys, int32_t* partitions, int device, void* stream) {
  return launch(partition_kernel, keys.count, device, stream, table, keys, partitions);
}

const char* hash_table_find(const Table& table, const HashKeys& keys, int64_t* slots, int device, void* stream) {
  return launch(find_kernel, keys.count, device, stream, table, keys, slots);
}

const char* hash_table_stamp(const Table& table, const HashKeys& keys, const Batch& batch, const Results& results,
                             int32_t* partitions, int device, void* stream) {
  return launch(stamp_kernel, keys.count, device, stream, table, keys, batch, results, partitions);
}

const char* hash_table_present(const Table& table, const HashBatch& batch, int device, void* stream) {
  return launch(present_kernel, table.num_partitions * kWarp, device, stream, table, batch);
}

const char* hash_table_missing(const Table& table, const HashBatch& batch, int device, void* stream) {
  const char* error = launch(missing_kernel, table.num_partitions * kWarp, device, stream, table, batch);
  if (error != nullptr || batch.batch.policy != Evict::kNone) return error;
  return launch(finish_kernel, kWarp, device, stream, table, batch);
}

const char* gather_rows(const char* table, int64_t row_bytes, const int64_t* slots, int64_t count, char* out, int device,
                        void* stream) {
  return with_words(row_bytes, count, [&](auto word, auto row_words, auto words) {
    using Word = decltype(word);
    return launch(gather_kernel<Word, decltype(words)>, words, device, stream, reinterpret_cast<const Word*>(table), row_words,
                  slots, words, reinterpret_cast<Word*>(out));
  });
}

const char* start_rows(char* table, int64_t row_bytes, const int64_t* slots, const uint8_t* status, int64_t count,
                       const char* rows, int device, void* stream) {
  return with_words(row_bytes, count, [&](auto word, auto row_words, auto words) {
    using Word = decltype(word);
    return launch(start_kernel<Word, decltype(words)>, words, device, stream, reinterpret_cast<Word*>(table), row_words, slots,
                  status, words, reinterpret_cast<const Word*>(rows));
  });
}

const char* scatter_rows(char* table, int64_t row_bytes, const int64_t* slots, const int64_t* order, int64_t count,
                         const char* rows, int device, void* stream) {
  return with_words(row_bytes, count, [&](auto word, auto row_words, auto words) {
    using Word = decltype(word);
    return launch(scatter_kernel<Word, decltype(words)>, words, device, stream, reinterpret_cast<Word*>(table), row_words,
                  slots, order, words, reinterpret_cast<const Word*>(rows));
  });
}

const char* mark_slots(void* array, int64_t item_bytes, int64_t size, const int64_t* slots, int64_t count, int64_t value,
                       int device, void* stream) {
  if (item_bytes == 8) {
    return launch(mark_kernel<int64_t>, count, device, stream, static_cast<int64_t*>(array), size, slots, count, value);
  }
  return launch(mark_kernel<uint8_t>, count, device, stream, static_cast<uint8_t*>(array), size, slots, count,
                static_cast<uint8_t>(value));
}

}  // namespace gossamer::cuda
