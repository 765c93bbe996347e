// The kernels for x86-64 with AVX-512 F, BW, DQ, VL and BF16.
#include "cpu/isa_begin.h"

#if defined(__x86_64__)
#include "cpu/isa_avx512_bf16_target.h"

#define GOSSAMER_AMX 0

namespace gossamer::avx512_bf16 {
namespace {
#include "cpu/isa_kernels.h"
}  // namespace

const Kernels kKernels = {"avx512_bf16", GOSSAMER_KERNEL_TABLE};

}  // namespace gossamer::avx512_bf16

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
