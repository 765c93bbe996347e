#include "cpu/core_distance.h"

#include <atomic>
#include <chrono>
#include <cstdint>

#include "cpu/parallel.h"

namespace gossamer {
namespace {

constexpr int kBursts = 5, kTrips = 100;
// Threads that share a core, as some do that were just woken, pass the line once in a scheduler's time slice: given up.
constexpr std::chrono::milliseconds kPatience{2};

using Clock = std::chrono::steady_clock;

struct alignas(64) Line {
  std::atomic<uint32_t> turns{0};
};

// Passes the line to the other thread until `until`, which takes the odd turns; false when it gave up.
bool pass(std::atomic<uint32_t>& turns, uint32_t from, uint32_t until, Clock::time_point deadline) {
  for (uint32_t turn = from; turn < until; turn += 2) {
    for (int spins = 1; turns.load(std::memory_order_acquire) != turn; ++spins) {
      if (spins % 1024 == 0 && Clock::now() > deadline) return false;
    }
    turns.store(turn + 1, std::memory_order_release);
  }
  return true;
}

constexpr double kGivenUp = std::chrono::duration<double>(kPatience).count() / kTrips;

// The distance of two threads of a team, `first` and the next.
double between(int first, int num_threads) {
  Line line;
  double least = kGivenUp;
  parallel_team(num_threads, [&](Team team) {
    const int place = team.thread - first;
    if (place != 0 && place != 1) return;
    const auto deadline = Clock::now() + kPatience;
    for (uint32_t burst = 0; burst < kBursts; ++burst) {
      const uint32_t from = 2 * kTrips * burst;
      const auto start = Clock::now();
      if (!pass(line.turns, from + place, from + 2 * kTrips, deadline)) return;
      if (place == 0) least = std::min(least, std::chrono::duration<double>(Clock::now() - start).count() / kTrips);
    }
  });
  return least;
}

}  // namespace

double core_distance(int num_threads) {
  if (num_threads < 2) return 0;
  double sum = 0;
  for (int first = 0; first + 1 < num_threads; ++first) sum += between(first, num_threads);
  return sum / (num_threads - 1);
}

}  // namespace gossamer
