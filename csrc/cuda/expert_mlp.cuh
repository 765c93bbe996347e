// The expert layer's own products on Hopper GPUs; conventions as in grouped_matmul.cuh.
#pragma once

#include "cuda/grouped_matmul.cuh"

namespace gossamer::cuda {

// The function of the gate (a Gate) and the constants of gossamer.Activation.
struct ActivationView {
  int code;
  bool gated, interleaved;
  float alpha, limit;
};

struct ExpertUpArgs {
  bool bfloat16;
  RoutingView routing;
  int64_t inner, c;  // I, H
  RowsView x;
  WeightView gate_up;
  const void* bias;  // (E, 2I) or (E, I) contiguous, or null
  ActivationView activation;
  void* act;     // (R, I) contiguous
  void* preact;  // (R, 2I) or (R, I) contiguous, or null
};

// act[r] = activation(preact[r]) with preact[r] = x[r] gate_up[e(r)]^T + bias[e(r)], which is stored too where wanted.
const char* expert_up(const ExpertUpArgs& args, const Where& where);

struct ExpertDownBackwardArgs {
  bool bfloat16;
  RoutingView routing;
  int64_t inner, c;  // I, H
  RowsView dy;
  WeightView down;  // as (E, I, H), or (E, H, I) where transposed
  ActivationView activation;
  const void* preact;   // (R, 2I) or (R, I) contiguous
  void* dpreact;        // likewise, may be preact; or null
  void* act;            // (R, I) contiguous, or null
  float* partial;       // (expert_down_backward_columns(I), R) contiguous, or null
  const void* weights;  // routing weight of each slot
  bool weights_float32;
};

// Rows of partial sums of the routing-weight gradient.
int64_t expert_down_backward_columns(int64_t inner);

// With dact[r] = dy[r] down[e(r)]: the gradient of the pre-activation and the activation, both times the row's routing
// weight, and partial sums of dact * activation, unweighted.
const char* expert_down_backward(const ExpertDownBackwardArgs& args, const Where& where);

}  // namespace gossamer::cuda
