// Threads: one OpenMP team per call, of the size that torch asks for.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace gossamer {

// A barrier for a team's threads. It spins briefly and then sleeps: when other processes compete for the cores, a spinning thread
// can keep the thread it waits for from running, and OpenMP's own barriers spin for milliseconds.
class Barrier {
 public:
  void wait(int team_size);

 private:
  std::atomic<int32_t> arrived_{0};
  std::atomic<uint32_t> phase_{0};
};

// A thread's index within its team. Kernels take it instead of using OpenMP themselves: they are compiled for an instruction set
// that an outlined parallel region may not inherit.
struct Team {
  int thread, size;
  Barrier* meeting = nullptr;

  void barrier() const {
    if (size > 1) meeting->wait(size);
  }

  struct Range {
    int64_t begin, end;
  };
  // This thread's contiguous share of `count` items, in whole units except at the end.
  Range share(int64_t count, int64_t unit = 1) const {
    const int64_t units = (count + unit - 1) / unit;
    return {std::min(count, units * thread / size * unit), std::min(count, units * (thread + 1) / size * unit)};
  }
};

// Distributes work in units. A thread first takes the units of its own contiguous range, where its caches are warm, and then units
// that slower threads have left. Results do not depend on which thread computed them. Shared, with one counter per thread.
class WorkQueue {
 public:
  static constexpr int64_t kStride = 64 / sizeof(std::atomic<int64_t>);

  WorkQueue() = default;
  explicit WorkQueue(std::atomic<int64_t>* taken) : taken_(taken) {}

  // For a thread that works alone.
  WorkQueue of(int thread) const { return WorkQueue(taken_ + thread * kStride); }

  // Called by every thread, with a barrier before the first each() and between an each() and the next restart().
  void restart(Team team) { taken_[team.thread * kStride].store(0, std::memory_order_relaxed); }

  // Calls f(begin, end) for units of `count` items until none is left. The last `quartered` units of a range are handed out in
  // quarters, so that threads wait less for each other at the end.
  template <class F>
  void each(Team team, int64_t count, int64_t unit, F&& f, int64_t quartered = 0) {
    for (int i = 0; i < team.size; ++i) {
      const int owner = (team.thread + i) % team.size;
      const auto [begin, end] = Team{owner, team.size}.share(count, unit);
      const int64_t whole = std::max<int64_t>(0, (end - begin + unit - 1) / unit - quartered);
      while (true) {
        const int64_t turn = taken_[owner * kStride].fetch_add(1, std::memory_order_relaxed),
                      size = turn < whole ? unit : unit / 4;
        const int64_t at = begin + std::min(turn, whole) * unit + std::max<int64_t>(0, turn - whole) * size;
        if (at >= end) break;
        f(at, std::min(end, at + size));
      }
    }
  }

 private:
  std::atomic<int64_t>* taken_ = nullptr;
};

// Runs f(team) in every thread.
template <class F>
void parallel_team(int num_threads, F&& f) {
  if (num_threads <= 1) {
    f(Team{0, 1});
    return;
  }
  Barrier meeting;
#pragma omp parallel num_threads(num_threads)
  f(Team{omp_get_thread_num(), omp_get_num_threads(), &meeting});
}

// Runs f(begin, end) over [0, count), one contiguous range per thread of at least `grain` items each.
template <class F>
void parallel_ranges(int64_t count, int64_t grain, int num_threads, F&& f) {
  const auto threads = std::clamp<int64_t>(count / std::max<int64_t>(grain, 1), 1, num_threads);
  parallel_team(static_cast<int>(threads), [&](Team team) {
    const auto [begin, end] = team.share(count);
    f(begin, end);
  });
}

}  // namespace gossamer
