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

enum cudaError_t { cudaSuccess = 0 };
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
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
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
inline std::vector<std::unique_ptr<Warp>> warps;
inline Warp& warp() { return *warps[threadIdx.x / 32]; }

void begin_block();
void end_block();

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

inline std::unique_ptr<std::barrier<>> whole_block;
inline void __syncthreads() { whole_block->arrive_and_wait(); }

// One block after the other, each with a thread of the host for each of its own.
template <class... Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params...), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  const auto call = [&]<size_t... I>(std::index_sequence<I...>) { kernel(*static_cast<Params*>(arguments[I])...); };
  for (unsigned b = 0; b < grid.x; ++b) {
    host::begin_block();
    memset(gossamer::cuda::counting_sort::shared_words, 0x55, sizeof gossamer::cuda::counting_sort::shared_words);
    host::warps.clear();
    for (unsigned w = 0; w < block.x / 32; ++w) host::warps.push_back(std::make_unique<host::Warp>());
    whole_block = std::make_unique<std::barrier<>>(block.x);
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < block.x; ++t) {
      threads.emplace_back([&, t] {
        threadIdx = {t};
        blockIdx = {b};
        gridDim = grid;
        call(std::index_sequence_for<Params...>{});
      });
    }
    for (std::thread& thread : threads) thread.join();
    host::end_block();
  }
  return cudaSuccess;
}
