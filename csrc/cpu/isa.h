// The kernels as compiled for each instruction set, and the choice among them at run time.
#pragma once

#include <cstdint>

#include "cpu/gather_reduce.h"

namespace gossamer {

// One instruction set's build of the vector kernels. Each is called by every thread of a team with its number.
struct Kernels {
  const char* name;
  void (*gather_reduce)(const GatherArgs& args, int64_t first_bag, int64_t last_bag);
  void (*gather_dot)(const GatherDotArgs& args, int64_t first_bag, int64_t last_bag);
};

namespace generic {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

// The best build that this processor runs.
const Kernels& kernels();

}  // namespace gossamer
