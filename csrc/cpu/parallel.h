// Threads: one OpenMP team a call, of the size torch asks for.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace gossamer {

// Runs f(begin, end) over [0, count) cut into one contiguous range a thread, with at least `grain` items each.
template <class F>
void parallel_ranges(int64_t count, int64_t grain, int num_threads, F&& f) {
  const int threads = static_cast<int>(std::clamp<int64_t>(count / std::max<int64_t>(grain, 1), 1, num_threads));
  if (threads == 1) {
    f(int64_t{0}, count);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    f(count * thread / team, count * (thread + 1) / team);
  }
}

}  // namespace gossamer
