// Routing of one instruction set; see isa_kernels.h.

// What a masked expert has for a logit and a choice: below all others, but above what is no expert.
constexpr float kMasked = std::numeric_limits<float>::lowest();
constexpr float kNoExpert = -std::numeric_limits<float>::infinity();
// Keeps the normalisation of sigmoid scores finite where all of them underflow, as ops/topk_routing.py says.
constexpr float kScoreEpsilon = 1e-20f;

// e^v for v up to 0, and nothing where that is no normal number.
GOSSAMER_INLINE Vec<float> share(Vec<float> v) { return v < -87.0f ? Vec<float>{} : vexp(v); }

// The place of the highest of whole vectors of values, the first of equal ones.
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

// The highest of the values shown so far, in descending order; the first one shown of equal ones.
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

// The token's logits cleaned, its scores and what experts are chosen by; each with room for whole vectors.
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

// Fills the token's scores: σ(x) and what its bias makes of it, or e^(x − highest), whose sum is returned, and x.
inline float fill_scores(const TopkRoutingArgs& a, const float* logits, const TokenScores& token) {
  constexpr int n = kLanes<float>;
  Vec<float> top = splat(kMasked);
  for (int64_t e = 0; e < a.experts; e += n) {
    const int valid = static_cast<int>(std::min<int64_t>(n, a.experts - e));
    Vec<float> x = load_valid(logits + e, valid);
    x = x > kMasked ? x : splat(kMasked);
    x = x > -kMasked ? splat(-kMasked) : x;
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
  if (a.sigmoid || a.renormalize) return 0;
  float highest = top[0];
  for (int lane = 1; lane < n; ++lane) highest = std::max(highest, top[lane]);
  Vec<float> total{};
  for (int64_t e = 0; e < a.experts; e += n) {
    const Vec<float> x = load(token.x + e), score = x == kMasked ? Vec<float>{} : share(x - highest);
    store(token.score + e, score);
    total += score;
  }
  return sum_lanes<float>(total);
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
    for (int64_t k = 0; k < a.top_k; k += n) store(weights + k, share(load(weights + k) - highest));
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

void topk_routing(const TopkRoutingArgs& a, int64_t begin, int64_t end) {
  const int64_t room = (a.experts + kLanes<float> - 1) / kLanes<float> * kLanes<float>;
  const auto scores = std::make_unique<float[]>(3 * room);
  const TokenScores token{scores.get(), scores.get() + room, scores.get() + 2 * room};
  for (int64_t t = begin; t < end; ++t) route_token(a, t, token);
}
