// The delta rule: for each head and token, S <- Diag(exp g) S; S += k β (v − Sᵀk)ᵀ; o = scale · Sᵀq.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "cpu/dtype.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/recorder.h"

namespace gossamer {

// An array of batches, tokens and heads, with strides in elements and contiguous channels.
struct HeadArray {
  void* base;
  int64_t batch_stride, token_stride, head_stride;
  DType dtype;

  explicit operator bool() const { return base != nullptr; }
};

enum class Gating { kNone, kByHead, kByChannel };

// Sums and states are of the accumulator's type, states contiguous.
struct DeltaRuleArgs {
  DType dtype;  // of q, k, v and o
  int64_t batch, tokens, key_heads, heads, key_size, value_size;
  // The starts of sequences among the tokens of a batch of one, and the end of the last; null if each batch is a sequence.
  const int64_t* bounds;
  int64_t num_sequences;
  HeadArray q, k, v, beta, g, o;  // g absent without a decay
  Gating decay;
  const void *a_log, *dt_bias;  // (heads,), and in the shape of g's channels, for a raw gate; else null
  bool sigmoid;
  double lower_bound;
  double scale;
  bool l2norm;
  const void* initial_state;  // (sequences, heads, key_size, value_size), null for zero
  void* final_state;          // null if not wanted
  void* checkpoints;          // (rows, heads, key_size, value_size), null if not wanted
};

struct DeltaRuleBackwardArgs : DeltaRuleArgs {
  HeadArray d_o;
  const void* dfinal_state;         // null for zero
  HeadArray dq, dk, dv, dbeta, dg;  // dg of the accumulator's type, with respect to log decays; absent if unwanted
  void* dinitial_state;             // null if unwanted
};

// Converts dg to the gradient of a raw gate, and computes da_log and ddt_bias, the gradients of its parameters.
struct GateBackwardArgs {
  DType sums;  // the accumulator's
  int64_t batch, tokens, heads, channels;
  HeadArray g, dg;
  const void *a_log, *dt_bias;
  bool sigmoid;
  double lower_bound;
  void *da_log, *ddt_bias;  // ddt_bias null without dt_bias
};

// Number of tokens of a chunk, and of a block within a chunk.
constexpr int64_t kChunkTokens = 64, kBlockTokens = 16;
// Number of chunks between the states that the forward pass saves for the backward pass.
constexpr int64_t kSpanChunks = 4;

// A key head of a sequence; one thread or one team computes its value heads.
struct DeltaRuleUnit {
  int64_t sequence, key_head, batch, begin, end, first_checkpoint;

  static DeltaRuleUnit of(const DeltaRuleArgs& a, int64_t index) {
    constexpr int64_t span = kSpanChunks * kChunkTokens;
    DeltaRuleUnit u{index / a.key_heads, index % a.key_heads, 0, 0, a.tokens, 0};
    if (a.bounds) {
      u.begin = a.bounds[u.sequence];
      u.end = a.bounds[u.sequence + 1];
      u.first_checkpoint = u.begin / span + u.sequence;
    } else {
      u.batch = u.sequence;
      u.first_checkpoint = u.sequence * ((a.tokens + span - 1) / span);
    }
    return u;
  }
};

// Whether the threads of a team share each unit, because units are fewer than threads.
inline bool shares_units(const DeltaRuleArgs& a, int num_threads) {
  return num_threads > 1 && a.num_sequences * a.key_heads < num_threads;
}

// Rows and columns of buffers are padded to 16, a vector of every instruction set.
constexpr int64_t kSixteen = 16;
constexpr int64_t whole_blocks(int64_t n) { return (n + kSixteen - 1) / kSixteen * kSixteen; }

// The stride of rows: an odd number of 64-byte lines, so that rows do not all map to the same sets of the first-level cache.
template <class S>
constexpr int64_t row_stride(int64_t size) {
  constexpr int64_t line = 64 / sizeof(S);
  return (whole_blocks(size) / line | 1) * line;
}
template <class S>
constexpr int64_t kTokenStride = row_stride<S>(kChunkTokens);

// The tokens of a key head: normalised keys and scaled queries, and their products.
template <class S>
struct KeyChunk {
  S *k, *q;            // (64, key stride)
  S* kt;               // (key size, token stride): the keys as columns
  S *kk, *qk;          // (64, token stride) each, in blocks up to the diagonal
  S *k_norm, *q_norm;  // 1 over the norms

  KeyChunk(Arena& arena, int64_t key_size) {
    const int64_t stride = row_stride<S>(key_size);
    k = arena.take<S>(kChunkTokens * stride);
    q = arena.take<S>(kChunkTokens * stride);
    kt = arena.take<S>(whole_blocks(key_size) * kTokenStride<S>);
    kk = arena.take<S>(kChunkTokens * kTokenStride<S>);
    qk = arena.take<S>(kChunkTokens * kTokenStride<S>);
    k_norm = arena.take<S>(kChunkTokens);
    q_norm = arena.take<S>(kChunkTokens);
  }
};

// The tokens of a head.
template <class S>
struct HeadChunk {
  S* beta;                 // (64,)
  S* decays;               // exp g: (64,), or (64, key stride)
  S *k_in, *q_in, *k_out;  // K̂, Q̂ and K̃
  S* total;                // one value per head, or one per row with channel decays
  S *between, *l, *p;      // D of heads, L and P (64, token stride)
  S* inverse;              // of I + diag(β) L: its blocks of 16 on the diagonal
  S *y, *o, *u;            // V − K̂ S, O and U (64, value stride)
  S* state = nullptr;      // before the chunk (key size, value stride)

  HeadChunk(Arena& arena, int64_t key_size, int64_t value_size, Gating decay) {
    const int64_t keys = row_stride<S>(key_size), values = row_stride<S>(value_size);
    beta = arena.take<S>(kChunkTokens);
    decays = arena.take<S>(kChunkTokens * (decay == Gating::kByChannel ? keys : 1));
    total = arena.take<S>(keys);
    if (decay != Gating::kNone) {
      k_in = arena.take<S>(kChunkTokens * keys);
      q_in = arena.take<S>(kChunkTokens * keys);
      k_out = arena.take<S>(kChunkTokens * keys);
    }
    if (decay != Gating::kByChannel) between = arena.take<S>(kChunkTokens * kTokenStride<S>);
    l = arena.take<S>(kChunkTokens * kTokenStride<S>);
    p = arena.take<S>(kChunkTokens * kTokenStride<S>);
    inverse = arena.take<S>(kChunkTokens * kSixteen);
    y = arena.take<S>(kChunkTokens * values);
    o = arena.take<S>(kChunkTokens * values);
    u = arena.take<S>(kChunkTokens * values);
  }

  // Without decays the chunk's keys and queries are those of the group.
  void take_keys(const KeyChunk<S>& key, Gating decay) {
    if (decay != Gating::kNone) return;
    k_in = k_out = key.k;
    q_in = key.q;
  }
};

// A thread's additional memory.
template <class S>
struct DeltaScratch {
  S* rows;     // (16, value stride)
  S* left;     // (32, key stride): keys and queries of a block, decayed from its start
  S* right;    // (key size, token stride): keys before a block, decayed to its start, as columns
  S* running;  // (key size, 16)
  S* block;    // (17, key stride): keys of a block, decayed to its end, and the decay over it
  DeltaScratch(Arena& arena, int64_t key_size, int64_t value_size, Gating decay) {
    const int64_t keys = row_stride<S>(key_size);
    rows = arena.take<S>(kSixteen * row_stride<S>(value_size));
    if (decay == Gating::kByChannel) {
      left = arena.take<S>(2 * kSixteen * keys);
      right = arena.take<S>(whole_blocks(key_size) * kTokenStride<S>);
      running = arena.take<S>(whole_blocks(key_size) * kSixteen);
      block = arena.take<S>((kSixteen + 1) * keys);
    }
  }
};

// Additional data of a head's chunk for the backward pass.
template <class S>
struct HeadChunkGradient {
  S *d_o, *g, *beta_g;  // (64, value stride); g is the gradient of diag(β) (V − K̂ S)

  HeadChunkGradient(Arena& arena, int64_t value_size) {
    const int64_t values = row_stride<S>(value_size);
    d_o = arena.take<S>(kChunkTokens * values);
    beta_g = arena.take<S>(kChunkTokens * values);
    g = arena.take<S>(kChunkTokens * values);
  }
};

// A thread's memory for turning these into gradients of the arguments.
template <class S>
struct GradientScratch {
  S *state_t, *dstate_t;        // (value size, key stride)
  S* u_t;                       // (value size, or 64 rows, token stride)
  S *dp, *h;                    // (64, token stride)
  S *dk_in, *dq_in, *dk_out;    // (64, key stride)
  S *dq, *dk;                   // sums over the heads of a group
  S *row_k, *column_k, *row_q;  // of channels: gradients of keys and queries by the products within the chunk
  S* from_start;                // (64, key stride) decays from the start of a block
  S* to_end;                    // and to its end
  S* block_total;               // (4, key stride)
  S *dg, *dbeta;                // (64,) or (64, key stride)

  GradientScratch(Arena& arena, int64_t key_size, int64_t value_size, Gating decay) {
    const int64_t keys = row_stride<S>(key_size), values = whole_blocks(value_size);
    state_t = arena.take<S>(values * keys);
    dstate_t = arena.take<S>(values * keys);
    u_t = arena.take<S>(std::max(values, kChunkTokens) * kTokenStride<S>);
    dp = arena.take<S>(kChunkTokens * kTokenStride<S>);
    h = arena.take<S>(kChunkTokens * kTokenStride<S>);
    for (S** rows : {&dk_in, &dq_in, &dk_out, &dq, &dk}) *rows = arena.take<S>(kChunkTokens * keys);
    if (decay == Gating::kByChannel) {
      for (S** rows : {&row_k, &column_k, &row_q, &from_start, &to_end}) *rows = arena.take<S>(kChunkTokens * keys);
      block_total = arena.take<S>(kChunkTokens / kSixteen * keys);
    }
    dg = arena.take<S>(kChunkTokens * (decay == Gating::kByChannel ? keys : 1));
    dbeta = arena.take<S>(kChunkTokens);
  }
};

// The memory of a thread, or of a team that shares each unit: the chunks of a span, head after head.
template <class S>
struct DeltaRuleBuffers {
  int64_t group, chunks;  // heads of a key head; chunks that are in memory at a time
  std::vector<KeyChunk<S>> keys;
  std::vector<HeadChunk<S>> heads;
  std::vector<HeadChunkGradient<S>> gradients;
  std::vector<S*> states;   // of a head, before each chunk of the span and after the last: chunks + 1
  std::vector<S*> dstates;  // as many, or two used alternately
  int64_t dstate_turns = 0;

  DeltaRuleBuffers(Arena& arena, const DeltaRuleArgs& a, int64_t chunks_, int64_t gradient_chunks)
      : group(a.heads / a.key_heads), chunks(chunks_) {
    const int64_t state_size = whole_blocks(a.key_size) * row_stride<S>(a.value_size);
    for (int64_t c = 0; c < chunks; ++c) keys.emplace_back(arena, a.key_size);
    for (int64_t i = 0; i < group * chunks; ++i) heads.emplace_back(arena, a.key_size, a.value_size, a.decay);
    for (int64_t i = 0; i < group * (chunks + 1); ++i) states.push_back(arena.take<S>(state_size));
    if (gradient_chunks == 0) return;
    for (int64_t i = 0; i < group * gradient_chunks; ++i) gradients.emplace_back(arena, a.value_size);
    dstate_turns = gradient_chunks + 1;
    for (int64_t i = 0; i < group * dstate_turns; ++i) dstates.push_back(arena.take<S>(state_size));
  }

  HeadChunk<S>& head(int64_t h, int64_t chunk) { return heads[h * chunks + chunk]; }
  S* state(int64_t h, int64_t chunk) { return states[h * (chunks + 1) + chunk]; }
  HeadChunkGradient<S>& gradient(int64_t h, int64_t chunk) {
    return gradients[h * (dstate_turns - 1) + chunk % (dstate_turns - 1)];
  }
  S* dstate(int64_t h, int64_t chunk) { return dstates[h * dstate_turns + chunk % dstate_turns]; }
};

// Bytes of the memory of each thread or team, and of what each thread needs for itself.
template <class S>
struct DeltaRuleLayout {
  int64_t chunks, gradient_chunks;
  size_t memory, scratch;

  DeltaRuleLayout(const DeltaRuleArgs& a, bool backward, int num_threads) {
    const bool together = shares_units(a, num_threads);
    chunks = together || backward ? kSpanChunks : 1;
    gradient_chunks = !backward ? 0 : together ? kSpanChunks : 1;
    Arena plan, own;
    DeltaRuleBuffers<S>(plan, a, chunks, gradient_chunks);
    DeltaScratch<S>(own, a.key_size, a.value_size, a.decay);
    if (backward) GradientScratch<S>(own, a.key_size, a.value_size, a.decay);
    memory = plan.used();
    scratch = own.used();
  }
  size_t bytes(const DeltaRuleArgs& a, int num_threads) const {
    Arena queue;
    queue.take<std::atomic<int64_t>>(num_threads * WorkQueue::kStride);
    return queue.used() + memory * (shares_units(a, num_threads) ? 1 : num_threads) + scratch * num_threads;
  }
};

void delta_rule(const DeltaRuleArgs& args, int num_threads);
void delta_rule_backward(const DeltaRuleBackwardArgs& args, int num_threads);
// One token of each batch; final_state, which is initial_state, changes in place.
void delta_rule_step(const DeltaRuleArgs& args, int num_threads);
void gate_backward(const GateBackwardArgs& args, int num_threads);

}  // namespace gossamer
