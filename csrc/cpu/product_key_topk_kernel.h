// The highest sums of two lists of scores, of one instruction set.
#pragma once

#include "cpu/gather_reduce_kernel.h"
#include "cpu/product_key_topk.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

constexpr float kMaskedKey = -std::numeric_limits<float>::infinity();

// Bit i is set where lane i of the mask is.
GOSSAMER_INLINE uint32_t lane_bits(Mask<float> mask) {
#if GOSSAMER_F16C && GOSSAMER_VECTOR_BYTES == 64
  return _mm512_movepi32_mask((__m512i)mask);
#elif GOSSAMER_F16C
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes<float>; ++lane) bits |= (static_cast<uint32_t>(mask[lane]) & 1u) << lane;
  return bits;
#endif
}

// The highest of the values seen so far, in descending order; of equal values the first one seen.
struct Ranking {
  int64_t size, filled = 0;
  float value[kMostPairs];
  int32_t index[kMostPairs];

  explicit Ranking(int64_t size) : size(size) {}

  bool takes(float v) const { return filled < size || v > value[size - 1]; }

  void show(float v, int32_t i) {
    if (!takes(v)) return;
    int64_t at = filled < size ? filled++ : size - 1;
    for (; at > 0 && v > value[at - 1]; --at) {
      value[at] = value[at - 1];
      index[at] = index[at - 1];
    }
    value[at] = v;
    index[at] = i;
  }
};

// A bound that at least `wanted` of the values (whole vectors of them) reach, and few more if they are evenly spread. Halving
// the range a few times takes a tenth of the time of finding the exact bound.
inline float reached_by(const float* values, int64_t sets, int64_t wanted) {
  constexpr int n = kLanes<float>;
  Vec<float> low = load(values), high = low;
  for (int64_t set = 1; set < sets; ++set) {
    const Vec<float> v = load(values + set * n);
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
  float least = low[0], most = high[0];
  for (int lane = 1; lane < n; ++lane) {
    least = std::min(least, low[lane]);
    most = std::max(most, high[lane]);
  }
  for (int step = 0; step < 8 && least > kMaskedKey; ++step) {
    const float middle = least + (most - least) / 2;
    int64_t count = 0;
    for (int64_t set = 0; set < sets; ++set) count += __builtin_popcount(lane_bits(load(values + set * n) >= splat(middle)));
    if (count < wanted) {
      most = middle;
    } else {
      least = middle;
      if (count == wanted) break;
    }
  }
  return least;
}

// Ranks the `count` scores; returns whether all are numbers or -inf.
//
// If K of the maxima of disjoint parts reach a bound, then at least K scores reach it, and few more. One pass finds such a
// bound, another collects the scores that reach it, and only these are ranked. With 4·K parts, about 1.2·K of evenly spread
// scores reach it.
inline bool rank_scores(const float* scores, int64_t count, Ranking& best) {
  constexpr int n = kLanes<float>;
  constexpr int64_t most_sets = 4 * kMostPairs / n;
  const Vec<float> infinity = splat(std::numeric_limits<float>::infinity());
  const int64_t vectors = count / n, sets = std::min((4 * best.size + n - 1) / n, most_sets);
  Mask<float> sound = ~Mask<float>{};
  float bound = kMaskedKey;
  if (vectors >= 2 * sets) {
    float maxima[most_sets * n];
    for (int64_t set = 0; set < sets; ++set) {
      Vec<float> highest = load(scores + set * n);
      sound &= highest < infinity;
      for (int64_t v = set + sets; v < vectors; v += sets) {
        const Vec<float> x = load(scores + v * n);
        sound &= x < infinity;
        highest = x > highest ? x : highest;
      }
      store(maxima + set * n, highest);
    }
    bound = reached_by(maxima, sets, best.size);
  } else {
    for (int64_t v = 0; v < vectors; ++v) sound &= load(scores + v * n) < infinity;
  }
  const Vec<float> reach = splat(bound);
  for (int64_t v = 0; v < vectors; ++v) {
    for (uint32_t bits = lane_bits(load(scores + v * n) >= reach); bits; bits &= bits - 1) {
      const int64_t i = v * n + __builtin_ctz(bits);
      best.show(scores[i], static_cast<int32_t>(i));
    }
  }
  bool numbers = lane_bits(sound) == lane_bits(~Mask<float>{});
  for (int64_t i = vectors * n; i < count; ++i) {
    numbers &= scores[i] < std::numeric_limits<float>::infinity();
    best.show(scores[i], static_cast<int32_t>(i));
  }
  return numbers;
}

// The highest sums of two ranked lists. A pair of ranks i and j is preceded by (i+1)·(j+1) - 1 others, so most are never looked
// at. Pairs are visited in order of their ranks, so of equal sums the lower ranks come first.
inline void rank_pairs(const Ranking& first, const Ranking& second, Ranking& pairs) {
  constexpr float kMost = std::numeric_limits<float>::max();
  const int64_t k = pairs.size;
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < k / (i + 1); ++j) {
      const float a = first.value[i], b = second.value[j];
      const float sum = a == kMaskedKey || b == kMaskedKey ? kMaskedKey : std::clamp(a + b, -kMost, kMost);
      if (!pairs.takes(sum)) break;
      pairs.show(sum, static_cast<int32_t>(i * kMostPairs + j));
    }
  }
}

// The K highest pairs of two ranked lists: their sums, if wanted, and ids.
inline void choose_pairs(const Ranking& first, const Ranking& second, int64_t size2, float* values, int64_t* ids) {
  Ranking pairs(first.size);
  rank_pairs(first, second, pairs);
  for (int64_t k = 0; k < pairs.size; ++k) {
    const int32_t pair = pairs.index[k];
    ids[k] = int64_t{first.index[pair / kMostPairs]} * size2 + second.index[pair % kMostPairs];
  }
  if (values) std::copy_n(pairs.value, pairs.size, values);
}

// The K highest pairs of one row of each list. If a score is NaN or +inf, nothing is ranked and false is returned.
inline bool search_pairs(const float* scores1, int64_t size1, const float* scores2, int64_t size2, int64_t top_k, float* values,
                         int64_t* ids) {
  Ranking first(top_k), second(top_k);
  if (!rank_scores(scores1, size1, first) || !rank_scores(scores2, size2, second)) {
    std::fill_n(ids, top_k, int64_t{0});
    return false;
  }
  choose_pairs(first, second, size2, values, ids);
  return true;
}

void product_key_topk(const ProductKeyTopkArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const bool sound = search_pairs(a.scores1 + r * a.row_stride1, a.size1, a.scores2 + r * a.row_stride2, a.size2, a.top_k,
                                    a.values + r * a.top_k, a.ids + r * a.top_k);
    if (!sound) __atomic_store_n(a.bad, true, __ATOMIC_RELAXED);
  }
}

void product_key_topk_backward(const ProductKeyTopkBackwardArgs& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    float *to1 = a.dscores1 + r * a.size1, *to2 = a.dscores2 + r * a.size2;
    std::fill_n(to1, a.size1, 0.0f);
    std::fill_n(to2, a.size2, 0.0f);
    for (int64_t k = r * a.top_k; k < (r + 1) * a.top_k; ++k) {
      if (a.values[k] == kMaskedKey) continue;
      to1[a.ids[k] / a.size2] += a.dvalues[k];
      to2[a.ids[k] % a.size2] += a.dvalues[k];
    }
  }
}

// The scores of a query's chosen pairs.
inline void score_pairs(const ProductKeySearchArgs& a, int64_t row) {
  const float *query = a.queries + row * a.row_stride, *keys = a.keys + row % a.groups * 2 * a.side * a.half;
  for (int64_t k = row * a.top_k; k < (row + 1) * a.top_k; ++k) {
    const int64_t first = a.ids[k] / a.side, second = a.side + a.ids[k] % a.side;
    a.scores[k] = row_dot(keys + first * a.half, query, a.half) + row_dot(keys + second * a.half, query + a.half, a.half);
  }
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
