// What values β and the log decays of the delta rule have.
#pragma once

#include "cpu/delta_rule.h"

namespace gossamer {

// The least and the largest β and the largest log decay, with 0 among each; NaN is none of them.
struct GateRange {
  double least_beta, most_beta, most_g;
};
GateRange gate_range(const DeltaRuleArgs& args);

}  // namespace gossamer
