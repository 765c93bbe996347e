#include "cpu/sparse_update.h"

#include <bit>
#include <cmath>
#include <cstddef>
#include <functional>
#include <limits>
#include <memory>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/radix_sort.h"

namespace gossamer {
namespace {

// Number of sorted entries that a thread takes at a time.
constexpr int64_t kUnit = 2048;

// Which ids of the lists contribute, as linear rows.
struct Lists {
  const Bags& bags;
  int64_t num_rows;

  // Calls f(position, linear row) for those of a bag.
  template <class F>
  void each(int64_t bag, F&& f) const {
    int64_t rows = num_rows, base = 0;
    if (bags.features) {
      const Feature& feature = bags.features[bag / bags.bags_per_feature()];
      rows = feature.rows;
      base = feature.row;
    }
    const auto limit = static_cast<uint64_t>(std::min(rows, bags.limit));
    const int64_t end = bags.end(bag);
    for (int64_t p = bags.begin(bag); p < end; ++p) {
      const int64_t id = bags.index[p];
      if (static_cast<uint64_t>(id) < limit && id != bags.padding_idx) f(p, base + id);
    }
  }
};

// Uninitialised arrays cut from one block.
class Workspace {
 public:
  template <class T>
  void reserve(T*& array, int64_t count) {
    wanted_.push_back([this, &array, at = bytes_] { array = reinterpret_cast<T*>(block_.get() + at); });
    bytes_ += (std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64;
  }

  void allocate() {
    block_ = allocate_scratch(bytes_);
    for (auto& set : wanted_) set();
  }

 private:
  std::vector<std::function<void()>> wanted_;
  Scratch block_;
  size_t bytes_ = 0;
};

template <class Word>
class Update {
 public:
  Update(const UpdateArgs& args, int num_threads)
      : args_(args),
        lists_{args.bags, args.num_rows},
        counts_(num_threads + 1),
        found_(num_threads),
        taken_(new std::atomic<int64_t>[num_threads * WorkQueue::kStride]) {
    const Bags& bags = args.bags;
    const int64_t positions = positions_ = bags.num_bags ? bags.end(bags.num_bags - 1) - bags.begin(0) : 0;
    workspace_.reserve(entries_, positions);
    workspace_.reserve(other_, positions);
    workspace_.reserve(histograms_, static_cast<int64_t>(num_threads) * kStreams << kMaxDigitBits);
    workspace_.reserve(partials_, (positions / kPiece + positions / (kPiece + 1) + 1) * args.dim);
    by_position_ = args.bags.weights || args.argmax;
    if (by_position_) workspace_.reserve(bag_of_, bags.num_positions);
    means_ = bags.mean;
    for (int64_t f = 0; f < bags.num_features; ++f) means_ |= bags.features[f].mean != 0;
    if (means_) workspace_.reserve(bag_scale_, bags.num_bags);
    // In doubles: enough for vectors of either type, plus one vector.
    workspace_.reserve(scratch_, num_threads * scratch_size());
    workspace_.allocate();
  }

  void run(Team team) {
    list(team);
    team.barrier();
    const int bits = std::bit_width(static_cast<uint64_t>(std::max<int64_t>(args_.num_rows - 1, 0)));
    Entry<Word>* const listed = leaves_out(team) ? other_ : entries_;
    Entry<Word>* const room = leaves_out(team) ? entries_ : other_;
    const Entry<Word>* sorted = radix_sort(listed, room, counts_[team.size], bits, histograms_, team);
    if (!args_.blocks) find_long_runs(sorted, team);
    team.barrier();
    if (team.thread == 0) collect(sorted, team);
    WorkQueue queue(taken_.get());
    queue.restart(team);
    team.barrier();
    const TableKernels& k = kernels().tables;
    queue.each(team, pieces_, 1, [&](int64_t begin, int64_t end) { k.sum_pieces(args_, ids_, begin, end); });
    team.barrier();
    queue.restart(team);
    team.barrier();
    double* scratch = scratch_ + team.thread * scratch_size();
    queue.each(team, ids_.count, kUnit, [&](int64_t begin, int64_t end) { k.update_rows(args_, ids_, begin, end, scratch); });
  }

 private:
  // For a table of codes also the row as floats and, if its scale is trained, the original gradient; for blocks the sums of
  // overlapping ones.
  int64_t scratch_size() const {
    return (args_.scales || args_.blocks ? 2 * args_.dim : args_.dim) + (args_.blocks ? kBlockSums : 0) + 64;
  }

  // Whether ids were left out, once they are listed.
  bool leaves_out(Team team) const { return counts_[team.size] < positions_; }

  // Writes the entries of this thread's bags at their position without skipped ids; if earlier ids are skipped, after the
  // entries of lower threads in the other array.
  void list(Team team) {
    const Bags& bags = args_.bags;
    const auto [low, high] = team.share(bag_cost(bags, bags.num_bags));
    const int64_t first = bag_at(bags, low), last = bag_at(bags, high);
    const int64_t place = first < last ? bags.begin(first) - bags.begin(0) : 0;
    Entry<Word>* out = entries_ + place;
    for (int64_t bag = first; bag < last; ++bag) {
      const Entry<Word>* const begin = out;
      lists_.each(bag, [&](int64_t position, int64_t row) {
        if (by_position_) bag_of_[position] = bag;
        *out++ = {static_cast<Word>(row), static_cast<Word>(by_position_ ? position : bag)};
      });
      if (means_) {
        const bool mean = bags.features ? bags.features[bag / bags.bags_per_feature()].mean != 0 : bags.mean;
        bag_scale_[bag] = mean ? 1.0 / static_cast<double>(std::max<int64_t>(out - begin, 1)) : 1.0;
      }
    }
    const int64_t count = out - (entries_ + place);
    counts_[team.thread + 1] = count;
    team.barrier();
    if (team.thread == 0) {
      for (int i = 0; i < team.size; ++i) counts_[i + 1] += counts_[i];
    }
    team.barrier();
    if (leaves_out(team)) std::copy_n(entries_ + place, count, other_ + counts_[team.thread]);
  }

  // A run of more than kPiece entries covers a multiple of kPiece, of which this thread looks at its share.
  void find_long_runs(const Entry<Word>* sorted, Team team) {
    const int64_t count = counts_[team.size];
    const auto [begin, end] = team.share(count, kPiece);
    const auto before = [](const Entry<Word>& entry, Word row) { return entry.row < row; };
    const auto after = [](Word row, const Entry<Word>& entry) { return row < entry.row; };
    for (int64_t i = begin; i < end; i += kPiece) {
      const Word row = sorted[i].row;
      // The thread with the first multiple within a run handles the run.
      if (i >= kPiece && sorted[i - kPiece].row == row) continue;
      const int64_t first = std::lower_bound(sorted, sorted + i, row, before) - sorted;
      if (first + kPiece >= count || sorted[first + kPiece].row != row) continue;
      found_[team.thread].push_back({first, std::upper_bound(sorted + i, sorted + count, row, after) - sorted, 0});
    }
  }

  void collect(const Entry<Word>* sorted, Team team) {
    for (auto& found : found_) {
      for (LongRun run : found) {
        run.first_piece = pieces_;
        pieces_ += (run.end - run.begin + kPiece - 1) / kPiece;
        long_runs_.push_back(run);
      }
    }
    ids_ = {sorted,
            sizeof(Word) == 8,
            counts_[team.size],
            bag_of_,
            bag_scale_,
            long_runs_.data(),
            static_cast<int64_t>(long_runs_.size()),
            partials_};
  }

  const UpdateArgs& args_;
  Lists lists_;
  bool by_position_ = false, means_ = false;
  int64_t positions_ = 0;
  std::vector<int64_t> counts_;
  std::vector<std::vector<LongRun>> found_;
  std::unique_ptr<std::atomic<int64_t>[]> taken_;
  Workspace workspace_;
  Entry<Word>*entries_ = nullptr, *other_ = nullptr;
  Word* histograms_ = nullptr;
  int64_t* bag_of_ = nullptr;
  double *bag_scale_ = nullptr, *partials_ = nullptr, *scratch_ = nullptr;
  std::vector<LongRun> long_runs_;
  int64_t pieces_ = 0;
  SortedIds ids_{};
};

template <class Word>
void run(const UpdateArgs& args, int num_threads) {
  Update<Word> update(args, num_threads);
  parallel_team(num_threads, [&](Team team) { update.run(team); });
}

}  // namespace

StepRule StepRule::at(int64_t t) const {
  StepRule rule = *this;
  rule.correction1 = 1 - std::pow(beta1, static_cast<double>(t));
  rule.correction2 = 1 - std::pow(beta2, static_cast<double>(t));
  rule.step_key = mix64(mix64(seed) + static_cast<uint64_t>(t) * kGolden);
  return rule;
}

void sparse_update(const UpdateArgs& args, int num_threads) {
  constexpr int64_t kNarrow = std::numeric_limits<uint32_t>::max();
  const Bags& bags = args.bags;
  const int64_t positions = bags.num_bags ? bags.end(bags.num_bags - 1) - bags.begin(0) : 0;
  const auto threads = std::clamp<int64_t>(positions * args.dim / kElementsPerThread, 1, num_threads);
  if (std::max({args.num_rows, bags.num_positions, bags.num_bags}) <= kNarrow) {
    run<uint32_t>(args, static_cast<int>(threads));
  } else {
    run<uint64_t>(args, static_cast<int>(threads));
  }
}

}  // namespace gossamer
