// Sums and means over lists of ids whose vectors are composed of several rows of a table, or of blocks of an array.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/gather_reduce.h"
#include "cpu/map_ids.h"

namespace gossamer {

// A matrix product has two parts: a row of the table is a matrix (m, k), and a row of a second table is a matrix (k, n).
enum class Composition { kAdd, kMultiply, kConcatenate, kMatmul };

// Codes of ids, `width` bytes per id, packed lowest bit first.
struct CodeList {
  const uint8_t* bytes;
  int64_t num_ids, width;
  int bits;
};

// The rows that compose an id's vector. A map gives the row of a part. For a coded part, the map gives the first row and its
// modulus the number of rows, and a code selects one; codes outside this range or the table are faults.
struct Parts {
  IdMaps maps;
  int64_t num_coded;       // parts with codes, which come first
  CodeList often, seldom;  // codes of the first ids, and of those that follow
  Composition composition;
  int64_t columns;  // of a part; a concatenation may cut off the last part
  bool blocks;      // parts are `columns` consecutive elements of one array, at positions given by maps
  bool wrap;        // blocks continue at the start of the array, and their positions are taken modulo its size

  // Ids below this number are valid; 0 if all are.
  int64_t num_ids() const { return num_coded > 0 ? often.num_ids + seldom.num_ids : maps.limit; }
};

// A fault that a call found; the first one reported by a thread is kept.
enum class PartsFault : int32_t { kNone, kId, kCode };

// The parts of the gradient of composed vectors, for each position.
struct ComposeGradient {
  FloatMatrix dout;  // (B, D) of the accumulator's dtype, column stride 1, or absent
  // The row of each part, -1 if the id contributes nothing; for blocks the first element, or all D elements.
  void* rows;  // (L, H), (L, D) for elements, or null
  bool wide_rows, elements;
  void* part_gradients;          // (L, H, C) of the accumulator's dtype, for products; or null
  FloatMatrix weight_gradients;  // one row of num_positions, or absent; the bags are then without weights
};

// Sums of the gradients of a table's rows, each over one piece of the bags.
struct RowSums {
  FloatMatrix dout;  // (B, D) of the accumulator's dtype, column stride 1
  // For each piece (M, C) sums of the accumulator's dtype, and whether the row is any live id's.
  void* sums;
  uint8_t* touched;
};

struct ComposeArgs {
  FloatMatrix table;      // (M, C), column stride 1; (M, 1) contiguous where parts are blocks
  int64_t num_rows, dim;  // M, D
  Bags bags;              // without limit and features
  Parts parts;
  FloatMatrix out;                            // (B, D), of the table's dtype or what it is accumulated in
  const ComposeGradient* gradient = nullptr;  // written instead of the result
  const RowSums* row_sums = nullptr;          // or these sums, of the bags of one piece
  int32_t* fault;
  FloatMatrix second{};  // second table of a matrix product, of the table's dtype, column stride 1
  int64_t second_rows = int64_t{1} << 62;
  int64_t inner = 0, width = 0;  // k and n of a matrix product; m is D/n
};

void gather_compose(const ComposeArgs& args, int num_threads);

// Writes the gradients of all rows of a table that a thread's caches hold, (M, C) contiguous in the accumulator's dtype, given that
// of the result; and the number of each row, -1 where no live id has it. The sums are of pieces of the bags, which do not depend on
// the number of threads, added in order. Parts are rows.
void sum_row_gradients(const ComposeArgs& args, const FloatMatrix& dout, void* sums, int32_t* rows, int num_threads);

}  // namespace gossamer
