// Codes and scales of several rows of a quantised weight, brought into the lanes.
#pragma once

#include "cpu/quantized_decode_kernel.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Maximum number of tokens for decoding with weight rows in the lanes: as many as leave registers for a vector of rows.
constexpr int kFewQuantized = GOSSAMER_VECTOR_BYTES / sizeof(float);
// Number of vectors of rows, which hide the latency of each other's additions.
template <int Tokens>
constexpr int kCodeVectors = Tokens < kFewQuantized ? 2 : 1;

// Words of codes of a step along the depth, for vectors of rows: word i of vector v has the codes of one row in each lane. Prefetches
// for a word are where the rows', or the panels', next words are: kLanes words go `step` apart, and the next ones start `turn` later.
template <int Vectors>
struct CodeWords {
  const uint8_t* words[Vectors];
  const uint8_t* ahead[Vectors];
  uint64_t step, turn;

  UInts at(int v, int64_t i) const { return load_bytes<UInts>(words[v] + i * kStride); }
  void fetch_ahead(int v, uint64_t i) const {
    constexpr uint64_t lanes = kLanes<float>;
    __builtin_prefetch(ahead[v] + i % lanes * step + i / lanes * turn, 0, 2);
  }

  // Bytes from a word to the next: words of a panel of codes, of which vectors are parts.
  static constexpr int64_t kStride = kCodePanel * kWordBytes;
  // Room for `words` words of vectors that are not in panels.
  static constexpr int64_t room(int64_t words) {
    return (Vectors * kLanes<float> + kCodePanel - 1) / kCodePanel * words * kStride;
  }
};

// Consecutive rows of a matrix, `Vectors` vectors of them; missing rows repeat the last one. Of weights in panels the first is a
// multiple of kLanes.
template <int Vectors>
class CodeRows {
 public:
  static constexpr int kLanesOf = kLanes<float>, kRows = Vectors * kLanesOf;

  CodeRows(const QuantizedMatrix& w, int64_t n, int64_t last) : w_(w) {
    const int64_t expert_scales = w.scales(0);
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = std::min<int64_t>(n + i, last - 1);
      scales_at_[i] = expert_scales + (row >> w.weights->row_shift) * w.weights->scale_columns;
      if (!w.weights->in_panels) {
        rows_[i] = w.row(row);
      } else if (i % kLanesOf == 0) {
        const int64_t first = std::min<int64_t>(n + i, (last - 1) / kLanesOf * kLanesOf);
        for (int j = 0; j < kLanesOf; ++j) rows_[i + j] = w.panel_row(first) + j * CodeWords<Vectors>::kStride;
      }
    }
  }

  // The words of a step of `columns` columns from k on. They are in panels already, or are brought into `memory`, of
  // CodeWords::room(), in which the last ones are filled up with zeros.
  CodeWords<Vectors> words(int64_t k, int64_t columns, uint8_t* memory) const {
    constexpr int64_t stride = CodeWords<Vectors>::kStride, in_panel = kCodePanel / kLanesOf;
    const QuantizedWeights& w = *w_.weights;
    const int64_t per_byte = w.columns / w.row_bytes(), from = k / per_byte;
    CodeWords<Vectors> out;
    if (w.in_panels) {
      const int64_t distance = ahead(k, columns, kPanelSteps) / per_byte * kCodePanel;
      for (int v = 0; v < Vectors; ++v) {
        out.words[v] = rows_[v * kLanesOf] + from * kCodePanel;
        out.ahead[v] = rows_[v * kLanesOf] + distance;
      }
      out.step = stride;
      out.turn = kLanesOf * stride;
      return out;
    }
    const int64_t end = (std::min(w.columns, k + columns) + per_byte - 1) / per_byte;
    for (int v = 0; v < Vectors; ++v) {
      uint8_t* to = memory + v / in_panel * (columns / per_byte * kCodePanel) + v % in_panel * sizeof(UInts);
      gather(rows_ + v * kLanesOf, from, end, to);
      out.words[v] = to;
      out.ahead[v] = rows_[v * kLanesOf] + ahead(k, columns, 2) / per_byte;
    }
    out.step = w.row_bytes();
    out.turn = 64;
    return out;
  }

  // The scales of kLanes groups of columns, `group` among them: for each vector of rows kLanes vectors, that of a group at
  // group % kLanes. They are read when a product comes to the first of them.
  const Vec<float>* scales(int64_t group) {
    if (group >= end_ || group < begin_) {
      begin_ = group / kLanesOf * kLanesOf;
      end_ = std::min(begin_ + kLanesOf, w_.weights->scale_columns);
      read_scales(begin_, static_cast<int>(end_ - begin_));
    }
    return scales_;
  }

 private:
  // Steps from words to their prefetches, which are enough for memory to answer. Prefetches of panels go on where the processor's own
  // ones end.
  static constexpr int64_t kPanelSteps = 4;

  // Where to prefetch, in columns from a row's first one, during a step of `columns` columns from `k` on: some steps ahead, in these
  // rows or the next ones.
  int64_t ahead(int64_t k, int64_t columns, int64_t steps) const {
    const QuantizedWeights& w = *w_.weights;
    const int64_t next = (w.in_panels ? kRows / kCodePanel : kRows) * w.columns;
    const int64_t place = k + steps * columns, past = place - (w.columns + columns - 1) / columns * columns;
    return past < 0 ? place : next + past;
  }

  // The words of a vector's rows from byte `from` to `end`; the last ones are filled up with zeros. Inlined, compilers keep the
  // vectors in memory.
  static __attribute__((noinline)) void gather(const uint8_t* const* rows, int64_t from, int64_t end, uint8_t* to) {
    constexpr int lanes = kLanesOf;
    constexpr int64_t bytes = sizeof(UInts), stride = CodeWords<Vectors>::kStride;
    const auto transposed = [](Vec<float>(&v)[lanes], uint8_t* to) __attribute__((always_inline)) {
      transpose<float>(v);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) std::memcpy(to + i * stride, &v[i], sizeof v[i]);
    };
    int64_t at = from;
    for (; at + bytes <= end; at += bytes, to += lanes * stride) {
      Vec<float> v[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) v[i] = load_bytes<Vec<float>>(rows[i] + at);
      transposed(v, to);
    }
    if (at < end) {
      Vec<float> v[lanes] = {};
      for (int i = 0; i < lanes; ++i) std::memcpy(&v[i], rows[i] + at, end - at);
      transposed(v, to);
    }
  }

  __attribute__((noinline)) void read_scales(int64_t group, int count) {
    // The next groups' scales, or the next rows'.
    const QuantizedWeights& weights = *w_.weights;
    const int64_t size = weights.scale_dtype < 0 ? 1 : element_size(static_cast<DType>(weights.scale_dtype));
    const bool more = group + count < weights.scale_columns;
    const int64_t ahead = more ? group + count : (int64_t{kRows} >> weights.row_shift) * weights.scale_columns;
    const char* base = static_cast<const char*>(weights.scale) + ahead * size;
    for (int i = 0; i < kRows; ++i) __builtin_prefetch(base + scales_at_[i] * size, 0, 2);
    const int64_t first_at = scales_at_[0] + group, last_at = scales_at_[kRows - 1] + group;
    if (first_at == last_at) {
      for (int j = 0; j < count; ++j) {
        for (int first = 0; first < kRows; first += kLanesOf) scales_[first + j] = splat(w_.scale(first_at + j));
      }
      return;
    }
    const bool stored = weights.scale_dtype != kNestedScale;
    if (stored && count == 1 && last_at - first_at == kRows - 1) {
      return w_.with_scale_loader([&](auto load_at) __attribute__((always_inline)) {
        for (int first = 0; first < kRows; first += kLanesOf) scales_[first] = load_at(first_at + first);
      });
    }
    const auto gather = [&](auto load_at) __attribute__((always_inline)) {
      for (int first = 0; first < kRows; first += kLanesOf) {
        Vec<float> v[kLanesOf];
#pragma GCC unroll 16
        for (int i = 0; i < kLanesOf; ++i) v[i] = load_at(scales_at_[first + i] + group);
        transpose<float>(v);
#pragma GCC unroll 16
        for (int i = 0; i < kLanesOf; ++i) scales_[first + i] = v[i];
      }
    };
    // Whole vectors may be read where they end within the matrix, though what follows `count` is not used.
    const int whole = last_at + kLanesOf <= w_.scales(0) + weights.scale_rows * weights.scale_columns ? kLanesOf : count;
    if (whole == kLanesOf && stored) return w_.with_scale_loader(gather);
    gather([&](int64_t at) { return w_.scale_run(at, whole); });
  }

  const QuantizedMatrix w_;
  const uint8_t* rows_[kRows];
  int64_t scales_at_[kRows];
  int64_t begin_ = 0, end_ = 0;
  alignas(64) Vec<float> scales_[kRows];
};

// Stores total[vector][token] of the weight's rows from `first` on, of `count` in all, as c[row][token] or c[token][row].
template <int Tokens, int Vectors, class S>
GOSSAMER_INLINE void store_totals(const Vec<S>* total, S* c, int64_t c_stride, int64_t first, int64_t count, bool by_token) {
  constexpr int lanes = kLanes<S>;
  for (int v = 0; v < Vectors && first < count; ++v, first += lanes, total += Tokens) {
    if (by_token) {
      for (int t = 0; t < Tokens; ++t) store(c + t * c_stride + first, total[t]);
      continue;
    }
    Vec<S> out[lanes] = {};
    for (int t = 0; t < Tokens; ++t) out[t] = total[t];
    transpose<S>(out);
    for (int64_t r = 0; r < std::min<int64_t>(lanes, count - first); ++r) store(c + (first + r) * c_stride, out[r]);
  }
}

// The scales of up to kGroup rows, for tiles of weights.
class ScalesOfRows {
 public:
  ScalesOfRows(const QuantizedMatrix& w, int64_t n, int64_t last) : shift_(w.weights->column_shift), rows_(w, n, last) {}

  // out[s · kGroup + i] = the scale of the i-th row at column `first` + s · step, for the columns up to `last`. Calls go up along the
  // columns.
  void at(int64_t first, int64_t last, int64_t step, float* out) {
    constexpr int lanes = kLanes<float>;
    for (int64_t c = first; c < last; c += step, out += kGroup) {
      const Vec<float>* scales = rows_.scales(c >> shift_) + (c >> shift_) % lanes;
      for (int v = 0; v < kGroup / lanes; ++v) store(out + v * lanes, scales[v * lanes]);
    }
  }

 private:
  int shift_;
  CodeRows<kGroup / kLanes<float>> rows_;
};

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
