// The kernels for any processor: the baseline of x86-64, NEON on aarch64.
#include "cpu/isa_begin.h"

// An install for a machine with a better instruction set compiles them in less time: it never chooses them by itself.
#if defined(__GNUC__) && !defined(__clang__)
#ifdef GOSSAMER_SPARE_GENERIC
#pragma GCC optimize("O1")
#else
#pragma GCC optimize("O2")
#endif
#endif

#include "cpu/isa_kernels.h"

namespace gossamer::generic {

const Kernels kKernels = {.name = "generic", GOSSAMER_KERNEL_TABLE};

}  // namespace gossamer::generic
