// Gradients of products of small matrices, for one instruction set.
#pragma once

#include "cpu/isa_begin.h"
#include "cpu/product_gradient.h"

#include "cpu/isa_target.h"

#include "cpu/gather_compose_kernel.h"
#include "cpu/vec.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Columns [column, column + n) of kRows rows of the gradient of one left matrix, and what its positions add to those columns of the
// gradients of right matrices, in `sums`. Both are multiples of the same elements of `dout`, which are read once for both. kDepth is
// the number of columns of the matrices, or 0 for any.
template <bool kFactors, int kDepth, int kRows, int n, class S>
__attribute__((noinline)) void product_gradient_part(const ProductGradientArgs& a, int64_t left_row, int64_t first,
                                                     int64_t column, S* sums) {
  using V = decltype(load_lanes_of<n>(static_cast<const S*>(nullptr)));
  const int64_t depth = kDepth > 0 ? kDepth : a.k, width = a.n, result = a.m * width;
  const S *const right = static_cast<const S*>(a.right) + column, *const dout = static_cast<const S*>(a.dout) + first * width;
  const int32_t *at = a.positions + a.offsets[left_row], *const stop = a.positions + a.offsets[left_row + 1];
  const int32_t *const last = a.positions + a.offsets[a.num_left] - 1, *const rows = a.rows;
  const int64_t own = (left_row * a.m + first) * depth + column;
  V left[kRows], sum[kRows] = {};
  for (int i = 0; i < kRows; ++i) left[i] = load_lanes_of<n>(static_cast<const S*>(a.left) + own + i * depth);
  sums += column;
  for (; at < stop; ++at) {
    const int64_t p = *at, matrix = rows[2 * p + 1] * width * depth;
    const S *d = dout + rows[2 * p] * result, *from = right + matrix;
    S* to = sums + matrix;
    // Positions of one matrix are scattered over the bags.
    __builtin_prefetch(rows + 2 * int64_t{*std::min(at + 16, last)});
    __builtin_prefetch(dout + rows[2 * int64_t{*std::min(at + 6, last)}] * result);
    [[maybe_unused]] const S factor = kFactors ? static_cast<const S*>(a.factors)[p] : S{1};
    for (const S* const end = d + width; d < end;) {
      // Sums of a few products are added to the long ones: fewer terms are rounded to the precision of these.
      V part[kRows] = {};
      for (const S* const stop_at = std::min(d + 8, end); d < stop_at; ++d, from += depth, to += depth) {
        const V other = load_lanes_of<n>(from);
        V total = {};
        for (int i = 0; i < kRows; ++i) {
          S term = d[i * width];
          if constexpr (kFactors) term *= factor;
          part[i] += other * term;
          total += left[i] * term;
        }
        store_lanes_of(to, load_lanes_of<n>(to) + total);
      }
      for (int i = 0; i < kRows; ++i) sum[i] += part[i];
    }
  }
  for (int i = 0; i < kRows; ++i) store_lanes_of(static_cast<S*>(a.left_gradient) + own + i * depth, sum[i]);
}

template <bool kFactors, class S>
void product_gradient_rows(const ProductGradientArgs& a, int64_t begin, int64_t end, S* sums) {
  for (int64_t row = begin; row < end; ++row) {
    int64_t first = 0;
    const auto take = [&](auto rows) __attribute__((always_inline)) {
      constexpr int kRows = decltype(rows)::value;
      for (; first + kRows <= a.m; first += kRows) {
        if (a.k == kLanes<S>) {
          product_gradient_part<kFactors, kLanes<S>, kRows, kLanes<S>, S>(a, row, first, 0, sums);
          continue;
        }
        cover<S>(a.k, [&](auto lanes, auto vectors, int64_t column) {
          constexpr int n = decltype(lanes)::value;
          for (int v = 0; v < decltype(vectors)::value; ++v) {
            product_gradient_part<kFactors, 0, kRows, n, S>(a, row, first, column + v * n, sums);
          }
        });
      }
    };
    take(Count<4>{});
    take(Count<2>{});
    take(Count<1>{});
  }
}

// The gradients of left matrices [begin, end), and their share of those of the right ones, which is added to `sums`.
void product_gradient(const ProductGradientArgs& args, int64_t begin, int64_t end, void* sums) {
  const auto of_type = [&](auto* to) {
    args.factors ? product_gradient_rows<true>(args, begin, end, to) : product_gradient_rows<false>(args, begin, end, to);
  };
  args.dtype == DType::kFloat64 ? of_type(static_cast<double*>(sums)) : of_type(static_cast<float*>(sums));
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
