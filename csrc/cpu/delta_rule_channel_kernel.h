// The products within a chunk with one decay per key channel; see delta_rule_kernel.h.
//
// The decay from token j to token i of a later block is the product of three decays: from j to the end of its block, across the
// blocks between, and from the start of i's block. Each operand of a matrix product takes its own factor.
#pragma once

#include "cpu/delta_rule_tile_kernel.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// K̂, Q̂, K̃ and the total.
template <class S>
void decay_rows(const DeltaRuleArgs& a, const KeyChunk<S>& key, int64_t rows, const HeadChunk<S>& chunk) {
  constexpr int n = kLanes<S>;
  const int64_t keys = row_stride<S>(a.key_size);
  for (int64_t c = 0; c < whole_blocks(a.key_size); c += n) {
    Vec<S> product = splat(S{1});
    for (int64_t at = c; at < rows * keys; at += keys) {
      product *= load(chunk.decays + at);
      store(chunk.k_in + at, load(key.k + at) * product);
      store(chunk.q_in + at, load(key.q + at) * product);
    }
    store(chunk.total + c, product);
    product = splat(S{1});
    for (int64_t at = (rows - 1) * keys + c; at >= 0; at -= keys) {
      store(chunk.k_out + at, load(key.k + at) * product);
      product *= load(chunk.decays + at);
    }
  }
}

// The rows of a block times the decays from its start, including each token's own.
template <class S>
void decay_from_start(const S* decays, int64_t keys, int64_t size, const S* k, const S* q, S* k_to, S* q_to) {
  constexpr int n = kLanes<S>;
  for (int64_t c = 0; c < size; c += n) {
    Vec<S> product = splat(S{1});
    for (int64_t at = c; at < kSixteen * keys; at += keys) {
      product *= load(decays + at);
      store(k_to + at, load(k + at) * product);
      store(q_to + at, load(q + at) * product);
    }
  }
}

// The rows of a block times the decays to its end, excluding each token's own; then the decay across the block.
template <class S>
void decay_to_end(const S* decays, int64_t keys, int64_t size, const S* k, S* to, S* total) {
  constexpr int n = kLanes<S>;
  for (int64_t c = 0; c < size; c += n) {
    Vec<S> product = splat(S{1});
    for (int64_t at = (kSixteen - 1) * keys + c; at >= 0; at -= keys) {
      store(to + at, load(k + at) * product);
      product *= load(decays + at);
    }
    store(total + c, product);
  }
}

// L and P of a block with itself. Lanes are earlier tokens, whose keys decay from one row to the next.
template <class S>
void diagonal_block(const S* decays, const S* k, const S* q, int64_t keys, int64_t key_size, S* running, S* l, S* p) {
  constexpr int n = kLanes<S>, vectors = kSixteen / n;
  transpose_square(k, keys, kSixteen, whole_blocks(key_size), running, kSixteen);
  for (int i = 0; i < kSixteen; ++i) {
    Mask<S> earlier[vectors];
    for (int v = 0; v < vectors; ++v) {
      for (int j = 0; j < n; ++j) earlier[v][j] = v * n + j < i ? -1 : 0;
    }
    Vec<S> l_sum[2][vectors] = {}, p_sum[2][vectors] = {};
    const S *decay = decays + i * keys, *key = k + i * keys, *query = q + i * keys;
    const auto add = [&](int64_t d, int side) __attribute__((always_inline)) {
      for (int v = 0; v < vectors; ++v) {
        S* at = running + d * kSixteen + v * n;
        const Vec<S> decayed = load(at) * (earlier[v] ? splat(decay[d]) : splat(S{1}));
        store(at, decayed);
        l_sum[side][v] = fma(splat(key[d]), decayed, l_sum[side][v]);
        p_sum[side][v] = fma(splat(query[d]), decayed, p_sum[side][v]);
      }
    };
    int64_t d = 0;
    for (; d + 2 <= key_size; d += 2) {
      add(d, 0);
      add(d + 1, 1);
    }
    if (d < key_size) add(d, 0);
    for (int v = 0; v < vectors; ++v) {
      store(l + i * kTokenStride<S> + v * n, l_sum[0][v] + l_sum[1][v]);
      store(p + i * kTokenStride<S> + v * n, p_sum[0][v] + p_sum[1][v]);
    }
    for (int j = i; j < kSixteen; ++j) l[i * kTokenStride<S> + j] = S{0};
    for (int j = i + 1; j < kSixteen; ++j) p[i * kTokenStride<S> + j] = S{0};
  }
}

template <class S>
void decay_by_channel(const DeltaRuleArgs& a, const KeyChunk<S>& key, int64_t rows, HeadChunk<S>& chunk,
                      const DeltaScratch<S>& scratch) {
  constexpr int n = kLanes<S>;
  constexpr int64_t stride = kTokenStride<S>;
  const int64_t keys = row_stride<S>(a.key_size), size = whole_blocks(a.key_size);
  decay_rows(a, key, rows, chunk);
  S *left_q = scratch.left + kSixteen * keys, *block_total = scratch.block + kSixteen * keys;
  for (int64_t b = 0; b < rows; b += kSixteen) {
    const S *decays = chunk.decays + b * keys, *k = key.k + b * keys, *q = key.q + b * keys;
    diagonal_block(decays, k, q, keys, a.key_size, scratch.running, chunk.l + b * stride + b, chunk.p + b * stride + b);
    if (b > 0) {
      decay_from_start(decays, keys, size, k, q, scratch.left, left_q);
      state_product<false, Into::kSet>(scratch.left, keys, scratch.right, stride, kSixteen, a.key_size, b, chunk.l + b * stride,
                                       stride);
      state_product<false, Into::kSet>(left_q, keys, scratch.right, stride, kSixteen, a.key_size, b, chunk.p + b * stride,
                                       stride);
    }
    if (b + kSixteen == rows) break;
    decay_to_end(decays, keys, size, k, scratch.block, block_total);
    for (int64_t d = 0; d < a.key_size; ++d) {
      for (int64_t j = 0; j < b; j += n)
        store(scratch.right + d * stride + j, load(scratch.right + d * stride + j) * block_total[d]);
    }
    transpose_square(scratch.block, keys, kSixteen, size, scratch.right + b, stride);
  }
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
