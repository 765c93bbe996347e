// Each block counts one span of slots; then each slot is placed by the counts of earlier spans and its rank within the span. All
// values are integers and every position is a function of the ids, so the result does not depend on the order of threads.
#include "cuda/dispatch.cuh"

#include <cuda_runtime.h>

namespace gossamer::cuda::counting_sort {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Largest number of blocks. Each block sums the counts of all blocks instead of leaving it to another launch: this reads
// blocks²·(E+1) words from L2, which kCounts bounds for many experts. Neither choice has GPU timings yet.
constexpr int64_t kSpans = 256;
constexpr int64_t kCounts = 1 << 24;
// Largest number of slots that one block counts and places alone.
constexpr int64_t kSingleSlots = 2048;
// Experts of one pass; more take more passes.
constexpr int kBins = 4096;
constexpr unsigned kAll = 0xffffffffu;

struct Params {
  DispatchArgs args;
  int64_t num_spans, span_slots;
};

// Words of shared memory: two per expert and one per warp.
int64_t shared_words_of(int64_t num_bins) { return 2 * (num_bins < kBins ? num_bins : kBins) + kWarps; }

// Expert of a slot, E where it is dropped.
template <typename Id>
__device__ int load_expert(const DispatchArgs& args, int64_t slot) {
  const auto* ids = static_cast<const Id*>(args.expert_ids);
  const auto flat = static_cast<uint32_t>(slot), top_k = static_cast<uint32_t>(args.top_k);
  const int64_t id = ids[flat / top_k * args.token_stride + flat % top_k * args.slot_stride];
  return static_cast<int>(id < 0 || id > args.num_experts ? args.num_experts : id);
}

// The slots of a block.
struct Span {
  int64_t begin, end;
  __device__ explicit Span(const Params& p)
      : begin(blockIdx.x * p.span_slots), end(min(begin + p.span_slots, p.args.num_rows)) {}
};

// Adds the number of the block's slots for each expert first .. first + width to bins[0 .. width).
template <typename Id>
__device__ void count(const Params& p, int first, int width, int32_t* bins) {
  const Span span(p);
  for (int64_t slot = span.begin + threadIdx.x; slot < span.end; slot += kThreads) {
    const int expert = load_expert<Id>(p.args, slot) - first;
    if (expert >= 0 && expert < width) atomicAdd(&bins[expert], 1);
  }
}

template <typename Id>
__global__ void __launch_bounds__(kThreads) count_kernel(const Params p) {
  extern __shared__ int32_t shared_words[];
  const int num_bins = static_cast<int>(p.args.num_experts) + 1;
  for (int first = 0; first < num_bins; first += kBins) {
    const int width = min(num_bins - first, kBins);
    for (int b = threadIdx.x; b < width; b += kThreads) shared_words[b] = 0;
    __syncthreads();
    count<Id>(p, first, width, shared_words);
    __syncthreads();
    int32_t* mine = p.args.scratch + static_cast<int64_t>(blockIdx.x) * num_bins + first;
    for (int b = threadIdx.x; b < width; b += kThreads) mine[b] = shared_words[b];
    __syncthreads();
  }
}

// Adds the counts of all spans to `totals`, and those of the spans before this one to `before`.
__device__ void add_spans(const Params& p, int first, int width, int32_t* totals, int32_t* before) {
  const int64_t num_bins = p.args.num_experts + 1;
  // With few experts, several threads share one expert, each with some of the spans.
  const int parts = max(4 * kThreads / width, 1);
  for (int item = threadIdx.x; item < width * parts; item += kThreads) {
    const int b = item % width;
    int total = 0, mine = 0;
#pragma unroll 8
    for (int64_t span = item / width; span < p.num_spans; span += parts) {
      const int counted = p.args.scratch[span * num_bins + first + b];
      total += counted;
      if (span < blockIdx.x) mine += counted;
    }
    atomicAdd(&totals[b], total);
    atomicAdd(&before[b], mine);
  }
}

// Sum over the threads before this one, and over all of them in `total`.
__device__ int block_exclusive_sum(int value, int32_t* warp_sums, int* total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int sum = value;
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kAll, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == kWarp - 1) warp_sums[warp] = sum;
  __syncthreads();
  int before = 0, all = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = all;
    all += warp_sums[w];
  }
  __syncthreads();
  *total = all;
  return before + sum - value;
}

// One span per block; a single block needs no counts from others.
template <typename Id>
__global__ void __launch_bounds__(kThreads) place_kernel(const Params p) {
  extern __shared__ int32_t shared_words[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int num_bins = static_cast<int>(p.args.num_experts) + 1;
  const Span span(p);
  int carry = 0;
  for (int first = 0; first < num_bins; first += kBins) {
    const int width = min(num_bins - first, kBins);
    int32_t* totals = shared_words;
    // The row that the next slot of each expert gets.
    int32_t* next = totals + width;
    int32_t* warp_sums = next + width;
    for (int b = threadIdx.x; b < 2 * width; b += kThreads) shared_words[b] = 0;
    __syncthreads();
    if (p.num_spans == 1) {
      count<Id>(p, first, width, totals);
    } else {
      add_spans(p, first, width, totals, next);
    }
    __syncthreads();
    for (int b0 = 0; b0 < width; b0 += kThreads) {
      const int b = b0 + static_cast<int>(threadIdx.x);
      int all;
      const int offset = carry + block_exclusive_sum(b < width ? totals[b] : 0, warp_sums, &all);
      carry += all;
      if (b < width) next[b] += offset;
      if (b < width && blockIdx.x == 0) p.args.offsets[first + b] = offset;
    }
    __syncthreads();
    for (int64_t begin = span.begin; begin < span.end; begin += kThreads) {
      const int64_t slot = begin + threadIdx.x;
      int expert = slot < span.end ? load_expert<Id>(p.args, slot) - first : -1;
      if (expert >= width) expert = -1;
      const bool here = expert >= 0;
      // Lanes of one expert are ranked by their mask, warps by taking turns.
      const unsigned peers = __match_any_sync(kAll, here ? expert : -1);
      const int earlier = __popc(peers & ((1u << lane) - 1));
      int row = 0;
      for (int turn = 0; turn < kWarps; ++turn) {
        if (turn == warp) {
          if (here) row = next[expert] + earlier;
          __syncwarp();
          if (here && earlier == 0) next[expert] += __popc(peers);
        }
        __syncthreads();
      }
      if (here) {
        p.args.rows[slot] = row;
        p.args.slots[row] = static_cast<int32_t>(slot);
      }
    }
  }
}

Params params_of(const DispatchArgs& args) {
  if (args.num_rows <= kSingleSlots) return {args, 1, args.num_rows};
  int64_t most = kSpans;
  while (most * most * (args.num_experts + 1) > kCounts && most > 32) most /= 2;
  const int64_t rounds = (args.num_rows + kThreads - 1) / kThreads;
  const int64_t span = (rounds + most - 1) / most * kThreads;
  return {args, (args.num_rows + span - 1) / span, span};
}

cudaError_t launch(void (*kernel)(Params), Params p, cudaStream_t stream) {
  void* arguments[] = {&p};
  const size_t shared = sizeof(int32_t) * shared_words_of(p.args.num_experts + 1);
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(p.num_spans)), dim3(kThreads), arguments, shared, stream);
}

template <typename Id>
cudaError_t sort(const Params& p, cudaStream_t stream) {
  if (p.num_spans > 1) {
    if (const cudaError_t error = launch(count_kernel<Id>, p, stream); error != cudaSuccess) return error;
  }
  return launch(place_kernel<Id>, p, stream);
}

}  // namespace gossamer::cuda::counting_sort

namespace gossamer::cuda {

int64_t dispatch_scratch_size(int64_t num_rows, int64_t num_experts) {
  DispatchArgs args{};
  args.num_rows = num_rows;
  args.num_experts = num_experts;
  const int64_t spans = counting_sort::params_of(args).num_spans;
  return spans == 1 ? 0 : spans * (num_experts + 1);
}

const char* dispatch(const DispatchArgs& args, int device, void* stream) {
  // The statically linked CUDA runtime has its own current device.
  if (const cudaError_t error = cudaSetDevice(device); error != cudaSuccess) return cudaGetErrorString(error);
  const counting_sort::Params params = counting_sort::params_of(args);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error =
      args.int64_ids ? counting_sort::sort<int64_t>(params, cuda_stream) : counting_sort::sort<int32_t>(params, cuda_stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace gossamer::cuda
