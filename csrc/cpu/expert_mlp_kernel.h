// expert_mlp for one instruction set, and code shared with its gradients.
#pragma once

#include "cpu/activation_kernel.h"
#include "cpu/expert_mlp.h"
#include "cpu/expert_update_kernel.h"
#include "cpu/gather_reduce_kernel.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// A chunk's rows, at most `Most`: token and routing weight of each, zero past the end.
template <class T, int64_t Most = ThreadBuffers<Accumulator<T>>::kMaxChunk>
struct ChunkRows {
  using S = Accumulator<T>;
  static constexpr int64_t kRoom = Most + kLanes<S>;
  int64_t token[kRoom];
  const T* row[kRoom];
  alignas(64) S weight[kRoom];

  void read(const ExpertMlpArgs& a, const Chunk& chunk) {
    for (int64_t i = 0; i < chunk.size(); ++i) {
      const int64_t slot = a.groups.slots[chunk.begin + i];
      token[i] = slot / a.top_k;
      weight[i] = static_cast<S>(weight_at(a.weights, token[i] * a.weights.row_stride + slot % a.top_k * a.weights.col_stride));
    }
    for (int64_t i = chunk.size(); i < chunk.size() + kLanes<S>; ++i) weight[i] = 0;
  }

  const T* const* rows_of(const FloatMatrix& m, const Chunk& chunk) {
    for (int64_t i = 0; i < chunk.size(); ++i) row[i] = static_cast<const T*>(m.base) + token[i] * m.row_stride;
    return row;
  }
};

// A thread's own memory.
template <class T>
struct ExpertMlpThread {
  ThreadBuffers<Operand<T>> buffers;
  ChunkRows<T> rows;
  ChunkRows<T, kFewRows> few[kMostTogether];  // of chunks that are computed together
};

// Rows of the pre-activation, as gate_up orders them: gate i, and up i when gated.
GOSSAMER_INLINE int64_t gate_row(const ExpertMlpArgs& a, int64_t i) {
  return a.activation.gated && a.activation.interleaved ? 2 * i : i;
}
GOSSAMER_INLINE int64_t up_row(const ExpertMlpArgs& a, int64_t i) { return a.activation.interleaved ? 2 * i + 1 : a.inner + i; }

// The sums of tokens' rows, `width` values each: the result itself if its type can hold sums, else separate rows.
template <class T>
struct TokenSums {
  using S = Accumulator<T>;
  S* base;
  T* result;
  int64_t tokens, width, stride;

  TokenSums(S* own, void* out, int64_t tokens, int64_t width)
      : base(own), result(static_cast<T*>(out)), tokens(tokens), width(width), stride(sum_stride(width)) {
    if constexpr (std::is_same_v<T, S>) {
      base = result;
      stride = width;
    }
  }

  S* at(int64_t token, int64_t column) const { return base + token * stride + column; }

  void zero(Team team) const {
    const auto mine = team.share(tokens * stride);
    if (mine.begin == mine.end) return;  // without tokens there is no memory
    std::memset(static_cast<void*>(base + mine.begin), 0, (mine.end - mine.begin) * sizeof(S));
  }

  // Adds the transpose of c (columns x tokens of the chunk), each token's row times its factor, at `column`.
  template <int64_t Most>
  void add(const S* c, int64_t c_stride, int64_t columns, const ChunkRows<T, Most>& rows, int64_t chunk, bool weighted,
           int64_t column) const {
    for_transposed(c, c_stride, columns, chunk, [&](int64_t i, int64_t offset, Vec<S> v, int valid) {
      add_to(at(rows.token[i], column + offset), v, valid, weighted, rows.weight[i]);
    });
  }

  // The same of rows of `columns` values, c_stride apart.
  template <int64_t Most>
  void add_rows(const S* c, int64_t c_stride, int64_t columns, const ChunkRows<T, Most>& rows, int64_t chunk, bool weighted,
                int64_t column) const {
    for (int64_t i = 0; i < chunk; ++i) {
      S* to = at(rows.token[i], column);
      for (int64_t j = 0; j < columns; j += kLanes<S>) {
        const int valid = static_cast<int>(std::min<int64_t>(kLanes<S>, columns - j));
        add_to(to + j, load(c + i * c_stride + j), valid, weighted, rows.weight[i]);
      }
    }
  }

  // Rounds to the result's type.
  void round(Team team) const {
    if constexpr (!std::is_same_v<T, S>) {
      const auto mine = team.share(tokens);
      for (int64_t token = mine.begin; token < mine.end; ++token) {
        for (int64_t i = 0; i < width; i += kLanes<S>) {
          const int valid = static_cast<int>(std::min<int64_t>(kLanes<S>, width - i));
          store_valid(result + token * width + i, load(at(token, i)), valid);
        }
      }
    }
  }

 private:
  static inline __attribute__((always_inline)) void add_to(S* to, Vec<S> v, int valid, bool weighted, S weight) {
    const Vec<S> old = load_valid(to, valid);
    store_valid(to, weighted ? old + v * weight : old + v, valid);
  }
};

// The pre-activation of activation columns first .. first+count: gate rows in c, up rows at *up; returns their row step.
// `x` is the weight's operand of as many tokens as `low` has, which holds x·aᵀ of an update, scaled; low_w is its b.
template <class W, class X, class T, class P, class S>
int64_t preactivation(const ExpertMlpArgs& a, const W& w, int64_t expert, const X& x, const Weight<T>& low_w,
                      const Panel<P>& low, int64_t first, int64_t count, S* c, S** up, int64_t c_stride, P* pack) {
  const int64_t tokens = low.width;
  const auto part = [&](int64_t n, int64_t rows, S* to) {
    group_product(w, n, rows, x, to, c_stride, pack);
    if (a.gate_up_update) group_product(low_w, n, rows, low, to, c_stride, pack, true);
    add_bias(a.gate_up_bias, expert, n, rows, to, c_stride, tokens);
  };
  *up = nullptr;
  if (!a.activation.gated) {
    part(first, count, c);
    return 1;
  }
  if (a.activation.interleaved) {
    part(2 * first, 2 * count, c);
    *up = c + c_stride;
    return 2;
  }
  *up = c + kGroup * c_stride;
  part(first, count, c);
  part(a.inner + first, count, *up);
  return 1;
}

// Saves what preactivation() computed.
template <class T, class S>
void save_preactivation(const ExpertMlpArgs& a, const Chunk& chunk, int64_t first, int64_t count, const S* c, const S* up,
                        int64_t c_stride) {
  const int64_t wide = a.inner * a.activation.halves();
  T* preact = static_cast<T*>(a.preact) + chunk.begin * wide;
  const auto part = [&](const S* from, int64_t rows, int64_t n) {
    for_transposed(from, c_stride, rows, chunk.size(), [&](int64_t token, int64_t column, Vec<S> v, int valid) {
      store_valid(preact + token * wide + n + column, v, valid);
    });
  };
  if (a.activation.gated && a.activation.interleaved) {
    part(c, 2 * count, 2 * first);
  } else {
    part(c, count, first);
    if (a.activation.gated) part(up, count, a.inner + first);
  }
}

// Gate and up of pairs of neighbouring values.
template <class S>
GOSSAMER_INLINE GateUp<S> parted(Vec<S> low, Vec<S> high) {
  return [&]<int... I>(std::integer_sequence<int, I...>) {
    return GateUp<S>{__builtin_shufflevector(low, high, 2 * I...), __builtin_shufflevector(low, high, (2 * I + 1)...)};
  }(std::make_integer_sequence<int, kLanes<S>>{});
}

template <class S>
GOSSAMER_INLINE Vec<S> first_lanes(Vec<S> v, int count) {
  S kept[kLanes<S>] = {};
  std::memcpy(kept, &v, count * sizeof(S));
  return load(kept);
}

// The activations of what preactivation() computed for columns first .. first+count, packed for products along them.
template <class P, class S>
void store_activation(const ExpertMlpArgs& a, const S* c, const S* up, int64_t step, const Panel<P>& act, int64_t first,
                      int64_t count) {
  visit_activation<S>(a.activation, [&](auto activation) {
    const auto value = [&](int64_t row, int64_t t) {
      const Vec<S> gate = load(c + row * step + t);
      return activation(GateUp<S>{gate, up ? load(up + row * step + t) : gate}).value;
    };
    for (int64_t row = 0; row < count; row += kTerms<P>) {
      for (int64_t t = 0; t < act.width; t += kLanes<S>) {
        const Vec<S> next = kTerms<P> > 1 && row + 1 < count ? value(row + 1, t) : Vec<S>{};
        store(act.at((first + row) / kTerms<P>, t), pack_lanes<P>(value(row, t), next));
      }
    }
  });
}

// Values between the sums of two tokens where they are rows: gate and up of a group of columns.
constexpr int64_t kTokenStride = 2 * kGroup;

// preactivation() with tokens as rows: up rows lie kGroup values after gate rows, or alternate with them.
template <class P, class S>
void token_preactivation(const ExpertMlpArgs& a, const QuantizedMatrix& w, int64_t expert, const QuantizedOperand<P>& x,
                         int64_t first, int64_t count, S* c) {
  const auto part = [&](int64_t n, int64_t rows, S* to) {
    token_rows_product(w, n, rows, x, to, kTokenStride);
    add_bias(a.gate_up_bias, expert, n, rows, to, 1, x.panel.width, kTokenStride);
  };
  if (!a.activation.gated) return part(first, count, c);
  if (a.activation.interleaved) return part(2 * first, 2 * count, c);
  part(first, count, c);
  part(a.inner + first, count, c + kGroup);
}

// The activations of `count` columns of what token_preactivation() computed, of all tokens for each index along the depth, `width`
// values each.
template <class P, class S>
void store_token_activation(const ExpertMlpArgs& a, const S* c, int64_t tokens, P* to, int64_t width, int64_t count) {
  constexpr int lanes = kLanes<S>, terms = kTerms<P>;
  constexpr int64_t most = kGroup / terms;
  const int64_t depth = (count + terms - 1) / terms;
  alignas(64) P values[kFewQuantized][most];
  visit_activation<S>(a.activation, [&](auto activation) {
    for (int64_t t = 0; t < tokens; ++t) {
      const S* from = c + t * kTokenStride;
      for (int64_t j = 0; j < count; j += lanes) {
        GateUp<S> in{load(from + j), load(from + j + (a.activation.gated ? kGroup : 0))};
        if (a.activation.gated && a.activation.interleaved) in = parted<S>(load(from + 2 * j), load(from + 2 * j + lanes));
        Vec<S> value = activation(in).value;
        if (count - j < lanes) value = first_lanes<S>(value, static_cast<int>(count - j));
        store_sums(reinterpret_cast<Term<P>*>(values[t]) + j, value);
      }
    }
  });
  if (width < kLanes<P>) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t t = 0; t < width; ++t) to[k * width + t] = t < tokens ? values[t][k] : P{};
    }
    return;
  }
  for (int64_t k = 0; k < depth; k += kLanes<P>) {
    Vec<P> v[kLanes<P>];
    for (int64_t t = 0; t < kLanes<P>; ++t) v[t] = t < tokens ? load(values[t] + k) : Vec<P>{};
    transpose<P>(v);
    for (int64_t i = 0; i < std::min<int64_t>(kLanes<P>, depth - k); ++i) store(to + (k + i) * width, v[i]);
  }
}

// The layer with the weights that gate_up_of(expert) and down_of(expert) give.
//
// Chunks of many rows come one after the other, with a barrier before each of their two products. Consecutive chunks of few rows, whose
// products read weights from memory most of the time, share two phases: gate and up of all of them, and down of all of them.
template <class T, class GateUpOf, class DownOf>
void expert_mlp_forward_typed(const ExpertMlpForwardArgs& a, void* shared, int num_threads, Team team, GateUpOf&& gate_up_of,
                              DownOf&& down_of) {
  using S = Accumulator<T>;
  using P = Operand<T>;
  Arena arena(shared);
  ExpertMlpBuffers<P> buffers(arena, a, num_threads);
  const auto own = std::make_unique_for_overwrite<ExpertMlpThread<T>>();
  P* pack = own->buffers.pack;
  S* c = own->buffers.c;
  auto operands = operand_memory<P>(std::max(a.hidden, a.inner), buffers.chunk, gate_up_of(0), down_of(0));
  const auto packed = team.share(a.hidden, kPanelWidth<P>);
  const TokenSums<T> sums(buffers.sum, a.y, a.tokens, a.output);
  const int64_t wide = a.inner * a.activation.halves();
  StageClock clock(a.updated() ? TimedKernel::kExpertMlpLora : TimedKernel::kExpertMlp, team.size);
  sums.zero(team);
  buffers.inner.restart(team);
  buffers.up_low.restart(team);
  clock.lap(Stage::kZero);
  // The low-rank rows of a product, which all threads need before they start it.
  const auto low_rows = [&](const ExpertUpdate& update, const Chunk& chunk, int64_t depth, const Panel<P>& rows,
                            const LowRankPanels<P>& low, WorkQueue& queue) {
    if (!update) return;
    S* save = update.s ? static_cast<S*>(update.s) + chunk.begin * update.rank : nullptr;
    const Weight<T> w = expert_weight<T>(update.a, chunk.expert, update.rank, depth);
    low_rank_rows(w, rows, update.scale, low, save, queue, team, c, own->buffers.c_stride(chunk.size()), pack);
    clock.lap(Stage::kLowRank);
    team.barrier();
    clock.lap(Stage::kWait);
  };
  const auto fetch_gate_up = [&](const auto& gate_up, int64_t i, int64_t m) {
    fetch_first_rows(gate_up, gate_row(a, i), m);
    if (a.activation.gated && !a.activation.interleaved) fetch_first_rows(gate_up, up_row(a, i), m);
  };
  // Columns i .. end of the activations of a chunk.
  const auto add_inner = [&](const Chunk& chunk, const auto& gate_up, const auto& x, const Panel<P>& low, const Panel<P>& act,
                             int64_t i, int64_t end) {
    const int64_t count = end - i, c_stride = own->buffers.c_stride(chunk.size());
    const Weight<T> low_w = expert_weight<T>(a.gate_up_update.b, chunk.expert, wide, a.gate_up_update.rank);
    S* up;
    const int64_t step = preactivation(a, gate_up, chunk.expert, x, low_w, low, i, count, c, &up, c_stride, pack) * c_stride;
    clock.lap(Stage::kGateUp);
    if (a.preact) {
      save_preactivation<T>(a, chunk, i, count, c, up, c_stride);
      clock.lap(Stage::kSave);
    }
    store_activation(a, c, up, step, act, i, count);
    clock.lap(Stage::kActivation);
  };
  // Adds columns h .. end of the output of a chunk, whose rows are `rows`, to the sums.
  const auto add_output = [&](const Chunk& chunk, const auto& w, const auto& act, const Panel<P>& low, const auto& rows,
                              int64_t h, int64_t end) {
    const int64_t m = chunk.size(), count = end - h, c_stride = own->buffers.c_stride(m);
    // The rows to which the product will be added are fetched into the cache while it is computed.
    for (int64_t i = 0; i < m; ++i) prefetch_lines<1, Fetch::kWriteLater>(sums.at(rows.token[i], h), count * sizeof(S));
    group_product(w, h, count, act, c, c_stride, pack);
    if (a.down_update) {
      const Weight<T> low_w = expert_weight<T>(a.down_update.b, chunk.expert, a.output, a.down_update.rank);
      group_product(low_w, h, count, low, c, c_stride, pack, true);
    }
    add_bias(a.down_bias, chunk.expert, h, count, c, c_stride, m);
    clock.lap(Stage::kDown);
    sums.add(c, c_stride, count, rows, m, true, h);
    clock.lap(Stage::kCombine);
  };
  using GateUpWeight = std::decay_t<decltype(gate_up_of(0))>;
  // add_inner() and add_output() with sums as rows of tokens. `to` takes `width` values for each index along the depth, up to `depth`
  // with zeros at the end.
  [[maybe_unused]] const auto add_token_inner = [&](const Chunk& chunk, const auto& gate_up, const auto& x, P* to,
                                                    int64_t width, int64_t depth, int64_t i, int64_t end) {
    token_preactivation(a, gate_up, chunk.expert, x, i, end - i, c);
    clock.lap(Stage::kGateUp);
    const int64_t last = packed_depth<P>(end);
    store_token_activation(a, c, chunk.size(), to + i / kTerms<P> * width, width, end - i);
    if (end == a.inner && last < depth)
      std::memset(static_cast<void*>(to + last * width), 0, (depth - last) * width * sizeof(P));
    clock.lap(Stage::kActivation);
  };
  [[maybe_unused]] const auto add_token_output = [&](const Chunk& chunk, const auto& w, const auto& act, const auto& rows,
                                                     int64_t h, int64_t end) {
    const int64_t m = chunk.size(), count = end - h;
    token_rows_product(w, h, count, act, c, kTokenStride);
    add_bias(a.down_bias, chunk.expert, h, count, c, 1, m, kTokenStride);
    clock.lap(Stage::kDown);
    sums.add_rows(c, kTokenStride, count, rows, m, true, h);
    clock.lap(Stage::kCombine);
  };
  const auto alone = [&](const Chunk& chunk) {
    const int64_t m = chunk.size();
    const bool few = m <= kFewRows;
    const Panel<P> x{few ? buffers.x_few + team.thread * buffers.x_few_size : buffers.x_c, packed_depth<P>(a.hidden), m};
    const Panel<P> act{buffers.act_c, packed_depth<P>(a.inner), m};
    const auto gate_up = gate_up_of(chunk.expert);
    const auto w = down_of(chunk.expert);
    fetch_gate_up(gate_up, team.share(a.inner, kGroup).begin, m);
    const auto up_low = low_rank_panels(buffers.up_update, a.gate_up_update.rank, m);
    const auto down_low = low_rank_panels(buffers.down_update, a.down_update.rank, m);
    own->rows.read(a, chunk);
    const auto share = few ? Team::Range{0, a.hidden} : packed;
    pack_as_columns(x, own->rows.rows_of(a.x, chunk), share.begin, share.end);
    clock.lap(Stage::kPack);
    team.barrier();
    buffers.output.restart(team);
    buffers.down_low.restart(team);
    clock.lap(Stage::kWait);
    low_rows(a.gate_up_update, chunk, a.hidden, x, up_low, buffers.up_low);
    const auto x_operand = operands.operand(gate_up, x);
    buffers.inner.each(
        team, a.inner, kGroup, [&](int64_t i, int64_t end) { add_inner(chunk, gate_up, x_operand, up_low.c, act, i, end); },
        quartered<P>(gate_up, m, 2));
    fetch_first_rows(w, team.share(a.output, kGroup).begin, m);
    team.barrier();
    buffers.inner.restart(team);
    buffers.up_low.restart(team);
    clock.lap(Stage::kWait);
    low_rows(a.down_update, chunk, a.inner, act, down_low, buffers.down_low);
    const auto act_operand = operands.operand(w, act);
    buffers.output.each(
        team, a.output, kGroup,
        [&](int64_t h, int64_t end) { add_output(chunk, w, act_operand, down_low.c, own->rows, h, end); },
        quartered<P>(w, m, 1));
  };

  Chunk few[kMostTogether];
  int64_t num_few = 0, num_memories = 0;
  using DownOperand = std::decay_t<decltype(operands.operand(down_of(0), Panel<P>{}))>;
  decltype(operands) few_memory[kMostTogether];
  const auto all_few = [&] {
    if (num_few == 0) return;
    const auto panel_of = [&](int64_t at) {
      return Panel<P>{buffers.act_few + at * buffers.act_few_size, packed_depth<P>(a.inner), few[at].size()};
    };
    const auto sums_by_token = [&](int64_t at) { return kSumsByToken<P, GateUpWeight> && few[at].size() <= kFewQuantized; };
    // Whether the second product reads a chunk's activations index by index; else it makes its operand of a panel.
    [[maybe_unused]] const auto reads_values = [&](int64_t at) {
      if constexpr (kSumsByToken<P, GateUpWeight>) return sums_by_token(at) && !down_of(0).weights->rounds_rows;
      return false;
    };
    const auto no_update = [&](int64_t at) { return Panel<P>{nullptr, 0, few[at].size()}; };
    for (int64_t at = 0; at < num_few; ++at) own->few[at].read(a, few[at]);
    // Chunks follow each other in whole units.
    const int64_t units = (a.inner + kGroup - 1) / kGroup, columns = units * kGroup;
    const auto mine = team.share(num_few * columns, kGroup);
    int64_t at_x = -1;
    Panel<P> x{buffers.x_few + team.thread * buffers.x_few_size, packed_depth<P>(a.hidden), 0};
    std::decay_t<decltype(operands.operand(gate_up_of(0), x))> x_operand;
    // Brings the rows of a chunk into x_operand, unless those of the last one are the same tokens.
    const auto take_rows = [&](int64_t at) {
      if (at == at_x) return;
      const int64_t m = few[at].size();
      auto& rows = own->few[at];
      const bool same = at_x >= 0 && few[at_x].size() == m && std::equal(rows.token, rows.token + m, own->few[at_x].token);
      at_x = at;
      if (same) return;
      const auto gate_up = gate_up_of(few[at].expert);
      const T* const* found = rows.rows_of(a.x, few[at]);
      x.width = m;
      if constexpr (std::is_same_v<decltype(gate_up), const QuantizedMatrix>) {
        if (operands.reads_rows(gate_up, m)) {
          x_operand = operands.operand_of_rows(found, a.hidden, m);
          return clock.lap(Stage::kPack);
        }
      }
      pack_as_columns(x, found, 0, a.hidden);
      x_operand = operands.operand(gate_up, x);
      clock.lap(Stage::kPack);
    };
    if (mine.begin < mine.end) {
      const int64_t at = mine.begin / columns;
      fetch_gate_up(gate_up_of(few[at].expert), mine.begin % columns, few[at].size());
      take_rows(at);
    }
    team.barrier();
    buffers.output.restart(team);
    clock.lap(Stage::kWait);
    buffers.inner.each(team, num_few * columns, kGroup, [&](int64_t first, int64_t last) {
      const int64_t at = first / columns, i = first % columns, end = std::min(i + last - first, a.inner);
      if (i >= end) return;
      take_rows(at);
      if (end == a.inner && at + 1 < num_few) fetch_gate_up(gate_up_of(few[at + 1].expert), 0, few[at + 1].size());
      const auto gate_up = gate_up_of(few[at].expert);
      const Panel<P> to = panel_of(at);
      if constexpr (kSumsByToken<P, GateUpWeight>) {
        if (sums_by_token(at)) {
          const int64_t width = reads_values(at) ? operands.few_width(to.width) : kLanes<P>;
          const int64_t depth = reads_values(at) ? operands.few_depth(a.inner) : to.depth;
          return add_token_inner(few[at], gate_up, x_operand, to.data, width, depth, i, end);
        }
      }
      add_inner(few[at], gate_up, x_operand, no_update(at), to, i, end);
    });
    // A thread computes several groups of an expert's columns at a time, since long runs are read faster.
    constexpr int64_t most = 4 * kGroup;
    const int64_t unit = std::clamp<int64_t>(a.output / (4 * team.size) / kGroup * kGroup, kGroup, most);
    const int64_t first_output = team.share(a.output, unit).begin;
    for (int64_t at = 0; at < num_few; ++at) fetch_first_rows(down_of(few[at].expert), first_output, few[at].size());
    team.barrier();
    buffers.inner.restart(team);
    clock.lap(Stage::kWait);
    DownOperand act[kMostTogether];
    for (int64_t at = 0; at < num_few; ++at) {
      if constexpr (kSumsByToken<P, GateUpWeight>) {
        if (reads_values(at)) {
          act[at] = operands.operand_of_few(panel_of(at).data, a.inner, few[at].size());
          continue;
        }
      }
      while (at >= num_memories) few_memory[num_memories++] = operand_memory<P>(a.inner, kFewRows, gate_up_of(0), down_of(0));
      act[at] = few_memory[at].operand(down_of(few[at].expert), panel_of(at));
    }
    clock.lap(Stage::kPack);
    // A token's experts are added in their order.
    buffers.output.each(
        team, a.output, unit,
        [&](int64_t begin, int64_t end) {
          for (int64_t at = 0; at < num_few; ++at) {
            const auto w = down_of(few[at].expert);
            for (int64_t h = begin; h < end; h += kGroup) {
              const int64_t last = std::min<int64_t>(end, h + kGroup);
              if (last == end) {
                // The next expert's rows, or the first expert's of the next turn.
                const bool more = at + 1 < num_few;
                const int64_t next = more ? at + 1 : 0;
                if (more || end < a.output) fetch_first_rows(down_of(few[next].expert), more ? begin : end, few[next].size());
              }
              if constexpr (kSumsByToken<P, GateUpWeight>) {
                if (sums_by_token(at)) {
                  add_token_output(few[at], w, act[at], own->few[at], h, last);
                  continue;
                }
              }
              add_output(few[at], w, act[at], no_update(at), own->few[at], h, last);
            }
          }
        },
        unit == most ? 1 : 0);
    num_few = 0;
  };

  for_chunks(a.groups, buffers.chunk, [&](const Chunk& chunk) {
    if (chunk.size() > kFewRows || buffers.together == 0) {
      all_few();
      return alone(chunk);
    }
    few[num_few++] = chunk;
    if (num_few == buffers.together) all_few();
  });
  all_few();
  team.barrier();
  clock.lap(Stage::kWait);
  sums.round(team);
  clock.lap(Stage::kRound);
}

void expert_mlp(const ExpertMlpForwardArgs& args, void* shared, int num_threads, Team team) {
  visit_values(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t wide = args.inner * args.activation.halves();
    expert_mlp_forward_typed<T>(
        args, shared, num_threads, team,
        [&](int64_t expert) { return expert_weight<T>(args.gate_up, expert, wide, args.hidden); },
        [&](int64_t expert) { return expert_weight<T>(args.down, expert, args.output, args.inner); });
  });
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
