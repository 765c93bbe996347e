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
struct CodeRows {
  static constexpr int kLanesOf = kLanes<float>, kRows = Vectors * kLanesOf;
  const uint8_t* row[kRows];
  int64_t scales[kRows];

  CodeRows(const QuantizedMatrix& w, int64_t n, int64_t last) {
    for (int i = 0; i < kRows; ++i) {
      row[i] = w.row(std::min(n + i, last - 1));
      scales[i] = w.scales(std::min(n + i, last - 1));
    }
  }

  // The rows' words from byte `from` to `end`, a word of each row of a vector side by side, vectors `stride` apart; the last words are
  // filled up with zeros.
  void gather(int64_t from, int64_t end, UInts* words, int64_t stride) const {
    constexpr int lanes = kLanesOf;
    constexpr int64_t bytes = sizeof(UInts);
    for (int first = 0; first < kRows; first += lanes) {
      UInts* to = words + first / lanes * stride;
      for (int64_t at = from; at < end; at += bytes, to += lanes) {
        Vec<float> v[lanes];
        if (at + bytes <= end) {
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i) v[i] = load_bytes<Vec<float>>(row[first + i] + at);
        } else {
          for (int i = 0; i < lanes; ++i) {
            v[i] = Vec<float>{};
            std::memcpy(&v[i], row[first + i] + at, end - at);
          }
        }
        transpose<float>(v);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) std::memcpy(to + i, &v[i], sizeof v[i]);
      }
    }
  }

  // The scales of `count` groups of columns from `group` on, a vector for each group.
  __attribute__((noinline)) void gather_scales(const QuantizedMatrix& w, int64_t group, int count, Vec<float>* out) const {
    // The next groups' scales, or the next rows'.
    const QuantizedWeights& weights = *w.weights;
    const int64_t size = weights.scale_dtype < 0 ? 1 : element_size(static_cast<DType>(weights.scale_dtype));
    const bool more = group + count < weights.scale_columns;
    const int64_t ahead = more ? group + count : (int64_t{kRows} >> weights.row_shift) * weights.scale_columns;
    const char* base = static_cast<const char*>(weights.scale) + ahead * size;
    for (int i = 0; i < kRows; ++i) __builtin_prefetch(base + scales[i] * size, 0, 2);
    const auto gather = [&](auto load_at) __attribute__((always_inline)) {
      for (int first = 0; first < kRows; first += kLanesOf) {
        Vec<float> v[kLanesOf];
#pragma GCC unroll 16
        for (int i = 0; i < kLanesOf; ++i) v[i] = load_at(scales[first + i] + group);
        transpose<float>(v);
#pragma GCC unroll 16
        for (int i = 0; i < kLanesOf; ++i) out[first + i] = v[i];
      }
    };
    if (count == kLanesOf && w.weights->scale_dtype != kNestedScale) return w.with_scale_loader(gather);
    gather([&](int64_t at) { return w.scale_run(at, count); });
  }
};

// The scales of up to kGroup rows, which are read for as many groups of columns at a time as a vector holds.
class ScalesOfRows {
 public:
  ScalesOfRows(const QuantizedMatrix& w, int64_t n, int64_t last) : w_(w), rows_(w, n, last) {}

  // out[s · kGroup + i] = the scale of the i-th row at column `first` + s · step, for the columns up to `last`. Calls go up along the
  // columns.
  void at(int64_t first, int64_t last, int64_t step, float* out) {
    constexpr int lanes = kLanes<float>;
    const int shift = w_.weights->column_shift;
    for (int64_t c = first; c < last; c += step, out += kGroup) {
      const int64_t group = c >> shift;
      if (group >= end_) {
        begin_ = group;
        end_ = std::min(group + lanes, w_.weights->scale_columns);
        rows_.gather_scales(w_, begin_, static_cast<int>(end_ - begin_), scales_);
      }
      for (int v = 0; v < kGroup / lanes; ++v) store(out + v * lanes, scales_[v * lanes + group - begin_]);
    }
  }

 private:
  const QuantizedMatrix& w_;
  CodeRows<kGroup / kLanes<float>> rows_;
  int64_t begin_ = 0, end_ = 0;
  alignas(64) Vec<float> scales_[kGroup];
};

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
