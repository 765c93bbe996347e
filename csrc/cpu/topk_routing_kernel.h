// Routing of one instruction set.
#pragma once

#include "cpu/activation_kernel.h"
#include "cpu/panel.h"
#include "cpu/topk_routing.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// The logit and choice of a masked expert: below all other experts, but above padding.
constexpr float kMasked = std::numeric_limits<float>::lowest();
constexpr float kNoExpert = -std::numeric_limits<float>::infinity();
// Keeps the normalisation of sigmoid scores finite where all of them underflow, as in ops/topk_routing.py.
constexpr float kScoreEpsilon = 1e-20f;

// The position of the highest value in whole vectors of values, the first of equal ones.
inline int64_t highest_place(const float* values, int64_t count) {
  constexpr int n = kLanes<float>;
  Vec<float> best = load(values);
  Mask<float> begin{};
  for (int64_t i = n; i < count; i += n) {
    const Vec<float> v = load(values + i);
    const Mask<float> above = v > best;
    best = above ? v : best;
    begin = above ? static_cast<int32_t>(i) - Mask<float>{} : begin;
  }
  float value[n];
  int32_t at[n];
  store(value, best);
  std::memcpy(at, &begin, sizeof begin);
  float highest = value[0];
  int64_t place = at[0];
  for (int lane = 1; lane < n; ++lane) {
    const bool better = value[lane] > highest || (value[lane] == highest && at[lane] + lane < place);
    highest = better ? value[lane] : highest;
    place = better ? at[lane] + lane : place;
  }
  return place;
}

// The highest of the values seen so far, in descending order; of equal values the first one seen.
struct Highest {
  int64_t size;
  float value[kMostChosen];
  int64_t index[kMostChosen];

  explicit Highest(int64_t size) : size(size) {
    std::fill_n(value, size, kNoExpert);
    std::fill_n(index, size, int64_t{0});
  }

  void show(float v, int64_t i) {
    if (!(v > value[size - 1])) return;
    int64_t at = size - 1;
    for (; at > 0 && v > value[at - 1]; --at) {
      value[at] = value[at - 1];
      index[at] = index[at - 1];
    }
    value[at] = v;
    index[at] = i;
  }
};

// The token's cleaned logits, its scores, and the values by which experts are chosen; each with room for whole vectors.
struct TokenScores {
  float *x, *score, *choice;
};

// Masks the experts of all groups but the chosen ones; a group counts by the sum of its `best` highest choices, without masked
// ones beyond the first.
inline void mask_groups(const TopkRoutingArgs& a, float* choice) {
  const int64_t size = a.experts / a.n_group;
  Highest chosen(a.topk_group);
  for (int64_t g = 0; g < a.n_group; ++g) {
    Highest best(std::min<int64_t>(a.sigmoid ? 2 : 1, size));
    for (int64_t i = 0; i < size; ++i) best.show(choice[g * size + i], i);
    const bool second = best.size > 1 && best.value[1] > kMasked;
    chosen.show(second ? best.value[0] + best.value[1] : best.value[0], g);
  }
  std::sort(chosen.index, chosen.index + chosen.size);
  int64_t at = 0;
  for (int64_t g = 0; g < a.n_group; ++g) {
    if (at < chosen.size && chosen.index[at] == g) {
      ++at;
    } else {
      std::fill_n(choice + g * size, size, kMasked);
    }
  }
}

// Cleans a token's logits: NaN and −inf become a masked expert's logit, +inf the largest finite number.
GOSSAMER_INLINE Vec<float> cleaned(const float* logits, int valid) {
  Vec<float> x = load_valid(logits, valid);
  x = x > kMasked ? x : splat(kMasked);
  return x > -kMasked ? splat(-kMasked) : x;
}

// Writes e^(x − highest) in whole vectors, 0 for masked experts, and returns the sum. `top` has the highest in one of its
// lanes.
inline float exponentials(const float* x, int64_t experts, Vec<float> top, float* to) {
  float highest = top[0];
  for (int lane = 1; lane < kLanes<float>; ++lane) highest = std::max(highest, top[lane]);
  Vec<float> total{};
  for (int64_t e = 0; e < experts; e += kLanes<float>) {
    const Vec<float> v = load(x + e), score = v == kMasked ? Vec<float>{} : falling_exp<float>(v - highest);
    store(to + e, score);
    total += score;
  }
  return sum_lanes<float>(total);
}

// Writes the cleaned logits in whole vectors, masked after the last one. The result has the highest logit in one of its lanes.
inline Vec<float> clean_row(const float* logits, int64_t experts, float* x) {
  constexpr int n = kLanes<float>;
  Vec<float> top = splat(kMasked);
  for (int64_t e = 0; e < experts; e += n) {
    const int valid = static_cast<int>(std::min<int64_t>(n, experts - e));
    Vec<float> v = cleaned(logits + e, valid);
    for (int lane = valid; lane < n; ++lane) v[lane] = kMasked;
    store(x + e, v);
    top = v > top ? v : top;
  }
  return top;
}

// Fills the token's scores and choices: σ(x) and its biased value, or e^(x − highest), whose sum is returned, and x.
inline float fill_scores(const TopkRoutingArgs& a, const float* logits, const TokenScores& token) {
  constexpr int n = kLanes<float>;
  Vec<float> top = splat(kMasked);
  for (int64_t e = 0; e < a.experts; e += n) {
    const int valid = static_cast<int>(std::min<int64_t>(n, a.experts - e));
    Vec<float> x = cleaned(logits + e, valid);
    const Mask<float> masked = x == kMasked;
    Vec<float> choice = x;
    if (a.sigmoid) {
      const Vec<float> score = masked ? Vec<float>{} : logistic<float>(x).value;
      store(token.score + e, score);
      choice = a.bias ? score + load_valid(a.bias + e, valid) : score;
      choice = masked ? splat(kMasked) : choice > kMasked ? choice : splat(kMasked);
    }
    if (valid < n) {
      for (int lane = valid; lane < n; ++lane) {
        x[lane] = kMasked;
        choice[lane] = kNoExpert;
      }
    }
    store(token.x + e, x);
    store(token.choice + e, choice);
    top = x > top ? x : top;
  }
  return a.sigmoid || a.renormalize ? 0 : exponentials(token.x, a.experts, top, token.score);
}

inline void route_token(const TopkRoutingArgs& a, int64_t t, const TokenScores& token) {
  constexpr int n = kLanes<float>;
  float total = fill_scores(a, a.logits + t * a.row_stride, token);
  if (a.n_group > 1) mask_groups(a, token.choice);
  alignas(64) float weights[kMostChosen + n];
  bool masked[kMostChosen];
  const bool over_chosen = a.renormalize && !a.sigmoid;
  const float* from = over_chosen ? token.x : token.score;
  for (int64_t k = 0; k < a.top_k; ++k) {
    const int64_t e = highest_place(token.choice, a.experts);
    masked[k] = !(token.choice[e] > kMasked);
    token.choice[e] = kNoExpert;
    a.ids[t * a.top_k + k] = e;
    weights[k] = from[e];
  }
  if (over_chosen) {
    const float highest = weights[0];
    for (int64_t k = 0; k < a.top_k; k += n) store(weights + k, falling_exp<float>(load(weights + k) - highest));
  }
  for (int64_t k = 0; k < a.top_k; ++k) {
    if (masked[k]) weights[k] = 0;
  }
  if (a.renormalize) {
    total = 0;
    for (int64_t k = 0; k < a.top_k; ++k) total += weights[k];
  }
  if (a.renormalize && a.sigmoid) {
    total += kScoreEpsilon;
  } else if (a.sigmoid || !(total > 0)) {
    total = 1;
  }
  for (int64_t k = 0; k < a.top_k; ++k) a.weights[t * a.top_k + k] = weights[k] / total * a.scale;
}

inline void route_until(const TopkRoutingArgs& a, int64_t t, const TokenScores& token) {
  const MassRule& rule = *a.until;
  const Vec<float> top = clean_row(a.logits + t * a.row_stride, a.experts, token.x);
  const float total = exponentials(token.x, a.experts, top, token.score);
  int64_t* ids = a.ids + t * a.top_k;
  float *weights = a.weights + t * a.top_k, sum = 0;
  int64_t at = 0;
  for (int64_t rank = 0; rank < rule.max_ranks; ++rank) {
    const int64_t e = highest_place(token.x, a.experts);
    const float share = token.score[e] / total;
    if (!(token.x[e] > kMasked) || !(share > 0)) break;
    token.x[e] = kNoExpert;
    if (e < rule.num_experts) {
      ids[at] = e;
      weights[at++] = share;
    }
    sum += share;
    if (rule.exceed ? sum > rule.mass : sum >= rule.mass) break;
  }
  std::fill(ids + at, ids + a.top_k, rule.num_experts);
  std::fill(weights + at, weights + a.top_k, 0.0f);
}

void topk_routing(const TopkRoutingArgs& a, int64_t begin, int64_t end) {
  const int64_t room = (a.experts + kLanes<float> - 1) / kLanes<float> * kLanes<float>;
  const auto scores = std::make_unique<float[]>(3 * room);
  const TokenScores token{scores.get(), scores.get() + room, scores.get() + 2 * room};
  for (int64_t t = begin; t < end; ++t) a.until ? route_until(a, t, token) : route_token(a, t, token);
}

// Computes the gradients of the chosen experts' logits. If weights are shares among all experts, the returned value times an
// expert's share is also part of every logit's gradient.
inline float chosen_gradients(const TopkRoutingBackwardArgs& a, int64_t t, float* dpicked) {
  const int64_t* ids = a.ids + t * a.top_k;
  const float *weights = a.weights + t * a.top_k, *dweights = a.dweights + t * a.top_k, *logits = a.logits + t * a.row_stride;
  float sum = 0, total = kScoreEpsilon;
  for (int64_t k = 0; k < a.top_k; ++k) {
    // Slots without an expert and slots whose score underflows have weight 0 and pass no gradient.
    const bool live = weights[k] > 0;
    dpicked[k] = live ? dweights[k] : 0;
    if (!a.sigmoid) sum += dpicked[k] * weights[k];
  }
  if (!a.sigmoid) {
    const float mean = a.renormalize ? sum / a.scale : 0;
    for (int64_t k = 0; k < a.top_k; ++k) dpicked[k] = weights[k] > 0 ? weights[k] * (dpicked[k] - mean) : 0;
    return a.renormalize ? 0 : -sum;
  }
  constexpr int n = kLanes<float>;
  alignas(64) float score[kMostChosen + n], rest[kMostChosen + n];
  for (int64_t k = 0; k < a.top_k; ++k) score[k] = logits[ids[k]];
  for (int64_t k = 0; k < a.top_k; k += n) {
    const auto sigma = logistic<float>(load(score + k));
    store(score + k, sigma.value);
    store(rest + k, sigma.rest);
  }
  for (int64_t k = 0; k < a.top_k; ++k) {
    if (!(weights[k] > 0)) score[k] = rest[k] = 0;
    dpicked[k] *= a.scale;
    sum += dpicked[k] * score[k];
    total += score[k];
  }
  for (int64_t k = 0; k < a.top_k; ++k) {
    const float dscore = a.renormalize ? (dpicked[k] - sum / total) / total : dpicked[k];
    dpicked[k] = dscore * score[k] * rest[k];
  }
  return 0;
}

void topk_routing_backward(const TopkRoutingBackwardArgs& a, int64_t begin, int64_t end) {
  constexpr int n = kLanes<float>;
  const int64_t room = (a.experts + n - 1) / n * n;
  const bool over_all = !a.sigmoid && !a.renormalize;
  const auto scores = std::make_unique<float[]>((over_all ? 2 * room : 0) + a.top_k);
  float *dpicked = scores.get(), *x = dpicked + a.top_k, *share_of = x + room;
  for (int64_t t = begin; t < end; ++t) {
    const float* logits = a.logits + t * a.row_stride;
    float* to = a.dlogits + t * a.experts;
    const float to_all = chosen_gradients(a, t, dpicked);
    if (over_all) {
      const Vec<float> top = clean_row(logits, a.experts, x);
      const float total = exponentials(x, a.experts, top, share_of), factor = total > 0 ? to_all / total : 0;
      // A logit that is not finite was replaced by a constant, so it gets no gradient.
      for (int64_t e = 0; e < a.experts; ++e) to[e] = std::isfinite(logits[e]) ? share_of[e] * factor : 0;
    } else {
      std::fill_n(to, a.experts, 0.0f);
    }
    for (int64_t k = 0; k < a.top_k; ++k) {
      // A slot without an expert may have an id without a logit.
      if (!(a.weights[t * a.top_k + k] > 0)) continue;
      const int64_t e = a.ids[t * a.top_k + k];
      if (std::isfinite(logits[e])) to[e] += dpicked[k];
    }
  }
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
