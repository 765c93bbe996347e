// Ends the region that isa_target.h begins; Clang requires this.
#if defined(__clang__) && GOSSAMER_VECTOR_BYTES > 16
#pragma clang attribute pop
#endif
