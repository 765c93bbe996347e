// The target of kernels for x86-64 with AVX2, FMA and F16C.
#pragma once

#include "cpu/isa_begin.h"

#include <immintrin.h>

// Set after the standard headers, so that their inline functions run on every processor.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define GOSSAMER_ISA avx2
#define GOSSAMER_AMX 0
#define GOSSAMER_VECTOR_BYTES 32
#define GOSSAMER_F16C 1
#define GOSSAMER_BF16_DOT 0
#define GOSSAMER_TILE_ROWS 4
#define GOSSAMER_TILE_VECTORS 3
