#include "cpu/delta_rule.h"

#include <optional>

#include "bindings/arguments.h"
#include "bindings/register.h"
#include "cpu/gate_range.h"

namespace gossamer::bindings {
namespace {

// (pointer, batch stride, token stride, head stride, dtype code)
using PyHeads = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int>;

HeadArray head_array(const PyHeads& x) {
  const auto& [pointer, batch, token, head, dtype] = x;
  return {reinterpret_cast<void*>(pointer), batch, token, head, static_cast<DType>(dtype)};
}

// The arguments from gossamer.ops.delta_rule: the record, with the output, the states and the kind of decay.
DeltaRuleArgs delta_rule_args(const std::tuple<PyHeads, PyHeads, PyHeads, PyHeads, PyHeads, PyHeads>& arrays,
                              const std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>& sizes, uintptr_t bounds,
                              int64_t num_sequences, int decay, uintptr_t a_log, uintptr_t dt_bias,
                              std::optional<double> lower_bound, double scale, bool l2norm, uintptr_t initial_state,
                              uintptr_t final_state, uintptr_t checkpoints) {
  DeltaRuleArgs a{};
  const auto& [q, k, v, beta, g, o] = arrays;
  a.q = head_array(q), a.k = head_array(k), a.v = head_array(v), a.beta = head_array(beta), a.g = head_array(g),
  a.o = head_array(o);
  a.dtype = a.q.dtype;
  std::tie(a.batch, a.tokens, a.key_heads, a.heads, a.key_size, a.value_size) = sizes;
  a.bounds = pointer<const int64_t>(bounds);
  a.num_sequences = num_sequences;
  a.decay = static_cast<Gating>(decay);
  a.a_log = pointer<const void>(a_log);
  a.dt_bias = pointer<const void>(dt_bias);
  a.sigmoid = lower_bound.has_value();
  a.lower_bound = lower_bound.value_or(0);
  a.scale = scale;
  a.l2norm = l2norm;
  a.initial_state = pointer<const void>(initial_state);
  a.final_state = pointer<void>(final_state);
  a.checkpoints = pointer<void>(checkpoints);
  return a;
}

// Raises an error for invalid values of β and g, before anything is written.
void check_gates(const DeltaRuleArgs& a) {
  GateRange range;
  {
    py::gil_scoped_release release;
    range = gate_range(a);
  }
  if (range.least_beta < 0 || range.most_beta > 2) {
    const double value = range.least_beta < 0 ? range.least_beta : range.most_beta;
    throw py::value_error("beta must be in [0, 2], got " + py::str(py::float_(value)).cast<std::string>());
  }
  if (range.most_g > 0) {
    throw py::value_error("g must be at most 0, the logarithm of a decay, got " +
                          py::str(py::float_(range.most_g)).cast<std::string>());
  }
}

}  // namespace

void register_delta_rule(py::module_& m) {
  py::class_<DeltaRuleArgs>(m, "DeltaRule", "The arguments of the delta rule.")
      .def(py::init(&delta_rule_args), py::arg("arrays"), py::arg("sizes"), py::arg("bounds"), py::arg("num_sequences"),
           py::arg("decay"), py::arg("a_log"), py::arg("dt_bias"), py::arg("lower_bound"), py::arg("scale"), py::arg("l2norm"),
           py::arg("initial_state"), py::arg("final_state"), py::arg("checkpoints"));
  m.attr("DELTA_RULE_SPAN") = kSpanChunks * kChunkTokens;
  m.def(
      "delta_rule",
      [](const DeltaRuleArgs& args, int num_threads) {
        check_gates(args);
        py::gil_scoped_release release;
        delta_rule(args, num_threads);
      },
      "The output, the final state and the states that the backward pass starts from.");
  m.def(
      "delta_rule_step",
      [](const DeltaRuleArgs& args, int num_threads) {
        check_gates(args);
        py::gil_scoped_release release;
        delta_rule_step(args, num_threads);
      },
      "One token of each batch; the final state, which is the initial one, changes in place.");
  m.def(
      "delta_rule_backward",
      [](const DeltaRuleArgs& args, const PyHeads& d_o, uintptr_t dfinal_state,
         const std::tuple<PyHeads, PyHeads, PyHeads, PyHeads, PyHeads>& gradients, uintptr_t dinitial_state, int num_threads) {
        const auto& [dq, dk, dv, dbeta, dg] = gradients;
        DeltaRuleBackwardArgs a{};
        static_cast<DeltaRuleArgs&>(a) = args;
        a.d_o = head_array(d_o);
        a.dfinal_state = pointer<const void>(dfinal_state);
        a.dq = head_array(dq), a.dk = head_array(dk), a.dv = head_array(dv), a.dbeta = head_array(dbeta), a.dg = head_array(dg);
        a.dinitial_state = pointer<void>(dinitial_state);
        py::gil_scoped_release release;
        delta_rule_backward(a, num_threads);
      },
      "The gradients of the arguments; that of the decays is with respect to their logarithms.");
  m.def(
      "gate_backward",
      [](int64_t batch, int64_t tokens, int64_t heads, int64_t channels, const PyHeads& g, const PyHeads& dg, uintptr_t a_log,
         uintptr_t dt_bias, std::optional<double> lower_bound, uintptr_t da_log, uintptr_t ddt_bias, int num_threads) {
        const HeadArray flow = head_array(dg);
        const GateBackwardArgs args{flow.dtype,
                                    batch,
                                    tokens,
                                    heads,
                                    channels,
                                    head_array(g),
                                    flow,
                                    pointer<const void>(a_log),
                                    pointer<const void>(dt_bias),
                                    lower_bound.has_value(),
                                    lower_bound.value_or(0),
                                    pointer<void>(da_log),
                                    pointer<void>(ddt_bias)};
        py::gil_scoped_release release;
        gate_backward(args, num_threads);
      },
      "Gradients of raw gates, in place of those of log decays, and of their parameters.");
}

}  // namespace gossamer::bindings
