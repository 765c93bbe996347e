// The place of a thread in a ring of shared-memory stages.
#pragma once

#include <cstdint>

#include "cuda/hopper/layout.h"

namespace gossamer::hopper {

// Stage, and the parity of its use: the use that fills or empties it now is the parity-th (mod 2) one.
// Consumers wait for `parity` of the stage's full barrier, producers for the other parity of the empty one. The first wait of a
// producer passes: a new barrier is in phase 0, so phase 1 counts as complete.
struct RingPosition {
  int32_t stage;
  uint32_t parity;
};

// The position `steps` uses later.
template <int kStages>
GOSSAMER_HD constexpr RingPosition advanced(RingPosition at, int64_t steps) {
  const int64_t to = at.stage + steps;
  return {static_cast<int32_t>(to % kStages), at.parity ^ static_cast<uint32_t>(to / kStages & 1)};
}

// One use later, without a division.
template <int kStages>
GOSSAMER_HD constexpr RingPosition next(RingPosition at) {
  return at.stage + 1 == kStages ? RingPosition{0, at.parity ^ 1} : RingPosition{at.stage + 1, at.parity};
}

}  // namespace gossamer::hopper
