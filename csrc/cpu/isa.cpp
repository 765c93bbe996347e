#include "cpu/isa.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gossamer {
namespace {

struct Build {
  const Kernels* kernels;
  bool (*runs_here)();
};

#if defined(__x86_64__)
[[maybe_unused]] bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

[[maybe_unused]] bool runs_avx512_bf16() { return runs_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Linux saves tile registers only for processes that request them.
[[maybe_unused]] bool runs_amx() {
#if defined(__linux__)
  constexpr unsigned kTiles = 1u << 24, kBFloat16 = 1u << 22;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (!runs_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d & kTiles) && (d & kBFloat16) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Zen 4 does, among the processors measured.
bool splits_vectors() {
#if defined(__x86_64__)
  constexpr unsigned kAmd = 0x68747541, kZen4 = 0x19;  // "Auth" of the vendor's name; Zen 3, of the same family, has no AVX-512
  unsigned a, b, c, d;
  if (!__get_cpuid(0, &a, &b, &c, &d) || b != kAmd || !__get_cpuid(1, &a, &b, &c, &d)) return false;
  return ((a >> 8) & 0xf) + ((a >> 20) & 0xff) == kZen4;
#else
  return false;
#endif
}

// Best first. GOSSAMER_WITHOUT_... leaves instruction sets out of an install.
const Build kBuilds[] = {
#if defined(__x86_64__)
#ifndef GOSSAMER_WITHOUT_AMX
    {&amx::kKernels, runs_amx},
#endif
#ifndef GOSSAMER_WITHOUT_AVX512_BF16
    {&avx512_bf16::kKernels, runs_avx512_bf16},
#endif
#ifndef GOSSAMER_WITHOUT_AVX512
    {&avx512::kKernels, runs_avx512},
#endif
#ifndef GOSSAMER_WITHOUT_AVX2
    {&avx2::kKernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
#endif
    {&generic::kKernels, [] { return true; }},
};

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const bool kSplitsVectors = splits_vectors();

const Kernels& kernels() {
  const Kernels* current = chosen.load(std::memory_order_acquire);
  if (current == nullptr) {
    choose_kernels(nullptr);
    current = chosen.load(std::memory_order_acquire);
  }
  return *current;
}

bool choose_kernels(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  for (const Build& build : kBuilds) {
    if ((name == nullptr || std::strcmp(name, build.kernels->name) == 0) && build.runs_here()) {
      chosen.store(build.kernels, std::memory_order_release);
      return true;
    }
  }
  return false;
}

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace gossamer
