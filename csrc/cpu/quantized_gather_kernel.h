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

// Consecutive rows of a matrix, `Vectors` vectors of them; missing rows repeat the last one.
template <int Vectors>
class CodeRows {
 public:
  static constexpr int kLanesOf = kLanes<float>, kRows = Vectors * kLanesOf;

  CodeRows(const QuantizedMatrix& w, int64_t n, int64_t last) : w_(w) {
    const int64_t bytes = w.weights->row_bytes(), expert_scales = w.scales(0);
    const uint8_t* first = w.row(n);
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = std::min<int64_t>(i, last - 1 - n);
      rows_[i] = first + row * bytes;
      scales_at_[i] = expert_scales + ((n + row) >> w.weights->row_shift) * w.weights->scale_columns;
    }
  }

  const uint8_t* const* rows() const { return rows_; }

  // Where to prefetch, in bytes from a row's first one, during a step of `columns` columns from `k` on: two steps ahead, which is
  // enough for memory to answer, in these rows or the next ones.
  int64_t ahead(int64_t k, int64_t columns) const {
    const QuantizedWeights& w = *w_.weights;
    const int64_t per_byte = w.columns / std::max<int64_t>(1, w.row_bytes());
    const int64_t place = k + 2 * columns, past = place - (w.columns + columns - 1) / columns * columns;
    return past < 0 ? place / per_byte : kRows * w.row_bytes() + past / per_byte;
  }

  // The rows' words from byte `from` to `end`, a word of each row of a vector side by side, vectors `stride` apart; the last words are
  // filled up with zeros. Inlined, compilers keep the vectors in memory.
  __attribute__((noinline)) void gather(int64_t from, int64_t end, UInts* words, int64_t stride) const {
    constexpr int lanes = kLanesOf;
    constexpr int64_t bytes = sizeof(UInts);
    const auto transposed = [](Vec<float>(&v)[lanes], UInts* to) __attribute__((always_inline)) {
      transpose<float>(v);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) std::memcpy(to + i, &v[i], sizeof v[i]);
    };
    for (int first = 0; first < kRows; first += lanes) {
      UInts* to = words + first / lanes * stride;
      const uint8_t* const* rows = rows_ + first;
      int64_t at = from;
      for (; at + bytes <= end; at += bytes, to += lanes) {
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
