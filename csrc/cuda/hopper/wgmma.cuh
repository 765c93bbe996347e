// D += A * B for one warpgroup: 64 rows, N columns, 16 of K, both operands in shared memory, float32 accumulators.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace gossamer::hopper {

// The accumulator's registers by their names in the instruction, and as operands of it.
#define GOSSAMER_NAMES_64                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define GOSSAMER_NAMES_96                                                            \
  GOSSAMER_NAMES_64                                                                  \
  ", "                                                                               \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define GOSSAMER_NAMES_128                                                                       \
  GOSSAMER_NAMES_96                                                                              \
  ", "                                                                                           \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define GOSSAMER_OPERANDS_64                                                                                               \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),  \
      "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), \
      "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
      "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), \
      "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), \
      "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), \
      "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define GOSSAMER_OPERANDS_96                                                                                               \
  GOSSAMER_OPERANDS_64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]),         \
      "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
      "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), \
      "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define GOSSAMER_OPERANDS_128                                                                                         \
  GOSSAMER_OPERANDS_96, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), \
      "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), \
      "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), \
      "+f"(d[119]), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), \
      "+f"(d[127])

// N columns take R registers of a thread; the operands after them are numbered A, B, ADD, KA and KB: the descriptors,
// whether D is added to or written, and which operands have contiguous M or N.
#define GOSSAMER_WGMMA(N, R, TYPE, A, B, ADD, KA, KB)                                                  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD                                               \
               ", 0;\n"                                                                                \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" GOSSAMER_NAMES_##R \
               "}, %" #A ", %" #B ", p, 1, 1, %" #KA ", %" #KB ";\n}\n"                                \
               : GOSSAMER_OPERANDS_##R                                                                 \
               : "l"(a), "l"(b), "r"(add), "n"(kMnA ? 1 : 0), "n"(kMnB ? 1 : 0))

// `add` 0 writes D, 1 adds to it. kMnA and kMnB: whether M of A, and N of B, is the contiguous dimension.
template <typename T, int kN, bool kMnA, bool kMnB>
__device__ __forceinline__ void mma(float (&d)[kN / 2], uint64_t a, uint64_t b, uint32_t add) {
  static_assert(kN == 128 || kN == 192 || kN == 256);
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if constexpr (kN == 128) GOSSAMER_WGMMA(128, 64, "bf16", 64, 65, 66, 67, 68);
    if constexpr (kN == 192) GOSSAMER_WGMMA(192, 96, "bf16", 96, 97, 98, 99, 100);
    if constexpr (kN == 256) GOSSAMER_WGMMA(256, 128, "bf16", 128, 129, 130, 131, 132);
  } else {
    if constexpr (kN == 128) GOSSAMER_WGMMA(128, 64, "f16", 64, 65, 66, 67, 68);
    if constexpr (kN == 192) GOSSAMER_WGMMA(192, 96, "f16", 96, 97, 98, 99, 100);
    if constexpr (kN == 256) GOSSAMER_WGMMA(256, 128, "f16", 128, 129, 130, 131, 132);
  }
}

}  // namespace gossamer::hopper
