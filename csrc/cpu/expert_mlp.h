// The expert feed-forward layer, forward and backward.
#pragma once

#include <cstdint>

#include "cpu/activate.h"
#include "cpu/grouped_matmul.h"
#include "cpu/recorder.h"

namespace gossamer {

// A low-rank update of the experts' weights (E, N, C): scale · b·a; absent if the rank is 0.
struct ExpertUpdate {
  ExpertWeights a, b;  // (E, r, C), (E, N, r)
  int64_t rank;
  double scale;
  void* s;  // (R, r) contiguous, x·aᵀ by expert, in the accumulator's type; null in a forward that need not save it

  explicit operator bool() const { return rank > 0; }
};

struct ExpertMlpArgs {
  DType dtype;
  Groups groups;
  int64_t tokens, hidden, output, inner, top_k;
  ActivationForm activation;
  FloatMatrix x;                        // (T, H), column stride 1
  ExpertWeights gate_up;                // (E, 2I, H)
  ExpertWeights down;                   // (E, O, I)
  FloatMatrix gate_up_bias, down_bias;  // (E, 2I), (E, O), or absent
  FloatMatrix weights;                  // (T, K)
  void* preact;                         // (R, 2I) contiguous, or null in a forward that need not save it
  ExpertUpdate gate_up_update, down_update;

  bool updated() const { return gate_up_update || down_update; }
};

struct ExpertMlpForwardArgs : ExpertMlpArgs {
  void* y;  // (T, O) contiguous
};

// A weight gradient, or null: contiguous, with the last two dimensions swapped when transposed.
struct WeightGradient {
  void* base;
  bool transposed;

  explicit operator bool() const { return base != nullptr; }
};

// Gradients of an update's factors, contiguous, or null.
struct UpdateGradient {
  void *da, *db;

  explicit operator bool() const { return da || db; }
};

struct ExpertMlpBackwardArgs : ExpertMlpArgs {
  FloatMatrix dy;  // (T, O), column stride 1
  void* dx;        // (T, H) contiguous, or null, like the other results
  WeightGradient dgate_up, ddown;
  FloatMatrix dweights;  // (T, K) contiguous, zeroed by the caller
  void *dgate_up_bias, *ddown_bias;
  UpdateGradient dgate_up_update, ddown_update;
  DType factor_dtype;  // dtype of the factors' gradients: `dtype` or float32

  int64_t wide() const { return inner * activation.halves(); }
  bool needs_dpreact() const { return dx || dgate_up || dgate_up_bias || dgate_up_update; }
  bool needs_dact() const { return needs_dpreact() || dweights; }
  bool needs_act() const { return ddown || ddown_update.da; }
};

void expert_mlp(const ExpertMlpForwardArgs& args, int num_threads);
void expert_mlp_backward(const ExpertMlpBackwardArgs& args, int num_threads);

// The stride of rows of sums in a call's memory: an odd number of whole cache lines. The same columns of many tokens are
// processed together, and with a power of two as stride they would share a few cache sets.
inline int64_t sum_stride(int64_t width) { return ((width + 15) / 16 | 1) * 16; }

// The largest chunk of few rows.
constexpr int64_t kFewRows = 16;
// The most chunks of few rows that are computed together, and how many if the activations of each take `bytes`: they should stay in a
// second-level cache.
constexpr int64_t kMostTogether = 16;
constexpr int64_t most_together(int64_t bytes) { return std::clamp<int64_t>((512 << 10) / bytes, 1, kMostTogether); }

// Memory for an update's low-rank rows, or their gradients: sums with tokens as columns, and packed forms for products with
// factors and for sums over tokens (the same memory if P is the type of sums); then saved rows with tokens as rows, and partial
// gradients of the factors.
template <class P>
struct LowRankMemory {
  using S = SumOf<P>;
  S* sums = nullptr;
  P *c = nullptr, *t = nullptr, *r = nullptr;
  S *a_partial = nullptr, *b_partial = nullptr;

  void take(Arena& arena, int64_t rank, int64_t chunk, bool over_tokens) {
    if (rank == 0) return;
    sums = arena.take<S>(panel_size(rank, chunk));
    if constexpr (std::is_same_v<P, S>) {
      c = t = sums;
    } else {
      c = arena.take<P>(panel_size(packed_depth<P>(rank), chunk));
      if (over_tokens) t = arena.take<P>(panel_size(rank, tile_depth<P>(chunk)));
    }
  }
  void take_gradients(Arena& arena, const UpdateGradient& g, int64_t rank, int64_t n, int64_t columns, int64_t chunk,
                      bool narrow) {
    take(arena, rank, chunk, g.da != nullptr);
    if (g.db) r = arena.take<P>(panel_size(tile_depth<P>(chunk), rank));
    if (g.da && narrow) a_partial = arena.take<S>(rank * columns);
    if (g.db && narrow) b_partial = arena.take<S>(n * rank);
  }
};

// The shared memory of a call, for products of P. Panels are named after their contents and the position of tokens: `_c` has
// tokens as columns, for products with weights; `_t` tokens as terms and `_r` tokens as rows, for the two sides of a sum over
// tokens. The others hold sums, with tokens as columns; if P is the type of sums, they also serve as `_c` and `_t`.
template <class P>
struct ExpertMlpBuffers {
  using S = SumOf<P>;
  static constexpr bool kSame = std::is_same_v<P, S>;
  int64_t chunk;
  WorkQueue inner, output, gate_up, down, up_low, down_low, up_a, up_b, down_a, down_b;
  P *x_c = nullptr, *x_t = nullptr, *x_r = nullptr, *dy_c = nullptr, *dy_t = nullptr, *dy_r = nullptr;
  P *preact_c = nullptr, *preact_t = nullptr, *preact_r = nullptr, *act_c = nullptr, *act_t = nullptr, *act_r = nullptr;
  P *dy_rows = nullptr, *preact_rows = nullptr;
  S *preact = nullptr, *act = nullptr, *dy = nullptr, *sum = nullptr;
  S *dweight_parts = nullptr, *dgate_up_partial = nullptr, *ddown_partial = nullptr;
  LowRankMemory<P> up_update, down_update;
  // Each thread's own copy of a chunk of at most kFewRows rows: packing so few takes less time than bringing over what other threads
  // have packed.
  P* x_few = nullptr;
  int64_t x_few_size = 0;
  // Room for the activations of several chunks of so few rows, which are computed together.
  P* act_few = nullptr;
  int64_t act_few_size = 0, together = 0;

  ExpertMlpBuffers(Arena& arena, const ExpertMlpForwardArgs& a, int num_threads) {
    take_queues(arena, num_threads);
    chunk = chunk_rows(a.hidden, sizeof(P) / kTerms<P>);
    x_c = arena.take<P>(panel_size(packed_depth<P>(a.hidden), chunk));
    x_few_size = panel_size(packed_depth<P>(a.hidden), kFewRows);
    x_few = arena.take<P>(num_threads * x_few_size);
    // Products with quantised weights read up to a multiple of 128 values.
    act_few_size = panel_size((packed_depth<P>(a.inner) + 127) / 128 * 128, kFewRows);
    together = a.updated() ? 0 : most_together(act_few_size * sizeof(P));
    act_few = arena.take<P>(together * act_few_size);
    act_c = arena.take<P>(panel_size(packed_depth<P>(a.inner), chunk));
    if (sizeof(S) > element_size(a.dtype)) sum = arena.take<S>(a.tokens * sum_stride(a.output));
    up_update.take(arena, a.gate_up_update.rank, chunk, false);
    down_update.take(arena, a.down_update.rank, chunk, false);
  }

  ExpertMlpBuffers(Arena& arena, const ExpertMlpBackwardArgs& a, int num_threads) {
    take_queues(arena, num_threads);
    const int64_t h = a.hidden, o = a.output, i = a.inner, wide = a.wide();
    const bool narrow = sizeof(S) > element_size(a.dtype);
    chunk = chunk_rows(std::max({h, o, wide}), sizeof(S));
    const int64_t terms = tile_depth<P>(chunk);
    const auto rows = [&](int64_t width) { return arena.take<P>(panel_size(terms, width)); };
    preact = arena.take<S>(panel_size(wide, chunk));
    act = arena.take<S>(panel_size(i, chunk));
    if constexpr (kSame) {
      dy = dy_c = dy_t = arena.take<S>(panel_size(o, chunk));
      preact_c = preact_t = preact;
      act_t = act;
    } else {
      if (a.needs_dact() || a.ddown_update.da) dy_c = arena.take<P>(panel_size(packed_depth<P>(o), chunk));
      if (a.ddown_bias || (a.dweights && a.down_bias)) dy = arena.take<S>(panel_size(o, chunk));
      if (a.dx || a.dgate_up_update.da) preact_c = arena.take<P>(panel_size(packed_depth<P>(wide), chunk));
      if (a.needs_dact()) dy_rows = arena.take<P>(packed_rows_size<P>(o, chunk));
      if (a.dx) preact_rows = arena.take<P>(packed_rows_size<P>(wide, chunk));
      const bool left_preact = a.dgate_up && !a.dgate_up.transposed, left_dy = a.ddown && !a.ddown.transposed;
      if (left_preact || a.dgate_up_update.db) preact_t = arena.take<P>(panel_size(wide, terms));
      if (left_dy || a.ddown_update.db) dy_t = arena.take<P>(panel_size(o, terms));
      if (a.ddown && a.ddown.transposed) act_t = arena.take<P>(panel_size(i, terms));
    }
    if (a.dweights) dweight_parts = arena.take<S>((i / 32 + 2) * chunk);
    if (a.dx && narrow) sum = arena.take<S>(a.tokens * sum_stride(h));
    if (a.dgate_up) {
      if (a.dgate_up.transposed) {
        x_t = arena.take<P>(panel_size(h, terms));
        preact_r = rows(wide);
      }
      if (narrow) dgate_up_partial = arena.take<S>(wide * h);
    }
    if (a.ddown) {
      if (a.ddown.transposed) dy_r = rows(o);
      if (narrow) ddown_partial = arena.take<S>(o * i);
    }
    if ((a.dgate_up && !a.dgate_up.transposed) || a.dgate_up_update.da) x_r = rows(h);
    if ((a.ddown && !a.ddown.transposed) || a.ddown_update.da) act_r = rows(i);
    const bool narrow_factors = sizeof(S) > element_size(a.factor_dtype);
    up_update.take_gradients(arena, a.dgate_up_update, a.gate_up_update.rank, wide, h, chunk, narrow_factors);
    down_update.take_gradients(arena, a.ddown_update, a.down_update.rank, o, i, chunk, narrow_factors);
  }

 private:
  void take_queues(Arena& arena, int num_threads) {
    for (WorkQueue* queue : {&inner, &output, &gate_up, &down, &up_low, &down_low, &up_a, &up_b, &down_a, &down_b}) {
      *queue = take_queue(arena, num_threads);
    }
  }
};

}  // namespace gossamer
