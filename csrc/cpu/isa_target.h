// The instruction set that kernels are compiled for, as isa_*.cpp defines it: GOSSAMER_ISA is its namespace. The kernels
// for any processor where nothing is defined: the baseline of x86-64, NEON on aarch64.
#pragma once

#include "cpu/isa_begin.h"

#ifndef GOSSAMER_ISA
#define GOSSAMER_ISA generic
#define GOSSAMER_VECTOR_BYTES 16
#define GOSSAMER_F16C 0
#define GOSSAMER_BF16_DOT 0
#define GOSSAMER_AMX 0
#define GOSSAMER_TILE_ROWS 4
#define GOSSAMER_TILE_VECTORS 2
#endif
