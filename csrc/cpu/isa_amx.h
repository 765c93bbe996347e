// The target of kernels for x86-64 with AVX-512 F, BW, DQ, VL and BF16, and AMX tiles of bfloat16.
#pragma once

#define GOSSAMER_ISA amx
#define GOSSAMER_AMX 1
#include "cpu/isa_avx512_bf16.h"

// Kernels for types other than bfloat16 come from another instruction set: see tiled_table.h.
#pragma GCC diagnostic ignored "-Wunused-function"
