#include "cpu/core_distance.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cpu/parallel.h"

namespace gossamer {
namespace {

constexpr int kBursts = 5, kTrips = 100;
// Threads that share a core, as just-woken threads may, pass the line once per time slice; the measurement then gives up.
constexpr std::chrono::milliseconds kPatience{2};

using Clock = std::chrono::steady_clock;

struct alignas(64) Line {
  std::atomic<uint32_t> turns{0};
};

// Passes the cache line back and forth until `until`; the other thread takes the odd turns. Returns false if it gave up.
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

}  // namespace

double core_distance(int num_threads) {
  const int pairs = num_threads / 2;
  if (pairs == 0) return 0;
  std::vector<Line> lines(pairs);
  std::vector<double> least(pairs, kGivenUp);
  parallel_team(num_threads, [&](Team team) {
    const int pair = team.thread / 2, place = team.thread % 2;
    if (pair == pairs) return;
    const auto deadline = Clock::now() + kPatience;
    for (uint32_t burst = 0; burst < kBursts; ++burst) {
      const uint32_t from = 2 * kTrips * burst;
      const auto start = Clock::now();
      if (!pass(lines[pair].turns, from + place, from + 2 * kTrips, deadline)) return;
      const double trip = std::chrono::duration<double>(Clock::now() - start).count() / kTrips;
      if (place == 0) least[pair] = std::min(least[pair], trip);
    }
  });
  return std::accumulate(least.begin(), least.end(), 0.0) / pairs;
}

}  // namespace gossamer
