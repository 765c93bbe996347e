// The range of β and of the log decays of the delta rule.
#pragma once

#include "cpu/delta_rule.h"

namespace gossamer {

// The smallest and largest β and the largest log decay, each including 0; NaN is ignored.
struct GateRange {
  double least_beta, most_beta, most_g;
};
GateRange gate_range(const DeltaRuleArgs& args);

}  // namespace gossamer
