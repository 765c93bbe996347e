// Entries of the kernel tables of an instruction set that may have tiles. AMX only multiplies bfloat16: products of other
// types, and kernels without tiles, come from avx512_bf16.
#pragma once

#include "cpu/tile_kernel.h"

#if GOSSAMER_AMX
namespace gossamer::GOSSAMER_ISA {
namespace {

template <const auto& kVectorTable, auto kEntry, auto kKernel, class Args>
void by_tiles(const Args& args, void* shared, int num_threads, Team team) {
  if (args.dtype != DType::kBFloat16) return (kVectorTable.*kEntry)(args, shared, num_threads, team);
  const TilesInUse tiles;
  kKernel(args, shared, num_threads, team);
}

template <const auto& kVectorTable, auto kEntry, class Args>
void by_vectors(const Args& args, void* shared, int num_threads, Team team) {
  (kVectorTable.*kEntry)(args, shared, num_threads, team);
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA

#define GOSSAMER_ENTRY(table, kernel) avx512_bf16::table, &std::remove_cvref_t<decltype(avx512_bf16::table)>::kernel
#define GOSSAMER_BY_TILES(table, kernel) by_tiles<GOSSAMER_ENTRY(table, kernel), kernel>
#define GOSSAMER_BY_VECTORS(table, kernel) by_vectors<GOSSAMER_ENTRY(table, kernel)>
#else
#define GOSSAMER_BY_TILES(table, kernel) kernel
#define GOSSAMER_BY_VECTORS(table, kernel) kernel
#endif
