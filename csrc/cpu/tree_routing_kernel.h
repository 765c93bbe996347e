// Gates of soft trees and of binary codes of one instruction set.
//
// The nodes of a tree are numbered as in a heap: the children of node i are 2i + 1 and 2i + 2. The children of neighbouring nodes are
// neighbours, so a vector of nodes yields two vectors of interleaved children. A code is a tree in which all nodes of a level share
// one split. Arrays indexed by node are padded to whole vectors; the padding holds arbitrary values.
#pragma once

#include "cpu/activation_kernel.h"
#include "cpu/topk_routing_kernel.h"
#include "cpu/tree_routing.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Added to the share that reaches a leaf: in the gates of trees, as nn.tree_gates documents, and in the entropy.
constexpr float kReachEpsilon = 1e-8f, kLogEpsilon = 1e-6f;

constexpr int64_t with_vector(int64_t count) { return (count + 2 * kLanes<float> - 1) / kLanes<float> * kLanes<float>; }

// The first and the second values of consecutive pairs.
struct Pairs {
  Vec<float> first, second;
};

GOSSAMER_INLINE Pairs load_pairs(const float* from) {
  constexpr int n = kLanes<float>;
  const Vec<float> a = load(from), b = load(from + n);
  return [&]<int... I>(std::integer_sequence<int, I...>) {
    return Pairs{__builtin_shufflevector(a, b, (2 * I)...), __builtin_shufflevector(a, b, (2 * I + 1)...)};
  }(std::make_integer_sequence<int, n>{});
}

GOSSAMER_INLINE void store_pairs(float* to, Vec<float> first, Vec<float> second) {
  constexpr int n = kLanes<float>;
  [&]<int... I>(std::integer_sequence<int, I...>) {
    store(to, __builtin_shufflevector(first, second, (I / 2 + I % 2 * n)...));
    store(to + n, __builtin_shufflevector(first, second, (n / 2 + I / 2 + I % 2 * n)...));
  }(std::make_integer_sequence<int, n>{});
}

// The logarithm of positive normal numbers: of m in [√½, √2) it is 2·atanh((m − 1)/(m + 1)).
GOSSAMER_INLINE Vec<float> vlog(Vec<float> x) {
  constexpr uint32_t root = 0x3f3504f3;  // √½
  const Mask<float> exponent = (Mask<float>)((UInts)x - root) >> 23;
  const Vec<float> m = (Vec<float>)((UInts)x - ((UInts)exponent << 23)), s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
  Vec<float> sum = splat(1.0f / 9);
  for (const float c : {1.0f / 7, 1.0f / 5, 1.0f / 3}) sum = sum * s2 + c;
  const Vec<float> power = __builtin_convertvector(exponent, Vec<float>);
  return power * 0.693147181f + (2.0f * s + 2.0f * s * s2 * sum);
}

// Whether each lane is one of the first `count`.
GOSSAMER_INLINE Mask<float> first_lanes(int64_t count) {
  Mask<float> lane;
  for (int i = 0; i < kLanes<float>; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(std::min<int64_t>(count, kLanes<float>));
}

// One part: its splits, and the shares that reach its nodes.
class SoftTree {
 public:
  explicit SoftTree(const TreeForm& form)
      : coded_(form.coded), inner_(form.inner_nodes()), splits_(form.splits()), experts_(form.experts) {
    int64_t last_level = 0;  // its first node
    while (2 * last_level + 1 <= 2 * inner_) last_level = 2 * last_level + 1;
    last_level_ = last_level;
    deep_ = std::min(2 * inner_ + 1 - last_level, experts_);
    const int64_t room = with_vector(splits_ + 1), nodes = 2 * with_vector(inner_) + with_vector(1);
    memory_ = std::make_unique<float[]>(3 * room + 2 * nodes + 2 * kLanes<float>);
    // Level d begins at node 2^d - 1. Aligned like this, its vectors are loaded just as they were stored.
    left_ = aligned(memory_.get()) + 1;
    right_ = left_ + room;
    slope_ = right_ + room;
    reach_ = slope_ + room;
    flow_ = reach_ + nodes;
  }

  // Reads the part's splits, behind which another vector must be readable.
  template <bool Slopes>
  void read(const float* v, float gamma) {
    constexpr int n = kLanes<float>;
    const Vec<float> width = splat(gamma), inverse = splat(1 / gamma), end = splat(0.5f);
    const float most_slope = 6 / (coded_ ? -gamma : gamma);
    for (int64_t i = 0; i < splits_; i += n) {
      Vec<float> x = load(v + i);
      x = x > -width ? x : -width;
      x = x < width ? x : width;
      // x / gamma; the second step corrects the rounding of the inverse.
      Vec<float> u = x * inverse;
      u = fma(fma(-u, width, x), inverse, u);
      u = u > -end ? u : -end;
      u = u < end ? u : end;
      // Both shares are accurate when small, and exactly zero if the step is saturated.
      const Vec<float> over = u + 0.5f, under = 0.5f - u;
      const Vec<float> step = over * over * (3.0f - 2.0f * over), rest = under * under * (3.0f - 2.0f * under);
      store(left_ + i, coded_ ? rest : step);
      store(right_ + i, coded_ ? step : rest);
      if constexpr (Slopes) store(slope_ + i, most_slope * over * under);
    }
    reach_[0] = 1;
    each_level([&](int64_t level, int64_t begin, int64_t count) {
      for (int64_t i = begin; i < begin + count; i += n) {
        const Vec<float> parents = load(reach_ + i);
        const auto [left, right] = shares(level, i);
        store_pairs(reach_ + 2 * i + 1, parents * left, parents * right);
      }
    });
  }

  // Writes the shares that reach the leaves, from left to right, padded with zeros to whole vectors.
  void leaves(float* to) const {
    std::copy_n(reach_ + last_level_, deep_, to);
    std::copy_n(reach_ + inner_, experts_ - deep_, to + deep_);
    std::fill_n(to + experts_, (kLanes<float> - experts_ % kLanes<float>) % kLanes<float>, 0.0f);
  }

  // Computes the gradients of the splits from those of the leaves; `to` has room for one more vector.
  void back(const float* leaves, float* to) {
    constexpr int n = kLanes<float>;
    std::copy_n(leaves, deep_, flow_ + last_level_);
    std::copy_n(leaves + deep_, experts_ - deep_, flow_ + inner_);
    // Codes that no expert has.
    if (coded_) std::fill_n(flow_ + last_level_ + experts_, inner_ + 1 - experts_, 0.0f);
    for (int64_t level = levels_of(last_level_) - 1, begin = (last_level_ - 1) / 2; level >= 0;
         --level, begin = (begin - 1) / 2) {
      const int64_t count = std::min(begin + 1, inner_ - begin);
      for (int64_t i = begin; i < begin + count; i += n) {
        const Pairs below = load_pairs(flow_ + 2 * i + 1);
        const auto [left, right] = shares(level, i);
        const Vec<float> sum = left * below.first + right * below.second;
        store(flow_ + i, first_lanes(begin + count - i) ? sum : load(flow_ + i));
      }
    }
    if (!coded_) {
      for (int64_t i = 0; i < inner_; i += n) {
        const Pairs below = load_pairs(flow_ + 2 * i + 1);
        store(to + i, load(reach_ + i) * (below.first - below.second) * load(slope_ + i));
      }
      return;
    }
    each_level([&](int64_t level, int64_t begin, int64_t count) {
      Vec<float> sum{};
      for (int64_t i = begin; i < begin + count; i += n) {
        const Pairs below = load_pairs(flow_ + 2 * i + 1);
        const Vec<float> d = load(reach_ + i) * (below.first - below.second);
        sum += first_lanes(begin + count - i) ? d : Vec<float>{};
      }
      to[level] = sum_lanes<float>(sum) * slope_[level];
    });
  }

 private:
  static float* aligned(float* memory) {
    constexpr uintptr_t bytes = sizeof(Vec<float>);
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + bytes - 1) / bytes * bytes);
  }

  static int64_t levels_of(int64_t first_node) {
    int64_t levels = 0;
    for (; first_node > 0; first_node = (first_node - 1) / 2) ++levels;
    return levels;
  }

  // Calls f(level, first node, number of inner nodes) from the root down.
  template <class F>
  void each_level(F&& f) const {
    for (int64_t level = 0, begin = 0; begin < inner_; ++level, begin = 2 * begin + 1) {
      f(level, begin, std::min(begin + 1, inner_ - begin));
    }
  }

  struct Shares {
    Vec<float> left, right;
  };
  Shares shares(int64_t level, int64_t node) const {
    if (coded_) return {splat(left_[level]), splat(right_[level])};
    return {load(left_ + node), load(right_ + node)};
  }

  bool coded_;
  int64_t inner_, splits_, experts_, last_level_, deep_;
  std::unique_ptr<float[]> memory_;
  float *left_, *right_, *slope_;  // by split
  float *reach_, *flow_;           // by node
};

// A token's scores, padded; two sets of rows by expert, one row for each part, with room for one value per part; and two more rows.
struct TreeRows {
  int64_t columns, room;
  std::unique_ptr<float[]> memory;
  float *scores, *parts, *more, *gates, *flow;

  explicit TreeRows(const TreeForm& form) : columns(form.columns()), room(with_vector(form.experts)) {
    const int64_t of_scores = with_vector(columns), of_parts = form.parts * room + with_vector(form.parts);
    memory = std::make_unique<float[]>(of_scores + 2 * of_parts + 2 * room);
    scores = memory.get();
    parts = scores + of_scores;
    more = parts + of_parts;
    gates = more + of_parts;
    flow = gates + room;
  }
};

// Sets a lane of `bad` if a score is NaN or +inf.
inline void judge_scores(const float* scores, int64_t count, Vec<float>& bad) {
  constexpr int n = kLanes<float>;
  const Vec<float> infinity = splat(std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < count; i += n) bad = load(scores + i) < infinity ? bad : splat(1.0f);
}

// Cleaned scores, kNoExpert in place of those that are masked or not `live`.
GOSSAMER_INLINE Vec<float> live_score(const float* scores, Mask<float> live) {
  const Vec<float> x = cleaned(scores, kLanes<float>);
  return (live & (x > kMasked)) ? x : splat(kNoExpert);
}

inline float highest_lane(Vec<float> v) {
  float highest = v[0];
  for (int lane = 1; lane < kLanes<float>; ++lane) highest = std::max(highest, v[lane]);
  return highest;
}

// Fills rows.gates with the sums over the parts; the caller divides by the total that is returned with the highest score.
struct GateNorm {
  float highest, total;
};

inline GateNorm sum_parts(const TreeRoutingArgs& a, SoftTree& tree, const TreeRows& rows) {
  constexpr int n = kLanes<float>;
  Vec<float> top = splat(kMasked), total{};
  for (int64_t j = 0; j < a.parts; ++j) {
    float* reach = rows.parts + j * rows.room;
    tree.read<false>(rows.scores + a.first_split(j), a.gamma);
    tree.leaves(reach);
    if (a.coded) continue;
    const float* scores = rows.scores + a.first_score(j);
    for (int64_t e = 0; e < a.experts; e += n) {
      const Vec<float> x = live_score(scores + e, load(reach + e) > 0.0f);
      store(rows.more + j * rows.room + e, x);
      top = x > top ? x : top;
    }
  }
  if (a.coded) {
    for (int64_t j = 0; j < a.parts; j += n) {
      const Vec<float> x = live_score(rows.scores + a.first_score(j), first_lanes(a.parts - j));
      store(rows.more + j, x);
      top = x > top ? x : top;
    }
    const float highest = highest_lane(top);
    for (int64_t j = 0; j < a.parts; j += n) {
      const Vec<float> share = falling_exp<float>(load(rows.more + j) - highest);
      store(rows.more + j, share);
      total += share;
    }
    for (int64_t e = 0; e < a.experts; e += n) {
      Vec<float> gate{};
      for (int64_t j = 0; j < a.parts; ++j) gate = fma(splat(rows.more[j]), load(rows.parts + j * rows.room + e), gate);
      store(rows.gates + e, gate);
    }
    return {highest, sum_lanes<float>(total)};
  }
  const float highest = highest_lane(top);
  for (int64_t e = 0; e < a.experts; e += n) {
    Vec<float> gate{};
    for (int64_t j = 0; j < a.parts; ++j) {
      const Vec<float> share = falling_exp<float>(load(rows.more + j * rows.room + e) - highest);
      gate = fma(share, load(rows.parts + j * rows.room + e) + kReachEpsilon, gate);
    }
    store(rows.gates + e, gate);
    total += gate;
  }
  return {highest, sum_lanes<float>(total)};
}

// Writes a token's slots. Gates behind the last expert are zero; with fewer slots than experts the gates are overwritten.
inline void choose_slots(const TreeRoutingArgs& a, int64_t t, float* gates) {
  int64_t* ids = a.ids + t * a.top_k;
  if (a.top_k == a.experts) {
    for (int64_t e = 0; e < a.experts; ++e) ids[e] = gates[e] > 0 ? e : a.experts;
    return;
  }
  for (int64_t k = 0; k < a.top_k; ++k) {
    const int64_t e = highest_place(gates, a.experts);
    const bool live = gates[e] > 0;
    ids[k] = live ? e : a.experts;
    a.weights[t * a.top_k + k] = live ? gates[e] : 0;
    gates[e] = kNoExpert;
  }
}

// Writes the sums of -s·log(s + 1e-6) and of s over a part's leaves, whose row is padded with zeros.
inline void sum_leaves(const float* reach, int64_t experts, float* to) {
  Vec<float> entropy{}, all{};
  for (int64_t e = 0; e < experts; e += kLanes<float>) {
    const Vec<float> s = load(reach + e);
    entropy += s * vlog(s + kLogEpsilon);
    all += s;
  }
  to[0] = -sum_lanes<float>(entropy);
  to[1] = sum_lanes<float>(all);
}

void tree_routing(const TreeRoutingArgs& a, int64_t begin, int64_t end) {
  constexpr int n = kLanes<float>;
  SoftTree tree(a);
  const TreeRows rows(a);
  Vec<float> bad{};
  for (int64_t t = begin; t < end; ++t) {
    std::copy_n(a.scores + t * a.row_stride, rows.columns, rows.scores);
    judge_scores(rows.scores, rows.columns, bad);
    const auto [highest, total] = sum_parts(a, tree, rows);
    const float divisor = total > 0 ? total : 1;
    for (int64_t e = 0; e < a.experts; e += n) store(rows.gates + e, load(rows.gates + e) / divisor);
    std::copy_n(rows.gates, a.experts, a.gates + t * a.experts);
    a.norm[2 * t] = highest;
    a.norm[2 * t + 1] = total;
    for (int64_t j = 0; a.reach && j < a.parts; ++j) {
      std::copy_n(rows.parts + j * rows.room, a.experts, a.reach + (t * a.parts + j) * a.experts);
    }
    for (int64_t j = 0; a.sums && j < a.parts; ++j) {
      sum_leaves(rows.parts + j * rows.room, a.experts, a.sums + (t * a.parts + j) * 2);
    }
    if (a.top_k) choose_slots(a, t, rows.gates);
  }
  if (sum_lanes<float>(bad) > 0) __atomic_store_n(a.bad, true, __ATOMIC_RELAXED);
}

// Writes the gradient of a token's gates, zero for gates that are zero and behind the last expert.
inline void fill_gate_flow(const TreeRoutingBackwardArgs& a, int64_t t, const float* gates, float* to) {
  if (a.dgates) {
    std::copy_n(a.dgates + t * a.experts, a.experts, to);
  } else {
    std::fill_n(to, a.experts, 0.0f);
  }
  if (a.dweights) {
    for (int64_t k = t * a.top_k; k < (t + 1) * a.top_k; ++k) {
      if (a.ids[k] < a.experts) to[a.ids[k]] += a.dweights[k];
    }
  }
  for (int64_t e = 0; e < a.experts; e += kLanes<float>) {
    const Mask<float> live = load(gates + e) > 0.0f;
    store(to + e, live ? load(to + e) : Vec<float>{});
  }
}

// Writes the gradient of a part's leaves from all results but the gates.
inline void fill_leaf_flow(const TreeRoutingBackwardArgs& a, int64_t part, const float* reach, float* to) {
  if (a.dreach) {
    std::copy_n(a.dreach + part * a.experts, a.experts, to);
  } else {
    std::fill_n(to, a.experts, 0.0f);
  }
  if (!a.dsums) return;
  const float dentropy = a.dsums[2 * part], dall = a.dsums[2 * part + 1];
  for (int64_t e = 0; e < a.experts; e += kLanes<float>) {
    const Vec<float> s = load(reach + e), more = s + kLogEpsilon;
    store(to + e, load(to + e) + (dall - dentropy * (vlog(more) + s / more)));
  }
}

void tree_routing_backward(const TreeRoutingBackwardArgs& a, int64_t begin, int64_t end) {
  constexpr int n = kLanes<float>;
  SoftTree tree(a);
  const TreeRows rows(a);
  const float infinity = std::numeric_limits<float>::infinity();
  float *reach = rows.parts, *dreach = rows.more;
  const auto dscores = std::make_unique<float[]>(with_vector(rows.columns));
  for (int64_t t = begin; t < end; ++t) {
    std::copy_n(a.scores + t * a.row_stride, rows.columns, rows.scores);
    std::copy_n(a.gates + t * a.experts, a.experts, rows.gates);
    fill_gate_flow(a, t, rows.gates, rows.flow);
    Vec<float> sum{};
    for (int64_t e = 0; e < a.experts; e += n) sum = fma(load(rows.gates + e), load(rows.flow + e), sum);
    const float mean = sum_lanes<float>(sum), highest = a.norm[2 * t], total = a.norm[2 * t + 1];
    const float divisor = total > 0 ? total : 1;
    for (int64_t j = 0; j < a.parts; ++j) {
      tree.read<true>(rows.scores + a.first_split(j), a.gamma);
      tree.leaves(reach);
      fill_leaf_flow(a, t * a.parts + j, reach, dreach);
      const float* scores = rows.scores + a.first_score(j);
      float *dsplits = dscores.get() + a.first_split(j), *dshare = dscores.get() + a.first_score(j);
      // Infinite scores are replaced by constants and get no gradient.
      if (a.coded) {
        const float share =
            scores[0] > kMasked ? falling_exp<float>(splat(std::min(scores[0], -kMasked) - highest))[0] / divisor : 0;
        Vec<float> taken{};
        for (int64_t e = 0; e < a.experts; e += n) {
          taken = fma(load(rows.flow + e), load(reach + e), taken);
          store(dreach + e, fma(splat(share), load(rows.flow + e), load(dreach + e)));
        }
        tree.back(dreach, dsplits);
        dshare[0] = scores[0] < infinity ? share * (sum_lanes<float>(taken) - mean) : 0;
        continue;
      }
      float* dleaves = rows.gates;
      for (int64_t e = 0; e < a.experts; e += n) {
        const Vec<float> s = load(reach + e), x = live_score(scores + e, s > 0.0f);
        const Vec<float> d = falling_exp<float>(x - highest) / divisor * (load(rows.flow + e) - mean);
        store(dreach + e, load(dreach + e) + d);
        store(dleaves + e, load(scores + e) < infinity ? d * (s + kReachEpsilon) : Vec<float>{});
      }
      // The last vector of split gradients may overwrite what follows, so the leaves' gradients are written after it.
      tree.back(dreach, dsplits);
      std::copy_n(dleaves, a.experts, dshare);
    }
    std::copy_n(dscores.get(), rows.columns, a.dscores + t * rows.columns);
  }
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
