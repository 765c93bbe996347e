#include "cpu/tree_routing.h"

#include "bindings/arguments.h"
#include "bindings/register.h"

namespace gossamer::bindings {

namespace {

// (scores, row stride, T, parts, E, gamma, whether parts are codes)
using PyTreeForm = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, float, bool>;

TreeForm tree_form(const PyTreeForm& form) {
  const auto& [scores, row_stride, tokens, parts, experts, gamma, coded] = form;
  return {pointer<const float>(scores), row_stride, tokens, parts, experts, gamma, coded};
}

}  // namespace

void register_tree_routing(py::module_& m) {
  m.def(
      "tree_routing",
      [](const PyTreeForm& form, int64_t top_k, uintptr_t gates, uintptr_t norm, uintptr_t ids, uintptr_t weights,
         uintptr_t reach, uintptr_t sums, int num_threads) {
        bool bad = false;
        const TreeRoutingArgs args{tree_form(form),
                                   top_k,
                                   pointer<float>(gates),
                                   pointer<float>(norm),
                                   pointer<int64_t>(ids),
                                   pointer<float>(weights),
                                   pointer<float>(reach),
                                   pointer<float>(sums),
                                   &bad};
        py::gil_scoped_release release;
        tree_routing(args, num_threads);
        return !bad;
      },
      "Gates by soft trees or codes, and the experts chosen by them; returns whether all scores are numbers or -inf.",
      py::arg("form"), py::kw_only(), py::arg("top_k"), py::arg("gates"), py::arg("norm"), py::arg("ids"), py::arg("weights"),
      py::arg("reach"), py::arg("sums"), py::arg("num_threads"));
  m.def(
      "tree_routing_backward",
      [](const PyTreeForm& form, int64_t top_k, uintptr_t gates, uintptr_t norm, uintptr_t ids, uintptr_t dgates,
         uintptr_t dweights, uintptr_t dreach, uintptr_t dsums, uintptr_t dscores, int num_threads) {
        const TreeRoutingBackwardArgs args{tree_form(form),
                                           top_k,
                                           pointer<const float>(gates),
                                           pointer<const float>(norm),
                                           pointer<const int64_t>(ids),
                                           pointer<const float>(dgates),
                                           pointer<const float>(dweights),
                                           pointer<const float>(dreach),
                                           pointer<const float>(dsums),
                                           pointer<float>(dscores)};
        py::gil_scoped_release release;
        tree_routing_backward(args, num_threads);
      },
      "What flows back to the scores.", py::arg("form"), py::kw_only(), py::arg("top_k"), py::arg("gates"), py::arg("norm"),
      py::arg("ids"), py::arg("dgates"), py::arg("dweights"), py::arg("dreach"), py::arg("dsums"), py::arg("dscores"),
      py::arg("num_threads"));
}

}  // namespace gossamer::bindings
