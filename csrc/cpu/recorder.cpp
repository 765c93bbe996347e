#include "cpu/recorder.h"

#include <chrono>
#include <mutex>

namespace gossamer {
namespace {

constexpr size_t kKernels = static_cast<size_t>(TimedKernel::kCount), kStages = static_cast<size_t>(Stage::kCount);
constexpr const char* kKernelNames[kKernels] = {
    "expert_mlp", "expert_mlp_backward", "expert_mlp_lora", "expert_mlp_lora_backward", "delta_rule", "delta_rule_backward"};
constexpr const char* kStageNames[kStages] = {
    "zero",  "pack", "gate_up",  "save",  "activation", "down",  "combine", "dact",    "transpose", "dx",  "dgate_up",
    "ddown", "sums", "low_rank", "round", "keys",       "gates", "states",  "dstates", "gradients", "wait"};

struct Recorded {
  std::mutex mutex;
  int64_t nanoseconds[kKernels][kStages] = {}, pieces[kKernels][kStages] = {};
  std::vector<MemoryEvent> memory;
};

Recorded& recorded() {
  // Never destroyed: memory is still freed while the process exits.
  static Recorded& only = *new Recorded;
  return only;
}

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

std::atomic<bool> recording{false};

void start_recording() {
  Recorded& all = recorded();
  const std::lock_guard lock(all.mutex);
  for (size_t k = 0; k < kKernels; ++k) {
    for (size_t s = 0; s < kStages; ++s) all.nanoseconds[k][s] = all.pieces[k][s] = 0;
  }
  all.memory.clear();
  recording.store(true, std::memory_order_relaxed);
}

std::pair<std::vector<StageTime>, std::vector<MemoryEvent>> stop_recording() {
  recording.store(false, std::memory_order_relaxed);
  Recorded& all = recorded();
  const std::lock_guard lock(all.mutex);
  std::vector<StageTime> times;
  for (size_t k = 0; k < kKernels; ++k) {
    for (size_t s = 0; s < kStages; ++s) {
      if (all.pieces[k][s] > 0) times.push_back({kKernelNames[k], kStageNames[s], all.nanoseconds[k][s], all.pieces[k][s]});
    }
  }
  return {std::move(times), std::exchange(all.memory, {})};
}

void record_memory(int64_t bytes) {
  Recorded& all = recorded();
  const std::lock_guard lock(all.mutex);
  all.memory.push_back({now(), bytes});
}

void StageClock::begin(TimedKernel kernel, int team_size) {
  kernel_ = kernel;
  team_size_ = team_size;
  nanoseconds_.fill(0);
  pieces_.fill(0);
  last_ = now();
}

void StageClock::add(Stage stage) {
  const int64_t time = now();
  nanoseconds_[static_cast<size_t>(stage)] += time - last_;
  ++pieces_[static_cast<size_t>(stage)];
  last_ = time;
}

void StageClock::finish() {
  Recorded& all = recorded();
  const std::lock_guard lock(all.mutex);
  const auto kernel = static_cast<size_t>(kernel_);
  for (size_t s = 0; s < kStages; ++s) {
    all.nanoseconds[kernel][s] += nanoseconds_[s] / team_size_;
    all.pieces[kernel][s] += pieces_[s];
  }
}

}  // namespace gossamer
