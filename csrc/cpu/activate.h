// The activation of expert layers on rows, and its gradient.
#pragma once

#include <cstdint>

#include "gate.h"
#include "cpu/dtype.h"

namespace gossamer {

struct ActivationForm {
  int code;  // a Gate
  bool gated, interleaved;
  double alpha, limit;

  int halves() const { return gated ? 2 : 1; }
};

struct ActivateArgs {
  ActivationForm form;
  int64_t rows, inner;
  FloatMatrix preact;  // (R, 2I), or (R, I) when not gated; column stride 1
  FloatMatrix dact;    // (R, I), column stride 1; absent in a forward
  void* out;           // act(preact) (R, I), or the gradient of preact; contiguous
};

void activate(const ActivateArgs& args, int num_threads);

}  // namespace gossamer
