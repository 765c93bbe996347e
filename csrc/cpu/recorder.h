// Time and memory of native kernels, for a profiler. Off until started, then on for the whole process.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace gossamer {

enum class TimedKernel {
  kExpertMlp,
  kExpertMlpBackward,
  kExpertMlpLora,
  kExpertMlpLoraBackward,
  kDeltaRule,
  kDeltaRuleBackward,
  kCount
};

enum class Stage {
  kZero,
  kPack,
  kGateUp,
  kSave,
  kActivation,
  kDown,
  kCombine,
  kDact,
  kTranspose,
  kDx,
  kDgateUp,
  kDdown,
  kSums,
  kLowRank,
  kRound,
  kKeys,
  kGates,
  kStates,
  kDstates,
  kGradients,
  kWait,
  kCount
};

// The record of one stage of a kernel: nanoseconds, averaged over the threads of each call's team, and the number of pieces of
// work.
struct StageTime {
  const char *kernel, *stage;
  int64_t nanoseconds, pieces;
};

// Bytes allocated (positive) or freed (negative), and the time by the steady clock.
struct MemoryEvent {
  int64_t nanoseconds, bytes;
};

extern std::atomic<bool> recording;

// Clears the record and starts recording.
void start_recording();

// Stops recording; stages that took no time are left out.
std::pair<std::vector<StageTime>, std::vector<MemoryEvent>> stop_recording();

// Records memory that does not come from torch's allocators.
void record_memory(int64_t bytes);
inline void note_memory(int64_t bytes) {
  if (recording.load(std::memory_order_relaxed)) record_memory(bytes);
}

// One thread's stopwatch for one call: each lap adds the time since the last one to a stage. Constructed at the start of the call;
// its times are recorded when it is destroyed.
class StageClock {
 public:
  StageClock(TimedKernel kernel, int team_size) : on_(recording.load(std::memory_order_relaxed)) {
    if (on_) begin(kernel, team_size);
  }
  StageClock(const StageClock&) = delete;
  StageClock& operator=(const StageClock&) = delete;
  ~StageClock() {
    if (on_) finish();
  }

  void lap(Stage stage) {
    if (on_) add(stage);
  }

 private:
  static constexpr size_t kStages = static_cast<size_t>(Stage::kCount);

  void begin(TimedKernel kernel, int team_size);
  void add(Stage stage);
  void finish();

  const bool on_;
  TimedKernel kernel_;
  int team_size_;
  int64_t last_;
  std::array<int64_t, kStages> nanoseconds_, pieces_;
};

}  // namespace gossamer
