// Sums of the gradients of sorted rows, and optimizer steps on them, for one instruction set.
#pragma once

#include "cpu/gather_reduce_kernel.h"
#include "cpu/row_codes_kernel.h"
#include "cpu/sparse_update.h"
#include "cpu/step_kernel.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Rows of the output's gradient, and of the table, are prefetched this many entries ahead.
constexpr int64_t kDoutAhead = 4;
constexpr int64_t kRowAhead = 24;

// An entry's contribution to its row: a row of dout times a factor.
template <class G>
struct Addend {
  const G* dout;
  Accumulator<G> factor;
  const int32_t* argmax;  // columns that count are those that hold `local`
  int32_t local;
};

// The entry at a position: of the given width or, for Any, of the ids' width.
struct Any {};
template <class Word = Any>
GOSSAMER_INLINE Entry<uint64_t> entry_at(const SortedIds& ids, int64_t place) {
  if constexpr (std::is_same_v<Word, Any>) {
    return ids.wide ? entry_at<uint64_t>(ids, place) : entry_at<uint32_t>(ids, place);
  } else {
    const Entry<Word>& entry = static_cast<const Entry<Word>*>(ids.entries)[place];
    return {entry.row, entry.source};
  }
}

template <class G>
GOSSAMER_INLINE const G* dout_row(const UpdateArgs& a, int64_t bag) {
  const G* dout = static_cast<const G*>(a.dout.base);
  if (!a.bags.features) return dout + bag * a.dout.row_stride;
  const int64_t each = a.bags.bags_per_feature();
  return dout + bag % each * a.dout.row_stride + a.bags.features[bag / each].column;
}

template <class S, class G>
GOSSAMER_INLINE Addend<G> addend(const UpdateArgs& a, const SortedIds& ids, int64_t entry) {
  const int64_t source = entry_at(ids, entry).source;
  const int64_t bag = ids.bag_of ? ids.bag_of[source] : source;
  double factor = a.bags.weights ? weight_at(a.bags.weights, source) : 1.0;
  if (ids.bag_scale) factor *= ids.bag_scale[bag];
  Addend<G> found{dout_row<G>(a, bag), static_cast<S>(factor), nullptr, 0};
  if (a.argmax) {
    found.argmax = a.argmax + bag * a.dim;
    found.local = static_cast<int32_t>(source - a.bags.begin(bag));
  }
  return found;
}

template <class G>
GOSSAMER_INLINE void prefetch_addend(const UpdateArgs& a, const SortedIds& ids, int64_t entry, int64_t bytes) {
  if (entry >= ids.count) return;
  const int64_t source = entry_at(ids, entry).source;
  prefetch_lines(dout_row<G>(a, ids.bag_of ? ids.bag_of[source] : source), bytes);
}

// The addend's columns that won their maximum, others zero.
template <class S, class G>
GOSSAMER_INLINE Vec<S> winners(const Addend<G>& from, int64_t column, int n) {
  S values[kLanes<S>] = {};
  store_some(values, load_n(from.dout + column, n), n);
  for (int i = 0; i < n; ++i) {
    if (from.argmax[column + i] != from.local) values[i] = 0;
  }
  return load(values);
}

// Sums kVectors vectors (or, when some > 0, one of `some` lanes) of the addends of entries [begin, end).
template <int kVectors, class S, class G>
GOSSAMER_INLINE void sum_columns(const UpdateArgs& a, const SortedIds& ids, int64_t begin, int64_t end, int64_t column,
                                 int some, int64_t bytes, S* grad) {
  Vec<S> sum[kVectors] = {};
  for (int64_t i = begin; i < end; ++i) {
    if (bytes > 0) prefetch_addend<G>(a, ids, i + kDoutAhead, bytes);
    const Addend<G> from = addend<S, G>(a, ids, i);
    for (int v = 0; v < kVectors; ++v) {
      const int64_t c = column + v * kLanes<S>;
      if (from.argmax) {
        sum[v] += winners<S>(from, c, some > 0 ? some : kLanes<S>);
      } else if (some > 0) {
        sum[v] += load_some(from.dout + c, some) * static_cast<S>(from.factor);
      } else {
        sum[v] += load(from.dout + c) * static_cast<S>(from.factor);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) store_n(grad + column + v * kLanes<S>, sum[v], some > 0 ? some : kLanes<S>);
}

template <class S, class G>
__attribute__((noinline)) void sum_entries(const UpdateArgs& a, const SortedIds& ids, int64_t begin, int64_t end, int64_t dim,
                                           S* grad) {
  int64_t column = 0, bytes = dim * static_cast<int64_t>(sizeof(G));
  const auto pass = [&](auto vectors) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(vectors)::value;
    sum_columns<kVectors, S, G>(a, ids, begin, end, column, 0, bytes, grad);
    bytes = 0;
    column += kVectors * kLanes<S>;
  };
  while (column + 8 * kLanes<S> <= dim) pass(std::integral_constant<int, 8>{});
  if (column + 4 * kLanes<S> <= dim) pass(std::integral_constant<int, 4>{});
  if (column + 2 * kLanes<S> <= dim) pass(std::integral_constant<int, 2>{});
  if (column + kLanes<S> <= dim) pass(std::integral_constant<int, 1>{});
  if (column < dim) {
    sum_columns<1, S, G>(a, ids, begin, end, column, static_cast<int>(dim - column), bytes, grad);
  }
}

// The addresses of a row and its states.
struct RowPlace {
  int64_t row, local, element, dim;

  // Its offset in a (N, D) array with that stride, or, in a flat one, among its table's rows.
  int64_t in(const UpdateArgs& a, int64_t row_stride) const {
    return a.bags.features ? element + local * dim : row * row_stride;
  }
};

template <class Word = Any>
GOSSAMER_INLINE RowPlace place_of(const UpdateArgs& a, const SortedIds& ids, int64_t entry) {
  const Entry<uint64_t> at = entry_at<Word>(ids, entry);
  const int64_t row = at.row;
  if (!a.bags.features) return {row, row, 0, a.dim};
  const int64_t bag = ids.bag_of ? ids.bag_of[at.source] : static_cast<int64_t>(at.source);
  const Feature& f = a.bags.features[bag / a.bags.bags_per_feature()];
  return {row, row - f.row, f.element, f.dim};
}

template <class S>
GOSSAMER_INLINE S* state_at(const UpdateArgs& a, const StateArray& state, const RowPlace& place) {
  if (!state.base) return nullptr;
  S* base = static_cast<S*>(state.base);
  return base + (state.per_row ? place.row * state.row_stride : place.in(a, state.row_stride));
}

template <class T>
GOSSAMER_INLINE void prefetch_place(const UpdateArgs& a, const RowPlace& place) {
  using S = Accumulator<T>;
  prefetch_lines<1, Fetch::kReadLater>(static_cast<T*>(a.table.base) + place.in(a, a.table.row_stride), place.dim * sizeof(T));
  if constexpr (kIsCode<T>) __builtin_prefetch(&a.scales[place.row], 1);
  const auto prefetch_state = [&](const StateArray& state) __attribute__((always_inline)) {
    if (!state.base) return;
    prefetch_lines<1, Fetch::kReadLater>(state_at<S>(a, state, place), state.per_row ? 1 : place.dim * sizeof(S));
  };
  prefetch_state(a.state1);
  prefetch_state(a.state2);
}

// Adds up the partial sums of a long run, in order.
template <class S>
GOSSAMER_INLINE void sum_partials(const UpdateArgs& a, const SortedIds& ids, int64_t begin, int64_t dim, S* grad) {
  const LongRun* run = ids.long_runs;
  for (int64_t low = 0, high = ids.num_long_runs; low < high;) {
    const int64_t middle = (low + high) / 2;
    run = ids.long_runs + middle;
    if (run->begin == begin) break;
    if (run->begin < begin) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const S* partial = static_cast<const S*>(ids.partials) + run->first_piece * a.dim;
  const int64_t pieces = (run->end - run->begin + kPiece - 1) / kPiece;
  over_row<S>(dim, [&](int64_t c, int n) __attribute__((always_inline)) {
    Vec<S> sum = {};
    for (int64_t piece = 0; piece < pieces; ++piece) sum += load_n(partial + piece * a.dim + c, n);
    store_n(grad + c, sum, n);
  });
}

// Calls f(i, stop) for the runs [i, stop) of equal rows that begin in [begin, end), and prefetch(i) for an entry of each run
// to come.
template <class Word, class P, class F>
GOSSAMER_INLINE void each_run(const SortedIds& ids, int64_t begin, int64_t end, P&& prefetch, F&& f) {
  const auto row_at = [&](int64_t place) __attribute__((always_inline)) { return entry_at<Word>(ids, place).row; };
  int64_t i = begin;
  if (begin > 0) {
    while (i < end && row_at(i) == row_at(i - 1)) ++i;
  }
  for (int64_t ahead = i; ahead < std::min(end, i + kRowAhead); ++ahead) prefetch(ahead);
  while (i < end) {
    const uint64_t row = row_at(i);
    int64_t stop = i + 1;
    while (stop < ids.count && row_at(stop) == row) ++stop;
    // Every entry is visited once, up to the end of a run of ordinary length.
    for (int64_t ahead = i; ahead < std::min(stop, i + kPiece); ++ahead) {
      const int64_t next = ahead + kRowAhead;
      if (next < ids.count && row_at(next) != row_at(next - 1)) prefetch(next);
    }
    f(i, stop);
    i = stop;
  }
}

// w = keep · w − step · grad(v) for the vectors v of a row of codes, whose scale moves first where it is trained.
template <int kVectors, class T, class F>
GOSSAMER_INLINE void descend_codes(const UpdateArgs& a, int64_t row, T* codes, float keep, float step, F&& grad) {
  const float before = a.scales[row];
  float scale = before;
  Vec<float> w[kVectors];
  for (int v = 0; v < kVectors; ++v) w[v] = keep * (load(codes + v * kLanes<float>) * before) - step * grad(v);
  if (a.scale_rate != 0) {
    Vec<float> slopes = {};
    for (int v = 0; v < kVectors; ++v) slopes += grad(v) * by_scale<T>(w[v] / before);
    a.scales[row] = scale = moved_scale(before, static_cast<float>(a.scale_rate), sum_lanes<float>(slopes));
  }
  const bool stochastic = a.rule.stochastic_rounding;
  const uint64_t key = stochastic ? mix64(a.rule.step_key + static_cast<uint64_t>(row) * kGolden) : 0;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t column = v * kLanes<float>;
    store(codes + column, round_to_code<T>(w[v] / scale, stochastic, rounding_bits(key, column)));
  }
}

// w = keep · w − step · grad(v) for the vectors v of a row.
template <int kVectors, class T, class F>
GOSSAMER_INLINE void descend(const UpdateArgs& a, int64_t row, Accumulator<T> keep, Accumulator<T> step, F&& grad) {
  T* w = static_cast<T*>(a.table.base) + row * a.table.row_stride;
  if constexpr (kIsCode<T>) {
    descend_codes<kVectors>(a, row, w, keep, step, grad);
  } else {
    const RowWriter<T> write(a.rule, w, static_cast<uint64_t>(row));
    for (int v = 0; v < kVectors; ++v) {
      const int64_t column = v * kLanes<Accumulator<T>>;
      write(column, keep * load(w + column) - step * grad(v), kLanes<Accumulator<T>>);
    }
  }
}

// Row-wise Adagrad's steps on rows of kVectors vectors, several at a time: for a single row, the dependent chain of lane sum,
// root and quotient takes longer than everything else.
template <int kVectors, class T>
class AdagradRows {
 public:
  using S = Accumulator<T>;

  AdagradRows(const UpdateArgs& a, S keep) : a_(a), keep_(keep) {}

  __attribute__((always_inline)) void add(int64_t row, const Vec<S> (&grad)[kVectors]) {
    Vec<S> squares = {};
    for (int v = 0; v < kVectors; ++v) {
      squares += grad[v] * grad[v];
      store(grads_[count_] + v * kLanes<S>, grad[v]);
    }
    squares_[count_] = sum_lanes<S>(squares) / static_cast<S>(kVectors * kLanes<S>);
    rows_[count_] = row;
    if (++count_ == kRows) step();
  }

  __attribute__((always_inline)) void step() {
    const S lr = static_cast<S>(a_.rule.lr), eps = static_cast<S>(a_.rule.eps);
    S* state = static_cast<S*>(a_.state1.base);
    for (int i = 0; i < count_; ++i) squares_[i] = state[rows_[i] * a_.state1.row_stride] += squares_[i];
    S steps[kRows];
    store(steps, lr / (vsqrt(load(squares_)) + eps));
    for (int i = 0; i < count_; ++i) {
      const auto grad = [&](int v) __attribute__((always_inline)) { return load(grads_[i] + v * kLanes<S>); };
      descend<kVectors, T>(a_, rows_[i], keep_, steps[i], grad);
    }
    count_ = 0;
  }

 private:
  static constexpr int kRows = kLanes<S>;

  const UpdateArgs& a_;
  S keep_;
  int count_ = 0;
  int64_t rows_[kRows];
  S squares_[kRows] = {};
  S grads_[kRows][kVectors * kLanes<S>];
};

// Rows of up to so many vectors are summed without branches.
constexpr int kSlotVectors = 2;

// Sums plain addends of rows of kVectors vectors and calls step(row, gradient) for each. Runs of a row have random lengths, of which
// most are short, so a branch where a run ends would often be mispredicted. There is none: after each entry the sum so far is
// stored in the slot of its run, and the next entry adds to it or to zero.
template <int kVectors, class T, class G, class Word, class P, class F>
GOSSAMER_INLINE void sum_in_slots(const UpdateArgs& a, const SortedIds& ids, int64_t begin, int64_t end, P&& prefetch,
                                  F&& step) {
  using S = Accumulator<T>;
  constexpr int64_t kColumns = kVectors * kLanes<S>, kSlots = 128 / kVectors;
  constexpr int kDoutBytes = kColumns * sizeof(G);
  const auto* entries = static_cast<const Entry<Word>*>(ids.entries);
  const auto* dout = static_cast<const G*>(a.dout.base);
  const int64_t stride = a.dout.row_stride;
  // The run of the last slot may go on; it is then the first of the next slots.
  S sums[kSlots + 1][kColumns];
  Word rows[kSlots + 1];
  const auto step_slots = [&](int64_t count) __attribute__((always_inline)) {
    for (int64_t slot = 0; slot < count; ++slot) {
      Vec<S> grad[kVectors];
      for (int v = 0; v < kVectors; ++v) grad[v] = load(sums[slot] + v * kLanes<S>);
      step(static_cast<int64_t>(rows[slot]), grad);
    }
  };
  // Whole runs, none of them long.
  const auto sum_runs = [&](int64_t first, int64_t last) __attribute__((always_inline)) {
    for (int64_t ahead = first; ahead < std::min(last, first + kRowAhead); ++ahead) prefetch(ahead);
    Vec<S> sum[kVectors] = {};
    int64_t slot = 0;
    rows[0] = entries[first].row;
    for (int64_t i = first; i < last;) {
      for (const int64_t stop = std::min(last, i + kSlots); i < stop; ++i) {
        prefetch(std::min(i + kRowAhead, last - 1));
        prefetch_lines<kDoutBytes>(dout + entries[std::min(i + kDoutAhead, last - 1)].source * stride, kDoutBytes);
        const Word row = entries[i].row;
        const bool same = row == rows[slot];
        slot += !same;
        rows[slot] = row;
        const Mask<S> kept = splat_bits<S>(-int64_t{same});
        const G* from = dout + entries[i].source * stride;
        for (int v = 0; v < kVectors; ++v) {
          sum[v] = (Vec<S>)((Mask<S>)sum[v] & kept) + load(from + v * kLanes<S>);
          store(sums[slot] + v * kLanes<S>, sum[v]);
        }
      }
      step_slots(slot);
      rows[0] = rows[slot];
      for (int v = 0; v < kVectors; ++v) store(sums[0] + v * kLanes<S>, sum[v]);
      slot = 0;
    }
    step_slots(1);
  };
  while (begin > 0 && begin < end && entries[begin].row == entries[begin - 1].row) ++begin;
  while (begin < end && end < ids.count && entries[end].row == entries[end - 1].row) ++end;
  const LongRun* const runs_end = ids.long_runs + ids.num_long_runs;
  const LongRun* run =
      std::lower_bound(ids.long_runs, runs_end, begin, [](const LongRun& found, int64_t place) { return found.begin < place; });
  while (begin < end) {
    const int64_t last = run < runs_end ? std::min(run->begin, end) : end;
    if (begin < last) sum_runs(begin, last);
    begin = last;
    if (begin < end) {
      sum_partials(a, ids, begin, kColumns, sums[0]);
      rows[0] = entries[begin].row;
      step_slots(1);
      begin = run++->end;
    }
  }
}

// The same for wider rows, whose sums stay in registers until their run ends.
template <int kVectors, class T, class G, class Word, class P, class F>
GOSSAMER_INLINE void sum_in_registers(const UpdateArgs& a, const SortedIds& ids, int64_t begin, int64_t end, P&& prefetch,
                                      F&& step) {
  using S = Accumulator<T>;
  const auto* entries = static_cast<const Entry<Word>*>(ids.entries);
  const auto* dout = static_cast<const G*>(a.dout.base);
  const int64_t stride = a.dout.row_stride;
  constexpr int kDoutBytes = kVectors * kLanes<S> * sizeof(G);
  each_run<Word>(ids, begin, end, prefetch, [&](int64_t i, int64_t stop) __attribute__((always_inline)) {
    Vec<S> grad[kVectors] = {};
    if (stop - i > kPiece) {
      S sums[kVectors * kLanes<S>];
      sum_partials(a, ids, i, kVectors * kLanes<S>, sums);
      for (int v = 0; v < kVectors; ++v) grad[v] = load(sums + v * kLanes<S>);
    } else {
      for (int64_t e = i; e < stop; ++e) {
        if (e + kDoutAhead < ids.count) {
          prefetch_lines<kDoutBytes>(dout + entries[e + kDoutAhead].source * stride, kDoutBytes);
        }
        const G* from = dout + entries[e].source * stride;
        for (int v = 0; v < kVectors; ++v) grad[v] += load(from + v * kLanes<S>);
      }
    }
    step(static_cast<int64_t>(entries[i].row), grad);
  });
}

// The steps whose rule is one pass over the row, on rows of exactly kVectors vectors with plain addends.
template <int kVectors, class T, class G, class Word>
void update_short_rows(const UpdateArgs& a, const SortedIds& ids, int64_t begin, int64_t end) {
  using S = Accumulator<T>;
  const bool adagrad = a.rule.algorithm == Algorithm::kRowwiseAdagrad;
  const S lr = static_cast<S>(a.rule.lr);
  const S keep = a.rule.decay == Decay::kWeights ? static_cast<S>(1 - a.rule.lr * a.rule.weight_decay) : S{1};
  AdagradRows<kVectors, T> adagrad_rows(a, keep);
  const auto step = [&](int64_t row, const Vec<S>(&grad)[kVectors]) __attribute__((always_inline)) {
    if (adagrad) return adagrad_rows.add(row, grad);
    descend<kVectors, T>(a, row, keep, lr, [&](int v) __attribute__((always_inline)) { return grad[v]; });
  };
  constexpr int kRowBytes = kVectors * kLanes<S> * sizeof(T);
  const auto* entries = static_cast<const Entry<Word>*>(ids.entries);
  const T* const table = static_cast<const T*>(a.table.base);
  const S* const state = static_cast<const S*>(a.state1.base);
  const int64_t table_stride = a.table.row_stride, state_stride = a.state1.row_stride;
  const auto prefetch = [=, scales = a.scales](int64_t entry) __attribute__((always_inline)) {
    const int64_t row = entries[entry].row;
    prefetch_lines<kRowBytes, Fetch::kReadLater>(table + row * table_stride, kRowBytes);
    if constexpr (kIsCode<T>) __builtin_prefetch(&scales[row], 1);
    if (adagrad) prefetch_lines<1, Fetch::kReadLater>(state + row * state_stride, 1);
  };
  if constexpr (kVectors <= kSlotVectors) {
    sum_in_slots<kVectors, T, G, Word>(a, ids, begin, end, prefetch, step);
  } else {
    sum_in_registers<kVectors, T, G, Word>(a, ids, begin, end, prefetch, step);
  }
  if (adagrad) adagrad_rows.step();
}

// Calls update_short_rows if it applies; otherwise returns false.
template <class T, class G, class Word>
bool update_as_short_rows(const UpdateArgs& a, const SortedIds& ids, int64_t begin, int64_t end) {
  using S = Accumulator<T>;
  const StepRule& rule = a.rule;
  constexpr double kMost = std::numeric_limits<double>::max();
  const bool plain = !a.bags.weights && !a.argmax && !a.bags.features && !ids.bag_scale;
  const bool one_pass = (rule.algorithm == Algorithm::kSgd && !a.state1.base) || rule.algorithm == Algorithm::kRowwiseAdagrad;
  const bool clipped = rule.clip_value <= kMost || rule.clip_norm <= kMost;
  if (!plain || !one_pass || clipped || (rule.weight_decay != 0 && rule.decay != Decay::kWeights)) return false;
  switch (a.dim % kLanes<S> == 0 ? a.dim / kLanes<S> : 0) {
    case 1:
      return update_short_rows<1, T, G, Word>(a, ids, begin, end), true;
    case 2:
      return update_short_rows<2, T, G, Word>(a, ids, begin, end), true;
    case 4:
      return update_short_rows<4, T, G, Word>(a, ids, begin, end), true;
    case 8:
      return update_short_rows<8, T, G, Word>(a, ids, begin, end), true;
    default:
      return false;
  }
}

// The step on a row of codes: decodes the row into `w`, steps it, and rounds it to codes of the new scale. `w` has room for the
// row and for the gradient passed to the rule.
template <class T>
GOSSAMER_INLINE void step_codes(const UpdateArgs& a, const RowPlace& place, float* grad, float* w) {
  T* codes = static_cast<T*>(a.table.base) + place.in(a, a.table.row_stride);
  const int64_t dim = place.dim;
  const float before = a.scales[place.row];
  float scale = before;
  over_row<float>(dim,
                  [&](int64_t c, int n) __attribute__((always_inline)) { store_n(w + c, load_n(codes + c, n) * before, n); });
  const bool learns = a.scale_rate != 0;
  float* const given = w + dim;
  if (learns) std::memcpy(given, grad, dim * sizeof(float));
  step_row<float>(a.rule, place.row, w, state_at<float>(a, a.state1, place), state_at<float>(a, a.state2, place), grad, dim);
  if (learns) {
    const float slope = sum_row<float>(dim, [&](int64_t c, int n) __attribute__((always_inline)) {
      return load_n(given + c, n) * by_scale<T>(load_n(w + c, n) / before);
    });
    a.scales[place.row] = scale = moved_scale(before, static_cast<float>(a.scale_rate), slope);
  }
  write_codes<T>(a.rule, static_cast<uint64_t>(place.row), w, scale, codes, dim);
}

// Entry for the rows whose runs begin in [begin, end).
template <class T, class G>
void update_range(const UpdateArgs& a, const SortedIds& ids, int64_t begin, int64_t end, void* scratch) {
  using S = Accumulator<T>;
  if constexpr (kShortRows) {
    if (ids.wide ? update_as_short_rows<T, G, uint64_t>(a, ids, begin, end)
                 : update_as_short_rows<T, G, uint32_t>(a, ids, begin, end)) {
      return;
    }
  }
  S* grad = static_cast<S*>(scratch);
  const auto prefetch = [&](int64_t entry) __attribute__((always_inline)) { prefetch_place<T>(a, place_of(a, ids, entry)); };
  each_run<Any>(ids, begin, end, prefetch, [&](int64_t i, int64_t stop) __attribute__((always_inline)) {
    const RowPlace place = place_of(a, ids, i);
    if (stop - i > kPiece) {
      sum_partials(a, ids, i, place.dim, grad);
    } else {
      sum_entries<S, G>(a, ids, i, stop, place.dim, grad);
    }
    if constexpr (kIsCode<T>) {
      step_codes<T>(a, place, grad, grad + place.dim);
    } else {
      T* w = static_cast<T*>(a.table.base) + place.in(a, a.table.row_stride);
      step_row<T>(a.rule, place.row, w, state_at<S>(a, a.state1, place), state_at<S>(a, a.state2, place), grad, place.dim);
    }
  });
}

template <class T, class G>
void sum_range(const UpdateArgs& a, const SortedIds& ids, int64_t first_piece, int64_t last_piece) {
  using S = Accumulator<T>;
  for (int64_t piece = first_piece; piece < last_piece; ++piece) {
    int64_t low = 0, high = ids.num_long_runs;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (ids.long_runs[middle].first_piece <= piece ? low : high) = middle;
    }
    const LongRun& run = ids.long_runs[low];
    const int64_t begin = run.begin + (piece - run.first_piece) * kPiece;
    const RowPlace place = place_of(a, ids, begin);
    sum_entries<S, G>(a, ids, begin, std::min(run.end, begin + kPiece), place.dim,
                      static_cast<S*>(ids.partials) + piece * a.dim);
  }
}

// Steps on `count` elements of an array whose rows are single elements, with their gradients in `grad`.
template <class T>
GOSSAMER_INLINE void step_elements(const UpdateArgs& a, int64_t first, int64_t count, Accumulator<T>* grad) {
  using S = Accumulator<T>;
  const StepRule& rule = a.rule;
  T* w = static_cast<T*>(a.table.base) + first;
  const auto state = [&](const StateArray& array) { return array.base ? static_cast<S*>(array.base) + first : nullptr; };
  S *state1 = state(a.state1), *state2 = state(a.state2);
  StepRule each = rule;
  // For rows of one element, a row's value equals the element's value in these rules: the mean of one square is the square.
  if (rule.algorithm == Algorithm::kPartialRowwiseAdam) each.algorithm = Algorithm::kAdam;
  const bool rows_of_one = rule.algorithm == Algorithm::kLamb || rule.clip_norm <= std::numeric_limits<double>::max() ||
                           (sizeof(T) == 2 && rule.stochastic_rounding);
  if (rows_of_one) {
    for (int64_t i = 0; i < count; ++i) {
      step_row<T>(rule, first + i, w + i, state1 ? state1 + i : nullptr, state2 ? state2 + i : nullptr, grad + i, 1);
    }
  } else if (rule.algorithm == Algorithm::kRowwiseAdagrad) {
    prepare_gradient(rule, w, grad, count);
    const RowWriter<T> write(rule, w, 0);
    const S lr = static_cast<S>(rule.lr), eps = static_cast<S>(rule.eps);
    const S keep = rule.decay == Decay::kWeights ? static_cast<S>(1 - rule.lr * rule.weight_decay) : S{1};
    over_row<S>(count, [&](int64_t c, int n) __attribute__((always_inline)) {
      const Vec<S> g = load_n(grad + c, n), sum = load_n(state1 + c, n) + g * g;
      store_n(state1 + c, sum, n);
      write(c, keep * load_n(w + c, n) - lr / (vsqrt(sum) + eps) * g, n);
    });
  } else {
    step_row<T>(each, first, w, state1, state2, grad, count);
  }
}

// Sums overlapping blocks, and steps on their elements. Entries are sorted by the blocks' first elements; those from `begin` to `end`
// stand for the elements from the first of `begin` to that of `end`, to which blocks that begin before may reach.
template <class T, class G>
void update_block_range(const UpdateArgs& a, const SortedIds& ids, int64_t begin, int64_t end, Accumulator<T>* sums) {
  using S = Accumulator<T>;
  const int64_t dim = a.dim, room = kBlockSums + 2 * dim;
  const auto start = [&](int64_t entry) { return static_cast<int64_t>(entry_at(ids, entry).row); };
  const int64_t first = start(begin), last = end < ids.count ? start(end) : std::numeric_limits<int64_t>::max();
  // Blocks with the same first element all belong to the range in which they end.
  int64_t entry = begin;
  while (entry > 0 && start(entry - 1) > first - dim) --entry;
  int64_t base = first, covered = first;  // sums hold the elements from base on, of which blocks cover those below `covered`
  std::fill_n(sums, room, S{0});
  const auto step_below = [&](int64_t stop) {
    if (stop > base) step_elements<T>(a, base, stop - base, sums);
    const int64_t kept = covered - stop;
    if (kept > 0) std::copy_n(sums + (stop - base), kept, sums);
    std::fill(sums + std::max<int64_t>(kept, 0), sums + (covered - base), S{0});
    base = stop;
  };
  for (; entry < ids.count; ++entry) {
    const int64_t at = start(entry);
    if (at >= last) break;
    const int64_t from = std::max(at, first), to = std::min(at + dim, last);
    if (from > covered) {
      step_below(covered);
      base = covered = from;
    } else if (to - base > room) {
      step_below(from);
    }
    prefetch_addend<G>(a, ids, entry + kDoutAhead, dim * static_cast<int64_t>(sizeof(G)));
    const Addend<G> part = addend<S, G>(a, ids, entry);
    const G* dout = part.dout + (from - at);
    S* sum = sums + (from - base);
    over_row<S>(to - from, [&](int64_t c, int n) __attribute__((always_inline)) {
      store_n(sum + c, load_n(sum + c, n) + load_n(dout + c, n) * static_cast<S>(part.factor), n);
    });
    covered = std::max(covered, to);
  }
  step_below(covered);
}

template <class F>
GOSSAMER_INLINE void visit_update(const UpdateArgs& args, F&& f) {
  visit_table(args.table.dtype, [&](auto table) {
    using T = typename decltype(table)::type;
    if constexpr (kIsCode<T>) {
      return f(table, TypeTag<Accumulator<T>>{});
    } else if constexpr (!std::is_same_v<T, Accumulator<T>>) {
      if (args.dout.dtype != args.table.dtype) return f(table, TypeTag<Accumulator<T>>{});
    }
    f(table, table);
  });
}

void sum_pieces(const UpdateArgs& args, const SortedIds& ids, int64_t first_piece, int64_t last_piece) {
  visit_update(args, [&](auto table, auto dout) {
    sum_range<typename decltype(table)::type, typename decltype(dout)::type>(args, ids, first_piece, last_piece);
  });
}

void update_rows(const UpdateArgs& args, const SortedIds& ids, int64_t begin, int64_t end, void* scratch) {
  visit_update(args, [&](auto table, auto dout) {
    using T = typename decltype(table)::type;
    using G = typename decltype(dout)::type;
    if constexpr (!kIsCode<T>) {
      if (args.blocks) return update_block_range<T, G>(args, ids, begin, end, static_cast<Accumulator<T>*>(scratch));
    }
    update_range<T, G>(args, ids, begin, end, scratch);
  });
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
