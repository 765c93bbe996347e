#include "cpu/gather_compose.h"

#include <string>
#include <string_view>

#include "bindings/arguments.h"
#include "bindings/bags.h"
#include "bindings/map_ids.h"
#include "bindings/register.h"
#include "cpu/product_gradient.h"

namespace gossamer::bindings {

// (pointer, ids, bytes of a row, bits)
using PyCodes = std::tuple<uintptr_t, int64_t, int64_t, int>;

static CodeList code_list(const PyCodes& codes) {
  const auto& [bytes, num_ids, width, bits] = codes;
  return {pointer<const uint8_t>(bytes), num_ids, width, bits};
}

// Runs a call over bags without holding the GIL, and raises an error for ids or codes that it could not read.
template <class F>
static void compose(const ComposeArgs& args, bool check_weights, int num_threads, F&& call) {
  const auto known = args.parts.num_ids() > 0 ? args.parts.num_ids() : std::numeric_limits<int64_t>::max();
  raise_bad_bags(args.bags, known, false, check_weights, num_threads);
  {
    py::gil_scoped_release release;
    call();
  }
  if (*args.fault == static_cast<int32_t>(PartsFault::kId)) raise_bad_bags(args.bags, known, true, false, num_threads);
  if (*args.fault == static_cast<int32_t>(PartsFault::kCode)) {
    throw py::index_error("codes must be below the number of rows of their part");
  }
}

static void compose(const ComposeArgs& args, bool check_weights, int num_threads) {
  compose(args, check_weights, num_threads, [&] { gather_compose(args, num_threads); });
}

void register_gather_compose(py::module_& m) {
  struct OwnedParts {
    MapList maps;
    int64_t num_coded;
    CodeList often, seldom;
    Composition composition;
    int64_t columns;
    bool blocks, wrap;

    Parts get() const { return {maps.get(), num_coded, often, seldom, composition, columns, blocks, wrap}; }
  };
  py::class_<OwnedParts>(m, "Parts", "Which rows an id's vector is composed of.")
      .def(py::init([](const MapList& maps, int64_t num_coded, const PyCodes& often, const PyCodes& seldom,
                       std::string_view operation, int64_t columns, bool blocks, bool wrap) {
        const auto composition = operation == "add"      ? Composition::kAdd
                                 : operation == "mul"    ? Composition::kMultiply
                                 : operation == "concat" ? Composition::kConcatenate
                                                         : Composition::kMatmul;
        return OwnedParts{maps, num_coded, code_list(often), code_list(seldom), composition, columns, blocks, wrap};
      }));
  // A lookup without what it writes; `fault` says which ids or codes it could not read.
  static constexpr auto lookup = [](const PyMatrix& table, int64_t num_rows, int64_t dim, const Bags& bags,
                                    const OwnedParts& parts, int32_t& fault) {
    return ComposeArgs{.table = matrix(table),
                       .num_rows = num_rows,
                       .dim = dim,
                       .bags = bags,
                       .parts = parts.get(),
                       .out = {},
                       .fault = &fault};
  };
  m.def(
      "gather_compose",
      [](const PyMatrix& table, int64_t num_rows, int64_t dim, const Bags& bags, const OwnedParts& parts, const PyMatrix& out,
         int num_threads) {
        int32_t fault = 0;
        ComposeArgs args = lookup(table, num_rows, dim, bags, parts, fault);
        args.out = matrix(out);
        compose(args, true, num_threads);
      },
      "out[b] = sum or mean over the live ids of bag b of weight · the vector that the id's rows compose.");
  m.def(
      "gather_matmul",
      [](const PyMatrix& left, int64_t num_rows, int64_t dim, int64_t inner, int64_t width, const PyMatrix& right,
         int64_t second_rows, const Bags& bags, const OwnedParts& parts, const PyMatrix& out, int num_threads) {
        int32_t fault = 0;
        ComposeArgs args = lookup(left, num_rows, dim, bags, parts, fault);
        args.out = matrix(out);
        args.second = matrix(right);
        args.second_rows = second_rows;
        args.inner = inner;
        args.width = width;
        compose(args, true, num_threads);
      },
      "out[b] = sum or mean over the live ids of bag b of weight · the product of the matrices that the id chooses.",
      py::kw_only(), py::arg("left"), py::arg("num_rows"), py::arg("dim"), py::arg("inner"), py::arg("width"), py::arg("right"),
      py::arg("second_rows"), py::arg("bags"), py::arg("parts"), py::arg("out"), py::arg("num_threads"));
  m.def(
      "compose_gradient",
      [](const PyMatrix& table, int64_t num_rows, int64_t dim, const Bags& bags, const OwnedParts& parts, const PyMatrix& dout,
         const PyVector& rows, bool elements, uintptr_t part_gradients, const PyVector& weight_gradients, int num_threads) {
        int32_t fault = 0;
        const IndexArray to = index_array(rows);
        const ComposeGradient gradient{.dout = matrix(dout),
                                       .rows = const_cast<void*>(to.base),
                                       .wide_rows = to.wide,
                                       .elements = elements,
                                       .part_gradients = pointer<void>(part_gradients),
                                       .weight_gradients = row_matrix(weight_gradients)};
        ComposeArgs args = lookup(table, num_rows, dim, bags, parts, fault);
        args.gradient = &gradient;
        compose(args, false, num_threads);
      },
      "The rows of each position's parts, the gradients of factors, and those of weights.", py::kw_only(), py::arg("table"),
      py::arg("num_rows"), py::arg("dim"), py::arg("bags"), py::arg("parts"), py::arg("dout"), py::arg("rows"),
      py::arg("elements"), py::arg("part_gradients"), py::arg("weight_gradients"), py::arg("num_threads"));
  m.def(
      "sum_row_gradients",
      [](const PyMatrix& table, int64_t num_rows, int64_t dim, const Bags& bags, const OwnedParts& parts, const PyMatrix& dout,
         uintptr_t sums, uintptr_t rows, int num_threads) {
        int32_t fault = 0;
        const ComposeArgs args = lookup(table, num_rows, dim, bags, parts, fault);
        compose(args, false, num_threads,
                [&] { sum_row_gradients(args, matrix(dout), pointer<void>(sums), pointer<int32_t>(rows), num_threads); });
      },
      "The gradients of all rows of a small table, and the numbers of those that live ids have.", py::kw_only(),
      py::arg("table"), py::arg("num_rows"), py::arg("dim"), py::arg("bags"), py::arg("parts"), py::arg("dout"),
      py::arg("sums"), py::arg("rows"), py::arg("num_threads"));
  m.def(
      "product_gradient",
      [](int dtype, std::tuple<int64_t, int64_t, int64_t> sizes, uintptr_t left, int64_t num_left, uintptr_t right,
         int64_t num_right, uintptr_t dout, uintptr_t factors, uintptr_t positions, uintptr_t offsets, uintptr_t rows,
         uintptr_t left_gradient, uintptr_t right_gradient, int num_threads) {
        const auto [m, k, n] = sizes;
        const ProductGradientArgs args{.dtype = static_cast<DType>(dtype),
                                       .m = m,
                                       .k = k,
                                       .n = n,
                                       .num_left = num_left,
                                       .num_right = num_right,
                                       .left = pointer<void>(left),
                                       .right = pointer<void>(right),
                                       .dout = pointer<void>(dout),
                                       .factors = pointer<void>(factors),
                                       .positions = pointer<int32_t>(positions),
                                       .offsets = pointer<int32_t>(offsets),
                                       .rows = pointer<int32_t>(rows),
                                       .left_gradient = pointer<void>(left_gradient),
                                       .right_gradient = pointer<void>(right_gradient)};
        py::gil_scoped_release release;
        product_gradient(args, num_threads);
      },
      "The gradients of both tables of gather_matmul, from the positions of each row of the left one.", py::kw_only(),
      py::arg("dtype"), py::arg("sizes"), py::arg("left"), py::arg("num_left"), py::arg("right"), py::arg("num_right"),
      py::arg("dout"), py::arg("factors"), py::arg("positions"), py::arg("offsets"), py::arg("rows"), py::arg("left_gradient"),
      py::arg("right_gradient"), py::arg("num_threads"));
}

}  // namespace gossamer::bindings
