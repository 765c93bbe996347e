#include "cpu/sparse_update.h"

#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>

#include "bindings/arguments.h"
#include "bindings/bags.h"
#include "bindings/register.h"

namespace gossamer::bindings {

namespace {

// (pointer, row stride, whether it has a value per row)
using PyState = std::tuple<uintptr_t, int64_t, bool>;

StateArray state_array(const PyState& state) {
  const auto& [pointer, row_stride, per_row] = state;
  return {reinterpret_cast<void*>(pointer), row_stride, per_row};
}

// The enumerator with this name.
template <class T, size_t kCount>
T named(const char* what, const Named<T> (&table)[kCount], std::string_view name) {
  for (const Named<T>& entry : table) {
    if (entry.name == name) return entry.value;
  }
  throw std::invalid_argument(std::string(what) + " has no native formula: " + std::string(name));
}

}  // namespace

void register_sparse_update(py::module_& m) {
  py::class_<StepRule>(m, "StepRule", "A rule of optimizer steps with its numbers.")
      .def(py::init([](std::string_view name, double lr, double weight_decay, std::string_view decay, double beta1,
                       double beta2, double eps, bool nesterov, double l1, double l2, double clip_value, double clip_norm,
                       bool stochastic_rounding, uint64_t seed) {
             return StepRule{.algorithm = named("optimizer", kAlgorithms, name),
                             .lr = lr,
                             .weight_decay = weight_decay,
                             .decay = named("decay", kDecays, decay),
                             .beta1 = beta1,
                             .beta2 = beta2,
                             .eps = eps,
                             .nesterov = nesterov,
                             .l1 = l1,
                             .l2 = l2,
                             .clip_value = clip_value,
                             .clip_norm = clip_norm,
                             .stochastic_rounding = stochastic_rounding,
                             .seed = seed};
           }),
           py::kw_only(), py::arg("name"), py::arg("lr"), py::arg("weight_decay"), py::arg("decay"), py::arg("beta1"),
           py::arg("beta2"), py::arg("eps"), py::arg("nesterov"), py::arg("l1"), py::arg("l2"), py::arg("clip_value"),
           py::arg("clip_norm"), py::arg("stochastic_rounding"), py::arg("seed"));
  m.def(
      "sparse_update",
      [](const PyMatrix& table, const PyState& state1, const PyState& state2, int64_t num_rows, int64_t dim,
         const PyScales& scales, double scale_rate, const PyMatrix& dout, const Bags& bags, uintptr_t argmax,
         const StepRule& rule, int64_t step, bool blocks, int num_threads) {
        raise_bad_bags(bags, num_rows, !bags.drop, true, num_threads);
        const UpdateArgs args{.table = matrix(table),
                              .state1 = state_array(state1),
                              .state2 = state_array(state2),
                              .num_rows = num_rows,
                              .dim = dim,
                              .scales = row_scales(scales),
                              .scale_rate = scale_rate,
                              .dout = matrix(dout),
                              .bags = bags,
                              .argmax = pointer<const int32_t>(argmax),
                              .rule = rule.at(step),
                              .blocks = blocks};
        py::gil_scoped_release release;
        sparse_update(args, num_threads);
      },
      "One optimizer step on the rows that bags list, with the gradients of duplicates summed first.", py::kw_only(),
      py::arg("table"), py::arg("state1"), py::arg("state2"), py::arg("num_rows"), py::arg("dim"), py::arg("scales"),
      py::arg("scale_rate"), py::arg("dout"), py::arg("bags"), py::arg("argmax"), py::arg("rule"), py::arg("step"),
      py::arg("blocks"), py::arg("num_threads"));
}

}  // namespace gossamer::bindings
