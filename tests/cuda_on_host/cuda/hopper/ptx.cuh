// Stands in for the instructions of that file: a model, after their documentation, of mbarriers, the copy engine and
// chunk copies. What is asynchronous there is done at once here, so missing waits do not show, and wrong addresses,
// counts, parities and orders of arrival do.
#pragma once

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>

#include "cuda_runtime.h"

namespace gossamer::hopper {

constexpr uint32_t kSharedSize = 232448;
// Where dynamic shared memory starts: at no multiple of 1024, as it may.
constexpr uint32_t kSharedStart = 528;
alignas(1024) inline uint8_t memory[kSharedSize];

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - memory) + kSharedStart;
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "%s (thread %u of block %u)\n", what, threadIdx.x, blockIdx.x);
  std::abort();
}

inline uint8_t* shared_pointer(uint32_t address, uint32_t bytes) {
  if (address < kSharedStart || address - kSharedStart + bytes > kSharedSize) fail("address outside shared memory");
  return memory + (address - kSharedStart);
}

// The 128-byte swizzle of an address.
inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

struct Barrier {
  uint32_t arrivals, pending;
  int64_t bytes = 0;
  uint32_t phase = 0;
  std::mutex mutex;
  std::condition_variable passed;
};
inline std::map<uint32_t, Barrier> barriers;

inline Barrier& barrier_at(uint32_t address) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("not a barrier");
  return found->second;
}

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

inline void barrier_init(uint32_t address, uint32_t arrivals) {
  Barrier& barrier = barriers[address];
  barrier.arrivals = barrier.pending = arrivals;
}
inline void barrier_init_fence() {}

inline void change(uint32_t address, uint32_t arrivals, int64_t bytes) {
  Barrier& barrier = barrier_at(address);
  const std::lock_guard lock(barrier.mutex);
  if (barrier.pending < arrivals) fail("one arrival too many");
  barrier.bytes += bytes;
  barrier.pending -= arrivals;
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.pending = barrier.arrivals;
    ++barrier.phase;
    barrier.passed.notify_all();
  }
}
inline void barrier_arrive(uint32_t address) { change(address, 1, 0); }
inline void barrier_arrive_expect(uint32_t address, uint32_t bytes) { change(address, 1, bytes); }
inline void barrier_arrive_after_copies(uint32_t address) { change(address, 1, 0); }

inline void barrier_wait(uint32_t address, uint32_t parity) {
  Barrier& barrier = barrier_at(address);
  std::unique_lock lock(barrier.mutex);
  const auto over = [&] { return barrier.phase % 2 != parity; };
  if (!barrier.passed.wait_for(lock, std::chrono::seconds(60), over)) fail("a barrier is never passed");
}

inline void copy_chunk(uint32_t to, const void* from, uint32_t bytes) {
  if (to % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes > 16) fail("a chunk that lies badly");
  uint8_t* at = shared_pointer(to, 16);
  memcpy(at, from, bytes);
  memset(at + bytes, 0, 16 - bytes);
}

inline void load_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int32_t column, int32_t row,
                     int32_t matrix = 0) {
  if (to % 1024 != 0) fail("a box that lies badly");
  for (int r = 0; r < 64; ++r) {
    for (int c = 0; c < 64; ++c) {
      const int64_t x = int64_t{column} + c, y = int64_t{row} + r, z = matrix;
      const bool inside = x >= 0 && x < int64_t(map->sizes[0]) && y >= 0 && y < int64_t(map->sizes[1]) &&
                          (map->rank == 2 || (z >= 0 && z < int64_t(map->sizes[2])));
      uint16_t value = 0;
      if (inside) memcpy(&value, map->data + 2 * x + y * map->strides[0] + z * map->strides[1], sizeof value);
      memcpy(shared_pointer(swizzled(to + r * 128 + 2 * c), 2), &value, sizeof value);
    }
  }
  change(barrier, 0, -64 * 128);
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
inline void begin_block() {
  gossamer::hopper::barriers.clear();
  memset(gossamer::hopper::memory, 0xff, gossamer::hopper::kSharedSize);
}

// Nothing may be left of a block: half a phase would be an arrival or a copy too few.
inline void end_block() {
  for (auto& [address, barrier] : gossamer::hopper::barriers) {
    if (barrier.pending != barrier.arrivals || barrier.bytes != 0) gossamer::hopper::fail("a barrier within a phase");
  }
}

}  // namespace host
