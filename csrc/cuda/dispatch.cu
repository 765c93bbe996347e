// Tile histograms, prefix sums over tiles and experts, placement by rank within a tile. Integers only, and every slot's
// place is a function of the ids, so the order in which threads run does not show.
#include "cuda/dispatch.cuh"

#include <cuda_runtime.h>

namespace gossamer::cuda {
namespace {

constexpr int kWarp = 32;
// Slots of a tile: one block counts them, one warp places them in kRounds steps.
constexpr int kTile = 256;
constexpr int kRounds = kTile / kWarp;
constexpr int kPlaceWarps = 4;
constexpr int kScanThreads = 256;
constexpr int kScanItems = 4;
// Bins of one pass of a histogram; more experts take more passes.
constexpr int kBins = 8192;
constexpr unsigned kAll = 0xffffffffu;

struct Sizes {
  int64_t num_rows, top_k, token_stride, slot_stride, num_experts, num_tiles;
};

// Expert of a slot, E where it is dropped.
template <typename Id>
__device__ int load_expert(const Id* ids, int64_t slot, const Sizes& s) {
  const auto flat = static_cast<uint32_t>(slot), top_k = static_cast<uint32_t>(s.top_k);
  const int64_t id = ids[flat / top_k * s.token_stride + flat % top_k * s.slot_stride];
  return static_cast<int>(id < 0 || id > s.num_experts ? s.num_experts : id);
}

template <typename Id>
__global__ void __launch_bounds__(kTile) histogram_kernel(const Id* ids, int32_t* counts, int32_t* done, Sizes s) {
  extern __shared__ int32_t bins[];
  const int64_t tile = blockIdx.x;
  const int64_t slot = tile * kTile + threadIdx.x;
  const int64_t num_bins = s.num_experts + 1;
  const int64_t expert = slot < s.num_rows ? load_expert(ids, slot, s) : num_bins;
  if (tile == 0 && threadIdx.x == 0) *done = 0;
  for (int64_t first = 0; first < num_bins; first += kBins) {
    const int width = static_cast<int>(min(num_bins - first, int64_t{kBins}));
    for (int b = threadIdx.x; b < width; b += kTile) bins[b] = 0;
    __syncthreads();
    if (expert >= first && expert < first + width) atomicAdd(&bins[expert - first], 1);
    __syncthreads();
    for (int b = threadIdx.x; b < width; b += kTile) counts[(first + b) * s.num_tiles + tile] = bins[b];
    __syncthreads();
  }
}

// Sum over the threads before this one, and over all of them in `total`.
__device__ int block_exclusive_sum(int value, int* total) {
  __shared__ int warp_sums[kScanThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int sum = value;
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kAll, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == kWarp - 1) warp_sums[warp] = sum;
  __syncthreads();
  int before = 0, all = 0;
  for (int w = 0; w < kScanThreads / kWarp; ++w) {
    if (w == warp) before = all;
    all += warp_sums[w];
  }
  __syncthreads();
  *total = all;
  return before + sum - value;
}

// Replaces `size` values by their exclusive prefix sums, written to `out`; returns their sum.
__device__ int exclusive_scan(const int32_t* values, int32_t* out, int64_t size) {
  int carry = 0;
  for (int64_t first = 0; first < size; first += kScanThreads * kScanItems) {
    const int64_t mine = first + static_cast<int64_t>(threadIdx.x) * kScanItems;
    int item[kScanItems], sum = 0;
    for (int i = 0; i < kScanItems; ++i) {
      item[i] = mine + i < size ? __ldcg(values + mine + i) : 0;
      sum += item[i];
    }
    int total;
    int running = carry + block_exclusive_sum(sum, &total);
    for (int i = 0; i < kScanItems; ++i) {
      if (mine + i < size) out[mine + i] = running;
      running += item[i];
    }
    carry += total;
  }
  return carry;
}

// One block an expert: counts become the rows of it in earlier tiles. The last block to end turns totals into offsets.
__global__ void __launch_bounds__(kScanThreads)
    scan_kernel(int32_t* counts, int32_t* totals, int32_t* offsets, int32_t* done, int64_t num_tiles) {
  int32_t* row = counts + blockIdx.x * num_tiles;
  const int total = exclusive_scan(row, row, num_tiles);
  __shared__ bool last;
  if (threadIdx.x == 0) {
    totals[blockIdx.x] = total;
    __threadfence();
    last = atomicAdd(done, 1) == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (last) {
    __threadfence();
    exclusive_scan(totals, offsets, gridDim.x);
  }
}

// One warp a tile: 32 slots at a time in order, lanes of one expert ranked by their mask.
template <typename Id>
__global__ void __launch_bounds__(kPlaceWarps* kWarp)
    place_kernel(const Id* ids, int32_t* counts, const int32_t* offsets, int32_t* slots, int32_t* rows, Sizes s) {
  const int lane = threadIdx.x % kWarp;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kPlaceWarps + threadIdx.x / kWarp;
  if (tile >= s.num_tiles) return;
  const int64_t first = tile * kTile + lane;
  int expert[kRounds], start[kRounds];
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int64_t slot = first + i * kWarp;
    expert[i] = slot < s.num_rows ? load_expert(ids, slot, s) : -1;
  }
#pragma unroll
  for (int i = 0; i < kRounds; ++i) start[i] = expert[i] < 0 ? 0 : offsets[expert[i]];
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const unsigned peers = __match_any_sync(kAll, expert[i]);
    const int earlier = __popc(peers & ((1u << lane) - 1));
    // The warp's own column of counts holds what it has placed so far.
    volatile int32_t* placed = counts + max(expert[i], 0) * s.num_tiles + tile;
    const int before = *placed;
    __syncwarp();
    if (expert[i] >= 0) {
      const int row = start[i] + before + earlier;
      const int64_t slot = first + i * kWarp;
      rows[slot] = row;
      slots[row] = static_cast<int32_t>(slot);
      if (earlier == 0) *placed = before + __popc(peers);
    }
    __syncwarp();
  }
}

template <typename Id>
void launch(const DispatchArgs& args, const Sizes& s, cudaStream_t stream) {
  const auto* ids = static_cast<const Id*>(args.expert_ids);
  const int64_t num_bins = s.num_experts + 1;
  int32_t* counts = args.scratch;
  int32_t* totals = counts + num_bins * s.num_tiles;
  int32_t* done = totals + num_bins;
  const size_t shared = sizeof(int32_t) * (num_bins < kBins ? num_bins : kBins);
  histogram_kernel<<<static_cast<unsigned>(s.num_tiles), kTile, shared, stream>>>(ids, counts, done, s);
  scan_kernel<<<static_cast<unsigned>(num_bins), kScanThreads, 0, stream>>>(counts, totals, args.offsets, done,
                                                                           s.num_tiles);
  const auto blocks = static_cast<unsigned>((s.num_tiles + kPlaceWarps - 1) / kPlaceWarps);
  place_kernel<<<blocks, kPlaceWarps * kWarp, 0, stream>>>(ids, counts, args.offsets, args.slots, args.rows, s);
}

int64_t num_tiles(int64_t num_rows) { return (num_rows + kTile - 1) / kTile; }

}  // namespace

int64_t dispatch_scratch_size(int64_t num_rows, int64_t num_experts) {
  return (num_experts + 1) * (num_tiles(num_rows) + 1) + 1;
}

const char* dispatch(const DispatchArgs& args, int device, void* stream) {
  // The static runtime of this library has a current device of its own.
  if (const cudaError_t error = cudaSetDevice(device); error != cudaSuccess) return cudaGetErrorString(error);
  const Sizes sizes{args.num_rows,    args.top_k,       args.token_stride,
                    args.slot_stride, args.num_experts, num_tiles(args.num_rows)};
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (args.int64_ids) {
    launch<int64_t>(args, sizes, cuda_stream);
  } else {
    launch<int32_t>(args, sizes, cuda_stream);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace gossamer::cuda
