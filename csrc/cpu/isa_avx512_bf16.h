// The target of kernels for x86-64 with AVX-512 F, BW, DQ, VL, BF16 and VNNI.
#pragma once

#include "cpu/isa_begin.h"

#include <immintrin.h>

// Set after the standard headers, so that their inline functions run on every processor.
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")
#endif

#ifndef GOSSAMER_ISA
#define GOSSAMER_ISA avx512_bf16
#define GOSSAMER_AMX 0
#endif
#define GOSSAMER_VECTOR_BYTES 64
#define GOSSAMER_F16C 1
#define GOSSAMER_BF16_DOT 1
#define GOSSAMER_VNNI 1
#define GOSSAMER_TILE_ROWS 8
#define GOSSAMER_TILE_VECTORS 3
