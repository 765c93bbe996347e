#include <array>
#include <optional>
#include <string>

#include "bindings/arguments.h"
#include "bindings/register.h"
#include "cpu/block_sparse.h"

namespace gossamer::bindings {

namespace {

using namespace py::literals;

using PySizes = std::pair<int64_t, int64_t>;
// (matrix, size of a part, stride of parts)
using PyParted = std::tuple<PyMatrix, int64_t, int64_t>;

PartedMatrix parted(const PyParted& p) {
  const auto& [m, size, stride] = p;
  return {matrix(m), size, stride};
}

Epilogue epilogue(const PyVector& bias, bool by_rows, const std::optional<std::string>& activation) {
  // Ungated activations in the order of their codes; see python/gossamer/_activation.py.
  static constexpr std::array<const char*, 5> kNames{"silu", "gelu", "gelu_tanh", "relu", "relu2"};
  if (!activation) return {row_matrix(bias), by_rows, -1};
  for (size_t code = 0; code < kNames.size(); ++code) {
    if (*activation == kNames[code]) return {row_matrix(bias), by_rows, static_cast<int>(code)};
  }
  throw py::value_error("activation must be an ungated one, got " + *activation);
}

}  // namespace

void register_block_sparse(py::module_& m) {
  py::class_<BlockLists>(m, "BlockLists", "The blocks of a matrix list by list, a list being a block row.")
      .def(py::init([](uintptr_t offsets, uintptr_t indices, uintptr_t order, int64_t count, int64_t across, int64_t nnz,
                       uintptr_t live, uintptr_t live_across) {
             const BlockLists lists{.offsets = pointer<const int32_t>(offsets),
                                    .indices = pointer<const int32_t>(indices),
                                    .order = pointer<const int32_t>(order),
                                    .count = count,
                                    .live = pointer<const int32_t>(live),
                                    .live_across = pointer<const int32_t>(live_across)};
             check_offsets("topology's offsets", lists.offsets, count, nnz);
             check_range("topology's indices", lists.indices, lists.offsets[count], across);
             if (lists.order) check_range("topology's order", lists.order, lists.offsets[count], nnz);
             return lists;
           }),
           py::kw_only(), "offsets"_a, "indices"_a, "order"_a, "count"_a, "across"_a, "nnz"_a, "live"_a, "live_across"_a);
  py::class_<BlockProductArgs>(m, "BlockProduct", "y = act(s · b + bias), s block-sparse.")
      .def(py::init([](const BlockLists& lists, uintptr_t values, const PySizes& block, const PySizes& strides,
                       const PyParted& b, int64_t depth, int64_t n, const PyVector& bias, bool bias_by_rows,
                       const std::optional<std::string>& activation, uintptr_t y, bool y_by_columns, int64_t y_part) {
             const PartedMatrix operand = parted(b);
             return BlockProductArgs{.dtype = operand.dtype,
                                     .lists = lists,
                                     .values = pointer<const void>(values),
                                     .bm = block.first,
                                     .bn = block.second,
                                     .row_stride = strides.first,
                                     .col_stride = strides.second,
                                     .b = operand,
                                     .depth = depth,
                                     .n = n,
                                     .epilogue = epilogue(bias, bias_by_rows, activation),
                                     .y = pointer<void>(y),
                                     .y_by_columns = y_by_columns,
                                     .y_part = y_part};
           }),
           py::kw_only(), "lists"_a, "values"_a, "block"_a, "strides"_a, "b"_a, "depth"_a, "n"_a, "bias"_a, "bias_by_rows"_a,
           "activation"_a, "y"_a, "y_by_columns"_a, "y_part"_a);
  py::class_<SampledProductArgs>(m, "SampledProduct", "act(a · b + bias) at the blocks of a topology.")
      .def(py::init([](const BlockLists& lists, uintptr_t rows_of, int64_t nnz, const PySizes& block, const PyMatrix& a,
                       uintptr_t a_rows, int64_t num_a, const PyParted& b, int64_t depth, int64_t cols, const PyVector& bias,
                       bool bias_by_rows, const std::optional<std::string>& activation, uintptr_t values) {
             check_range("topology.row_indices", pointer<const int32_t>(rows_of), lists.offsets[lists.count], lists.count);
             return SampledProductArgs{.dtype = matrix(a).dtype,
                                       .lists = lists,
                                       .rows_of = pointer<const int32_t>(rows_of),
                                       .nnz = nnz,
                                       .bm = block.first,
                                       .bn = block.second,
                                       .a = matrix(a),
                                       .a_rows = pointer<const int32_t>(a_rows),
                                       .num_a = num_a,
                                       .b = parted(b),
                                       .depth = depth,
                                       .cols = cols,
                                       .epilogue = epilogue(bias, bias_by_rows, activation),
                                       .values = pointer<void>(values)};
           }),
           py::kw_only(), "lists"_a, "rows_of"_a, "nnz"_a, "block"_a, "a"_a, "a_rows"_a, "num_a"_a, "b"_a, "depth"_a, "cols"_a,
           "bias"_a, "bias_by_rows"_a, "activation"_a, "values"_a);
  m.def(
      "choose_rectangles",
      [](const BlockLists& lists, const PySizes& block, int64_t across, int64_t size, int64_t part) {
        std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>> found;
        for (const Rectangle& r : choose_rectangles(lists, block.first, block.second, across, size, part)) {
          found.emplace_back(r.first, r.last, r.column, r.count, r.rows, r.depth);
        }
        return found;
      },
      "(first list, last list, first block column, number of block columns, rows and columns that are no padding) of the "
      "rectangles that products go by.");
  m.def("block_product", &block_product, py::call_guard<py::gil_scoped_release>(), "y = act(s · b + bias), s block-sparse.");
  m.def("sampled_product", &sampled_product, py::call_guard<py::gil_scoped_release>(),
        "act(a · b + bias) at the blocks of a topology, zero from the last one on.");
}

}  // namespace gossamer::bindings
