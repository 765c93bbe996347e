// The kernels for any processor: the baseline of x86-64, NEON on aarch64.
#include "cpu/isa_begin.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O2")
#endif

#define GOSSAMER_VECTOR_BYTES 16
#define GOSSAMER_F16C 0
#define GOSSAMER_BF16_DOT 0
#define GOSSAMER_AMX 0
#define GOSSAMER_TILE_ROWS 4
#define GOSSAMER_TILE_VECTORS 2

namespace gossamer::generic {
namespace {
#include "cpu/isa_kernels.h"
}  // namespace

const Kernels kKernels = {"generic", GOSSAMER_KERNEL_TABLE};

}  // namespace gossamer::generic
