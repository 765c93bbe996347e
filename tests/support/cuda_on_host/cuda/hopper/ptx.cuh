// Stands in for the instructions of that file: a model, after their documentation, of mbarriers, the copy engine and
// chunk copies. What is asynchronous there is done at once here, so missing waits do not show, and wrong addresses,
// counts, parities and orders of arrival do.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <map>

#include "cuda_runtime.h"

#define GOSSAMER_DYNAMIC_SHARED(name) uint8_t* const name = memories[cluster_rank()]->bytes

namespace gossamer::hopper {

constexpr uint32_t kSharedSize = 232448;
// Where dynamic shared memory starts: at no multiple of 1024, as it may.
constexpr uint32_t kSharedStart = 528;

struct Barrier {
  uint32_t arrivals, pending;
  int64_t bytes = 0;
  uint32_t phase = 0;
};

struct SharedMemory {
  alignas(1024) uint8_t bytes[kSharedSize];
  std::map<uint32_t, Barrier> barriers;
};
// Of each block of the cluster that runs.
inline std::vector<std::unique_ptr<SharedMemory>> memories;

inline uint32_t cluster_rank() { return host::block->rank; }
inline void cluster_sync() { host::cluster_meet->arrive_and_wait(); }
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - memories[cluster_rank()]->bytes) + kSharedStart;
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "%s (thread %u of block %u)\n", what, threadIdx.x, blockIdx.x);
  std::abort();
}

inline uint8_t* shared_pointer(uint32_t rank, uint32_t address, uint32_t bytes) {
  if (address < kSharedStart || address - kSharedStart + bytes > kSharedSize) fail("address outside shared memory");
  return memories[rank]->bytes + (address - kSharedStart);
}
inline uint8_t* shared_pointer(uint32_t address, uint32_t bytes) { return shared_pointer(cluster_rank(), address, bytes); }

// The 128-byte swizzle of an address.
inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

inline Barrier& barrier_at(uint32_t rank, uint32_t address) {
  const auto found = memories[rank]->barriers.find(address);
  if (found == memories[rank]->barriers.end()) fail("not a barrier");
  return found->second;
}

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

inline void barrier_init(uint32_t address, uint32_t arrivals) {
  Barrier& barrier = memories[cluster_rank()]->barriers[address];
  barrier.arrivals = barrier.pending = arrivals;
}
inline void barrier_init_fence() {}

inline void change(uint32_t rank, uint32_t address, uint32_t arrivals, int64_t bytes) {
  Barrier& barrier = barrier_at(rank, address);
  if (barrier.pending < arrivals) fail("one arrival too many");
  barrier.bytes += bytes;
  barrier.pending -= arrivals;
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.pending = barrier.arrivals;
    ++barrier.phase;
    ++host::progress;
  }
}
inline void barrier_arrive(uint32_t address) { change(cluster_rank(), address, 1, 0); }
inline void barrier_arrive_at(uint32_t address, uint32_t rank) { change(rank, address, 1, 0); }
inline void barrier_arrive_expect(uint32_t address, uint32_t bytes) { change(cluster_rank(), address, 1, bytes); }
inline void barrier_arrive_after_copies(uint32_t address) { change(cluster_rank(), address, 1, 0); }

template <bool kCluster = false>
void barrier_wait(uint32_t address, uint32_t parity) {
  const Barrier& barrier = barrier_at(cluster_rank(), address);
  while (barrier.phase % 2 == parity) host::yield();
}

inline void copy_chunk(uint32_t to, const void* from, uint32_t bytes) {
  if (to % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes > 16) fail("a chunk that lies badly");
  uint8_t* at = shared_pointer(to, 16);
  memcpy(at, from, bytes);
  memset(at + bytes, 0, 16 - bytes);
}

inline void load_box_of(uint32_t rank, uint32_t to, const CUtensorMap* map, uint32_t barrier, int32_t column, int32_t row,
                        int32_t matrix) {
  if (to % 1024 != 0) fail("a box that lies badly");
  for (int r = 0; r < 64; ++r) {
    for (int c = 0; c < 64; ++c) {
      const int64_t x = int64_t{column} + c, y = int64_t{row} + r, z = matrix;
      const bool inside = x >= 0 && x < int64_t(map->sizes[0]) && y >= 0 && y < int64_t(map->sizes[1]) &&
                          (map->rank == 2 || (z >= 0 && z < int64_t(map->sizes[2])));
      uint16_t value = 0;
      if (inside) memcpy(&value, map->data + 2 * x + y * map->strides[0] + z * map->strides[1], sizeof value);
      memcpy(shared_pointer(rank, swizzled(to + r * 128 + 2 * c), 2), &value, sizeof value);
    }
  }
  change(rank, barrier, 0, -64 * 128);
}
inline void load_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int32_t column, int32_t row, int32_t matrix = 0) {
  load_box_of(cluster_rank(), to, map, barrier, column, row, matrix);
}
inline void load_box_to(uint16_t blocks, uint32_t to, const CUtensorMap* map, uint32_t barrier, int32_t column, int32_t row,
                        int32_t matrix) {
  if (blocks >> memories.size() != 0) fail("a block outside the cluster");
  for (uint32_t rank = 0; rank < memories.size(); ++rank) {
    if (blocks >> rank & 1) load_box_of(rank, to, map, barrier, column, row, matrix);
  }
}

inline void copies_before_mma() {}
inline void mma_begin() { __syncwarp(); }
inline void mma_commit() {}
template <int kPending>
void mma_wait() {
  __syncwarp();
}
template <int kCount>
void mma_results(float (&)[kCount]) {}

}  // namespace gossamer::hopper

namespace host {

// What nobody has written is NaN in both types.
inline void begin_cluster(unsigned blocks) {
  using gossamer::hopper::memories;
  while (memories.size() > blocks) memories.pop_back();
  while (memories.size() < blocks) memories.push_back(std::make_unique<gossamer::hopper::SharedMemory>());
  for (auto& memory : memories) {
    memory->barriers.clear();
    memset(memory->bytes, 0xff, sizeof memory->bytes);
  }
}

// Nothing may be left of a block: half a phase would be an arrival or a copy too few.
inline void end_cluster() {
  for (auto& memory : gossamer::hopper::memories) {
    for (auto& [address, barrier] : memory->barriers) {
      if (barrier.pending != barrier.arrivals || barrier.bytes != 0) gossamer::hopper::fail("a barrier within a phase");
    }
  }
}

}  // namespace host
