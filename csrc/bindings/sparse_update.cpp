#include "cpu/sparse_update.h"

#include <cmath>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/bags.h"
#include "bindings/register.h"

namespace gossamer::bindings {

namespace {

// The numbers of gossamer.optim.Hyper, in its order, for step t, which counts from 1.
StepRule step_rule(int algorithm, const std::vector<double>& hyper, uint64_t seed, int64_t t) {
  StepRule rule{};
  rule.algorithm = static_cast<Algorithm>(algorithm);
  rule.lr = hyper.at(0);
  rule.weight_decay = hyper.at(1);
  rule.decoupled = hyper.at(2) != 0;
  rule.beta1 = hyper.at(3);
  rule.beta2 = hyper.at(4);
  rule.eps = hyper.at(5);
  rule.nesterov = hyper.at(6) != 0;
  rule.l1 = hyper.at(7);
  rule.l2 = hyper.at(8);
  rule.clip_value = hyper.at(9);
  rule.clip_norm = hyper.at(10);
  rule.stochastic_rounding = hyper.at(11) != 0;
  rule.correction1 = 1 - std::pow(rule.beta1, static_cast<double>(t));
  rule.correction2 = 1 - std::pow(rule.beta2, static_cast<double>(t));
  rule.step_key = mix64(mix64(seed) + static_cast<uint64_t>(t) * kGolden);
  return rule;
}

}  // namespace

void register_sparse_update(py::module_& m) {
  m.def(
      "sparse_update",
      [](const PyMatrix& table, const PyMatrix& state1, const PyMatrix& state2, int64_t num_rows, int64_t dim,
         const PyMatrix& dout, const Bags& bags, const PyVector& weights, uintptr_t argmax, bool mean, bool drop,
         int algorithm, const std::vector<double>& hyper, uint64_t seed, int64_t t, int num_threads) {
        const FloatMatrix factors = row_matrix(weights);
        raise_bad_bags(bags, num_rows, drop, factors, num_threads);
        const UpdateArgs args{matrix(table),
                              matrix(state1),
                              matrix(state2),
                              num_rows,
                              dim,
                              matrix(dout),
                              bags,
                              factors,
                              reinterpret_cast<const int32_t*>(argmax),
                              mean,
                              step_rule(algorithm, hyper, seed, t)};
        py::gil_scoped_release release;
        sparse_update(args, num_threads);
      },
      "One optimizer step on the rows that bags list, with the gradients of duplicates summed first.");
}

}  // namespace gossamer::bindings
