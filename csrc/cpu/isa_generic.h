// The target of kernels for any processor: the baseline of x86-64, NEON on aarch64.
#pragma once

#include "cpu/isa_begin.h"

// An install for a machine with a better instruction set compiles these with less optimisation, since it never chooses them by
// default.
#if defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__)
#ifdef GOSSAMER_SPARE_GENERIC
#pragma GCC optimize("O1")
#else
#pragma GCC optimize("O2")
#endif
#endif

#define GOSSAMER_ISA generic
#define GOSSAMER_VECTOR_BYTES 16
#define GOSSAMER_F16C 0
#define GOSSAMER_BF16_DOT 0
#define GOSSAMER_AMX 0
#define GOSSAMER_TILE_ROWS 4
#define GOSSAMER_TILE_VECTORS 2
