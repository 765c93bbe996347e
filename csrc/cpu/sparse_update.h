// The transpose of gather_reduce fused with an optimizer's step on the touched rows.
#pragma once

#include <cstdint>
#include <string_view>

#include "cpu/dtype.h"
#include "cpu/gather_reduce.h"

namespace gossamer {

// The rules, and how weight decay enters, by the names of python/gossamer/_step_rules.py.
enum class Algorithm { kSgd, kAdagrad, kRowwiseAdagrad, kAdam, kPartialRowwiseAdam, kLamb, kFtrl };
enum class Decay { kGradient, kWeights, kFormula };

template <class T>
struct Named {
  std::string_view name;
  T value;
};

constexpr Named<Algorithm> kAlgorithms[] = {{"sgd", Algorithm::kSgd},
                                            {"adagrad", Algorithm::kAdagrad},
                                            {"rowwise_adagrad", Algorithm::kRowwiseAdagrad},
                                            {"adam", Algorithm::kAdam},
                                            {"partial_rowwise_adam", Algorithm::kPartialRowwiseAdam},
                                            {"lamb", Algorithm::kLamb},
                                            {"ftrl", Algorithm::kFtrl}};
constexpr Named<Decay> kDecays[] = {{"gradient", Decay::kGradient}, {"weights", Decay::kWeights}, {"formula", Decay::kFormula}};

// A rule with its numbers; see gossamer._step_rules.StepRule.
struct StepRule {
  Algorithm algorithm;
  double lr, weight_decay;
  Decay decay;
  double beta1, beta2, eps;
  bool nesterov;
  double l1, l2, clip_value, clip_norm;
  bool stochastic_rounding;
  uint64_t seed;
  // Values for step t, set by at(t): 1 − β1ᵗ, 1 − β2ᵗ, and the part of the rounding generator's state that all rows share.
  double correction1 = 0, correction2 = 0;
  uint64_t step_key = 0;

  // The rule for step t, counted from 1.
  StepRule at(int64_t t) const;
};

inline uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

// A state in the dtype in which the table is accumulated: shaped like the table, or one value per row. Its base is null if
// there is no state.
struct StateArray {
  void* base;
  int64_t row_stride;
  bool per_row;
};

struct UpdateArgs {
  FloatMatrix table;  // (N, D), column stride 1; flat with features
  StateArray state1, state2;
  int64_t num_rows, dim;  // all rows and the largest dim with features
  RowScales scales;
  double scale_rate;  // change of a scale for a slope of one; 0 if scales are not trained
  FloatMatrix dout;   // (B, D), column stride 1, of the table's dtype or what it is accumulated in
  Bags bags;
  const int32_t* argmax;  // (B, D) contiguous, or null
  StepRule rule;
  // Whether row i is the block of the elements i .. i+D−1 of an array (N+D−1), so that rows overlap. Table and states have row
  // stride 1, and the rule's rows are single elements.
  bool blocks = false;
};

// Number of elements next to a block whose sums a thread holds before it steps on them.
constexpr int64_t kBlockSums = 1024;

// The ids that contribute, sorted by (linear) row, stably. An entry's source is its bag if neither weights nor argmax need its
// position, else its position.
template <class Word>
struct Entry {
  Word row, source;
};

// Runs of one row longer than this are summed in pieces of this many entries, whose sums are then added in order. So a run's
// sum depends only on the run, and a row with half of a batch's entries keeps all threads busy.
constexpr int64_t kPiece = 128;

struct LongRun {
  int64_t begin, end, first_piece;
};

struct SortedIds {
  const void* entries;
  bool wide;  // Entry<uint64_t>, else Entry<uint32_t>
  int64_t count;
  const int64_t* bag_of;    // the bag of each position, or null if sources are bags
  const double* bag_scale;  // 1 over the number of the bag's contributing ids, or null if no feature takes a mean
  const LongRun* long_runs;
  int64_t num_long_runs;
  void* partials;  // (pieces, dim) sums in the accumulator's type
};

// Updates table and state in place. The lists have been checked.
void sparse_update(const UpdateArgs& args, int num_threads);

}  // namespace gossamer
