#include <limits>
#include <string>

#include "bindings/arguments.h"
#include "bindings/register.h"
#include "cpu/gather_reduce.h"

namespace gossamer::bindings {

namespace {

// Checks the lists with the lock released, and raises what is wrong with them.
void raise_bad_bags(const Bags& bags, int64_t num_rows, int num_threads) {
  BagsError error;
  {
    py::gil_scoped_release release;
    error = check_bags(bags, num_rows, num_threads);
  }
  if (error.kind == BagsError::kIndex) {
    throw py::index_error("index must be in [0, N) with N=" + std::to_string(num_rows) + ", got " +
                          std::to_string(error.value) + " at flat position " + std::to_string(error.position));
  }
  if (error.kind == BagsError::kOffset) {
    throw py::value_error("offsets must ascend within [0, L] with L=" + std::to_string(bags.num_positions) + ", got " +
                          std::to_string(error.value) + " at position " + std::to_string(error.position));
  }
}

}  // namespace

void register_gather_reduce(py::module_& m) {
  py::class_<Bags>(m, "Bags", "The lists of ids of gather_reduce.")
      .def(py::init([](const PyVector& index, const PyVector& offsets, int64_t bag_size, int64_t num_positions,
                       int64_t num_bags, int64_t limit, int64_t padding_idx) {
        const auto all = std::numeric_limits<int64_t>::max();
        return Bags{index_array(index), index_array(offsets), bag_size, num_positions, num_bags, limit < 0 ? all : limit,
                    padding_idx};
      }));
  m.def(
      "gather_reduce",
      [](const PyMatrix& table, int64_t num_rows, int64_t dim, const Bags& bags, const PyVector& weights, uintptr_t out,
         int num_threads) {
        raise_bad_bags(bags, num_rows, num_threads);
        const GatherArgs args{matrix(table), num_rows, dim, bags, row_matrix(weights), reinterpret_cast<void*>(out)};
        py::gil_scoped_release release;
        gather_reduce(args, num_threads);
      },
      "out[b] = sum over the live ids of bag b of weight · table[id].");
  m.def(
      "gather_dot",
      [](const PyMatrix& dout, const PyMatrix& table, int64_t num_rows, int64_t dim, const Bags& bags, const PyVector& out,
         int num_threads) {
        raise_bad_bags(bags, num_rows, num_threads);
        const GatherDotArgs args{matrix(dout), matrix(table), num_rows, dim, bags, row_matrix(out)};
        py::gil_scoped_release release;
        gather_dot(args, num_threads);
      },
      "out[p] = <dout[bag of p], table[index[p]]>, zero where the id is skipped.");
}

}  // namespace gossamer::bindings
