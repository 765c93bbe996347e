// The kernels for x86-64 with AVX-512 F, BW, DQ, VL and BF16.
#include "cpu/isa_begin.h"

#if defined(__x86_64__)
#include "cpu/isa_avx512_bf16_target.h"

#define GOSSAMER_ISA avx512_bf16
#define GOSSAMER_AMX 0

#include "cpu/isa_kernels.h"

namespace gossamer::avx512_bf16 {

const Kernels kKernels = {.name = "avx512_bf16", GOSSAMER_KERNEL_TABLE};

}  // namespace gossamer::avx512_bf16

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
