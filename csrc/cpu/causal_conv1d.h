// Depthwise causal convolution along sequences, its gradients, and its update by one step.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/sequences.h"

namespace gossamer {

constexpr int kMostTaps = 8;

// The number of rows of one partial sum of the weight's gradient, and the channels of a block; a block of a few rows stays in
// the first-level cache.
constexpr int64_t kConvRows = 256, kConvChannels = 512;

// A floating array of three dimensions with strides in elements; base may be null for an absent argument.
struct FloatCube {
  void* base;
  int64_t strides[3];
  DType dtype;

  explicit operator bool() const { return base != nullptr; }

  // Its value at (i, j, k), of type T.
  template <class T>
  T& at(int64_t i, int64_t j, int64_t k) const {
    return static_cast<T*>(base)[i * strides[0] + j * strides[1] + k * strides[2]];
  }
};

// Sizes: B batches of T positions and C channels, W taps, N sequences, S inputs in a state.
struct CausalConvArgs {
  Sequences sequences;
  int64_t channels, taps, state_size;
  bool silu;
  FloatCube x;              // (B, T, C); channels or positions have stride 1
  FloatMatrix weight;       // (C, W)
  FloatMatrix bias;         // (1, C), or absent
  FloatCube initial_state;  // (N, C, S), or absent

  int64_t rows() const { return sequences.begin(sequences.count); }
  bool along_channels() const { return x.strides[2] == 1; }
  int64_t row_tiles() const { return (rows() + kConvRows - 1) / kConvRows; }
  int64_t channel_blocks() const { return (channels + kConvChannels - 1) / kConvChannels; }

  // The start of a sequence's positions in an array like x.
  template <class T>
  T* sequence(const FloatCube& array, int64_t n) const {
    return static_cast<T*>(array.base) + (sequences.offsets ? sequences.begin(n) * array.strides[1] : n * array.strides[0]);
  }
};

struct CausalConvForwardArgs : CausalConvArgs {
  FloatCube y;            // (B, T, C), laid out as x
  FloatCube final_state;  // (N, C, S), or absent
};

struct CausalConvBackwardArgs : CausalConvArgs {
  FloatCube dy;              // (B, T, C), laid out as x
  FloatCube dfinal_state;    // (N, C, S), or absent
  FloatCube dx;              // (B, T, C), laid out as x, or absent
  FloatMatrix dweight;       // (C, W), or absent
  FloatMatrix dbias;         // (1, C), or absent
  FloatCube dinitial_state;  // (N, C, S), or absent
};

// One position of B sequences. The state is read, then advanced by one input.
struct CausalConvStepArgs {
  int64_t batch, channels, taps, state_size;
  bool silu;
  FloatMatrix x;       // (B, C)
  FloatMatrix weight;  // (C, W)
  FloatMatrix bias;    // (1, C), or absent
  FloatCube state;     // (B, C, S)
  FloatMatrix y;       // (B, C)
};

void causal_conv1d(const CausalConvForwardArgs& args, int num_threads);
void causal_conv1d_backward(const CausalConvBackwardArgs& args, int num_threads);
void causal_conv1d_step(const CausalConvStepArgs& args, int num_threads);

}  // namespace gossamer
