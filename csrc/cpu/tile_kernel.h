// Products of bfloat16 by the processor's tiles (AMX), where an instruction set has them.
//
// A tile is 16 rows of 64 bytes. A left tile holds 16 rows of a matrix by 16 pairs along the sum, a right tile 16 rows of one
// panel vector, a tile of sums 16 x 16 floats. The sums of two left by two right tiles stay in registers along the whole depth, so
// each loaded tile is used twice.
#pragma once

#include "cpu/vec.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Whether products of P are made of tiles.
template <class P>
constexpr bool kTiled = GOSSAMER_AMX && std::is_same_v<P, BFloat16Pair>;

// Calls f with a tag of the C++ type of a product's values; tiles multiply bfloat16 only.
template <class F>
void visit_values([[maybe_unused]] DType dtype, F&& f) {
#if GOSSAMER_AMX
  f(TypeTag<BFloat16>{});
#else
  visit_float(dtype, f);
#endif
}

#if GOSSAMER_AMX

// The shape of all eight tiles, as a thread loads it.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileShapes() {
    for (int i = 0; i < 8; ++i) {
      row_bytes[i] = 64;
      rows[i] = kTileSide;
    }
  }
};

// Configures the tile registers for the lifetime of a kernel.
class TilesInUse {
 public:
  TilesInUse() {
    const TileShapes shapes;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~TilesInUse() {
    asm volatile("tilerelease");
    // Orders stores that bypass the caches before the barrier that announces them.
    _mm_sfence();
  }
  TilesInUse(const TilesInUse&) = delete;
  TilesInUse& operator=(const TilesInUse&) = delete;
};

// Tile registers are named in the instruction. Compilers do not know which memory tile loads and stores access, so fence_memory()
// separates them from other accesses.
GOSSAMER_INLINE void fence_memory() { asm volatile("" ::: "memory"); }
template <int Tile>
GOSSAMER_INLINE void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile));
}
template <int Tile>
GOSSAMER_INLINE void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(Tile));
}
template <int Tile>
GOSSAMER_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int Sums, int Left, int Right>
GOSSAMER_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Left), "i"(Right));
}

// The sums of Rows x Vecs tiles, in tiles 0 .. 3; left ones go through tiles 4 and 5, right ones through 6 and 7. Strides are bytes.
template <int Rows, int Vecs>
struct TileSums {
  static_assert(Rows >= 1 && Rows <= 2 && Vecs >= 1 && Vecs <= 2);

  GOSSAMER_INLINE void zero() {
    zero_tile<0>();
    if constexpr (Vecs > 1) zero_tile<1>();
    if constexpr (Rows > 1) zero_tile<2>();
    if constexpr (Rows > 1 && Vecs > 1) zero_tile<3>();
  }
  GOSSAMER_INLINE void load(const float* c, int64_t stride) {
    const float* second = second_row(c, stride);
    load_tile<0>(c, stride);
    if constexpr (Vecs > 1) load_tile<1>(c + kTileSide, stride);
    if constexpr (Rows > 1) load_tile<2>(second, stride);
    if constexpr (Rows > 1 && Vecs > 1) load_tile<3>(second + kTileSide, stride);
  }
  GOSSAMER_INLINE void store(float* c, int64_t stride) {
    float* second = second_row(c, stride);
    store_tile<0>(c, stride);
    if constexpr (Vecs > 1) store_tile<1>(c + kTileSide, stride);
    if constexpr (Rows > 1) store_tile<2>(second, stride);
    if constexpr (Rows > 1 && Vecs > 1) store_tile<3>(second + kTileSide, stride);
  }
  // Adds the products of `left`, 16 rows `stride` apart for each Rows, with the next rows of a panel's block of Vecs vectors.
  GOSSAMER_INLINE void add(const char* left, int64_t stride, const BFloat16Pair* right) {
    constexpr int64_t width = Vecs * 64;
    load_tile<4>(left, stride);
    load_tile<6>(right, width);
    multiply_tiles<0, 4, 6>();
    if constexpr (Vecs > 1) {
      load_tile<7>(right + kTileSide, width);
      multiply_tiles<1, 4, 7>();
    }
    if constexpr (Rows > 1) {
      load_tile<5>(left + kTileSide * stride, stride);
      multiply_tiles<2, 5, 6>();
    }
    if constexpr (Rows > 1 && Vecs > 1) multiply_tiles<3, 5, 7>();
  }

 private:
  template <class F>
  GOSSAMER_INLINE F* second_row(F* first, int64_t stride) {
    return first + kTileSide * stride / static_cast<int64_t>(sizeof(float));
  }
};

#endif

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
