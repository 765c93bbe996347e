#include <limits>
#include <string>
#include <string_view>

#include "bindings/arguments.h"
#include "bindings/bags.h"
#include "bindings/register.h"
#include "cpu/gather_reduce.h"

namespace gossamer::bindings {

void raise_bad_bags(const Bags& bags, int64_t num_rows, bool check_ids, bool check_weights, int num_threads) {
  BagsError error;
  {
    py::gil_scoped_release release;
    error = check_bags(bags, num_rows, check_ids, check_weights, num_threads);
  }
  if (error.kind == BagsError::kIndex) {
    throw py::index_error("index must be in [0, N) with N=" + std::to_string(error.num_rows) + ", got " +
                          std::to_string(error.value) + " at flat position " + std::to_string(error.position));
  }
  if (error.kind == BagsError::kOffset) {
    throw py::value_error("offsets must ascend within [0, L] with L=" + std::to_string(bags.num_positions) + ", got " +
                          std::to_string(error.value) + " at position " + std::to_string(error.position));
  }
  if (error.kind == BagsError::kWeight) {
    throw py::value_error("weights must not be NaN, got nan at flat position " + std::to_string(error.position));
  }
}

void register_gather_reduce(py::module_& m) {
  constexpr auto kAll = std::numeric_limits<int64_t>::max();
  py::class_<Bags>(m, "Bags", "Lists of ids, and how the table rows that they name are reduced.")
      .def(py::init([](const PyVector& index, const PyVector& offsets, const PyVector& weights, int64_t bag_size,
                       int64_t num_positions, int64_t num_bags, int64_t limit, std::string_view mode, int64_t padding_idx,
                       bool drop, uintptr_t features, int64_t num_features) {
        return Bags{.index = index_array(index),
                    .offsets = index_array(offsets),
                    .weights = row_matrix(weights),
                    .bag_size = bag_size,
                    .num_positions = num_positions,
                    .num_bags = num_bags,
                    .limit = limit < 0 ? kAll : limit,
                    .padding_idx = padding_idx,
                    .mean = mode == "mean",
                    .drop = drop,
                    .features = pointer<const Feature>(features),
                    .num_features = num_features};
      }));
  m.def(
      "gather_reduce",
      [](const PyMatrix& table, int64_t num_rows, int64_t dim, const PyScales& scales, const Bags& bags, const PyMatrix& out,
         int num_threads) {
        // If the sum reads exactly all ids, it finds ids outside the table and NaN weights itself; a separate check takes 3% of
        // its time.
        const bool by_sum = !bags.drop && dim > 0 && bags.limit >= num_rows, check_weights = bags.limit == kAll;
        raise_bad_bags(bags, num_rows, !bags.drop && !by_sum, check_weights && !by_sum, num_threads);
        bool suspect = false;
        const GatherArgs args{.table = matrix(table),
                              .num_rows = num_rows,
                              .dim = dim,
                              .scales = row_scales(scales),
                              .bags = bags,
                              .out = matrix(out),
                              .suspect = by_sum ? &suspect : nullptr};
        {
          py::gil_scoped_release release;
          gather_reduce(args, num_threads);
        }
        if (suspect) raise_bad_bags(bags, num_rows, true, check_weights, num_threads);
      },
      "out[b] = sum or mean over the live ids of bag b of weight · table[id].");
  m.def(
      "gather_max",
      [](const PyMatrix& table, int64_t num_rows, int64_t dim, const Bags& bags, const PyMatrix& out, uintptr_t argmax,
         int num_threads) {
        raise_bad_bags(bags, num_rows, !bags.drop, false, num_threads);
        const GatherMaxArgs args{.table = matrix(table),
                                 .num_rows = num_rows,
                                 .dim = dim,
                                 .bags = bags,
                                 .out = matrix(out),
                                 .argmax = pointer<int32_t>(argmax)};
        py::gil_scoped_release release;
        gather_max(args, num_threads);
      },
      "Columnwise maxima over the live ids of each bag, and their positions within it, -1 for none.", py::kw_only(),
      py::arg("table"), py::arg("num_rows"), py::arg("dim"), py::arg("bags"), py::arg("out"), py::arg("argmax"),
      py::arg("num_threads"));
  m.def(
      "gather_dot",
      [](const PyMatrix& dout, const PyMatrix& table, int64_t num_rows, int64_t dim, const PyScales& scales, const Bags& bags,
         const PyVector& out, int num_threads) {
        raise_bad_bags(bags, num_rows, !bags.drop, false, num_threads);
        const GatherDotArgs args{.dout = matrix(dout),
                                 .table = matrix(table),
                                 .num_rows = num_rows,
                                 .dim = dim,
                                 .scales = row_scales(scales),
                                 .bags = bags,
                                 .out = row_matrix(out)};
        py::gil_scoped_release release;
        gather_dot(args, num_threads);
      },
      "out[p] = <dout[bag of p], table[index[p]]>, over the bag's live ids for a mean; zero where the id is skipped.",
      py::kw_only(), py::arg("dout"), py::arg("table"), py::arg("num_rows"), py::arg("dim"), py::arg("scales"), py::arg("bags"),
      py::arg("out"), py::arg("num_threads"));
}

}  // namespace gossamer::bindings
