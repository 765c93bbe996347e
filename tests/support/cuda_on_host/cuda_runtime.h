// Stands in for CUDA's header of that name: what the kernels and their launches use of it, on one thread of the host.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "cuda.h"

#define __host__
#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define CUDART_VERSION 13000

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

using std::max;
using std::min;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0 };
constexpr unsigned long long cudaEnableDefault = 0;
using cudaStream_t = void*;

// Few, so that a block has several tiles.
constexpr int kMultiprocessors = 3;

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = kMultiprocessors;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an error"; }
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

inline dim3 threadIdx, blockIdx, gridDim;

template <class T>
T __ldg(const T* at) {
  return *at;
}

namespace host {

// A kernel's threads take turns on one thread of the host: each has a stack, and runs until it has to wait. Between two waits
// nothing else runs, and the order of turns is fixed, so that a missing barrier shows in every run or in none.
struct Fiber {
  static constexpr size_t kStack = 1 << 18;

  std::unique_ptr<char[]> stack = std::make_unique_for_overwrite<char[]>(kStack);
  jmp_buf place;
  dim3 thread_index, block_index;
  struct Block* block;
  bool begun, ended;
};
inline Fiber* running;
inline jmp_buf turns;               // where a fiber that waits or ends goes
inline uint64_t progress;           // counts ends of fibers and barriers that were passed
inline std::function<void()> body;  // what each fiber runs

inline void yield() {
  if (_setjmp(running->place) == 0) _longjmp(turns, 1);
}

inline void enter() {
  body();
  running->ended = true;
  ++progress;
  _longjmp(turns, 1);
}

class Barrier {
 public:
  explicit Barrier(unsigned size) : size_(size) {}

  void arrive_and_wait() {
    const unsigned mine = phase_;
    if (++arrived_ < size_) {
      while (phase_ == mine) yield();
      return;
    }
    arrived_ = 0;
    ++phase_;
    ++progress;
  }

 private:
  unsigned size_, arrived_ = 0, phase_ = 0;
};

// The lanes of a warp meet here, and pass each other values.
struct Warp {
  Barrier meet{32};
  uint64_t values[32];
};

struct Block {
  std::vector<std::unique_ptr<Warp>> warps;
  Barrier meet;
  unsigned rank;  // in the cluster

  Block(unsigned threads, unsigned rank) : meet(threads), rank(rank) {
    for (unsigned w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<Warp>());
  }
};
inline Block* block;
// All threads of the cluster that runs.
inline std::unique_ptr<Barrier> cluster_meet;
inline Warp& warp() { return *block->warps[threadIdx.x / 32]; }

void begin_cluster(unsigned blocks);
void end_cluster();

// Exchanges values between the lanes of a warp: what f makes of them, which it reads by of(lane).
template <class T, class F>
auto with_values(T value, F&& f) {
  Warp& mine = warp();
  memcpy(&mine.values[threadIdx.x % 32], &value, sizeof value);
  mine.meet.arrive_and_wait();
  const auto out = f([&](unsigned lane) {
    T other;
    memcpy(&other, &mine.values[lane], sizeof other);
    return other;
  });
  mine.meet.arrive_and_wait();
  return out;
}

template <class T>
T exchange(T value, unsigned from) {
  return with_values(value, [&](auto of) { return of(from); });
}

}  // namespace host

inline void __syncwarp() { host::warp().meet.arrive_and_wait(); }
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return host::exchange(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int step) {
  return host::exchange(value, threadIdx.x % 32 ^ step);
}

template <class T>
T __shfl_up_sync(unsigned, T value, unsigned step) {
  const unsigned lane = threadIdx.x % 32;
  return host::exchange(value, lane < step ? lane : lane - step);
}
template <class T>
unsigned __match_any_sync(unsigned, T value) {
  return host::with_values(value, [&](auto of) {
    unsigned equal = 0;
    for (unsigned lane = 0; lane < 32; ++lane) equal |= unsigned{of(lane) == value} << lane;
    return equal;
  });
}
inline unsigned __ballot_sync(unsigned, bool value) {
  return host::with_values(value, [](auto of) {
    unsigned set = 0;
    for (unsigned lane = 0; lane < 32; ++lane) set |= unsigned{of(lane)} << lane;
    return set;
  });
}
inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __popc(unsigned value) { return std::popcount(value); }
inline int atomicAdd(int* at, int value) { return std::atomic_ref<int>(*at).fetch_add(value); }

// Dynamic shared memory of the kernels that name it so; what it holds at first is nothing to rely on.
namespace gossamer::cuda::counting_sort {
inline int32_t shared_words[58112];
}

inline void __syncthreads() { host::block->meet.arrive_and_wait(); }

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace host {

inline void take_turn(Fiber& fiber) {
  running = &fiber;
  threadIdx = fiber.thread_index;
  blockIdx = fiber.block_index;
  block = fiber.block;
  if (_setjmp(turns) != 0) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = Fiber::kStack;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

// Runs the fibers until all have ended, in ascending order or in descending order.
inline void take_turns(const std::vector<Fiber*>& fibers, bool descending) {
  const auto count = static_cast<unsigned>(fibers.size());
  for (unsigned ended = 0; ended < count;) {
    const uint64_t before = progress;
    ended = 0;
    for (unsigned i = 0; i < count; ++i) {
      Fiber& fiber = *fibers[descending ? count - 1 - i : i];
      if (!fiber.ended) take_turn(fiber);
      ended += fiber.ended;
    }
    if (progress == before) {
      std::fprintf(stderr, "a barrier is never passed (block %u)\n", fibers[0]->block_index.x);
      std::abort();
    }
  }
}

// One cluster after the other. Every other cluster's threads take turns in descending order: a missing barrier shows in one
// order at least.
template <class Call>
void run_grid(dim3 grid, dim3 threads_of_block, unsigned cluster, const Call& call) {
  static std::vector<std::unique_ptr<Fiber>> pool;
  const unsigned count = cluster * threads_of_block.x;
  while (pool.size() < count) pool.push_back(std::make_unique<Fiber>());
  gridDim = grid;
  body = call;
  for (unsigned first = 0; first < grid.x; first += cluster) {
    begin_cluster(cluster);
    memset(gossamer::cuda::counting_sort::shared_words, 0x55, sizeof gossamer::cuda::counting_sort::shared_words);
    cluster_meet = std::make_unique<Barrier>(count);
    std::vector<std::unique_ptr<Block>> blocks;
    for (unsigned r = 0; r < cluster; ++r) blocks.push_back(std::make_unique<Block>(threads_of_block.x, r));
    std::vector<Fiber*> fibers;
    for (unsigned t = 0; t < count; ++t) {
      const unsigned rank = t / threads_of_block.x;
      Fiber& fiber = *fibers.emplace_back(pool[t].get());
      fiber.thread_index = {t % threads_of_block.x};
      fiber.block_index = {first + rank};
      fiber.block = blocks[rank].get();
      fiber.begun = fiber.ended = false;
    }
    take_turns(fibers, first / cluster % 2 == 1);
    end_cluster();
  }
}

}  // namespace host

template <class... Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params...), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  const auto call = [&]<size_t... I>(std::index_sequence<I...>) { kernel(*static_cast<Params*>(arguments[I])...); };
  host::run_grid(grid, block, 1, [&] { call(std::index_sequence_for<Params...>{}); });
  return cudaSuccess;
}

template <class Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params), const Params& params) {
  const unsigned cluster = config->numAttrs > 0 ? config->attrs[0].val.clusterDim.x : 1;
  if (config->gridDim.x % cluster != 0) return cudaErrorInvalidValue;
  host::run_grid(config->gridDim, config->blockDim, cluster, [&] { kernel(params); });
  return cudaSuccess;
}
