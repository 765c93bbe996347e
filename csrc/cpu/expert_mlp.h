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

// The shared memory of a call. Panels are named by what they hold and by what lies in their lanes: `_c` has tokens as
// columns, `_r` tokens as rows.
template <class S>
struct ExpertMlpBuffers {
  int64_t chunk;
  WorkQueue inner, hidden, gate_up, down;
  S *x_c = nullptr, *act_c = nullptr, *sum = nullptr;
  S *x_r = nullptr, *dy_c = nullptr, *dy_r = nullptr, *preact_c = nullptr, *preact_r = nullptr, *act_r = nullptr;
  S *dweight_parts = nullptr, *dgate_up_partial = nullptr, *ddown_partial = nullptr;

  ExpertMlpBuffers(Arena& arena, const ExpertMlpForwardArgs& a, int num_threads) {
    take_queues(arena, num_threads);
    chunk = chunk_rows(a.hidden, sizeof(S));
    x_c = arena.take<S>(panel_size(a.hidden, chunk));
    act_c = arena.take<S>(panel_size(a.inner, chunk));
    if (sizeof(S) > element_size(a.dtype)) sum = arena.take<S>(a.tokens * a.hidden);
  }

  ExpertMlpBuffers(Arena& arena, const ExpertMlpBackwardArgs& a, int num_threads) {
    take_queues(arena, num_threads);
    const int64_t h = a.hidden, i = a.inner, wide = a.wide();
    const bool narrow = sizeof(S) > element_size(a.dtype);
    chunk = chunk_rows(std::max(h, wide), sizeof(S));
    preact_c = arena.take<S>(panel_size(wide, chunk));
    act_c = arena.take<S>(panel_size(i, chunk));
    dy_c = arena.take<S>(panel_size(h, chunk));
    if (a.dweights) dweight_parts = arena.take<S>((i / 32 + 2) * chunk);
    if (a.dx && narrow) sum = arena.take<S>(a.tokens * h);
    if (a.dgate_up) {
      if (a.dgate_up.transposed) {
        x_c = arena.take<S>(panel_size(h, chunk));
        preact_r = arena.take<S>(panel_size(chunk, wide));
      } else {
        x_r = arena.take<S>(panel_size(chunk, h));
      }
      if (narrow) dgate_up_partial = arena.take<S>(wide * h);
    }
    if (a.ddown) {
      if (a.ddown.transposed) {
        dy_r = arena.take<S>(panel_size(chunk, h));
      } else {
        act_r = arena.take<S>(panel_size(chunk, i));
      }
      if (narrow) ddown_partial = arena.take<S>(h * i);
    }
  }

 private:
  void take_queues(Arena& arena, int num_threads) {
    for (WorkQueue* queue : {&inner, &hidden, &gate_up, &down}) *queue = take_queue(arena, num_threads);
  }
};

}  // namespace gossamer
