// Stands in for CUDA's header of that name: what the kernels and their launches use of it, on threads of the host.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
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

inline thread_local dim3 threadIdx, blockIdx, gridDim;

template <class T>
T __ldg(const T* at) {
  return *at;
}

namespace host {

// The lanes of a warp meet here, and pass each other values.
struct Warp {
  std::barrier<> meet{32};
  uint64_t values[32];
};

struct Block {
  std::vector<std::unique_ptr<Warp>> warps;
  std::barrier<> meet;
  unsigned rank;  // in the cluster

  Block(unsigned threads, unsigned rank) : meet(threads), rank(rank) {
    for (unsigned w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<Warp>());
  }
};
inline thread_local Block* block;
// All threads of the cluster that runs.
inline std::unique_ptr<std::barrier<>> cluster_meet;
inline Warp& warp() { return *block->warps[threadIdx.x / 32]; }

void begin_cluster(unsigned blocks);
void end_cluster();

template <class T>
T exchange(T value, unsigned from) {
  Warp& mine = warp();
  memcpy(&mine.values[threadIdx.x % 32], &value, sizeof value);
  mine.meet.arrive_and_wait();
  T out;
  memcpy(&out, &mine.values[from], sizeof out);
  mine.meet.arrive_and_wait();
  return out;
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
  unsigned equal = 0;
  for (unsigned lane = 0; lane < 32; ++lane) equal |= unsigned{host::exchange(value, lane) == value} << lane;
  return equal;
}
inline unsigned __ballot_sync(unsigned, bool value) {
  unsigned set = 0;
  for (unsigned lane = 0; lane < 32; ++lane) set |= unsigned{host::exchange(value, lane)} << lane;
  return set;
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

// One cluster after the other, with a thread of the host for each of its blocks' own, which serve all clusters.
template <class Call>
void run_grid(dim3 grid, dim3 threads_of_block, unsigned cluster, const Call& call) {
  const unsigned count = cluster * threads_of_block.x;
  std::vector<std::unique_ptr<Block>> blocks;
  std::barrier<> between{count};
  cluster_meet = std::make_unique<std::barrier<>>(count);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < count; ++t) {
    threads.emplace_back([&, t] {
      const unsigned rank = t / threads_of_block.x;
      threadIdx = {t % threads_of_block.x};
      gridDim = grid;
      for (unsigned first = 0; first < grid.x; first += cluster) {
        if (t == 0) {
          begin_cluster(cluster);
          memset(gossamer::cuda::counting_sort::shared_words, 0x55, sizeof gossamer::cuda::counting_sort::shared_words);
          blocks.clear();
          for (unsigned r = 0; r < cluster; ++r) blocks.push_back(std::make_unique<Block>(threads_of_block.x, r));
        }
        between.arrive_and_wait();
        block = blocks[rank].get();
        blockIdx = {first + rank};
        call();
        between.arrive_and_wait();
        if (t == 0) end_cluster();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
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
