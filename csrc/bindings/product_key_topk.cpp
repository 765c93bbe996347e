#include "cpu/product_key_topk.h"

#include <string>

#include "bindings/arguments.h"
#include "bindings/register.h"

namespace gossamer::bindings {

namespace {

int64_t checked_pairs(int64_t top_k) {
  if (top_k <= kMostPairs) return top_k;
  throw py::value_error("top_k must be at most " + std::to_string(kMostPairs) + ", got " + std::to_string(top_k));
}

}  // namespace

void register_product_key_topk(py::module_& m) {
  m.def(
      "product_key_topk",
      [](uintptr_t scores1, int64_t row_stride1, uintptr_t scores2, int64_t row_stride2, int64_t rows, int64_t size1,
         int64_t size2, int64_t top_k, uintptr_t values, uintptr_t ids, int num_threads) {
        bool bad = false;
        const ProductKeyTopkArgs args{.scores1 = pointer<const float>(scores1),
                                      .scores2 = pointer<const float>(scores2),
                                      .row_stride1 = row_stride1,
                                      .row_stride2 = row_stride2,
                                      .rows = rows,
                                      .size1 = size1,
                                      .size2 = size2,
                                      .top_k = checked_pairs(top_k),
                                      .values = pointer<float>(values),
                                      .ids = pointer<int64_t>(ids),
                                      .bad = &bad};
        py::gil_scoped_release release;
        product_key_topk(args, num_threads);
        return !bad;
      },
      "The highest sums of one score from each of two lists; returns whether all scores are numbers or -inf.", py::kw_only(),
      py::arg("scores1"), py::arg("row_stride1"), py::arg("scores2"), py::arg("row_stride2"), py::arg("rows"), py::arg("size1"),
      py::arg("size2"), py::arg("top_k"), py::arg("values"), py::arg("ids"), py::arg("num_threads"));
  m.def(
      "product_key_topk_backward",
      [](uintptr_t dvalues, uintptr_t values, uintptr_t ids, int64_t rows, int64_t size1, int64_t size2, int64_t top_k,
         uintptr_t dscores1, uintptr_t dscores2, int num_threads) {
        const ProductKeyTopkBackwardArgs args{.dvalues = pointer<const float>(dvalues),
                                              .values = pointer<const float>(values),
                                              .ids = pointer<const int64_t>(ids),
                                              .rows = rows,
                                              .size1 = size1,
                                              .size2 = size2,
                                              .top_k = top_k,
                                              .dscores1 = pointer<float>(dscores1),
                                              .dscores2 = pointer<float>(dscores2)};
        py::gil_scoped_release release;
        product_key_topk_backward(args, num_threads);
      },
      "What flows back to both lists.", py::kw_only(), py::arg("dvalues"), py::arg("values"), py::arg("ids"), py::arg("rows"),
      py::arg("size1"), py::arg("size2"), py::arg("top_k"), py::arg("dscores1"), py::arg("dscores2"), py::arg("num_threads"));
  m.def(
      "product_key_search",
      [](uintptr_t queries, int64_t row_stride, int64_t rows, uintptr_t keys, int64_t groups, int64_t side, int64_t half,
         int64_t top_k, uintptr_t ids, uintptr_t scores, int num_threads) {
        bool bad = false;
        const ProductKeySearchArgs args{.queries = pointer<const float>(queries),
                                        .row_stride = row_stride,
                                        .rows = rows,
                                        .keys = pointer<const float>(keys),
                                        .groups = groups,
                                        .side = side,
                                        .half = half,
                                        .top_k = checked_pairs(top_k),
                                        .ids = pointer<int64_t>(ids),
                                        .scores = pointer<float>(scores),
                                        .bad = &bad};
        py::gil_scoped_release release;
        product_key_search(args, num_threads);
        return !bad;
      },
      "The pairs of sub-keys with the highest scores of each query, and these scores; returns whether all scores are numbers or -inf.",
      py::kw_only(), py::arg("queries"), py::arg("row_stride"), py::arg("rows"), py::arg("keys"), py::arg("groups"),
      py::arg("side"), py::arg("half"), py::arg("top_k"), py::arg("ids"), py::arg("scores"), py::arg("num_threads"));
}

}  // namespace gossamer::bindings
