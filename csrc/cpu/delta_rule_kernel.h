// The delta rule of one instruction set.
//
// A chunk of C tokens with keys K, queries Q and the state S before it is solved by
//   (I + diag(β) L) U = diag(β) (V − K̂ S),   O = Q̂ S + P U,   S' = Diag(total) S + K̃ᵀ U,
// where L = tril(KKᵀ ⊙ D, −1) and P = tril(QKᵀ ⊙ D), D holds the decays between two tokens, and K̂ and Q̂ are decayed from the
// start of the chunk, K̃ to its end. Decays are products of exponentials that are at most 1, never quotients. Every column of
// U, O and S is computed independently: results do not depend on how threads share the columns.
#pragma once

#include "cpu/delta_rule_channel_kernel.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// The rows of q or k, each divided by its norm and multiplied with `scale`; 1 over the norms.
template <class S>
void normalise_rows(S* x, int64_t stride, int64_t rows, int64_t size, bool l2norm, S scale, S* norms) {
  constexpr int n = kLanes<S>;
  for (int64_t t = 0; t < rows; ++t) {
    S* row = x + t * stride;
    S factor = scale;
    if (l2norm) {
      Vec<S> sum{};
      for (int64_t c = 0; c < size; c += n) sum = fma(load(row + c), load(row + c), sum);
      norms[t] = S{1} / std::sqrt(sum_lanes<S>(sum) + S(1e-6));
      factor = norms[t] * scale;
    }
    if (factor == S{1}) continue;
    for (int64_t c = 0; c < size; c += n) store(row + c, load(row + c) * factor);
  }
}

template <class T, class S>
void prepare_keys(const DeltaRuleArgs& a, const DeltaRuleUnit& unit, int64_t token, int64_t count, const KeyChunk<S>& chunk) {
  const int64_t keys = row_stride<S>(a.key_size), rows = whole_blocks(count);
  const auto load_head = [&](const HeadArray& x, S* to, S scale, S* norms) {
    const T* from =
        static_cast<const T*>(x.base) + unit.batch * x.batch_stride + token * x.token_stride + unit.key_head * x.head_stride;
    load_rows(from, x.token_stride, count, a.key_size, to, keys, rows);
    normalise_rows(to, keys, rows, a.key_size, a.l2norm, scale, norms);
  };
  load_head(a.k, chunk.k, S{1}, chunk.k_norm);
  load_head(a.q, chunk.q, static_cast<S>(a.scale), chunk.q_norm);
  if (a.decay == Gating::kByChannel) return;
  transpose_square(chunk.k, keys, rows, whole_blocks(a.key_size), chunk.kt, kTokenStride<S>);
  for (int64_t i = 0; i < rows; i += kSixteen) {
    const int64_t at = i * kTokenStride<S>;
    state_product<false, Into::kSet>(chunk.k + i * keys, keys, chunk.kt, kTokenStride<S>, kSixteen, a.key_size, i + kSixteen,
                                     chunk.kk + at, kTokenStride<S>);
    state_product<false, Into::kSet>(chunk.q + i * keys, keys, chunk.kt, kTokenStride<S>, kSixteen, a.key_size, i + kSixteen,
                                     chunk.qk + at, kTokenStride<S>);
  }
}

// β and the decays of a head's tokens; those past the last are 0 and 1.
template <class T, class S>
void load_gates(const DeltaRuleArgs& a, const DeltaRuleUnit& unit, int64_t head, int64_t token, int64_t count,
                const HeadChunk<S>& chunk) {
  constexpr int n = kLanes<S>;
  const int64_t rows = whole_blocks(count);
  with_rows<T>(a.beta, unit.batch, token, head, [&](const auto* from) {
    for (int64_t t = 0; t < rows; ++t)
      chunk.beta[t] = t < count ? static_cast<S>(to_scalar(from[t * a.beta.token_stride])) : S{0};
  });
  if (a.decay == Gating::kNone) {
    for (int64_t t = 0; t < rows; ++t) chunk.decays[t] = S{1};
    return;
  }
  const bool by_channel = a.decay == Gating::kByChannel;
  const DecayGate<S> gate = decay_gate_of<S>(a, head, by_channel ? a.key_size : 1);
  with_rows<T>(a.g, unit.batch, token, head, [&](const auto* from) {
    if (!by_channel) {
      for (int64_t t = 0; t < rows; ++t)
        chunk.decays[t] = t < count ? static_cast<S>(to_scalar(from[t * a.g.token_stride])) : S{0};
      const Vec<S> shift = splat(gate.bias ? *gate.bias : S{0});
      for (int64_t t = 0; t < rows; t += n) store(chunk.decays + t, gate.decay(load(chunk.decays + t), shift));
      for (int64_t t = 0; t < rows; ++t) chunk.decays[t] = t < count ? head_decay_of(chunk.decays[t]) : S{1};
      return;
    }
    const int64_t keys = row_stride<S>(a.key_size);
    load_rows(from, a.g.token_stride, count, a.key_size, chunk.decays, keys, rows);
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t c = 0; c < a.key_size; c += n) {
        S* at = chunk.decays + t * keys + c;
        const Vec<S> shift = gate.bias && t < count
                                 ? load_valid(gate.bias + c, static_cast<int>(std::min<int64_t>(n, a.key_size - c)))
                                 : Vec<S>{};
        store(at, t < count ? decay_of<S>(gate.decay(load(at), shift)) : splat(S{1}));
      }
    }
  });
}

// D, L, P, K̂, Q̂ and K̃ of a head with one decay a token.
template <class S>
void decay_by_head(const DeltaRuleArgs& a, const KeyChunk<S>& key, int64_t rows, HeadChunk<S>& chunk) {
  constexpr int n = kLanes<S>;
  constexpr int64_t stride = kTokenStride<S>;
  const int64_t keys = row_stride<S>(a.key_size);
  for (int64_t i = 0; i < rows; ++i) {
    S* d = chunk.between + i * stride;
    const int64_t last = i / kSixteen * kSixteen + kSixteen;
    for (int64_t j = 0; j < last; j += n) {
      const bool fresh = i == 0 || (i % kSixteen == 0 && j >= i);
      store(d + j, fresh ? Vec<S>{} : load(d - stride + j) * chunk.decays[i]);
    }
    d[i] = S{1};
    for (int64_t j = 0; j < last; j += n) {
      const int64_t at = i * stride + j;
      store(chunk.l + at, load(d + j) * load(key.kk + at));
      // Values above the diagonal would be 0 times a value that may overflow.
      store(chunk.p + at, load(d + j) * load(key.qk + at));
    }
    for (int64_t j = i + 1; j < last; ++j) chunk.l[i * stride + j] = chunk.p[i * stride + j] = S{0};
    chunk.l[i * stride + i] = S{0};
  }
  if (a.decay == Gating::kNone) {
    chunk.total[0] = S{1};
    return;
  }
  S product{1};
  const S* to_end = chunk.between + (rows - 1) * stride;
  for (int64_t t = 0; t < rows; ++t) {
    product *= chunk.decays[t];
    for (int64_t c = 0; c < whole_blocks(a.key_size); c += n) {
      const int64_t at = t * keys + c;
      store(chunk.k_in + at, load(key.k + at) * product);
      store(chunk.q_in + at, load(key.q + at) * product);
      store(chunk.k_out + at, load(key.k + at) * to_end[t]);
    }
  }
  chunk.total[0] = product;
}

// The inverses of the blocks of I + diag(β) L on its diagonal, by forward substitution.
template <class S>
void invert_blocks(int64_t rows, const HeadChunk<S>& chunk) {
  constexpr int n = kLanes<S>, vectors = kSixteen / n;
  for (int64_t b = 0; b < rows; b += kSixteen) {
    S* inverse = chunk.inverse + b * kSixteen;
    for (int i = 0; i < kSixteen; ++i) {
      Vec<S> row[vectors] = {};
      row[i / n][i % n] = S{1};
      const S* l = chunk.l + (b + i) * kTokenStride<S> + b;
      for (int j = 0; j < i; ++j) {
        const Vec<S> factor = splat(-chunk.beta[b + i] * l[j]);
        for (int v = 0; v < vectors; ++v) row[v] = fma(factor, load(inverse + j * kSixteen + v * n), row[v]);
      }
      for (int v = 0; v < vectors; ++v) store(inverse + i * kSixteen + v * n, row[v]);
    }
  }
}

// Columns [first, last) of Y, U, O and the state after a chunk; `first` is a multiple of whole vectors.
template <class T, class S>
void advance(const DeltaRuleArgs& a, const DeltaRuleUnit& unit, int64_t head, int64_t token, int64_t count,
             const HeadChunk<S>& chunk, int64_t first, int64_t last, const DeltaScratch<S>& scratch, bool outputs, S* next) {
  constexpr int n = kLanes<S>;
  const int64_t keys = row_stride<S>(a.key_size), values = row_stride<S>(a.value_size), rows = whole_blocks(count),
                columns = last - first;
  S *y = chunk.y + first, *u = chunk.u + first, *o = chunk.o + first, *temporary = scratch.rows + first;
  const S* state = chunk.state + first;
  // A block of the state's columns is used for keys and queries while it is in the first-level cache.
  for (int64_t c = 0; c < columns; c += GOSSAMER_TILE_VECTORS * n) {
    const int64_t width = std::min<int64_t>(GOSSAMER_TILE_VECTORS * n, columns - c);
    state_product<false, Into::kSet>(chunk.k_in, keys, state + c, values, rows, a.key_size, width, y + c, values);
    if (outputs) state_product<false, Into::kSet>(chunk.q_in, keys, state + c, values, rows, a.key_size, width, o + c, values);
  }
  const T* v = static_cast<const T*>(a.v.base) + unit.batch * a.v.batch_stride + token * a.v.token_stride +
               head * a.v.head_stride + first;
  const int64_t size = std::min(last, a.value_size) - first;
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t c = 0; c < columns; c += n) {
      const int64_t left = t < count ? size - c : 0;
      const T* from = v + t * a.v.token_stride + c;
      const Vec<S> value = left >= n ? load(from) : left > 0 ? load_some(from, static_cast<int>(left)) : Vec<S>{};
      store(y + t * values + c, value - load(y + t * values + c));
    }
  }
  for (int64_t b = 0; b < rows; b += kSixteen) {
    for (int64_t t = 0; t < kSixteen; ++t) {
      for (int64_t c = 0; c < columns; c += n) store(temporary + t * values + c, load(y + (b + t) * values + c));
    }
    if (b > 0)
      state_product<false, Into::kSubtract>(chunk.l + b * kTokenStride<S>, kTokenStride<S>, u, values, kSixteen, b, columns,
                                            temporary, values);
    for (int64_t t = 0; t < kSixteen; ++t) {
      for (int64_t c = 0; c < columns; c += n)
        store(temporary + t * values + c, load(temporary + t * values + c) * chunk.beta[b + t]);
    }
    state_product<false, Into::kSet>(chunk.inverse + b * kSixteen, kSixteen, temporary, values, kSixteen, kSixteen, columns,
                                     u + b * values, values);
  }
  if (outputs) {
    for (int64_t b = 0; b < rows; b += kSixteen) {
      state_product<false, Into::kAdd>(chunk.p + b * kTokenStride<S>, kTokenStride<S>, u, values, kSixteen, b + kSixteen,
                                       columns, o + b * values, values);
    }
    T* to =
        static_cast<T*>(a.o.base) + unit.batch * a.o.batch_stride + token * a.o.token_stride + head * a.o.head_stride + first;
    store_rows(o, values, count, size, to, a.o.token_stride);
  }
  if (next) {
    state_product<true, Into::kDecayed>(chunk.k_out, keys, u, values, whole_blocks(a.key_size), rows, columns, next + first,
                                        values, state, chunk.total, a.decay == Gating::kByChannel ? 1 : 0);
  }
}

// Copies the state of a sequence and head between memory and a buffer, whose rows and columns past the state's size are zero.
template <class S>
void load_state(const S* from, int64_t key_size, int64_t value_size, S* to) {
  const int64_t values = row_stride<S>(value_size), rows = whole_blocks(key_size);
  if (from == nullptr) {
    std::fill_n(to, rows * values, S{0});
    return;
  }
  load_rows(from, value_size, key_size, value_size, to, values, rows);
}
template <class S>
void store_state(const S* from, int64_t key_size, int64_t value_size, S* to) {
  store_rows(from, row_stride<S>(value_size), key_size, value_size, to, value_size);
}

template <class S>
GOSSAMER_INLINE auto state_at(S* states, const DeltaRuleArgs& a, int64_t row, int64_t head) {
  return states ? states + (row * a.heads + head) * a.key_size * a.value_size : nullptr;
}

// A team's share of a unit: as many pieces of columns as threads.
template <class S>
struct ColumnPieces {
  int64_t width, pieces;

  ColumnPieces(int64_t value_size, int64_t group, int team_size) {
    const int64_t blocks = whole_blocks(value_size) / kSixteen;
    const int64_t wanted = std::clamp<int64_t>((team_size + group - 1) / group, 1, blocks);
    const int64_t each = (blocks + wanted - 1) / wanted;
    width = each * kSixteen;
    pieces = (blocks + each - 1) / each;
  }
};

// The forward computation of chunks [first, last) of a unit, from the states before the first. A team's threads synchronise
// between stages.
template <class T, class S>
void forward_chunks(const DeltaRuleArgs& a, const DeltaRuleUnit& unit, int64_t first, int64_t last, DeltaRuleBuffers<S>& memory,
                    const DeltaScratch<S>& scratch, bool outputs, bool last_state, Team team, StageClock& clock) {
  const int64_t group = memory.group, chunks = last - first;
  const auto token_of = [&](int64_t c) { return unit.begin + (first + c) * kChunkTokens; };
  const auto count_of = [&](int64_t c) { return std::min(kChunkTokens, unit.end - token_of(c)); };
  for (int64_t c = team.thread; c < chunks; c += team.size) prepare_keys<T>(a, unit, token_of(c), count_of(c), memory.keys[c]);
  clock.lap(Stage::kKeys);
  team.barrier();
  for (int64_t i = team.thread; i < chunks * group; i += team.size) {
    const int64_t c = i / group, h = i % group, rows = whole_blocks(count_of(c));
    HeadChunk<S>& chunk = memory.head(h, c);
    load_gates<T>(a, unit, unit.key_head * group + h, token_of(c), count_of(c), chunk);
    if (a.decay == Gating::kByChannel) {
      decay_by_channel(a, memory.keys[c], rows, chunk, scratch);
    } else {
      decay_by_head(a, memory.keys[c], rows, chunk);
    }
    invert_blocks(rows, chunk);
  }
  clock.lap(Stage::kGates);
  team.barrier();
  // Each thread has its own views of the chunks, which may share the group's keys.
  const ColumnPieces<S> pieces(a.value_size, group, team.size);
  for (int64_t i = team.thread; i < group * pieces.pieces; i += team.size) {
    const int64_t h = i / pieces.pieces, begin = i % pieces.pieces * pieces.width;
    const int64_t end = std::min(begin + pieces.width, whole_blocks(a.value_size));
    for (int64_t c = 0; c < chunks; ++c) {
      HeadChunk<S> chunk = memory.head(h, c);
      chunk.take_keys(memory.keys[c], a.decay);
      chunk.state = memory.state(h, c);
      advance<T>(a, unit, unit.key_head * group + h, token_of(c), count_of(c), chunk, begin, end, scratch, outputs,
                 c + 1 < chunks || last_state ? memory.state(h, c + 1) : nullptr);
    }
  }
  clock.lap(Stage::kStates);
  team.barrier();
}

template <class T>
void delta_rule_unit(const DeltaRuleArgs& a, const DeltaRuleUnit& unit, DeltaRuleBuffers<Accumulator<T>>& memory,
                     const DeltaScratch<Accumulator<T>>& scratch, Team team, StageClock& clock) {
  using S = Accumulator<T>;
  const int64_t group = memory.group, num_chunks = (unit.end - unit.begin + kChunkTokens - 1) / kChunkTokens;
  const auto heads = [&](auto&& f) {
    for (int64_t h = team.thread; h < group; h += team.size) f(h, unit.key_head * group + h);
    team.barrier();
  };
  heads([&](int64_t h, int64_t head) {
    load_state(state_at(static_cast<const S*>(a.initial_state), a, unit.sequence, head), a.key_size, a.value_size,
               memory.state(h, 0));
  });
  for (int64_t first = 0; first < num_chunks; first += memory.chunks) {
    const int64_t last = std::min(first + memory.chunks, num_chunks);
    if (a.checkpoints && first % kSpanChunks == 0) {
      heads([&](int64_t h, int64_t head) {
        const int64_t row = unit.first_checkpoint + first / kSpanChunks;
        store_state(memory.state(h, 0), a.key_size, a.value_size, state_at(static_cast<S*>(a.checkpoints), a, row, head));
      });
    }
    forward_chunks<T>(a, unit, first, last, memory, scratch, true, last < num_chunks || a.final_state, team, clock);
    if (last < num_chunks || a.final_state) {
      for (int64_t h = 0; h < group; ++h)
        std::swap(memory.states[h * (memory.chunks + 1)], memory.states[h * (memory.chunks + 1) + last - first]);
    }
  }
  if (!a.final_state) return;
  heads([&](int64_t h, int64_t head) {
    store_state(memory.state(h, 0), a.key_size, a.value_size, state_at(static_cast<S*>(a.final_state), a, unit.sequence, head));
  });
}

// Calls f(unit, memory, scratch, scratch_arena, team, clock) for each unit: each thread alone with its own memory, or a whole
// team together.
template <class S, class F>
void for_units(const DeltaRuleArgs& a, bool backward, void* shared, int num_threads, Team team, F&& f) {
  StageClock clock(backward ? TimedKernel::kDeltaRuleBackward : TimedKernel::kDeltaRule, team.size);
  const bool together = shares_units(a, num_threads);
  const DeltaRuleLayout<S> layout(a, backward, num_threads);
  Arena arena(shared);
  WorkQueue queue(arena.take<std::atomic<int64_t>>(num_threads * WorkQueue::kStride));
  char* own = arena.take<char>(0);
  Arena memory_arena(own + (together ? 0 : team.thread * layout.memory));
  Arena scratch_arena(own + layout.memory * (together ? 1 : num_threads) + team.thread * layout.scratch);
  DeltaRuleBuffers<S> memory(memory_arena, a, layout.chunks, layout.gradient_chunks);
  const DeltaScratch<S> scratch(scratch_arena, a.key_size, a.value_size, a.decay);
  const int64_t units = a.num_sequences * a.key_heads;
  if (together) {
    for (int64_t i = 0; i < units; ++i) f(DeltaRuleUnit::of(a, i), memory, scratch, scratch_arena, team, clock);
    return;
  }
  queue.restart(team);
  team.barrier();
  queue.each(team, units, 1,
             [&](int64_t i, int64_t) { f(DeltaRuleUnit::of(a, i), memory, scratch, scratch_arena, Team{0, 1}, clock); });
}

void delta_rule(const DeltaRuleArgs& a, void* shared, int num_threads, Team team) {
  visit_float(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_units<Accumulator<T>>(a, false, shared, num_threads, team,
                              [&](const DeltaRuleUnit& unit, auto& memory, const auto& scratch, Arena, Team members,
                                  StageClock& clock) { delta_rule_unit<T>(a, unit, memory, scratch, members, clock); });
  });
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
