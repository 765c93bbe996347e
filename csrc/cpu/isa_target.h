// Sets the instruction set that kernels are compiled for, that of GOSSAMER_TARGET, or generic: GOSSAMER_ISA is its namespace.
// Only kernels come after it: an inline function that all instruction sets share would be theirs alone.
#pragma once

#ifdef GOSSAMER_TARGET
#include GOSSAMER_TARGET
#else
#include "cpu/isa_generic.h"
#endif
