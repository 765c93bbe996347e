// Retrieval by product keys of one instruction set.
#pragma once

#include "cpu/product_key_screen_kernel.h"
#include "cpu/tile_gemm.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Searches queries [begin, end) of one group: scores of kGroup queries at a time stay in the second-level cache until they are
// ranked.
inline void product_search(const ProductKeySearchArgs& a, int64_t group, int64_t begin, int64_t end) {
  constexpr int n = kLanes<float>;
  const int64_t stride = (a.side + n - 1) / n * n, queries = a.rows / a.groups;
  const auto uninitialised = [](int64_t values) { return std::unique_ptr<float[]>(new float[values]); };
  const auto packed = uninitialised(2 * stride * a.half), scores = uninitialised(2 * kGroup * stride);
  const auto pack = uninitialised(kPackSize<float>);
  std::vector<const float*> rows(a.side);
  Panel<float> panels[2];
  for (int64_t list = 0; list < 2; ++list) {
    const float* keys = a.keys + (group * 2 + list) * a.side * a.half;
    for (int64_t i = 0; i < a.side; ++i) rows[i] = keys + i * a.half;
    panels[list] = {packed.get() + list * stride * a.half, a.half, a.side};
    pack_as_columns(panels[list], rows.data(), 0, a.half);
  }
  for (int64_t at = begin; at < end; at += kGroup) {
    const int64_t count = std::min<int64_t>(kGroup, end - at);
    for (int64_t list = 0; list < 2; ++list) {
      const Weight<float> left{a.queries + group * a.row_stride + list * a.half, a.groups * a.row_stride, 1, queries, a.half};
      group_product(left, at, count, panels[list], scores.get() + list * kGroup * stride, stride, pack.get());
    }
    for (int64_t i = 0; i < count; ++i) {
      const float* row = scores.get() + i * stride;
      const int64_t query = (at + i) * a.groups + group;
      if (!search_pairs(row, a.side, row + kGroup * stride, a.side, a.top_k, nullptr, a.ids + query * a.top_k)) {
        __atomic_store_n(a.bad, true, __ATOMIC_RELAXED);
      }
      score_pairs(a, query);
    }
  }
}

void product_key_search(const ProductKeySearchArgs& a, int64_t begin, int64_t end) {
  for (int64_t group = 0; group < a.groups; ++group) {
#if GOSSAMER_VNNI
    if (can_screen(a)) {
      const float* keys = a.keys + group * 2 * a.side * a.half;
      const CodedKeys coded[2] = {CodedKeys(keys, a.side, a.half), CodedKeys(keys + a.side * a.half, a.side, a.half)};
      if (coded[0].sound && coded[1].sound) {
        screened_search(a, group, coded, begin, end);
        continue;
      }
    }
#endif
    product_search(a, group, begin, end);
  }
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
