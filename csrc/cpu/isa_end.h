// The end of what isa_target.h has begun: Clang asks for it.
#if defined(__clang__) && GOSSAMER_VECTOR_BYTES > 16
#pragma clang attribute pop
#endif
