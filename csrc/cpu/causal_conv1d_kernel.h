// Depthwise causal convolution for one instruction set. Two layouts have separate kernels: vectors of channels, with rows of
// positions, and vectors of positions, with one row per channel.
#pragma once

#include "cpu/activation_kernel.h"
#include "cpu/causal_conv1d.h"
#include "cpu/panel.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

constexpr int kMostHalo = kMostTaps - 1;
// Number of positions that are computed together and share inputs.
constexpr int kConvTogether = 4;
// Number of positions after which sums over positions are added to the tile's sums.
constexpr int64_t kConvChain = 32;

// u·σ(u), and its derivative times `slope`.
template <class S>
GOSSAMER_INLINE Vec<S> silu(Vec<S> u) {
  return u * logistic<S>(u).value;
}
template <class S>
GOSSAMER_INLINE Vec<S> silu_slope(Vec<S> u) {
  const auto [sigma, rest] = logistic<S>(u);
  return sigma * (S{1} + u * rest);
}

// Taps and bias of a block of channels in the accumulator's type, taps[i][c].
template <class S>
struct ConvWeights {
  alignas(64) S taps[kMostTaps][kConvChannels];
  alignas(64) S bias[kConvChannels];

  ConvWeights(const CausalConvArgs& a, int64_t first_channel, int64_t channels) {
    visit_float(a.weight.dtype, [&](auto tag) {
      const auto* from = static_cast<const typename decltype(tag)::type*>(a.weight.base);
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t i = 0; i < a.taps; ++i) {
          taps[i][c] = to_scalar(from[(first_channel + c) * a.weight.row_stride + i * a.weight.col_stride]);
        }
      }
    });
    for (int64_t c = 0; c < channels; ++c) bias[c] = a.bias ? static_cast<S>(a.bias.at(0, first_channel + c)) : S{0};
  }
};

// The input at a position before a sequence's first.
template <class T>
GOSSAMER_INLINE T before_first(const CausalConvArgs& a, int64_t n, int64_t c, int64_t position) {
  return a.initial_state ? a.initial_state.at<T>(n, c, a.state_size + position) : T{};
}

// The inputs of a block of channels by position; positions before the start of a sequence come from its initial state.
template <class T>
struct ConvRowsOf {
  alignas(64) T halo[kMostHalo][kConvChannels];
  const T* base;
  int64_t stride;

  void start(const CausalConvArgs& a, int64_t n, int64_t first, int64_t first_channel, int64_t channels) {
    base = a.sequence<const T>(a.x, n) + first_channel;
    stride = a.x.strides[1];
    for (int64_t p = first - (a.taps - 1); p < 0; ++p) {
      for (int64_t c = 0; c < channels; ++c) halo[p + kMostHalo][c] = before_first<T>(a, n, first_channel + c, p);
    }
  }

  const T* operator[](int64_t position) const { return position < 0 ? halo[position + kMostHalo] : base + position * stride; }
};

// Calls f(channel, valid lanes) for the vectors of a block of channels.
template <class S, class F>
GOSSAMER_INLINE void for_lanes(int64_t channels, F&& f) {
  constexpr int n = kLanes<S>;
  int64_t c = 0;
  for (; c + n <= channels; c += n) f(c, std::integral_constant<int, n>{});
  if (c < channels) f(c, static_cast<int>(channels - c));
}

// The number of taps as a constant if it is common in models, or 0.
template <class F>
void visit_taps(int64_t taps, F&& f) {
  if (taps == 3) return f(std::integral_constant<int, 3>{});
  if (taps == 4) return f(std::integral_constant<int, 4>{});
  f(std::integral_constant<int, 0>{});
}

// kRows consecutive outputs, from the inputs in[0] .. in[taps - 1 + kRows - 1], oldest first.
template <int kTaps, int kRows, class T, class S>
void conv_rows(const ConvWeights<S>& w, int64_t taps, bool with_silu, const T* const* in, T* const* out, int64_t channels) {
  const int count = kTaps ? kTaps : static_cast<int>(taps);
  for_lanes<S>(channels, [&](int64_t c, auto valid) {
    Vec<S> x[(kTaps ? kTaps : kMostTaps) - 1 + kRows];
    for (int i = 0; i < count - 1 + kRows; ++i) x[i] = load_valid(in[i] + c, valid);
    Vec<S> sum[kRows];
    for (int r = 0; r < kRows; ++r) sum[r] = load(w.bias + c);
    for (int i = 0; i < count; ++i) {
      const Vec<S> tap = load(w.taps[i] + c);
      for (int r = 0; r < kRows; ++r) sum[r] = fma(tap, x[i + r], sum[r]);
    }
    for (int r = 0; r < kRows; ++r) store_valid(out[r] + c, with_silu ? silu<S>(sum[r]) : sum[r], valid);
  });
}

template <int kTaps, class T>
void conv_along_channels(const CausalConvForwardArgs& a, Team::Range rows, int64_t first_channel, int64_t channels) {
  using S = Accumulator<T>;
  const ConvWeights<S> w(a, first_channel, channels);
  ConvRowsOf<T> x;
  const int64_t halo = a.taps - 1;
  a.sequences.each_piece(rows.begin, rows.end, [&](int64_t n, int64_t first, int64_t last) {
    x.start(a, n, first, first_channel, channels);
    T* y = a.sequence<T>(a.y, n) + first_channel;
    const auto compute = [&](auto together, int64_t p) {
      const T* in[kMostHalo + together];
      T* out[together];
      for (int64_t i = 0; i < halo + together; ++i) in[i] = x[p - halo + i];
      for (int r = 0; r < together; ++r) out[r] = y + (p + r) * a.y.strides[1];
      conv_rows<kTaps, together>(w, a.taps, a.silu, in, out, channels);
    };
    int64_t p = first;
    for (; p + kConvTogether <= last; p += kConvTogether) compute(std::integral_constant<int, kConvTogether>{}, p);
    for (; p < last; ++p) compute(std::integral_constant<int, 1>{}, p);
  });
}

// Inputs of a channel at consecutive positions, in the accumulator's type; whole vectors may be loaded at any position.
template <class S>
using ConvLine = S[kMostHalo + kConvRows + kMostHalo + 64 / sizeof(S)];

// Positions [first, last) of a channel, whose position 0 is at `from`.
template <class T, class S>
void load_line(const CausalConvArgs& a, const T* from, int64_t n, int64_t c, int64_t first, int64_t last, S* to) {
  int64_t p = first;
  for (; p < std::min<int64_t>(last, 0); ++p) to[p - first] = to_scalar(before_first<T>(a, n, c, p));
  for_lanes<S>(last - p, [&](int64_t i, auto valid) { store(to + p - first + i, load_valid(from + p + i, valid)); });
}

// The sums before the activation at line[taps - 1 + i] and on.
template <class S>
GOSSAMER_INLINE Vec<S> conv_line(const ConvWeights<S>& w, int64_t taps, int64_t c, const S* line, int64_t i) {
  Vec<S> sum = splat(w.bias[c]);
  for (int64_t j = 0; j < taps; ++j) sum = fma(splat(w.taps[j][c]), load(line + i + j), sum);
  return sum;
}

template <class T>
void conv_along_positions(const CausalConvForwardArgs& a, Team::Range rows, int64_t first_channel, int64_t channels) {
  using S = Accumulator<T>;
  const ConvWeights<S> w(a, first_channel, channels);
  alignas(64) ConvLine<S> line = {};
  a.sequences.each_piece(rows.begin, rows.end, [&](int64_t n, int64_t begin, int64_t end) {
    for (int64_t c = 0; c < channels; ++c) {
      const T* x = a.sequence<const T>(a.x, n) + (first_channel + c) * a.x.strides[2];
      T* y = a.sequence<T>(a.y, n) + (first_channel + c) * a.y.strides[2];
      for (int64_t first = begin; first < end; first += kConvRows) {
        const int64_t last = std::min(end, first + kConvRows);
        load_line(a, x, n, first_channel + c, first - (a.taps - 1), last, line);
        for_lanes<S>(last - first, [&](int64_t i, auto valid) {
          const Vec<S> sum = conv_line(w, a.taps, c, line, i);
          store_valid(y + first + i, a.silu ? silu<S>(sum) : sum, valid);
        });
      }
    }
  });
}

// Calls f(first channel, channels) for the blocks of a range of channels.
template <class F>
void for_channel_blocks(Team::Range channels, F&& f) {
  for (int64_t c = channels.begin; c < channels.end; c += kConvChannels) f(c, std::min(kConvChannels, channels.end - c));
}

void causal_conv1d(const CausalConvForwardArgs& a, Team::Range rows, Team::Range channels) {
  visit_float(a.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_channel_blocks(channels, [&](int64_t first, int64_t count) {
      if (!a.along_channels()) return conv_along_positions<T>(a, rows, first, count);
      visit_taps(a.taps, [&](auto taps) { conv_along_channels<taps, T>(a, rows, first, count); });
    });
  });
}

// Sums over a tile's rows of the gradients of taps and bias, [i][c]; the bias comes after the taps.
template <class S>
using ConvSums = S[kMostTaps + 1][kConvChannels];

// One step of the backward pass: computes kRows gradients of the sums before the activation, from dy (null for zeros, past a
// sequence's end), and as many gradients of the inputs `taps - 1` positions earlier, where `dx` is not null.
template <class T>
struct ConvStepBack {
  const T *const *x, *const *dy;
  T* const* dx;
  bool counted;  // in the sums of taps and bias
};

// `carried` holds the gradients of the sums before the activation at the `taps - 1` positions before, oldest first.
template <int kTaps, int kRows, class T, class S>
void conv_rows_back(const ConvWeights<S>& w, int64_t taps, bool with_silu, const ConvStepBack<T>& step,
                    S (*carried)[kConvChannels], S (*sums)[kConvChannels], int64_t channels) {
  const int count = kTaps ? kTaps : static_cast<int>(taps), halo = count - 1;
  constexpr int kMost = (kTaps ? kTaps : kMostTaps) - 1 + kRows;
  for_lanes<S>(channels, [&](int64_t c, auto valid) {
    Vec<S> d[kMost];  // carried, then new
    for (int i = 0; i < halo; ++i) d[i] = load(carried[i] + c);
    if (step.dy[0] == nullptr) {
      for (int r = 0; r < kRows; ++r) d[halo + r] = Vec<S>{};
    } else {
      Vec<S> x[kMost];
      for (int i = 0; i < halo + kRows; ++i) x[i] = load_valid(step.x[i] + c, valid);
      for (int r = 0; r < kRows; ++r) d[halo + r] = load_valid(step.dy[r] + c, valid);
      if (with_silu) {
        Vec<S> sum[kRows];
        for (int r = 0; r < kRows; ++r) sum[r] = load(w.bias + c);
        for (int i = 0; i < count; ++i) {
          const Vec<S> tap = load(w.taps[i] + c);
          for (int r = 0; r < kRows; ++r) sum[r] = fma(tap, x[i + r], sum[r]);
        }
        for (int r = 0; r < kRows; ++r) d[halo + r] *= silu_slope<S>(sum[r]);
      }
      if (step.counted) {
        for (int i = 0; i < count; ++i) {
          Vec<S> total = d[halo] * x[i];
          for (int r = 1; r < kRows; ++r) total = fma(d[halo + r], x[i + r], total);
          store(sums[i] + c, load(sums[i] + c) + total);
        }
        Vec<S> total = d[halo];
        for (int r = 1; r < kRows; ++r) total += d[halo + r];
        store(sums[count] + c, load(sums[count] + c) + total);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      if (step.dx[r] == nullptr) continue;
      Vec<S> total{};
      for (int i = 0; i < count; ++i) total = fma(load(w.taps[i] + c), d[r + halo - i], total);
      store_valid(step.dx[r] + c, total, valid);
    }
    for (int i = 0; i < halo; ++i) store(carried[i] + c, d[kRows + i]);
  });
}

// The final state's part of the gradients of a sequence's last inputs.
template <class T>
void add_final_state(const CausalConvBackwardArgs& a, int64_t n, Team::Range positions, int64_t first_channel,
                     int64_t channels) {
  if (!a.dfinal_state || !a.dx) return;
  const int64_t before = a.sequences.size(n) - a.state_size;
  T* dx = a.sequence<T>(a.dx, n);
  for (int64_t p = std::max(positions.begin, before); p < positions.end; ++p) {
    for (int64_t c = first_channel; c < first_channel + channels; ++c) {
      T& out = dx[p * a.dx.strides[1] + c * a.dx.strides[2]];
      from_scalar(to_scalar(out) + to_scalar(a.dfinal_state.at<T>(n, c, p - before)), out);
    }
  }
}

// The gradient of a sequence's initial state: `halo(position, channel)` from the sums, plus the final state's part.
template <class T, class F>
void store_dinitial(const CausalConvBackwardArgs& a, int64_t n, int64_t first_channel, int64_t channels, F&& halo) {
  const int64_t size = a.state_size, length = a.sequences.size(n);
  for (int64_t c = first_channel; c < first_channel + channels; ++c) {
    for (int64_t j = 0; j < size; ++j) {
      Accumulator<T> value = length > 0 && j >= size - (a.taps - 1) ? halo(j - size, c - first_channel) : 0;
      if (a.dfinal_state && j >= length) value += to_scalar(a.dfinal_state.at<T>(n, c, j - length));
      from_scalar(value, a.dinitial_state.at<T>(n, c, j));
    }
  }
}

template <int kTaps, class T>
void conv_back_along_channels(const CausalConvBackwardArgs& a, Team::Range rows, int64_t first_channel, int64_t channels,
                              ConvSums<Accumulator<T>>& sums) {
  using S = Accumulator<T>;
  const ConvWeights<S> w(a, first_channel, channels);
  ConvRowsOf<T> x;
  alignas(64) S carried[kMostHalo][kConvChannels];
  alignas(64) ConvSums<S> recent;
  for (auto& row : recent) std::fill_n(row, channels, S{});
  // Added in two levels, because a chain of additions as long as a tile would round more than torch does.
  const auto collect = [&] {
    for (int64_t i = 0; i <= a.taps; ++i) {
      for_lanes<S>(channels, [&](int64_t c, auto) {
        store(sums[i] + c, load(sums[i] + c) + load(recent[i] + c));
        store(recent[i] + c, Vec<S>{});
      });
    }
  };
  alignas(64) T dhalo[kMostHalo][kConvChannels];
  const int64_t halo = a.taps - 1;
  a.sequences.each_piece(rows.begin, rows.end, [&](int64_t n, int64_t first, int64_t last) {
    const bool from_state = first == 0 && a.dinitial_state;
    if (!from_state && !a.dx && !a.dweight && !a.dbias) return;
    x.start(a, n, first, first_channel, channels);
    const T* dy = a.sequence<const T>(a.dy, n) + first_channel;
    T* dx = a.dx ? a.sequence<T>(a.dx, n) + first_channel : nullptr;
    const int64_t size = a.sequences.size(n);
    for (auto& row : carried) std::fill_n(row, channels, S{});
    const auto compute = [&](auto together, int64_t p, bool counted) {
      const T *in[kMostHalo + together], *d[together];
      T* out[together];
      for (int64_t i = 0; i < halo + together; ++i) in[i] = p < size ? x[p - halo + i] : nullptr;
      for (int r = 0; r < together; ++r) {
        d[r] = p < size ? dy + (p + r) * a.dy.strides[1] : nullptr;
        const int64_t to = p + r - halo;
        out[r] = to < 0              ? (from_state ? dhalo[to + kMostHalo] : nullptr)
                 : to < first || !dx ? nullptr
                                     : dx + to * a.dx.strides[1];
      }
      conv_rows_back<kTaps, together>(w, a.taps, a.silu, ConvStepBack<T>{in, d, out, counted}, carried, recent, channels);
    };
    int64_t p = first;
    for (; p + kConvTogether <= last; p += kConvTogether) {
      compute(std::integral_constant<int, kConvTogether>{}, p, true);
      if ((p - first) % kConvChain == 0) collect();
    }
    for (; p < last; ++p) compute(std::integral_constant<int, 1>{}, p, true);
    collect();
    // The last inputs of the piece also contribute to sums after it, which are counted there.
    if (a.dx || from_state) {
      for (; p < last + halo; ++p) compute(std::integral_constant<int, 1>{}, p, false);
    }
    add_final_state<T>(a, n, {first, last}, first_channel, channels);
    if (from_state) {
      store_dinitial<T>(a, n, first_channel, channels,
                        [&](int64_t position, int64_t c) { return to_scalar(dhalo[position + kMostHalo][c]); });
    }
  });
}

template <class T>
void conv_back_along_positions(const CausalConvBackwardArgs& a, Team::Range rows, int64_t first_channel, int64_t channels,
                               ConvSums<Accumulator<T>>& sums) {
  using S = Accumulator<T>;
  const ConvWeights<S> w(a, first_channel, channels);
  alignas(64) ConvLine<S> line = {}, d = {};
  const int64_t halo = a.taps - 1;
  a.sequences.each_piece(rows.begin, rows.end, [&](int64_t n, int64_t first, int64_t last) {
    const int64_t size = a.sequences.size(n), end = std::min(size, last + halo);
    T dhalo[kMostHalo][kConvChannels];
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t channel = first_channel + c;
      load_line(a, a.sequence<const T>(a.x, n) + channel * a.x.strides[2], n, channel, first - halo, end, line);
      // Gradients of the sums at positions [first, end), and zeros past the end.
      load_line(a, a.sequence<const T>(a.dy, n) + channel * a.dy.strides[2], n, channel, first, end, d);
      if (a.silu) {
        for_lanes<S>(end - first,
                     [&](int64_t i, auto) { store(d + i, load(d + i) * silu_slope<S>(conv_line(w, a.taps, c, line, i))); });
      }
      for (int64_t i = end - first; i < last - first + halo; ++i) d[i] = 0;
      if (a.dweight || a.dbias) {
        for (int64_t j = 0; j <= a.taps; ++j) {
          Vec<S> total{};
          for_lanes<S>(last - first, [&](int64_t i, auto valid) {
            const Vec<S> part = load_valid(d + i, valid);
            total = j < a.taps ? fma(part, load_valid(line + i + j, valid), total) : total + part;
          });
          sums[j][c] += sum_lanes<S>(total);
        }
      }
      if (a.dx) {
        T* dx = a.sequence<T>(a.dx, n) + channel * a.dx.strides[2];
        for_lanes<S>(last - first, [&](int64_t i, auto valid) {
          Vec<S> total{};
          for (int64_t j = 0; j < a.taps; ++j) total = fma(splat(w.taps[j][c]), load(d + i + halo - j), total);
          store_valid(dx + first + i, total, valid);
        });
      }
      if (first == 0 && a.dinitial_state) {
        for (int64_t p = -halo; p < 0; ++p) {
          S total{};
          for (int64_t j = 0; j <= p + halo; ++j) total += w.taps[j][c] * d[p + halo - j];
          from_scalar(total, dhalo[p + kMostHalo][c]);
        }
      }
    }
    add_final_state<T>(a, n, {first, last}, first_channel, channels);
    if (first == 0 && a.dinitial_state) {
      store_dinitial<T>(a, n, first_channel, channels,
                        [&](int64_t position, int64_t c) { return to_scalar(dhalo[position + kMostHalo][c]); });
    }
  });
}

// Adds up the tiles' sums of channels in the tiles' order.
template <class S>
void store_conv_sums(const CausalConvBackwardArgs& a, const S* partial, Team::Range channels) {
  const int64_t tiles = a.row_tiles();
  const auto total = [&](int64_t i, int64_t c) {
    double sum = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) sum += partial[(tile * (a.taps + 1) + i) * a.channels + c];
    return static_cast<S>(sum);
  };
  const auto store_to = [&](const FloatMatrix& out, int64_t row, int64_t column, S value) {
    visit_float(out.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      from_scalar(static_cast<Accumulator<T>>(value),
                  static_cast<T*>(out.base)[row * out.row_stride + column * out.col_stride]);
    });
  };
  for (int64_t c = channels.begin; c < channels.end; ++c) {
    if (a.dweight) {
      for (int64_t i = 0; i < a.taps; ++i) store_to(a.dweight, c, i, total(i, c));
    }
    if (a.dbias) store_to(a.dbias, 0, c, total(a.taps, c));
  }
}

void causal_conv1d_backward(const CausalConvBackwardArgs& a, void* partial, Team team) {
  visit_float(a.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using S = Accumulator<T>;
    const int64_t blocks = a.channel_blocks();
    const auto [begin, end] = team.share(a.row_tiles() * blocks);
    alignas(64) ConvSums<S> sums;
    for (int64_t at = begin; at < end; ++at) {
      const int64_t tile = at / blocks, first = at % blocks * kConvChannels,
                    channels = std::min(kConvChannels, a.channels - first);
      const Team::Range rows{tile * kConvRows, std::min(a.rows(), (tile + 1) * kConvRows)};
      for (auto& row : sums) std::fill_n(row, channels, S{});
      if (a.along_channels()) {
        visit_taps(a.taps, [&](auto taps) { conv_back_along_channels<taps, T>(a, rows, first, channels, sums); });
      } else {
        conv_back_along_positions<T>(a, rows, first, channels, sums);
      }
      if (partial == nullptr) continue;
      for (int64_t i = 0; i <= a.taps; ++i) {
        std::copy_n(sums[i], channels, static_cast<S*>(partial) + (tile * (a.taps + 1) + i) * a.channels + first);
      }
    }
    // Sequences without positions, which are in no tile.
    if (a.dinitial_state) {
      const auto [first, last] = team.share(a.sequences.count);
      for (int64_t n = first; n < last; ++n) {
        if (a.sequences.size(n) == 0) store_dinitial<T>(a, n, 0, a.channels, [](int64_t, int64_t) { return S{}; });
      }
    }
    team.barrier();
    if (partial != nullptr) store_conv_sums<S>(a, static_cast<const S*>(partial), team.share(a.channels));
  });
}

// kConvChannels values at most, of a state that is read whole and written whole.
void causal_conv1d_step(const CausalConvStepArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 64;
  visit_float(a.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using S = Accumulator<T>;
    visit_taps(a.taps, [&](auto constant) {
      const int64_t taps = constant ? constant : a.taps, first_used = a.state_size - (taps - 1);
      alignas(64) S sums[kBlock];
      for (int64_t at = begin; at < end;) {
        const int64_t n = at / a.channels, first = at % a.channels, count = std::min({kBlock, a.channels - first, end - at});
        const auto* x = static_cast<const T*>(a.x.base) + n * a.x.row_stride + first * a.x.col_stride;
        auto* y = static_cast<T*>(a.y.base) + n * a.y.row_stride + first * a.y.col_stride;
        T* state = static_cast<T*>(a.state.base) + n * a.state.strides[0] + first * a.state.strides[1];
        visit_float(a.weight.dtype, [&](auto weight_tag) {
          const auto* weight =
              static_cast<const typename decltype(weight_tag)::type*>(a.weight.base) + first * a.weight.row_stride;
          for (int64_t c = 0; c < count; ++c) {
            S sum = a.bias ? static_cast<S>(a.bias.at(0, first + c)) : S{0};
            const T* past = state + c * a.state.strides[1] + first_used * a.state.strides[2];
            const auto* tap = weight + c * a.weight.row_stride;
            for (int64_t i = 0; i < taps - 1; ++i) {
              sum += S(to_scalar(tap[i * a.weight.col_stride])) * S(to_scalar(past[i * a.state.strides[2]]));
            }
            sums[c] = sum + S(to_scalar(tap[(taps - 1) * a.weight.col_stride])) * S(to_scalar(x[c * a.x.col_stride]));
          }
        });
        for (int64_t c = 0; c < count; ++c) {
          T* kept = state + c * a.state.strides[1];
          for (int64_t i = 0; i + 1 < a.state_size; ++i) kept[i * a.state.strides[2]] = kept[(i + 1) * a.state.strides[2]];
          kept[(a.state_size - 1) * a.state.strides[2]] = x[c * a.x.col_stride];
        }
        for_lanes<S>(count, [&](int64_t c, auto valid) {
          const Vec<S> sum = load(sums + c);
          store_valid(y + c, a.silu ? silu<S>(sum) : sum, valid);
        });
        at += count;
      }
    });
  });
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
