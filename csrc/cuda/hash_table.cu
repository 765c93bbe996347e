// One warp a partition does in order what its keys ask for, so no two threads ever write to one bucket at a time, and the
// result does not depend on which warp runs first. Searches and copies go by key or by row.
#include "cuda/hash_table.cuh"

#include <cuda_runtime.h>

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

__global__ void __launch_bounds__(kThreads) partition_kernel(Table t, HashKeys keys, int32_t* partitions) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < keys.count) partitions[i] = static_cast<int32_t>(place_of(t, load_key(keys, i)).partition);
}

__global__ void __launch_bounds__(kThreads) find_kernel(Table t, HashKeys keys, int64_t* slots) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= keys.count) return;
  const int64_t key = load_key(keys, i);
  slots[i] = find(t, key, place_of(t, key));
}

// Touches the slots of a warp's lanes, -1 for none: equal slots once, with the last score or the sum of the increments,
// and the slots of one bucket in turns.
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

__global__ void __launch_bounds__(kThreads) present_kernel(Table t, HashBatch b) {
  const int64_t partition = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (partition >= t.num_partitions) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t end = b.begins[partition + 1];
  for (int64_t from = b.begins[partition]; from < end; from += kWarp) {
    const int64_t position = from + lane < end ? b.order[from + lane] : -1;
    int64_t slot = kAbsent;
    if (position >= 0) {
      const int64_t key = load_key(b.keys, position);
      // Nothing is inserted while this kernel runs, so a search may leave the partition; scores and pins belong to one
      // partition's warp, but where searches leave there are none.
      slot = find(t, key, place_of(t, key));
      b.results.slots[position] = slot;
      b.results.status[position] = slot >= 0 ? kHit : kRefused;
    }
    touch_all(t, b.batch, slot, position);
  }
}

__global__ void __launch_bounds__(kThreads) missing_kernel(Table t, HashBatch b) {
  const int64_t partition = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (partition >= t.num_partitions) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t end = b.begins[partition + 1];
  for (int64_t from = b.begins[partition]; from < end; from += kWarp) {
    const int64_t position = from + lane < end ? b.order[from + lane] : -1;
    const bool missing = position >= 0 && b.results.status[position] != kHit;
    const int64_t key = missing ? load_key(b.keys, position) : 0;
    const Place place = place_of(t, key);
    for (unsigned rest = __ballot_sync(kAll, missing); rest; rest &= rest - 1) {
      if (lane == lowest_bit(rest) && !insert_missing(t, b.batch, b.results, position, key, place, true)) {
        b.results.status[position] = kPending;
        atomicAdd(b.leaving, 1);
      }
      __syncwarp();
    }
  }
}

// One warp looks for the pending positions in order, and one lane serves them.
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

template <class Word>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const Word* table, int64_t row_words, const int64_t* slots, int64_t count, Word* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count * row_words) return;
  const int64_t row = i / row_words, slot = slots[row];
  out[i] = slot >= 0 ? table[slot * row_words + i % row_words] : Word{};
}

template <class Word>
__global__ void __launch_bounds__(kThreads) scatter_kernel(Word* table, int64_t row_words, const int64_t* slots,
                                                           const int64_t* order, int64_t count, const Word* rows) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count * row_words) return;
  const int64_t row = i / row_words, slot = slots[row];
  if (slot < 0 || (row + 1 < count && slots[row + 1] == slot)) return;
  table[slot * row_words + i % row_words] = rows[order[row] * row_words + i % row_words];
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

// The static runtime of this library has a current device of its own.
template <class Launch>
const char* on_device(int device, Launch&& launch) {
  if (const cudaError_t error = cudaSetDevice(device); error != cudaSuccess) return cudaGetErrorString(error);
  launch();
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Calls f with a value of the widest word that divides a row, whose storage is aligned to 16 bytes.
template <class F>
void with_word(int64_t row_bytes, F&& f) {
  if (row_bytes % 16 == 0) {
    f(uint4{});
  } else if (row_bytes % 4 == 0) {
    f(uint32_t{});
  } else {
    f(uint16_t{});
  }
}

}  // namespace

const char* hash_table_partitions(const Table& table, const HashKeys& keys, int32_t* partitions, int device,
                                  void* stream) {
  return on_device(device, [&] {
    partition_kernel<<<blocks_for(keys.count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(table, keys, partitions);
  });
}

const char* hash_table_find(const Table& table, const HashKeys& keys, int64_t* slots, int device, void* stream) {
  return on_device(device, [&] {
    find_kernel<<<blocks_for(keys.count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(table, keys, slots);
  });
}

const char* hash_table_present(const Table& table, const HashBatch& batch, int device, void* stream) {
  return on_device(device, [&] {
    const unsigned blocks = blocks_for(table.num_partitions * kWarp);
    present_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(table, batch);
  });
}

const char* hash_table_missing(const Table& table, const HashBatch& batch, int device, void* stream) {
  return on_device(device, [&] {
    const auto s = static_cast<cudaStream_t>(stream);
    missing_kernel<<<blocks_for(table.num_partitions * kWarp), kThreads, 0, s>>>(table, batch);
    if (batch.batch.policy == Evict::kNone) finish_kernel<<<1, kWarp, 0, s>>>(table, batch);
  });
}

const char* gather_rows(const char* table, int64_t row_bytes, const int64_t* slots, int64_t count, char* out, int device,
                        void* stream) {
  return on_device(device, [&] {
    with_word(row_bytes, [&](auto word) {
      using Word = decltype(word);
      const int64_t words = row_bytes / static_cast<int64_t>(sizeof(Word));
      gather_kernel<<<blocks_for(count * words), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          reinterpret_cast<const Word*>(table), words, slots, count, reinterpret_cast<Word*>(out));
    });
  });
}

const char* scatter_rows(char* table, int64_t row_bytes, const int64_t* slots, const int64_t* order, int64_t count,
                         const char* rows, int device, void* stream) {
  return on_device(device, [&] {
    with_word(row_bytes, [&](auto word) {
      using Word = decltype(word);
      const int64_t words = row_bytes / static_cast<int64_t>(sizeof(Word));
      scatter_kernel<<<blocks_for(count * words), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          reinterpret_cast<Word*>(table), words, slots, order, count, reinterpret_cast<const Word*>(rows));
    });
  });
}

}  // namespace gossamer::cuda
