// The expert feed-forward layer, forward and backward.
#pragma once

#include <cstdint>

#include "cpu/grouped_matmul.h"
#include "cpu/recorder.h"

namespace gossamer {

// As python/gossamer/_activation.py numbers them.
struct ActivationForm {
  int code;
  bool gated, interleaved;
  double alpha, limit;

  int halves() const { return gated ? 2 : 1; }
};

struct ExpertMlpArgs {
  DType dtype;
  Groups groups;
  int64_t tokens, hidden, inner, top_k;
  ActivationForm activation;
  FloatMatrix x;           // (T, H), column stride 1
  ExpertWeights gate_up;   // (E, 2I, H)
  ExpertWeights down;      // (E, H, I)
  FloatMatrix gate_up_bias, down_bias;  // (E, 2I), (E, H), or absent
  FloatMatrix weights;     // (T, K)
  void* preact;            // (R, 2I) contiguous, or null in a forward that need not save it
};

struct ExpertMlpForwardArgs : ExpertMlpArgs {
  void* y;  // (T, H) contiguous
};

// A weight gradient, or null: contiguous, with the last two dimensions exchanged when transposed.
struct WeightGradient {
  void* base;
  bool transposed;

  explicit operator bool() const { return base != nullptr; }
};

struct ExpertMlpBackwardArgs : ExpertMlpArgs {
  FloatMatrix dy;  // (T, H), column stride 1
  void* dx;        // (T, H) contiguous, or null; so too the other results
  WeightGradient dgate_up, ddown;
  FloatMatrix dweights;            // (T, K) contiguous, zeroed by the caller
  void *dgate_up_bias, *ddown_bias;

  int64_t wide() const { return inner * activation.halves(); }
  bool needs_dpreact() const { return dx || dgate_up || dgate_up_bias; }
  bool needs_dact() const { return needs_dpreact() || dweights; }
};

void expert_mlp(const ExpertMlpForwardArgs& args, int num_threads);
void expert_mlp_backward(const ExpertMlpBackwardArgs& args, int num_threads);

// The shared memory of a call, for products of P. Panels are named by what they hold and by where the tokens are: `_c` has
// tokens as columns, for products with weights; `_t` tokens as terms and `_r` tokens as rows, for the two sides of a sum
// over tokens. The others hold sums, with tokens as columns; where P is what sums are, they are `_c` and `_t` too.
template <class P>
struct ExpertMlpBuffers {
  using S = SumOf<P>;
  static constexpr bool kSame = std::is_same_v<P, S>;
  int64_t chunk;
  WorkQueue inner, hidden, gate_up, down;
  P *x_c = nullptr, *x_t = nullptr, *x_r = nullptr, *dy_c = nullptr, *dy_t = nullptr, *dy_r = nullptr;
  P *preact_c = nullptr, *preact_t = nullptr, *preact_r = nullptr, *act_c = nullptr, *act_t = nullptr, *act_r = nullptr;
  S *preact = nullptr, *act = nullptr, *dy = nullptr, *sum = nullptr;
  S *dweight_parts = nullptr, *dgate_up_partial = nullptr, *ddown_partial = nullptr;

  ExpertMlpBuffers(Arena& arena, const ExpertMlpForwardArgs& a, int num_threads) {
    take_queues(arena, num_threads);
    chunk = chunk_rows(a.hidden, sizeof(P) / kTerms<P>);
    x_c = arena.take<P>(panel_size(packed_depth<P>(a.hidden), chunk));
    act_c = arena.take<P>(panel_size(packed_depth<P>(a.inner), chunk));
    if (sizeof(S) > element_size(a.dtype)) sum = arena.take<S>(a.tokens * a.hidden);
  }

  ExpertMlpBuffers(Arena& arena, const ExpertMlpBackwardArgs& a, int num_threads) {
    take_queues(arena, num_threads);
    const int64_t h = a.hidden, i = a.inner, wide = a.wide();
    const bool narrow = sizeof(S) > element_size(a.dtype);
    chunk = chunk_rows(std::max(h, wide), sizeof(S));
    const int64_t terms = packed_depth<P>(chunk);
    const auto rows = [&](int64_t width) { return arena.take<P>(panel_size(terms, width)); };
    preact = arena.take<S>(panel_size(wide, chunk));
    act = arena.take<S>(panel_size(i, chunk));
    if constexpr (kSame) {
      dy = dy_c = dy_t = arena.take<S>(panel_size(h, chunk));
      preact_c = preact_t = preact;
      act_t = act;
    } else {
      if (a.needs_dact()) dy_c = arena.take<P>(panel_size(packed_depth<P>(h), chunk));
      if (a.ddown_bias || (a.dweights && a.down_bias)) dy = arena.take<S>(panel_size(h, chunk));
      if (a.dx) preact_c = arena.take<P>(panel_size(packed_depth<P>(wide), chunk));
      if (a.dgate_up && !a.dgate_up.transposed) preact_t = arena.take<P>(panel_size(wide, terms));
      if (a.ddown) (a.ddown.transposed ? act_t : dy_t) = arena.take<P>(panel_size(a.ddown.transposed ? i : h, terms));
    }
    if (a.dweights) dweight_parts = arena.take<S>((i / 32 + 2) * chunk);
    if (a.dx && narrow) sum = arena.take<S>(a.tokens * h);
    if (a.dgate_up) {
      if (a.dgate_up.transposed) {
        x_t = arena.take<P>(panel_size(h, terms));
        preact_r = rows(wide);
      } else {
        x_r = rows(h);
      }
      if (narrow) dgate_up_partial = arena.take<S>(wide * h);
    }
    if (a.ddown) {
      (a.ddown.transposed ? dy_r : act_r) = rows(a.ddown.transposed ? h : i);
      if (narrow) ddown_partial = arena.take<S>(h * i);
    }
  }

 private:
  void take_queues(Arena& arena, int num_threads) {
    for (WorkQueue* queue : {&inner, &hidden, &gate_up, &down}) *queue = take_queue(arena, num_threads);
  }
};

}  // namespace gossamer
