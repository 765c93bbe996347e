// Threads: one OpenMP team a call, of the size torch asks for.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace gossamer {

// A thread's place in its team. Kernels take one instead of using OpenMP themselves, because they are compiled for an
// instruction set that the outlined parallel region may not inherit.
struct Team {
  int thread, size;

  void barrier() const;

  struct Range {
    int64_t begin, end;
  };
  // This thread's contiguous share of `count` items, in whole units but for the end.
  Range share(int64_t count, int64_t unit = 1) const {
    const int64_t units = (count + unit - 1) / unit;
    return {std::min(count, units * thread / size * unit), std::min(count, units * (thread + 1) / size * unit)};
  }
};

// Runs f(team) in every thread.
template <class F>
void parallel_team(int num_threads, F&& f) {
  if (num_threads <= 1) {
    f(Team{0, 1});
    return;
  }
#pragma omp parallel num_threads(num_threads)
  f(Team{omp_get_thread_num(), omp_get_num_threads()});
}

// Runs f(begin, end) over [0, count) cut into one contiguous range a thread, with at least `grain` items each.
template <class F>
void parallel_ranges(int64_t count, int64_t grain, int num_threads, F&& f) {
  const auto threads = std::clamp<int64_t>(count / std::max<int64_t>(grain, 1), 1, num_threads);
  parallel_team(static_cast<int>(threads), [&](Team team) {
    const auto [begin, end] = team.share(count);
    f(begin, end);
  });
}

}  // namespace gossamer
