// The finishes of the expert layer's first product and of the gradient that comes back through its second one.
#pragma once

#include "cuda/hopper/activation.h"
#include "cuda/hopper/row_product.cuh"

namespace gossamer::hopper {

// Where an activation column's gate and up values lie in a row of the pre-activation.
struct PreactLayout {
  int32_t inner;  // I
  ActivationForm form;
  bool aligned;  // whole vectors of every tensor here may be moved at once

  __device__ int32_t width() const { return form.gated ? 2 * inner : inner; }
  __device__ bool pairs() const { return form.gated && form.interleaved; }
};

struct GatePair {
  Vector gate, up;
};

// Splits sixteen interleaved values, and joins them again.
__device__ __forceinline__ GatePair take_apart(const Vector& left, const Vector& right) {
  GatePair out;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const Vector& from = i < kVector / 2 ? left : right;
    out.gate.v[i] = from.v[2 * i % kVector];
    out.up.v[i] = from.v[2 * i % kVector + 1];
  }
  return out;
}

template <typename T>
__device__ __forceinline__ void store_pair(T* row, const GatePair& pair, int column, const PreactLayout& layout) {
  const int rest = layout.inner - column;
  if (layout.pairs()) {
    Vector left, right;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      Vector& to = i < kVector / 2 ? left : right;
      to.v[2 * i % kVector] = pair.gate.v[i];
      to.v[2 * i % kVector + 1] = pair.up.v[i];
    }
    store_vector(row + 2 * column, left, 2 * rest, layout.aligned);
    store_vector(row + 2 * column + kVector, right, 2 * rest - kVector, layout.aligned);
    return;
  }
  store_vector(row + column, pair.gate, rest, layout.aligned);
  if (layout.form.gated) store_vector(row + layout.inner + column, pair.up, rest, layout.aligned);
}

// Gate and up of eight activation columns as they lie in memory: two vectors, the second unused where ungated.
struct PackedPair {
  Packed first, second;
};

template <typename T>
__device__ __forceinline__ PackedPair load_pair(const T* row, int column, const PreactLayout& layout, bool aligned) {
  const int rest = layout.inner - column;
  PackedPair out;
  if (layout.pairs()) {
    out.first = load_vector(row + 2 * column, 2 * rest, aligned);
    out.second = load_vector(row + 2 * column + kVector, 2 * rest - kVector, aligned);
    return out;
  }
  out.first = load_vector(row + column, rest, aligned);
  out.second = layout.form.gated ? load_vector(row + layout.inner + column, rest, aligned) : out.first;
  return out;
}

template <typename T>
__device__ __forceinline__ GatePair unpack_pair(const PackedPair& packed, const PreactLayout& layout) {
  const Vector first = unpack<T>(packed.first), second = unpack<T>(packed.second);
  return layout.pairs() ? take_apart(first, second) : GatePair{first, second};
}

struct GluParams {
  RowProductParams product;
  PreactLayout layout;
  void* act;         // (R, I)
  void* preact;      // (R, 2I) or (R, I), or null
  const void* bias;  // (E, 2I) or (E, I), or null
  bool bias_aligned;
};

// act = glu(x W1 + b1), and the pre-activation. A tile has the gate columns of half its width, and the same up columns:
// pairs where they are interleaved, else halves. Ungated, its columns are activation columns.
template <typename T>
struct GluFinish {
  using Params = GluParams;

  static __device__ void prepare(const Params&) {}

  template <typename, int kN>
  static __device__ __forceinline__ void tile(const Params& p, const Tile& tile, const float (&acc)[kN / 2], uint8_t* staging,
                                              int block_row) {
    const PreactLayout& layout = p.layout;
    const int lane = threadIdx.x % kLanes, eighth = lane % 4;
    const int columns = layout.form.gated ? kN / 2 : kN;
    const int width = layout.width();
    const T* bias = p.bias == nullptr ? nullptr : static_cast<const T*>(p.bias) + int64_t{tile.expert} * width;
#pragma unroll 1
    for (int piece = 0; piece < kN / kPieceColumns; ++piece) {
      if (layout.form.gated && !layout.form.interleaved) {
        stage_halves<kN>(staging, acc, piece);
      } else {
        stage_neighbours<kN>(staging, acc, piece);
      }
      const int items = layout.form.gated ? 2 : 4;
#pragma unroll 1
      for (int item = 0; item < items; ++item) {
        const int half = item % 2, side = item / 2;
        const int row = staging_row(lane) + 8 * half;
        const int64_t r = int64_t{tile.row} + lane_row(block_row, half);
        const int column =
            tile.column_tile * columns + (layout.form.gated ? piece : 2 * piece + side) * kStagingColumns + eighth * kVector;
        if (r >= tile.row_end || column >= layout.inner) continue;
        GatePair pair;
        if (layout.pairs()) {
          const uint8_t* from = staging + eighth / 2 * kStagingBytes;
          pair = take_apart(staged(from, row, eighth % 2 * 2), staged(from, row, eighth % 2 * 2 + 1));
        } else {
          pair.gate = staged(staging + side * kStagingBytes, row, eighth);
          pair.up = layout.form.gated ? staged(staging + kStagingBytes, row, eighth) : pair.gate;
        }
        if (bias != nullptr) {
          const GatePair add = unpack_pair<T>(load_pair(bias, column, layout, p.bias_aligned), layout);
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            pair.gate.v[i] += add.gate.v[i];
            pair.up.v[i] += add.up.v[i];
          }
        }
        if (p.preact != nullptr) store_pair(static_cast<T*>(p.preact) + r * width, pair, column, layout);
        with_code(layout.form.code, [&](auto code) {
          Vector act;
#pragma unroll
          for (int i = 0; i < kVector; ++i) act.v[i] = glu<code.value>(pair.gate.v[i], pair.up.v[i], layout.form);
          store_vector(static_cast<T*>(p.act) + r * layout.inner + column, act, layout.inner - column, layout.aligned);
        });
      }
    }
  }
};

struct GluBackwardParams {
  RowProductParams product;
  PreactLayout layout;
  const void* preact;
  void* dpreact;        // as preact, which it may be, or null
  void* act;            // (R, I), or null
  float* partial;       // (column tiles, R), or null
  const void* weights;  // routing weights by slot, of the element type or float32
  bool weights_float32;
};

// From dact = dy W2 of a tile: d(pre-activation), the routing-weighted activation, and each row's sum of dact * act.
template <typename T>
struct GluBackwardFinish {
  using Params = GluBackwardParams;

  static __device__ void prepare(const Params&) {}

  static __device__ float weight(const Params& p, int64_t row) {
    const int32_t slot = slot_of(p.product.experts, row);
    return p.weights_float32 ? static_cast<const float*>(p.weights)[slot] : widen(static_cast<const T*>(p.weights)[slot]);
  }

  template <typename, int kN>
  static __device__ __forceinline__ void tile(const Params& p, const Tile& tile, const float (&acc)[kN / 2], uint8_t* staging,
                                              int block_row) {
    constexpr int kItems = 4 * (kN / kPieceColumns);
    const PreactLayout& layout = p.layout;
    const int lane = threadIdx.x % kLanes, eighth = lane % 4;
    const int64_t width = layout.width();
    const int64_t first = int64_t{tile.row} + lane_row(block_row, 0), second = first + 8;
    const bool first_inside = first < tile.row_end, second_inside = second < tile.row_end;
    const float first_weight = first_inside ? weight(p, first) : 0.0f;
    const float second_weight = second_inside ? weight(p, second) : 0.0f;
    float first_dot = 0.0f, second_dot = 0.0f;
    const auto column_of = [&](int item) { return tile.column_tile * kN + item / 2 * kStagingColumns + eighth * kVector; };
    const auto wanted = [&](int item) {
      return (item % 2 ? second_inside : first_inside) && column_of(item) < layout.inner && item < kItems;
    };
    const auto load = [&](int item) {
      PackedPair pair{};
      if (wanted(item)) {
        const T* row = static_cast<const T*>(p.preact) + (item % 2 ? second : first) * width;
        pair = load_pair(row, column_of(item), layout, layout.aligned);
      }
      return pair;
    };
    // Pre-activations are loaded two items ahead of the one being processed.
    PackedPair next = load(0), after = load(1);
#pragma unroll 1
    for (int item = 0; item < kItems; ++item) {
      if (item % 4 == 0) stage_neighbours<kN>(staging, acc, item / 4);
      const PackedPair packed = next;
      next = after;
      after = load(item + 2);
      if (!wanted(item)) continue;
      const int half = item % 2, side = item / 2 % 2, column = column_of(item);
      const int64_t r = half ? second : first;
      const float row_weight = half ? second_weight : first_weight;
      const Vector dact = staged(staging + side * kStagingBytes, staging_row(lane) + 8 * half, eighth);
      const GatePair pair = unpack_pair<T>(packed, layout);
      with_code(layout.form.code, [&](auto code) {
        Vector act;
        GatePair gradient;
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const GluGradient g = glu_gradient<code.value>(dact.v[i], pair.gate.v[i], pair.up.v[i], layout.form);
          // Columns past the end have dact = 0, since the weight reads as zeros there; the activation of zero is finite.
          dot += dact.v[i] * g.act;
          act.v[i] = row_weight * g.act;
          gradient.gate.v[i] = row_weight * g.dgate;
          gradient.up.v[i] = row_weight * g.dup;
        }
        if (half) {
          second_dot += dot;
        } else {
          first_dot += dot;
        }
        if (p.act != nullptr) {
          store_vector(static_cast<T*>(p.act) + r * layout.inner + column, act, layout.inner - column, layout.aligned);
        }
        if (p.dpreact != nullptr) store_pair(static_cast<T*>(p.dpreact) + r * width, gradient, column, layout);
      });
    }
    if (p.partial == nullptr) return;
    __syncwarp();
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      first_dot += __shfl_xor_sync(0xffffffffu, first_dot, step);
      second_dot += __shfl_xor_sync(0xffffffffu, second_dot, step);
    }
    float* sums = p.partial + int64_t{tile.column_tile} * p.product.experts.num_rows;
    if (eighth == 0 && first_inside) sums[first] = first_dot;
    if (eighth == 0 && second_inside) sums[second] = second_dot;
  }
};

}  // namespace gossamer::hopper
