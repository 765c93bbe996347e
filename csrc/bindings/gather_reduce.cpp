#include <limits>
#include <string>

#include "bindings/arguments.h"
#include "bindings/bags.h"
#include "bindings/register.h"
#include "cpu/gather_reduce.h"

namespace gossamer::bindings {

void raise_bad_bags(const Bags& bags, int64_t num_rows, bool drop, const FloatMatrix& weights, int num_threads) {
  BagsError error;
  {
    py::gil_scoped_release release;
    error = check_bags(bags, num_rows, drop, weights, num_threads);
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
  py::class_<Bags>(m, "Bags", "The lists of ids of gather_reduce.")
      .def(py::init([](const PyVector& index, const PyVector& offsets, int64_t bag_size, int64_t num_positions,
                       int64_t num_bags, int64_t limit, int64_t padding_idx, uintptr_t features, int64_t num_features) {
        const auto all = std::numeric_limits<int64_t>::max();
        return Bags{index_array(index),
                    index_array(offsets),
                    bag_size,
                    num_positions,
                    num_bags,
                    limit < 0 ? all : limit,
                    padding_idx,
                    reinterpret_cast<const Feature*>(features),
                    num_features};
      }));
  m.def(
      "gather_reduce",
      [](const PyMatrix& table, int64_t num_rows, int64_t dim, const Bags& bags, const PyVector& weights,
         const PyMatrix& out, bool mean, bool drop, bool check_weights, int num_threads) {
        const FloatMatrix factors = row_matrix(weights);
        // Where it reads every id and no more, the sum itself finds those outside: looking through them takes 3% of it.
        const bool by_sum = !drop && !factors && dim > 0 && bags.limit >= num_rows;
        raise_bad_bags(bags, num_rows, drop || by_sum, check_weights ? factors : FloatMatrix{}, num_threads);
        bool outside = false;
        const GatherArgs args{matrix(table), num_rows, dim, bags, factors, matrix(out), mean, by_sum ? &outside : nullptr};
        {
          py::gil_scoped_release release;
          gather_reduce(args, num_threads);
        }
        if (outside) raise_bad_bags(bags, num_rows, false, {}, num_threads);
      },
      "out[b] = sum or mean over the live ids of bag b of weight · table[id].");
  m.def(
      "gather_max",
      [](const PyMatrix& table, int64_t num_rows, int64_t dim, const Bags& bags, const PyMatrix& out, uintptr_t argmax,
         bool drop, int num_threads) {
        raise_bad_bags(bags, num_rows, drop, {}, num_threads);
        const GatherMaxArgs args{matrix(table), num_rows, dim, bags, matrix(out), reinterpret_cast<int32_t*>(argmax)};
        py::gil_scoped_release release;
        gather_max(args, num_threads);
      },
      "Columnwise maxima over the live ids of each bag, and their positions within it, -1 for none.");
  m.def(
      "gather_dot",
      [](const PyMatrix& dout, const PyMatrix& table, int64_t num_rows, int64_t dim, const Bags& bags, const PyVector& out,
         bool mean, bool drop, int num_threads) {
        raise_bad_bags(bags, num_rows, drop, {}, num_threads);
        const GatherDotArgs args{matrix(dout), matrix(table), num_rows, dim, bags, row_matrix(out), mean};
        py::gil_scoped_release release;
        gather_dot(args, num_threads);
      },
      "out[p] = <dout[bag of p], table[index[p]]>, over the bag's live ids for a mean; zero where the id is skipped.");
}

}  // namespace gossamer::bindings
