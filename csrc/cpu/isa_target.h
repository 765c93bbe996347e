// Sets the instruction set for which kernels are compiled, that of GOSSAMER_TARGET or generic; GOSSAMER_ISA is its namespace.
// Only kernels may follow: a shared inline function would be compiled for this instruction set.
#pragma once

#ifdef GOSSAMER_TARGET
#include GOSSAMER_TARGET
#else
#include "cpu/isa_generic.h"
#endif
