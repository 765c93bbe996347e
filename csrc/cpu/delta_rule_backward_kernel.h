// Gradients of the delta rule; each span of chunks first repeats the stages of delta_rule_kernel.h.
//
// From dS' after a chunk and dO:
//   dU = Pᵀ dO + K̃ dS',   G = (I + diag(β) L)⁻ᵀ dU,   dS = Diag(total) dS' + Q̂ᵀ dO − K̂ᵀ diag(β) G,   dV = diag(β) G,
//   dP = tril(dO Uᵀ),   dL = −diag(β) tril(G Uᵀ, −1),   dβ = rowsum(G ⊙ (V − K̂ S − L U)),
//   dQ̂ = dO Sᵀ,   dK̂ = −diag(β) G Sᵀ,   dK̃ = U dS'ᵀ.
// The gradient of a log decay sums the gradients of all decays that contain it: from earlier to later tokens, from the start of
// the chunk, to its end, and over the whole chunk.
#pragma once

#include "cpu/delta_rule_kernel.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Columns [first, last) of G, diag(β) G, dV and the gradient of the state before a chunk, from the gradient of the state after
// it.
template <class T, class S>
void retreat(const DeltaRuleBackwardArgs& a, const DeltaRuleUnit& unit, int64_t head, int64_t token, int64_t count,
             const HeadChunk<S>& chunk, const HeadChunkGradient<S>& gradient, int64_t first, int64_t last,
             const DeltaScratch<S>& scratch, const S* dstate, S* before) {
  constexpr int n = kLanes<S>;
  constexpr int64_t stride = kTokenStride<S>;
  const int64_t keys = row_stride<S>(a.key_size), values = row_stride<S>(a.value_size), rows = whole_blocks(count),
                columns = last - first;
  S *d_o = gradient.d_o + first, *g = gradient.g + first, *beta_g = gradient.beta_g + first, *temporary = scratch.rows + first;
  const int64_t size = std::min(last, a.value_size) - first;
  const T* from = static_cast<const T*>(a.d_o.base) + unit.batch * a.d_o.batch_stride + token * a.d_o.token_stride +
                  head * a.d_o.head_stride + first;
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t c = 0; c < columns; c += n) {
      const int64_t left = t < count ? size - c : 0;
      const T* at = from + t * a.d_o.token_stride + c;
      store(d_o + t * values + c, left >= n ? load(at) : left > 0 ? load_some(at, static_cast<int>(left)) : Vec<S>{});
    }
  }
  for (int64_t b = 0; b < rows; b += kSixteen) {
    state_product<true, Into::kSet>(chunk.p + b * stride + b, stride, d_o + b * values, values, kSixteen, rows - b, columns,
                                    g + b * values, values);
  }
  state_product<false, Into::kAdd>(chunk.k_out, keys, dstate + first, values, rows, a.key_size, columns, g, values);
  for (int64_t b = rows - kSixteen; b >= 0; b -= kSixteen) {
    for (int64_t t = 0; t < kSixteen; ++t) {
      for (int64_t c = 0; c < columns; c += n) store(temporary + t * values + c, load(g + (b + t) * values + c));
    }
    const int64_t later = b + kSixteen;
    if (later < rows) {
      state_product<true, Into::kSubtract>(chunk.l + later * stride + b, stride, beta_g + later * values, values, kSixteen,
                                           rows - later, columns, temporary, values);
    }
    state_product<true, Into::kSet>(chunk.inverse + b * kSixteen, kSixteen, temporary, values, kSixteen, kSixteen, columns,
                                    g + b * values, values);
    for (int64_t t = b; t < later; ++t) {
      for (int64_t c = 0; c < columns; c += n) store(beta_g + t * values + c, load(g + t * values + c) * chunk.beta[t]);
    }
  }
  if (a.dv) {
    T* to = static_cast<T*>(a.dv.base) + unit.batch * a.dv.batch_stride + token * a.dv.token_stride + head * a.dv.head_stride +
            first;
    store_rows(beta_g, values, count, size, to, a.dv.token_stride);
  }
  if (before == nullptr) return;
  const int64_t state_rows = whole_blocks(a.key_size);
  state_product<true, Into::kDecayed>(chunk.q_in, keys, d_o, values, state_rows, rows, columns, before + first, values,
                                      dstate + first, chunk.total, a.decay == Gating::kByChannel ? 1 : 0);
  state_product<true, Into::kSubtract>(chunk.k_in, keys, beta_g, values, state_rows, rows, columns, before + first, values);
}

template <class S>
GOSSAMER_INLINE S dot(const S* a, const S* b, int64_t size) {
  constexpr int n = kLanes<S>;
  Vec<S> sum{};
  for (int64_t c = 0; c < size; c += n) sum = fma(load(a + c), load(b + c), sum);
  return sum_lanes<S>(sum);
}

// The gradients of keys, queries and decays through L, P, K̂, Q̂ and K̃ with one decay per token. s.h holds the sums G Uᵀ.
template <class S>
void gradients_by_head(const DeltaRuleArgs& a, const KeyChunk<S>& key, const HeadChunk<S>& chunk, const S* dstate, int64_t rows,
                       const GradientScratch<S>& s) {
  constexpr int n = kLanes<S>;
  constexpr int64_t stride = kTokenStride<S>;
  const int64_t keys = row_stride<S>(a.key_size), values = row_stride<S>(a.value_size), size = whole_blocks(a.key_size);
  const bool gated = a.decay != Gating::kNone;
  // X(i, j), the gradient through the decay from j to i, stored in s.u_t, which is no longer needed.
  S* flow = s.u_t;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t last = i / kSixteen * kSixteen + kSixteen;
    const Vec<S> beta = splat(-chunk.beta[i]);
    for (int64_t j = 0; j < last; j += n) {
      const int64_t at = i * stride + j;
      const Vec<S> dp = load(s.dp + at), dl = load(s.h + at) * beta, between = load(chunk.between + at);
      if (gated) store(flow + at, dp * load(chunk.p + at) + dl * load(chunk.l + at));
      store(s.dp + at, dp * between);
      store(s.h + at, dl * between);
    }
    for (int64_t j = i; j < last; ++j) s.h[i * stride + j] = S{0};
  }
  for (int64_t b = 0; b < rows; b += kSixteen) {
    const int64_t at = b * keys, later = rows - b;
    state_product<false, Into::kAdd>(s.dp + b * stride, stride, key.k, keys, kSixteen, b + kSixteen, size, s.dq + at, keys);
    state_product<false, Into::kAdd>(s.h + b * stride, stride, key.k, keys, kSixteen, b + kSixteen, size, s.dk + at, keys);
    state_product<true, Into::kAdd>(s.dp + b * stride + b, stride, key.q + at, keys, kSixteen, later, size, s.dk + at, keys);
    state_product<true, Into::kAdd>(s.h + b * stride + b, stride, key.k + at, keys, kSixteen, later, size, s.dk + at, keys);
  }
  S product{1}, total{0};
  S from_start[kChunkTokens], to_end[kChunkTokens];
  for (int64_t t = 0; t < rows; ++t) {
    product *= chunk.decays[t];
    const S last = chunk.between[(rows - 1) * stride + t];
    S *dq = s.dq + t * keys, *dk = s.dk + t * keys;
    const S *dq_in = s.dq_in + t * keys, *dk_in = s.dk_in + t * keys, *dk_out = s.dk_out + t * keys;
    for (int64_t c = 0; c < size; c += n) {
      store(dq + c, fma(load(dq_in + c), splat(product), load(dq + c)));
      store(dk + c, fma(load(dk_in + c), splat(product), fma(load(dk_out + c), splat(last), load(dk + c))));
    }
    if (gated) {
      from_start[t] = dot(chunk.q_in + t * keys, dq_in, size) + dot(chunk.k_in + t * keys, dk_in, size);
      to_end[t] = dot(chunk.k_out + t * keys, dk_out, size);
    }
  }
  if (!gated) return;
  for (int64_t d = 0; d < a.key_size; ++d)
    total += dot(chunk.state + d * values, dstate + d * values, whole_blocks(a.value_size));
  total *= chunk.total[0];
  // Sums over later i for each j; the sums for j before t belong to the decay of t.
  Vec<S> below[kChunkTokens / n] = {};
  S earlier{0}, later{0};
  for (int64_t t = 0; t < rows; ++t) s.dg[t] = total + (earlier += t > 0 ? to_end[t - 1] : S{0});
  for (int64_t t = rows - 1; t >= 0; --t) {
    const int64_t last = t / kSixteen * kSixteen + kSixteen;
    for (int64_t j = 0; j < last; j += n) below[j / n] += load(flow + t * stride + j);
    S between{0};
    S lanes[kChunkTokens];
    for (int64_t j = 0; j < last; j += n) store(lanes + j, below[j / n]);
    for (int64_t j = 0; j < t; ++j) between += lanes[j];
    s.dg[t] += (later += from_start[t]) + between;
  }
}

// The same with one decay per channel.
template <class S>
void gradients_by_channel(const DeltaRuleArgs& a, const KeyChunk<S>& key, const HeadChunk<S>& chunk, const S* dstate,
                          int64_t rows, const DeltaScratch<S>& scratch, const GradientScratch<S>& s) {
  constexpr int n = kLanes<S>;
  constexpr int64_t stride = kTokenStride<S>;
  const int64_t keys = row_stride<S>(a.key_size), values = row_stride<S>(a.value_size), size = whole_blocks(a.key_size);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t last = i / kSixteen * kSixteen + kSixteen;
    for (int64_t j = 0; j < last; j += n) store(s.h + i * stride + j, load(s.h + i * stride + j) * splat(-chunk.beta[i]));
    for (int64_t j = i; j < last; ++j) s.h[i * stride + j] = S{0};
  }
  for (S* sums : {s.row_q, s.row_k, s.column_k}) std::fill_n(sums, rows * keys, S{0});
  // Earlier blocks, by products: s.to_end holds their keys decayed to the start of the current block.
  for (int64_t b = 0; b < rows; b += kSixteen) {
    const S* decays = chunk.decays + b * keys;
    if (b > 0) {
      state_product<false, Into::kSet>(s.dp + b * stride, stride, s.to_end, keys, kSixteen, b, size, s.row_q + b * keys, keys);
      state_product<false, Into::kSet>(s.h + b * stride, stride, s.to_end, keys, kSixteen, b, size, s.row_k + b * keys, keys);
      for (int64_t c = 0; c < size; c += n) {
        Vec<S> product = splat(S{1});
        for (int64_t t = b; t < b + kSixteen; ++t) {
          const int64_t at = t * keys + c;
          product *= load(chunk.decays + at);
          store(s.row_q + at, load(s.row_q + at) * product);
          store(s.row_k + at, load(s.row_k + at) * product);
        }
      }
    }
    S* total = s.block_total + b / kSixteen * keys;
    decay_to_end(decays, keys, size, key.k + b * keys, s.to_end + b * keys, total);
    for (int64_t t = 0; t < b; ++t) {
      for (int64_t c = 0; c < size; c += n) store(s.to_end + t * keys + c, load(s.to_end + t * keys + c) * load(total + c));
    }
  }
  // Later blocks, the last first: column_k sums the gradients at the start of the current block, and s.dg those across a block,
  // from earlier to later ones.
  S* left_q = scratch.left + kSixteen * keys;
  std::fill_n(s.dg, rows * keys, S{0});
  for (int64_t b = rows - kSixteen; b > 0; b -= kSixteen) {
    const S* total = s.block_total + b / kSixteen * keys;
    if (b + kSixteen < rows) {
      for (int64_t c = 0; c < size; c += n) {
        Vec<S> over{};
        for (int64_t block = 0; block < b; block += kSixteen) {
          over *= block > 0 ? load(s.block_total + block / kSixteen * keys + c) : Vec<S>{};
          Vec<S> product = splat(S{1});
          for (int64_t at = (block + kSixteen - 1) * keys + c; at >= block * keys; at -= keys) {
            const Vec<S> column = load(s.column_k + at) * load(total + c);
            store(s.column_k + at, column);
            over = fma(load(key.k + at) * product, column, over);
            product *= load(chunk.decays + at);
          }
        }
        for (int64_t t = b; t < b + kSixteen; ++t) store(s.dg + t * keys + c, over);
      }
    }
    decay_from_start(chunk.decays + b * keys, keys, size, key.k + b * keys, key.q + b * keys, scratch.left, left_q);
    state_product<true, Into::kAdd>(s.dp + b * stride, stride, left_q, keys, b, kSixteen, size, s.column_k, keys);
    state_product<true, Into::kAdd>(s.h + b * stride, stride, scratch.left, keys, b, kSixteen, size, s.column_k, keys);
    for (int64_t c = 0; c < size; c += n) {
      Vec<S> product = splat(S{1});
      for (int64_t t = b - 1; t >= b - kSixteen; --t) {
        const int64_t at = t * keys + c;
        store(s.column_k + at, load(s.column_k + at) * product);
        product *= load(chunk.decays + at);
      }
    }
  }
  // The block with itself: lanes are channels.
  for (int64_t b = 0; b < rows; b += kSixteen) {
    for (int64_t c = 0; c < size; c += n) {
      const int64_t start = b * keys + c;
      Vec<S> flow[kSixteen][kSixteen], from_later[kSixteen] = {}, later{}, earlier{};
      for (int64_t t = kSixteen - 1; t >= 0; --t) {
        const int64_t at = start + t * keys;
        later += load(key.q + at) * load(s.row_q + at) + load(key.k + at) * load(s.row_k + at);
        store(s.dg + at, load(s.dg + at) + later);
      }
      for (int64_t t = 0; t < kSixteen; ++t) {
        const int64_t at = start + t * keys;
        store(s.dg + at, load(s.dg + at) + earlier);
        earlier = fma(load(key.k + at), load(s.column_k + at), earlier);
      }
      for (int64_t j = 0; j < kSixteen; ++j) {
        const Vec<S> k = load(key.k + start + j * keys);
        Vec<S> decay = splat(S{1}), sum{};
        for (int64_t i = j + 1; i < kSixteen; ++i) {
          const int64_t at = start + i * keys, pair = (b + i) * stride + b + j;
          decay *= load(chunk.decays + at);
          const Vec<S> decayed = k * decay, dp = splat(s.dp[pair]), dl = splat(s.h[pair]);
          store(s.row_q + at, fma(dp, decayed, load(s.row_q + at)));
          store(s.row_k + at, fma(dl, decayed, load(s.row_k + at)));
          const Vec<S> back = fma(dp, load(key.q + at), dl * load(key.k + at));
          sum = fma(decay, back, sum);
          flow[i][j] = decayed * back;
        }
        store(s.column_k + start + j * keys, load(s.column_k + start + j * keys) + sum);
      }
      for (int64_t t = kSixteen - 1; t > 0; --t) {
        Vec<S> sum{};
        for (int64_t j = 0; j < t; ++j) {
          from_later[j] += flow[t][j];
          sum += from_later[j];
        }
        store(s.dg + start + t * keys, load(s.dg + start + t * keys) + sum);
      }
    }
  }
  for (int64_t c = 0; c < size; c += n) {
    // The gradient across the whole chunk belongs to all decays, and the gradient to its end to the decays after a token.
    Vec<S> earlier{};
    for (int lane = 0; lane < n; ++lane) {
      const int64_t d = c + lane;
      if (d < a.key_size)
        earlier[lane] = chunk.total[d] * dot(chunk.state + d * values, dstate + d * values, whole_blocks(a.value_size));
    }
    for (int64_t t = 0; t < rows; ++t) {
      const int64_t at = t * keys + c;
      store(s.dg + at, load(s.dg + at) + earlier);
      earlier = fma(load(chunk.k_out + at), load(s.dk_out + at), earlier);
    }
    Vec<S> start{}, product = splat(S{1});
    for (int64_t t = rows - 1; t >= 0; --t) {
      const int64_t at = t * keys + c;
      start += load(chunk.q_in + at) * load(s.dq_in + at) + load(chunk.k_in + at) * load(s.dk_in + at);
      store(s.dg + at, load(s.dg + at) + start);
    }
    Vec<S> to_end[kChunkTokens];
    for (int64_t t = rows - 1; t >= 0; --t) {
      to_end[t] = product;
      product *= load(chunk.decays + t * keys + c);
    }
    product = splat(S{1});
    for (int64_t t = 0; t < rows; ++t) {
      const int64_t at = t * keys + c;
      product *= load(chunk.decays + at);
      const Vec<S> dp = splat(s.dp[t * stride + t]);
      store(s.dq + at, load(s.dq + at) + fma(load(s.dq_in + at), product, fma(dp, load(key.k + at), load(s.row_q + at))));
      const Vec<S> inner = fma(dp, load(key.q + at), load(s.row_k + at) + load(s.column_k + at));
      store(s.dk + at, load(s.dk + at) + fma(load(s.dk_in + at), product, fma(load(s.dk_out + at), to_end[t], inner)));
    }
  }
}

// The gradient of a row before it was divided by its norm and multiplied with `scale`, from that of the result.
template <class S>
void unnormalise_rows(S* d, const S* x, int64_t stride, int64_t rows, int64_t size, bool l2norm, S scale, const S* norms) {
  constexpr int n = kLanes<S>;
  for (int64_t t = 0; t < rows; ++t) {
    S* dx = d + t * stride;
    const S* row = x + t * stride;
    // x holds the scaled row: x̂ = x / scale, and d x̂ = scale · dx.
    const S along = l2norm && scale != S{0} ? dot(row, dx, size) / scale : S{0};
    const S factor = l2norm ? norms[t] : S{1};
    for (int64_t c = 0; c < size; c += n) store(dx + c, (load(dx + c) * scale - load(row + c) * along) * factor);
  }
}

// Gradients of a chunk's arguments except v, for the heads of the group one after another.
template <class T, class S>
void chunk_gradients(const DeltaRuleBackwardArgs& a, const DeltaRuleUnit& unit, int64_t token, int64_t count, int64_t c,
                     DeltaRuleBuffers<S>& memory, const DeltaScratch<S>& scratch, const GradientScratch<S>& s) {
  constexpr int64_t stride = kTokenStride<S>;
  const int64_t keys = row_stride<S>(a.key_size), values = row_stride<S>(a.value_size), rows = whole_blocks(count);
  const int64_t key_size = whole_blocks(a.key_size), value_size = whole_blocks(a.value_size);
  const KeyChunk<S>& key = memory.keys[c];
  std::fill_n(s.dq, rows * keys, S{0});
  std::fill_n(s.dk, rows * keys, S{0});
  for (int64_t h = 0; h < memory.group; ++h) {
    const int64_t head = unit.key_head * memory.group + h;
    HeadChunk<S> chunk = memory.head(h, c);
    chunk.take_keys(key, a.decay);
    chunk.state = memory.state(h, c);
    const HeadChunkGradient<S>& gradient = memory.gradient(h, c);
    const S* dstate = memory.dstate(h, c + 1);
    transpose_square(chunk.u, values, rows, value_size, s.u_t, stride);
    for (int64_t b = 0; b < rows; b += kSixteen) {
      const int64_t at = b * stride;
      state_product<false, Into::kSet>(gradient.d_o + b * values, values, s.u_t, stride, kSixteen, a.value_size, b + kSixteen,
                                       s.dp + at, stride);
      state_product<false, Into::kSet>(gradient.g + b * values, values, s.u_t, stride, kSixteen, a.value_size, b + kSixteen,
                                       s.h + at, stride);
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = i + 1; j < i / kSixteen * kSixteen + kSixteen; ++j) s.dp[i * stride + j] = S{0};
      S sum = dot(gradient.g + i * values, chunk.y + i * values, value_size);
      for (int64_t j = 0; j < i; ++j) sum -= s.h[i * stride + j] * chunk.l[i * stride + j];
      s.dbeta[i] = sum;
    }
    transpose_square(chunk.state, values, whole_blocks(a.key_size), value_size, s.state_t, keys);
    transpose_square(dstate, values, whole_blocks(a.key_size), value_size, s.dstate_t, keys);
    state_product<false, Into::kSet>(gradient.d_o, values, s.state_t, keys, rows, a.value_size, key_size, s.dq_in, keys);
    std::fill_n(s.dk_in, rows * keys, S{0});
    state_product<false, Into::kSubtract>(gradient.beta_g, values, s.state_t, keys, rows, a.value_size, key_size, s.dk_in,
                                          keys);
    state_product<false, Into::kSet>(chunk.u, values, s.dstate_t, keys, rows, a.value_size, key_size, s.dk_out, keys);
    if (a.decay == Gating::kByChannel) {
      gradients_by_channel(a, key, chunk, dstate, rows, scratch, s);
    } else {
      gradients_by_head(a, key, chunk, dstate, rows, s);
    }
    if (a.dbeta) {
      with_rows<T>(a.dbeta, unit.batch, token, head, [&](auto* to) {
        for (int64_t t = 0; t < count; ++t) from_scalar(s.dbeta[t], to[t * a.dbeta.token_stride]);
      });
    }
    if (a.dg) {
      S* to = static_cast<S*>(a.dg.base) + unit.batch * a.dg.batch_stride + token * a.dg.token_stride + head * a.dg.head_stride;
      if (a.decay == Gating::kByChannel) {
        store_rows(s.dg, keys, count, a.key_size, to, a.dg.token_stride);
      } else {
        for (int64_t t = 0; t < count; ++t) to[t * a.dg.token_stride] = s.dg[t];
      }
    }
  }
  const auto finish = [&](const HeadArray& out, S* d, const S* x, S scale, const S* norms) {
    if (!out) return;
    unnormalise_rows(d, x, keys, rows, key_size, a.l2norm, scale, norms);
    T* to =
        static_cast<T*>(out.base) + unit.batch * out.batch_stride + token * out.token_stride + unit.key_head * out.head_stride;
    store_rows(d, keys, count, a.key_size, to, out.token_stride);
  };
  finish(a.dq, s.dq, key.q, static_cast<S>(a.scale), key.q_norm);
  finish(a.dk, s.dk, key.k, S{1}, key.k_norm);
}

template <class T>
void delta_rule_backward_unit(const DeltaRuleBackwardArgs& a, const DeltaRuleUnit& unit,
                              DeltaRuleBuffers<Accumulator<T>>& memory, const DeltaScratch<Accumulator<T>>& scratch,
                              const GradientScratch<Accumulator<T>>& gradients, Team team, StageClock& clock) {
  using S = Accumulator<T>;
  const int64_t group = memory.group, num_chunks = (unit.end - unit.begin + kChunkTokens - 1) / kChunkTokens;
  const int64_t turns = memory.dstate_turns, whole = whole_blocks(a.value_size);
  const auto heads = [&](auto&& f) {
    for (int64_t h = team.thread; h < group; h += team.size) f(h, unit.key_head * group + h);
    team.barrier();
  };
  const ColumnPieces<S> pieces(a.value_size, group, team.size);
  const int64_t behind = num_chunks > 0 ? (num_chunks - 1) % kSpanChunks + 1 : 0;
  heads([&](int64_t h, int64_t head) {
    load_state(state_at(static_cast<const S*>(a.dfinal_state), a, unit.sequence, head), a.key_size, a.value_size,
               memory.dstate(h, behind));
  });
  for (int64_t first = (num_chunks - 1) / kSpanChunks * kSpanChunks; first >= 0 && num_chunks > 0; first -= kSpanChunks) {
    const int64_t last = std::min(first + kSpanChunks, num_chunks), chunks = last - first;
    const auto token_of = [&](int64_t c) { return unit.begin + (first + c) * kChunkTokens; };
    const auto count_of = [&](int64_t c) { return std::min(kChunkTokens, unit.end - token_of(c)); };
    // The gradient of the state after this span is that of the state before the previously processed span.
    for (int64_t h = 0; h < (last < num_chunks ? group : 0); ++h)
      std::swap(memory.dstates[h * turns], memory.dstates[h * turns + kSpanChunks % turns]);
    heads([&](int64_t h, int64_t head) {
      const int64_t row = unit.first_checkpoint + first / kSpanChunks;
      load_state(state_at(static_cast<const S*>(a.checkpoints), a, row, head), a.key_size, a.value_size, memory.state(h, 0));
    });
    forward_chunks<T>(a, unit, first, last, memory, scratch, false, false, team, clock);
    const auto back = [&](int64_t h, int64_t c, int64_t begin, int64_t end) {
      HeadChunk<S> chunk = memory.head(h, c);
      chunk.take_keys(memory.keys[c], a.decay);
      retreat<T>(a, unit, unit.key_head * group + h, token_of(c), count_of(c), chunk, memory.gradient(h, c), begin, end,
                 scratch, memory.dstate(h, c + 1), first + c > 0 || a.dinitial_state ? memory.dstate(h, c) : nullptr);
    };
    if (team.size == 1) {
      for (int64_t c = chunks - 1; c >= 0; --c) {
        for (int64_t h = 0; h < group; ++h) back(h, c, 0, whole);
        clock.lap(Stage::kDstates);
        chunk_gradients<T>(a, unit, token_of(c), count_of(c), c, memory, scratch, gradients);
        clock.lap(Stage::kGradients);
      }
      continue;
    }
    for (int64_t i = team.thread; i < group * pieces.pieces; i += team.size) {
      const int64_t begin = i % pieces.pieces * pieces.width;
      for (int64_t c = chunks - 1; c >= 0; --c) back(i / pieces.pieces, c, begin, std::min(begin + pieces.width, whole));
    }
    clock.lap(Stage::kDstates);
    team.barrier();
    for (int64_t c = team.thread; c < chunks; c += team.size) {
      chunk_gradients<T>(a, unit, token_of(c), count_of(c), c, memory, scratch, gradients);
    }
    clock.lap(Stage::kGradients);
    team.barrier();
  }
  if (!a.dinitial_state) return;
  heads([&](int64_t h, int64_t head) {
    store_state(memory.dstate(h, 0), a.key_size, a.value_size,
                state_at(static_cast<S*>(a.dinitial_state), a, unit.sequence, head));
  });
}

void delta_rule_backward(const DeltaRuleBackwardArgs& a, void* shared, int num_threads, Team team) {
  visit_float(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using S = Accumulator<T>;
    for_units<S>(
        a, true, shared, num_threads, team,
        [&](const DeltaRuleUnit& unit, auto& memory, const auto& scratch, Arena& arena, Team members, StageClock& clock) {
          Arena own = arena;
          const GradientScratch<S> gradients(own, a.key_size, a.value_size, a.decay);
          delta_rule_backward_unit<T>(a, unit, memory, scratch, gradients, members, clock);
        });
  });
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
