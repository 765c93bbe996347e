// The gradients of expert_mlp for one instruction set.
#pragma once

#include "cpu/expert_mlp_kernel.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Activation columns first .. first+count of a chunk: d(pre-activation) over the pre-activation's panel, the weighted
// activation, and the part of the routing-weight gradient; dact holds dy · W2.
template <class T, class S>
void activation_gradient(const ExpertMlpBackwardArgs& a, const Panel<S>& preact, const Panel<S>& act, int64_t first,
                         int64_t count, const S* dact, int64_t c_stride, const S* weight, S* dweight_part) {
  visit_activation<S>(a.activation, [&](auto activation) {
    for (int64_t t = 0; t < preact.width; t += kLanes<S>) {
      const Vec<S> w = load(weight + t);
      // Several short chains of additions: see segment_length().
      Vec<S> dot[4] = {};
      for (int64_t i = 0; i < count; ++i) {
        S* gate = preact.at(gate_row(a, first + i), t);
        S* up = a.activation.gated ? preact.at(up_row(a, first + i), t) : gate;
        const ActivationValue<S> value = activation(GateUp<S>{load(gate), load(up)});
        store(act.at(first + i, t), value.value * w);
        if (!dact) continue;
        const Vec<S> d = load(dact + i * c_stride + t);
        dot[i % 4] += d * value.value;
        if (a.activation.gated) store(up, d * w * value.dup);
        store(gate, d * w * value.dgate);
      }
      if (dweight_part) store(dweight_part + t, (dot[0] + dot[1]) + (dot[2] + dot[3]));
    }
  });
}

// The same with tokens as rows: `preact` holds the saved values, dact's rows are kGroup values, and gradients and weighted
// activations are stored where tiles read them.
template <class T, class P, class S>
void activation_gradient_rows(const ExpertMlpBackwardArgs& a, const T* const* preact, const PackedRows<P>& dpreact,
                              const Panel<P>& act_r, int64_t first, int64_t count, const S* dact, const S* weight,
                              S* dweight_part) {
  constexpr int lanes = kLanes<S>, terms = kTerms<P>;
  const int64_t up = a.activation.gated ? a.inner : 0;
  visit_activation<S>(a.activation, [&](auto activation) {
    for (int64_t t = 0; t < dpreact.tokens; t += terms) {
      Vec<S> dot[terms] = {};
      for (int64_t i = 0; i < count; i += lanes) {
        const int valid = static_cast<int>(std::min<int64_t>(lanes, count - i));
        Vec<S> weighted[terms] = {};
        for (int j = 0; j < std::min<int64_t>(terms, dpreact.tokens - t); ++j) {
          const T* from = preact[t + j] + first + i;
          T* to = dpreact.row(t + j) + first + i;
          const Vec<S> gate = load_valid(from, valid), w = splat(weight[t + j]);
          const ActivationValue<S> value =
              activation(GateUp<S>{gate, a.activation.gated ? load_valid(from + up, valid) : gate});
          const Vec<S> d = load_valid(dact + (t + j) * kGroup + i, valid);
          dot[j] += d * value.value;
          if (a.activation.gated) store_valid_sums(to + up, d * w * value.dup, valid);
          store_valid_sums(to, d * w * value.dgate, valid);
          weighted[j] = value.value * w;
        }
        if (act_r.data) store(act_r.at(t / terms, first + i), pack_lanes<P>(weighted[0], weighted[terms - 1]));
      }
      if (!dweight_part) continue;
      for (int j = 0; j < std::min<int64_t>(terms, dpreact.tokens - t); ++j) dweight_part[t + j] = sum_lanes<S>(dot[j]);
    }
  });
  if (act_r.data) zero_past(act_r, packed_depth<P>(dpreact.tokens), first, first + count);
}

// out[t] = Σ_i factors(expert, i) · panel[i][t].
template <class S>
void weighted_rows(const Panel<S>& panel, const FloatMatrix& factors, int64_t expert, S* out) {
  const int segment = segment_length(panel.depth);
  for (int64_t t = 0; t < panel.width; t += kLanes<S>) {
    Vec<S> sum = {}, part = {};
    for (int64_t i = 0; i < panel.depth; ++i) {
      part += load(panel.at(i, t)) * static_cast<S>(factors.at(expert, i));
      if (i % segment == segment - 1) {
        sum += part;
        part = Vec<S>{};
      }
    }
    store(out + t, sum + part);
  }
}

template <class T>
class ExpertMlpBackward {
  using S = Accumulator<T>;
  using P = Operand<T>;
  static constexpr bool kSame = std::is_same_v<P, S>;

 public:
  ExpertMlpBackward(const ExpertMlpBackwardArgs& args, void* shared, int num_threads, Team t)
      : a(args),
        team(t),
        clock(args.updated() ? TimedKernel::kExpertMlpLoraBackward : TimedKernel::kExpertMlpBackward, t.size),
        arena(shared),
        buffers(arena, args, num_threads),
        own(std::make_unique<ExpertMlpThread<T>>()),
        dx(buffers.sum, args.dx, args.tokens, args.hidden) {
    bias_sums = std::make_unique<S[]>(a.wide() + a.output);
    if ((a.needs_dact() && down_by_rows()) || (a.dx && gate_up_by_rows())) rows_memory = RowsMemory<P>(buffers.chunk);
    activation_by_rows = kTiled<P> && a.dx && down_by_rows() && gate_up_by_rows() && !a.activation.interleaved &&
                         !a.gate_up_update && !a.down_update && !a.dgate_up_bias && !buffers.preact_r && !buffers.act_t;
  }

  void run() {
    if (a.dx) dx.zero(team);
    zero_empty_experts();
    buffers.inner.restart(team);
    buffers.down_low.restart(team);
    clock.lap(Stage::kZero);
    meet();
    for_chunks(a.groups, buffers.chunk, [&](const Chunk& chunk) {
      own->rows.read(a, chunk);
      const int64_t m = chunk.size();
      const int64_t terms = packed_depth<P>(m), depth = tile_depth<P>(m);
      x_t = {buffers.x_t, a.hidden, terms};
      x_r = {buffers.x_r, depth, a.hidden};
      dy = {buffers.dy, a.output, m};
      dy_c = {buffers.dy_c, packed_depth<P>(a.output), m};
      dy_rows = {buffers.dy_rows, a.output, m};
      preact_rows = {buffers.preact_rows, a.wide(), m};
      dy_t = {buffers.dy_t, a.output, terms};
      dy_r = {buffers.dy_r, depth, a.output};
      preact = {buffers.preact, a.wide(), m};
      preact_c = {buffers.preact_c, packed_depth<P>(a.wide()), m};
      preact_t = {buffers.preact_t, a.wide(), terms};
      preact_r = {buffers.preact_r, depth, a.wide()};
      act = {buffers.act, a.inner, m};
      act_t = {buffers.act_t, a.inner, terms};
      act_r = {buffers.act_r, depth, a.inner};
      up_low = low_rank_panels(buffers.up_update, a.gate_up_update.rank, m);
      up_low_r = {buffers.up_update.r, depth, a.gate_up_update.rank};
      down_low = low_rank_panels(buffers.down_update, a.down_update.rank, m);
      down_low_r = {buffers.down_update.r, depth, a.down_update.rank};
      if (a.needs_dact()) fetch_first_columns<P>(transposed_down(chunk.expert), team, m);
      gather(chunk);
      clock.lap(Stage::kPack);
      meet();
      if (a.down_update && (a.needs_dact() || a.ddown_update.da)) {
        low_gradient(a.down_update, chunk, a.output, dy_c, down_low, buffers.down_low);
      }
      through_activation(chunk);
      meet();
      if (!kSame || buffers.preact_r) {
        if (activation_by_rows) {
          gradient_by_terms();
        } else if constexpr (!kSame) {
          for_own_preact([&](int64_t begin, int64_t end) {
            if (buffers.preact_c && (!gate_up_by_tiles() || a.gate_up_update)) pack_along_rows(preact_c, preact, begin, end);
            if (a.dx && gate_up_by_tiles()) transpose_rows(preact_rows, preact, begin, end);
            if (buffers.preact_t) pack_along_tokens(preact_t, preact, begin, end);
          });
          if (a.dx && gate_up_by_tiles() && team.thread == 0) preact_rows.zero_past_terms();
        }
        if (buffers.preact_r) {
          const auto mine = team.share(a.wide(), kPanelWidth<S>);
          transpose_panel(preact_r, preact, mine.begin, mine.end);
        }
        clock.lap(Stage::kTranspose);
        meet();
      }
      if (a.gate_up_update && (a.dx || a.dgate_up_update.da)) {
        low_gradient(a.gate_up_update, chunk, a.wide(), preact_c, up_low, buffers.up_low);
      }
      gradients(chunk);
      meet();
    });
    if (a.dx) dx.round(team);
    clock.lap(Stage::kRound);
  }

 private:
  void meet() {
    team.barrier();
    clock.lap(Stage::kWait);
  }

  void zero_empty_experts() {
    const auto weight = [&](const WeightGradient& g, int64_t rows, int64_t cols) {
      if (g) zero_empty<T>(a.groups, g.base, g.transposed ? cols : rows, g.transposed ? rows : cols, team);
    };
    weight(a.dgate_up, a.wide(), a.hidden);
    weight(a.ddown, a.output, a.inner);
    const auto factors = [&](const UpdateGradient& g, int64_t rank, int64_t n, int64_t c) {
      visit_float(a.factor_dtype, [&](auto tag) {
        using G = typename decltype(tag)::type;
        if (g.da) zero_empty<G>(a.groups, g.da, rank, c, team);
        if (g.db) zero_empty<G>(a.groups, g.db, n, rank, team);
      });
    };
    factors(a.dgate_up_update, a.gate_up_update.rank, a.wide(), a.hidden);
    factors(a.ddown_update, a.down_update.rank, a.output, a.inner);
    if (team.thread != 0) return;
    if (a.dgate_up_bias) zero_empty<T>(a.groups, a.dgate_up_bias, 1, a.wide(), Team{0, 1});
    if (a.ddown_bias) zero_empty<T>(a.groups, a.ddown_bias, 1, a.output, Team{0, 1});
  }

  // Calls f for this thread's ranges of pre-activation rows, in whole pairs: mostly those whose activation it computes, so that
  // they stay in its caches.
  template <class F>
  void for_own_preact(F&& f) const {
    const auto mine = team.share(a.inner, kGroup);
    if (!a.activation.gated) {
      f(mine.begin, mine.end);
    } else if (a.activation.interleaved) {
      f(2 * mine.begin, 2 * mine.end);
    } else if (a.inner % 2 == 0) {
      f(mine.begin, mine.end);
      f(a.inner + mine.begin, a.inner + mine.end);
    } else {
      const auto part = team.share(a.wide(), kGroup);
      f(part.begin, part.end);
    }
  }

  // Packs the chunk's rows, each thread a range of columns.
  void gather(const Chunk& chunk) {
    const int64_t unit = kTiled<P> ? 2 * kPanelWidth<S> : kPanelWidth<S>;
    const auto h = team.share(a.hidden, unit), o = team.share(a.output, unit);
    const T* const* rows = own->rows.rows_of(a.dy, chunk);
    const int64_t m = chunk.size();
    if constexpr (kSame) {
      const bool left_dy = a.ddown && !a.ddown.transposed;
      if (a.needs_dact() || a.ddown_bias || a.ddown_update || left_dy) pack_as_columns(dy_c, rows, o.begin, o.end);
    } else {
      if (buffers.dy_c && (!down_by_tiles() || a.down_update)) pack_as_columns(dy_c, rows, o.begin, o.end);
      if (a.needs_dact() && down_by_tiles()) copy_rows(dy_rows, rows, o.begin, o.end);
      if (buffers.dy_t) pack_as_terms(dy_t, rows, m, o.begin, o.end);
      if (buffers.dy) pack_as_columns(dy, rows, o.begin, o.end);
    }
    if (buffers.dy_r) pack_as_rows(dy_r, rows, m, o.begin, o.end);
    rows = own->rows.rows_of(a.x, chunk);
    if (buffers.x_t) pack_as_terms(x_t, rows, m, h.begin, h.end);
    if (buffers.x_r) pack_as_rows(x_r, rows, m, h.begin, h.end);
    const auto saved = [&](const ExpertUpdate& update, const RowPanel<P>& panel, const S* factors) {
      const S* s = static_cast<const S*>(update.s) + chunk.begin * update.rank;
      if (panel.data) pack_low_rank_rows(panel, s, factors, update.scale, m, team);
    };
    saved(a.gate_up_update, up_low_r, nullptr);
    saved(a.down_update, down_low_r, own->rows.weight);
    if (!a.needs_dact() && !a.needs_act()) return;
    for (int64_t i = 0; i < chunk.size(); ++i) {
      own->rows.row[i] = static_cast<const T*>(a.preact) + (chunk.begin + i) * a.wide();
    }
    if (!activation_by_rows) {
      for_own_preact([&](int64_t begin, int64_t end) { pack_as_columns(preact, own->rows.row, begin, end); });
    }
  }

  // The remaining work after activation_gradient_rows(): d(pre-activation) for the sum over tokens, and zeros where tiles read
  // past its end.
  void gradient_by_terms() {
    if constexpr (kTiled<P>) {
      const int64_t m = preact_rows.tokens;
      for (int64_t t = 0; t < m; ++t) own->rows.row[t] = preact_rows.row(t);
      for_own_preact([&](int64_t begin, int64_t end) {
        if (buffers.preact_t) pack_as_terms(preact_t, own->rows.row, m, begin, end);
      });
      if (team.thread != 0) return;
      preact_rows.zero_past_terms();
      if (a.wide() % kTerms<P> != 0) {
        for (int64_t t = 0; t < m; ++t) preact_rows.row(t)[a.wide()] = T{};
      }
    }
  }

  // Whether products with a weight's transpose have tokens in the rows of the result, since transposing results costs less than
  // transposing weights.
  bool down_by_rows() const { return kByRows<P> && runs_along_rows(transposed_down(0)); }
  bool gate_up_by_rows() const { return kByRows<P> && runs_along_rows(transposed_gate_up(0)); }
  // Whether tiles read the tokens of these products as rows; vectors read them as columns of a panel.
  bool down_by_tiles() const { return kTiled<P> && down_by_rows(); }
  bool gate_up_by_tiles() const { return kTiled<P> && gate_up_by_rows(); }

  Weight<T> transposed_down(int64_t expert) const { return expert_weight_t<T>(a.down, expert, a.output, a.inner); }
  Weight<T> transposed_gate_up(int64_t expert) const { return expert_weight_t<T>(a.gate_up, expert, a.wide(), a.hidden); }

  // Calls f(i, count) with own->buffers.c = the product of rows i .. i+count of a weight with the chunk, tokens as columns, for all
  // rows; or, where such a weight goes by rows, by_rows(i, count, c) with tokens as rows of kGroup values in c. before(i, end) comes
  // ahead of each piece of work.
  template <class Before, class F, class ByRows>
  void product(WorkQueue& queue, const Weight<T>& w, const Panel<P>& columns, const PackedRows<P>& rows, Before&& before, F&& f,
               ByRows&& by_rows) {
    if constexpr (kByRows<P>) {
      if (goes_by_rows<P>(w, columns.width))
        return shared_rows_product(queue, team, w, rows, columns, rows_memory, before, by_rows);
    }
    const int64_t c_stride = own->buffers.c_stride(buffers.chunk);
    queue.each(team, w.num_rows, kGroup, [&](int64_t i, int64_t end) {
      before(i, end);
      group_product(w, i, end - i, columns, own->buffers.c, c_stride, own->buffers.pack);
      f(i, end - i);
    });
  }

  // The part of a product that has tokens as rows, with tokens as columns in own->buffers.c.
  void transpose_product(const S* c, int64_t count, int64_t tokens) {
    transpose_tokens(c, kGroup, tokens, count, own->buffers.c, own->buffers.c_stride(buffers.chunk));
  }

  // The gradient through a product's update: scale · columns · b.
  void low_gradient(const ExpertUpdate& update, const Chunk& chunk, int64_t n, const Panel<P>& columns,
                    const LowRankPanels<P>& low, WorkQueue& queue) {
    const Weight<T> w = expert_weight_t<T>(update.b, chunk.expert, n, update.rank);
    S* save = nullptr;
    low_rank_rows(w, columns, update.scale, low, save, queue, team, own->buffers.c, own->buffers.c_stride(buffers.chunk),
                  own->buffers.pack);
    clock.lap(Stage::kLowRank);
    meet();
  }

  // dy · W2, then back through the activation.
  void through_activation(const Chunk& chunk) {
    for (WorkQueue* queue : {&buffers.output, &buffers.gate_up, &buffers.down, &buffers.up_low, &buffers.up_a, &buffers.up_b,
                             &buffers.down_a, &buffers.down_b}) {
      queue->restart(team);
    }
    if (!a.needs_dact() && !a.needs_act()) return;
    const int64_t c_stride = own->buffers.c_stride(buffers.chunk);
    const Weight<T> down = transposed_down(chunk.expert);
    const Weight<T> low_w = expert_weight_t<T>(a.down_update.a, chunk.expert, a.down_update.rank, a.inner);
    const auto activate = [&](int64_t i, int64_t count, const S* dact) {
      if (dact && a.down_update) group_product(low_w, i, count, down_low.c, own->buffers.c, c_stride, own->buffers.pack, true);
      if (dact) clock.lap(Stage::kDact);
      S* part = a.dweights ? buffers.dweight_parts + i / kGroup * buffers.chunk : nullptr;
      activation_gradient<T>(a, preact, act, i, count, dact, c_stride, own->rows.weight, part);
      clock.lap(Stage::kActivation);
      if (buffers.act_r) transpose_panel(act_r, act, i, i + count);
      if constexpr (!kSame) {
        if (buffers.act_t) pack_along_tokens(act_t, act, i, i + count);
      }
      clock.lap(Stage::kTranspose);
    };
    const auto with_dact = [&](int64_t i, int64_t count) { activate(i, count, own->buffers.c); };
    if (a.needs_dact()) {
      // The rows that the activation's gradient will read are fetched while the product is computed.
      const auto fetch_saved = [&](int64_t i, int64_t end) {
        if (!activation_by_rows) return;
        for (int64_t t = 0; t < chunk.size(); ++t) {
          for (int64_t half = 0; half < a.wide(); half += a.inner) {
            prefetch_lines<1, Fetch::kReadLater>(own->rows.row[t] + half + i, (end - i) * sizeof(T));
          }
        }
      };
      product(buffers.inner, down, dy_c, dy_rows, fetch_saved, with_dact, [&](int64_t i, int64_t count, const S* c) {
        if constexpr (kTiled<P>) {
          if (activation_by_rows) {
            clock.lap(Stage::kDact);
            S* part = a.dweights ? buffers.dweight_parts + i / kGroup * buffers.chunk : nullptr;
            activation_gradient_rows<T, P>(a, own->rows.row, preact_rows, act_r, i, count, c, own->rows.weight, part);
            return clock.lap(Stage::kActivation);
          }
        }
        transpose_product(c, count, chunk.size());
        with_dact(i, count);
      });
    } else {
      buffers.inner.each(team, a.inner, kGroup, [&](int64_t i, int64_t end) { activate(i, end - i, nullptr); });
    }
    if (a.dweights && a.down_bias && team.thread == team.size - 1) {
      weighted_rows(dy, a.down_bias, chunk.expert, buffers.dweight_parts + (a.inner + kGroup - 1) / kGroup * buffers.chunk);
    }
    if (a.dx) fetch_first_columns<P>(transposed_gate_up(chunk.expert), team, chunk.size());
  }

  // All sums over the chunk's rows, and dx.
  void gradients(const Chunk& chunk) {
    const int64_t m = chunk.size(), c_stride = own->buffers.c_stride(buffers.chunk), h = a.hidden, o = a.output, n = a.wide();
    buffers.inner.restart(team);
    buffers.down_low.restart(team);
    const auto add_dx = [&] {
      const Weight<T> low_w = expert_weight_t<T>(a.gate_up_update.a, chunk.expert, a.gate_up_update.rank, h);
      const Weight<T> gate_up = transposed_gate_up(chunk.expert);
      const auto fetch_sums = [&](int64_t i, int64_t end) {
        const int64_t count = std::min<int64_t>(kGroup, end - i);
        for (int64_t t = 0; t < m; ++t) prefetch_lines<1, Fetch::kWriteLater>(dx.at(own->rows.token[t], i), count * sizeof(S));
      };
      const auto add = [&](int64_t i, int64_t count) {
        if (a.gate_up_update) group_product(low_w, i, count, up_low.c, own->buffers.c, c_stride, own->buffers.pack, true);
        clock.lap(Stage::kDx);
        dx.add(own->buffers.c, c_stride, count, own->rows, m, false, i);
        clock.lap(Stage::kCombine);
      };
      const auto add_rows = [&](int64_t i, int64_t count, const S* c) {
        if (a.gate_up_update) {
          transpose_product(c, count, m);
          return add(i, count);
        }
        clock.lap(Stage::kDx);
        dx.add_rows(c, kGroup, count, own->rows, m, false, i);
        if (i + count < h) fetch_sums(i + count, h);
        clock.lap(Stage::kCombine);
      };
      product(buffers.output, gate_up, preact_c, preact_rows, fetch_sums, add, add_rows);
    };
    // Half of the threads begin with the weight gradients, since memory reads and writes at once faster than in turns.
    const bool dx_last = !kTiled<P> && team.thread % 2 == 1;
    if (a.dx && !dx_last) add_dx();
    if (a.dgate_up) {
      if (a.dgate_up.transposed) {
        weight_gradient(buffers.gate_up, x_t, preact_r, a.dgate_up, buffers.dgate_up_partial, chunk);
      } else {
        weight_gradient(buffers.gate_up, preact_t, x_r, a.dgate_up, buffers.dgate_up_partial, chunk);
      }
      clock.lap(Stage::kDgateUp);
    }
    if (a.ddown) {
      if (a.ddown.transposed) {
        weight_gradient(buffers.down, act_t, dy_r, a.ddown, buffers.ddown_partial, chunk);
      } else {
        weight_gradient(buffers.down, dy_t, act_r, a.ddown, buffers.ddown_partial, chunk);
      }
      clock.lap(Stage::kDdown);
    }
    if (a.dx && dx_last) add_dx();
    factor_gradients(a.dgate_up_update, chunk, up_low.t, x_r, preact_t, up_low_r, buffers.up_a, buffers.up_b,
                     buffers.up_update);
    factor_gradients(a.ddown_update, chunk, down_low.t, act_r, dy_t, down_low_r, buffers.down_a, buffers.down_b,
                     buffers.down_update);
    if (a.dgate_up_bias) {
      const auto mine = team.share(n, kGroup);
      sum_tokens(preact, static_cast<const S*>(nullptr), mine.begin, mine.end, chunk, bias_sums.get(),
                 static_cast<T*>(a.dgate_up_bias) + chunk.expert * n);
    }
    if (a.ddown_bias) {
      const auto mine = team.share(o, kGroup);
      sum_tokens(dy, own->rows.weight, mine.begin, mine.end, chunk, bias_sums.get() + n,
                 static_cast<T*>(a.ddown_bias) + chunk.expert * o);
    }
    if (a.dweights) sum_dweights(chunk);
    if (a.dgate_up_bias || a.ddown_bias || a.dweights) clock.lap(Stage::kSums);
  }

  void weight_gradient(WorkQueue& queue, const Panel<P>& columns, const RowPanel<P>& rows, const WeightGradient& gradient,
                       S* partial, const Chunk& chunk) {
    const bool whole = chunk.first && chunk.last;
    T* out = static_cast<T*>(gradient.base) + chunk.expert * columns.depth * rows.width;
    const bool past_caches = a.groups.num_experts * columns.depth * rows.width * static_cast<int64_t>(sizeof(T)) > kPastCaches;
    const GradientSink<T> sink{out, whole ? nullptr : partial, rows.width, rows.width, chunk.first, chunk.last, past_caches};
    const auto sum = [&](int64_t begin, int64_t end) { outer_product(columns, begin, end, rows, sink); };
    queue.each(team, columns.depth, kOuterRows<P>, sum, kTiled<P> ? 0 : 1);
    if (past_caches) order_streams();
  }

  // da = lowᵀ · rows and db = columnsᵀ · saved.
  void factor_gradients(const UpdateGradient& g, const Chunk& chunk, const Panel<P>& low, const RowPanel<P>& rows,
                        const Panel<P>& columns, const RowPanel<P>& saved, WorkQueue& a_queue, WorkQueue& b_queue,
                        const LowRankMemory<P>& memory) {
    if (g.da) factor_gradient(a_queue, team, kRankUnit, low, rows, g.da, a.factor_dtype, memory.a_partial, chunk);
    if (g.db) factor_gradient(b_queue, team, kGroup, columns, saved, g.db, a.factor_dtype, memory.b_partial, chunk);
    if (g) clock.lap(Stage::kLowRank);
  }

  void sum_dweights(const Chunk& chunk) {
    const int64_t parts = (a.inner + kGroup - 1) / kGroup + (a.down_bias ? 1 : 0);
    const auto mine = team.share(chunk.size());
    visit_float(a.dweights.dtype, [&](auto tag) {
      auto* out = static_cast<typename decltype(tag)::type*>(a.dweights.base);
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        S sum = 0;
        for (int64_t p = 0; p < parts; ++p) sum += buffers.dweight_parts[p * buffers.chunk + i];
        from_scalar(sum, out[a.groups.slots[chunk.begin + i]]);
      }
    });
  }

  const ExpertMlpBackwardArgs& a;
  Team team;
  StageClock clock;
  Arena arena;
  ExpertMlpBuffers<P> buffers;
  std::unique_ptr<ExpertMlpThread<T>> own;
  std::unique_ptr<S[]> bias_sums;
  RowsMemory<P> rows_memory;
  // Whether tokens stay in rows from one product to the next.
  bool activation_by_rows;
  TokenSums<T> dx;
  Panel<P> x_t, dy_c, dy_t, preact_c, preact_t, act_t;
  RowPanel<P> x_r, dy_r, preact_r, act_r;
  PackedRows<P> dy_rows, preact_rows;
  Panel<S> dy, preact, act;
  LowRankPanels<P> up_low, down_low;
  RowPanel<P> up_low_r, down_low_r;
};

void expert_mlp_backward(const ExpertMlpBackwardArgs& args, void* shared, int num_threads, Team team) {
  visit_values(args.dtype,
               [&](auto tag) { ExpertMlpBackward<typename decltype(tag)::type>(args, shared, num_threads, team).run(); });
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
