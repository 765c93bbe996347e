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
  const char* name;
  const Kernels* kernels;  // null if the install leaves them out
  bool (*runs_here)();
};

#if defined(__x86_64__)
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

bool runs_avx512_bf16() {
  return runs_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}

// Linux saves tile registers only for processes that request them.
bool runs_amx() {
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

// Of the processors measured, Zen 4 does.
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

constexpr Kernels kGeneric{.name = "generic",
                           .pairs = false,
                           .tiles = false,
                           .experts = generic::kExperts,
                           .structured = generic::kStructured,
                           .tables = generic::kTables,
                           .rows = generic::kRows};
#if defined(__x86_64__)
// GOSSAMER_WITHOUT_... leaves instruction sets out of an install.
#ifndef GOSSAMER_WITHOUT_AVX2
constexpr Kernels kAvx2Kernels{.name = "avx2",
                               .pairs = false,
                               .tiles = false,
                               .experts = avx2::kExperts,
                               .structured = avx2::kStructured,
                               .tables = avx2::kTables,
                               .rows = avx2::kRows};
constexpr const Kernels* kAvx2 = &kAvx2Kernels;
#else
constexpr const Kernels* kAvx2 = nullptr;
#endif
#ifndef GOSSAMER_WITHOUT_AVX512
constexpr Kernels kAvx512Kernels{.name = "avx512",
                                 .pairs = false,
                                 .tiles = false,
                                 .experts = avx512::kExperts,
                                 .structured = avx512::kStructured,
                                 .tables = avx512::kTables,
                                 .rows = avx512::kRows};
constexpr const Kernels* kAvx512 = &kAvx512Kernels;
#else
constexpr const Kernels* kAvx512 = nullptr;
#endif
#ifndef GOSSAMER_WITHOUT_AVX512_BF16
constexpr Kernels kAvx512Bf16Kernels{.name = "avx512_bf16",
                                     .pairs = true,
                                     .tiles = false,
                                     .experts = avx512_bf16::kExperts,
                                     .structured = avx512_bf16::kStructured,
                                     .tables = avx512_bf16::kTables,
                                     .rows = avx512_bf16::kRows};
constexpr const Kernels* kAvx512Bf16 = &kAvx512Bf16Kernels;
#else
constexpr const Kernels* kAvx512Bf16 = nullptr;
#endif
#ifndef GOSSAMER_WITHOUT_AMX
constexpr Kernels kAmxKernels{.name = "amx",
                              .pairs = true,
                              .tiles = true,
                              .experts = amx::kExperts,
                              .structured = amx::kStructured,
                              .tables = avx512_bf16::kTables,
                              .rows = avx512_bf16::kRows};
constexpr const Kernels* kAmx = &kAmxKernels;
#else
constexpr const Kernels* kAmx = nullptr;
#endif
#endif

// Best first.
constexpr Build kBuilds[] = {
#if defined(__x86_64__)
    {"amx", kAmx, runs_amx},
    {"avx512_bf16", kAvx512Bf16, runs_avx512_bf16},
    {"avx512", kAvx512, runs_avx512},
    {"avx2", kAvx2, runs_avx2},
#endif
    {"generic", &kGeneric, [] { return true; }},
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
    if (build.kernels != nullptr && (name == nullptr || std::strcmp(name, build.name) == 0) && build.runs_here()) {
      chosen.store(build.kernels, std::memory_order_release);
      return true;
    }
  }
  return false;
}

const char* best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  for (const Build& build : kBuilds) {
    if (build.runs_here()) return build.name;
  }
  return "generic";
}

std::vector<const char*> compiled_isas() {
  std::vector<const char*> names;
  for (const Build& build : kBuilds) {
    if (build.kernels != nullptr) names.push_back(build.name);
  }
  return names;
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
