// The frame of every kernel here: a persistent, warp-specialised matrix product.
//
// Warpgroup 0 fills stages of shared memory (the producer), warpgroups 1 and 2 multiply and finish tiles (consumers):
// they either share the halves of one tile (cooperative) or alternate between tiles, so that the epilogue of one overlaps the
// product of the other (ping-pong). Each stage has two mbarriers: full and empty.
//
// A wait on an mbarrier identifies a phase by its parity only, so no thread may wait two phases ahead: it would mistake the phase
// before last for its own. A thread that waits has therefore waited for the stage's previous use or, in ping-pong, for its turn,
// which comes after the other warpgroup has seen its last stage full.
//
// Blocks of a cluster take consecutive row tiles of one expert and the same columns; each multicasts a part of the weight tile to
// all of them. A stage is free when the consumers of all blocks have read it, and a block must not end while another one writes to
// it or arrives at its barriers.
//
// A problem gives the sizes, the schedule of tiles, what the producer loads and what happens to a finished tile.
#pragma once

#include "cuda/hopper/layout.h"
#include "cuda/hopper/pipeline.h"
#include "cuda/hopper/ptx.cuh"
#include "cuda/hopper/schedule.h"
#include "cuda/hopper/wgmma.cuh"

namespace gossamer::hopper {

constexpr int kGroupThreads = 128;
constexpr int kWarpsPerGroup = 4;
constexpr int kThreads = 3 * kGroupThreads;

// kChunkCopies: the producer's 128 threads copy gathered rows in chunks of 16 bytes; otherwise one thread issues TMA copies.
// kCluster: blocks of a cluster.
template <typename T_, int kBlockM_, int kBlockN_, int kStages_, bool kPingPong_, bool kChunkCopies_, int kCluster_ = 1>
struct Shape {
  using T = T_;
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kStages = kStages_;
  static constexpr bool kPingPong = kPingPong_, kChunkCopies = kChunkCopies_;
  static constexpr int kCluster = kCluster_;
  // Rows that the blocks of a cluster take together.
  static constexpr int kTileRows = kBlockM * kCluster;
  static constexpr int kPanelsA = kBlockM / kPanel, kPanelsB = kBlockN / kPanel;
  static constexpr int kStageBytes = stage_bytes(kBlockM, kBlockN);
  // Blocks of 64 rows that a consumer warpgroup multiplies.
  static constexpr int kBlocks = kPingPong ? kPanelsA : kPanelsA / 2;
  // Threads that copy rows keep addresses in registers. 128 producer and 256 consumer threads share the launch's 504 registers per
  // three threads; accumulators take up to 192 of a consumer's.
  static constexpr bool kMostAccumulators = kBlocks * kBlockN / 2 > 128;
  static constexpr int kProducerRegisters = kChunkCopies ? 56 : kMostAccumulators ? 24 : 40;
  static constexpr int kConsumerRegisters = kChunkCopies ? 224 : kMostAccumulators ? 240 : 232;
  static constexpr int kFullArrivals = 1 + (kChunkCopies ? kGroupThreads : 0);
  static constexpr int kEmptyArrivals = kWarpsPerGroup * (kPingPong ? 1 : 2) * kCluster;
  static constexpr int kBarriersStart = barriers_start(kBlockM, kBlockN, kStages);
  static constexpr int kSharedBytes = shared_bytes(kBlockM, kBlockN, kStages);
  static_assert(kBlocks >= 1 && kSharedBytes <= kSharedLimit);
  static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168);
};

template <class S>
class Shared {
 public:
  __device__ explicit Shared(uint8_t* memory) {
    const uint32_t start = shared_address(memory);
    base_ = (start + kAtomBytes - 1) / kAtomBytes * kAtomBytes;
    staging_ = memory + (base_ - start) + S::kStages * S::kStageBytes;
  }
  __device__ uint32_t stage(int stage) const { return base_ + stage * S::kStageBytes; }
  __device__ uint32_t full(int stage) const { return base_ + S::kBarriersStart + 8 * stage; }
  __device__ uint32_t empty(int stage) const { return full(S::kStages + stage); }
  // The phase ends when consumer warpgroup `group` may begin its next product.
  __device__ uint32_t turn(int group) const { return full(2 * S::kStages + group); }
  // The piece of a consumer warp, 0 to 7.
  __device__ uint8_t* staging(int warp) const { return staging_ + warp * kWarpStaging; }

 private:
  uint32_t base_;
  uint8_t* staging_;
};

// A consumer warpgroup: 0 or 1, its place in the ring, and the first of its blocks of 64 rows.
template <class S>
struct Consumer {
  int group;
  RingPosition at{0, 0};

  __device__ explicit Consumer(int group) : group(group) {}
  __device__ int first_block() const { return S::kPingPong ? 0 : group * S::kBlocks; }
};

// Marks a stage as read by this warp: each of the first kCluster lanes arrives at one block of the cluster.
template <class S>
__device__ __forceinline__ void free_stage(const Shared<S>& shared, int stage) {
  if constexpr (S::kCluster == 1) {
    barrier_arrive(shared.empty(stage));
  } else {
    barrier_arrive_at(shared.empty(stage), threadIdx.x % kLanes);
  }
}

// Sums `num_steps` stages into the accumulators of the warpgroup's blocks, and frees the stages.
template <class S, bool kMnA, bool kMnB>
__device__ __forceinline__ void multiply(float (&acc)[S::kBlocks][S::kBlockN / 2], const Shared<S>& shared,
                                         Consumer<S>& consumer, int num_steps) {
  RingPosition& at = consumer.at;
  const uint64_t a0 = operand_descriptor(shared.stage(0) + consumer.first_block() * kPanelBytes, !kMnA);
  const uint64_t b0 = operand_descriptor(shared.stage(0) + S::kPanelsA * kPanelBytes, !kMnB);
  const bool frees = threadIdx.x % kLanes < S::kCluster;
  int previous = 0;
  for (int step = 0; step < num_steps; ++step) {
    barrier_wait(shared.full(at.stage), at.parity);
    __syncwarp();
    if constexpr (S::kChunkCopies) copies_before_mma();
    const uint64_t stage = static_cast<uint64_t>(at.stage) * (S::kStageBytes >> 4);
    mma_begin();
#pragma unroll
    for (int k = 0; k < kPanel / kMmaK; ++k) {
#pragma unroll
      for (int block = 0; block < S::kBlocks; ++block) {
        mma<typename S::T, S::kBlockN, kMnA, kMnB>(acc[block],
                                                   a0 + stage + k * descriptor_step(!kMnA) + block * (kPanelBytes >> 4),
                                                   b0 + stage + k * descriptor_step(!kMnB), step + k > 0 ? 1 : 0);
      }
    }
    mma_commit();
    // All but the newest stage have been read.
    mma_wait<1>();
    if (step > 0 && frees) free_stage(shared, previous);
    previous = at.stage;
    at = next<S::kStages>(at);
  }
  if (S::kPingPong && frees && (S::kCluster == 1 || threadIdx.x % kLanes == 0)) {
    barrier_arrive(shared.turn(1 - consumer.group));
  }
  mma_wait<0>();
#pragma unroll
  for (int block = 0; block < S::kBlocks; ++block) mma_results(acc[block]);
  if (num_steps > 0 && frees) free_stage(shared, previous);
}

// Clusters take tiles in turn, as blocks do where a cluster is one.
template <class S>
__device__ __forceinline__ int64_t first_tile() {
  return blockIdx.x / S::kCluster;
}
template <class S>
__device__ __forceinline__ int64_t num_clusters() {
  return gridDim.x / S::kCluster;
}

// The block's part of the cluster's rows, which may be none: it then starts where the group ends.
template <class S>
__device__ __forceinline__ void take_part(Tile& tile) {
  if constexpr (S::kCluster > 1) {
    const int64_t row = tile.row + int64_t{cluster_rank()} * S::kBlockM;
    tile.row = static_cast<int32_t>(min(row, int64_t{tile.row_end}));
  }
}

template <class Problem>
__device__ __forceinline__ void consume(const typename Problem::Params& p, const Shared<typename Problem::S>& shared,
                                        int group) {
  using S = typename Problem::S;
  auto schedule = Problem::schedule(p);
  uint8_t* staging = shared.staging(group * kWarpsPerGroup + threadIdx.x / kLanes % kWarpsPerGroup);
  Consumer<S> consumer(group);
  Problem::prepare(p);
  int64_t index = first_tile<S>();
  uint32_t turn_parity = group == 0 ? 1 : 0;
  if (S::kPingPong && group == 1) {
    index += num_clusters<S>();
    consumer.at = advanced<S::kStages>(consumer.at, Problem::steps_of_every_tile(p));
  }
  Tile tile;
  for (; schedule.seek(index, tile); index += (S::kPingPong ? 2 : 1) * num_clusters<S>()) {
    take_part<S>(tile);
    float acc[S::kBlocks][S::kBlockN / 2];
    if constexpr (S::kPingPong) {
      barrier_wait(shared.turn(group), turn_parity);
      turn_parity ^= 1;
    }
    Problem::multiply_tile(p, tile, acc, shared, consumer);
    if constexpr (S::kPingPong) {
      consumer.at = advanced<S::kStages>(consumer.at, Problem::steps_of_every_tile(p));
    }
#pragma unroll
    for (int block = 0; block < S::kBlocks; ++block) {
      Problem::finish(p, tile, acc[block], staging, (consumer.first_block() + block) * kPanel);
    }
    __syncwarp();
  }
}

template <class Problem>
__device__ __forceinline__ void produce(const typename Problem::Params& p, const Shared<typename Problem::S>& shared) {
  using S = typename Problem::S;
  // Without chunk copies one warp finds the tiles, and one of its threads issues the copies.
  if (!S::kChunkCopies && threadIdx.x >= kLanes) return;
  auto schedule = Problem::schedule(p);
  RingPosition at{0, 0};
  Tile tile;
  for (int64_t index = first_tile<S>(); schedule.seek(index, tile); index += num_clusters<S>()) {
    take_part<S>(tile);
    Problem::load_tile(p, tile, shared, at);
  }
  // Waits until every stage has been read, so that no copy is in flight when the block ends.
  if (!S::kChunkCopies && threadIdx.x != 0) return;
  for (int stage = 0; stage < S::kStages; ++stage) {
    barrier_wait<(S::kCluster > 1)>(shared.empty(at.stage), at.parity ^ 1);
    at = next<S::kStages>(at);
  }
}

template <class Problem>
__global__ void __launch_bounds__(kThreads, 1) kernel(const __grid_constant__ typename Problem::Params p) {
  using S = typename Problem::S;
  GOSSAMER_DYNAMIC_SHARED(memory);
  const Shared<S> shared(memory);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::kStages; ++stage) {
      barrier_init(shared.full(stage), S::kFullArrivals);
      barrier_init(shared.empty(stage), S::kEmptyArrivals);
    }
    for (int group = 0; group < 2; ++group) barrier_init(shared.turn(group), kWarpsPerGroup);
    barrier_init_fence();
  }
  if constexpr (S::kCluster > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
  if (group == 0) {
    give_registers<S::kProducerRegisters>();
    produce<Problem>(p, shared);
  } else {
    take_registers<S::kConsumerRegisters>();
    consume<Problem>(p, shared, group - 1);
  }
  if constexpr (S::kCluster > 1) cluster_sync();
}

}  // namespace gossamer::hopper
