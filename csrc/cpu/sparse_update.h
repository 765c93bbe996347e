// The transpose of gather_reduce fused with an optimizer's step on the touched rows.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/dtype.h"
#include "cpu/gather_reduce.h"

namespace gossamer {

// Codes of python/gossamer/optim.py.
enum class Algorithm : int { kSgd = 0, kAdagrad, kRowwiseAdagrad, kAdam, kPartialRowwiseAdam, kLamb, kFtrl };

// An optimizer's numbers; see gossamer.optim.Hyper.
struct StepRule {
  Algorithm algorithm;
  double lr, weight_decay, beta1, beta2, eps, l1, l2, clip_value, clip_norm;
  bool decoupled, nesterov, stochastic_rounding;
  // 1 − β1ᵗ and 1 − β2ᵗ.
  double correction1, correction2;
  // Of the rounding's generator: what is common to a step's rows.
  uint64_t step_key;
};

inline uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

struct UpdateArgs {
  FloatMatrix table;  // (N, D), column stride 1; flat with features
  FloatMatrix state1, state2;  // likewise, or a value a row at row_stride; of the dtype the table is accumulated in
  int64_t num_rows, dim;       // all rows and the largest dim with features
  FloatMatrix dout;            // (B, D), column stride 1, of the table's dtype or what it is accumulated in
  Bags bags;
  FloatMatrix weights;    // one row of num_positions, or absent
  const int32_t* argmax;  // (B, D) contiguous, or null
  bool mean;
  StepRule rule;
};

// The ids that contribute, sorted by (linear) row, stably. An entry's source is its bag where neither weights nor argmax
// need its position, else its position.
template <class Word>
struct Entry {
  Word row, source;
};

// Runs of one row longer than this are summed in pieces of so many entries, whose sums are then added in order. So the sum
// of a run depends on nothing but the run, and one row that takes half of a batch keeps all threads busy.
constexpr int64_t kPiece = 128;

struct LongRun {
  int64_t begin, end, first_piece;
};

struct SortedIds {
  const void* entries;
  bool wide;  // Entry<uint64_t>, else Entry<uint32_t>
  int64_t count;
  const int64_t* bag_of;    // the bag of each position, or null where sources are bags
  const double* bag_scale;  // 1 over the bag's ids that contribute, or null where no feature takes a mean
  const LongRun* long_runs;
  int64_t num_long_runs;
  void* partials;  // (pieces, dim) sums in the accumulator's type
};

// Updates table and state in place. The lists have been checked.
void sparse_update(const UpdateArgs& args, int num_threads);

}  // namespace gossamer
