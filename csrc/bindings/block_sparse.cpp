#include "bindings/arguments.h"
#include "bindings/register.h"
#include "cpu/block_sparse.h"

namespace gossamer::bindings {

namespace {

// (offsets, indices, order or 0, number of lists, live rows or 0, live columns of block columns or 0)
using PyLists = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, uintptr_t, uintptr_t>;
// (values, bm, bn, row stride, column stride)
using PyBlocks = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t>;
// (matrix, size of a part, stride of parts)
using PyParted = std::tuple<PyMatrix, int64_t, int64_t>;
// (bias, whether it runs along rows, activation code or -1)
using PyEpilogue = std::tuple<PyVector, bool, int>;

BlockLists lists(const PyLists& l) {
  const auto& [offsets, indices, order, count, live, live_across] = l;
  return {pointer<const int32_t>(offsets), pointer<const int32_t>(indices), pointer<const int32_t>(order), count,
          pointer<const int32_t>(live), pointer<const int32_t>(live_across)};
}

PartedMatrix parted(const PyParted& p) {
  const auto& [m, size, stride] = p;
  return {matrix(m), size, stride};
}

Epilogue epilogue(const PyEpilogue& e) {
  const auto& [bias, by_rows, activation] = e;
  return {row_matrix(bias), by_rows, activation};
}

}  // namespace

void register_block_sparse(py::module_& m) {
  m.def(
      "choose_rectangles",
      [](const PyLists& l, int64_t bm, int64_t bn, int64_t across, int64_t size, int64_t part) {
        std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>> found;
        for (const Rectangle& r : choose_rectangles(lists(l), bm, bn, across, size, part)) {
          found.emplace_back(r.first, r.last, r.column, r.count, r.rows, r.depth);
        }
        return found;
      },
      "(first list, last list, first block column, number of block columns, rows and columns that are no padding) of the "
      "rectangles that products go by.");
  m.def(
      "block_product",
      [](const PyLists& l, const PyBlocks& blocks, const PyParted& b, int64_t depth, int64_t n, const PyEpilogue& e,
         uintptr_t y, bool y_by_columns, int64_t y_part, int num_threads) {
        const auto& [values, bm, bn, row_stride, col_stride] = blocks;
        const PartedMatrix operand = parted(b);
        const BlockProductArgs args{operand.dtype, lists(l), reinterpret_cast<const void*>(values),
                                    bm, bn, row_stride, col_stride, operand, depth, n, epilogue(e),
                                    reinterpret_cast<void*>(y), y_by_columns, y_part};
        py::gil_scoped_release release;
        block_product(args, num_threads);
      },
      "y = act(s · b + bias), s block-sparse.");
  m.def(
      "sampled_product",
      [](const PyLists& l, uintptr_t rows_of, int64_t nnz, int64_t bm, int64_t bn, const PyMatrix& a, uintptr_t a_rows,
         int64_t num_a, const PyParted& b, int64_t depth, int64_t cols, const PyEpilogue& e, uintptr_t values, int num_threads) {
        const SampledProductArgs args{matrix(a).dtype, lists(l), reinterpret_cast<const int32_t*>(rows_of),
                                      nnz, bm, bn, matrix(a), reinterpret_cast<const int32_t*>(a_rows), num_a, parted(b),
                                      depth, cols, epilogue(e), reinterpret_cast<void*>(values)};
        py::gil_scoped_release release;
        sampled_product(args, num_threads);
      },
      "act(a · b + bias) at the blocks of a topology, zero from the last one on.");
}

}  // namespace gossamer::bindings
