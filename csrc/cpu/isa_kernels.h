// The vector kernels, included by each isa_*.cpp inside its namespace.
#include "cpu/vec.h"
#include "cpu/gather_reduce_kernel.h"

#define GOSSAMER_KERNEL_TABLE gather_reduce, gather_dot
