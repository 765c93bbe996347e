#include "cpu/parallel.h"

#include <chrono>

namespace gossamer {
namespace {

// About the cost of waking a sleeping thread.
constexpr std::chrono::microseconds kSpin{50};

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

}  // namespace

void Barrier::wait(int team_size) {
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == team_size) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    phase_.notify_all();
    return;
  }
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
      relax();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  phase_.wait(phase, std::memory_order_acquire);
}

}  // namespace gossamer
