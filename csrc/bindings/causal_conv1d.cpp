#include "bindings/arguments.h"
#include "bindings/register.h"
#include "cpu/causal_conv1d.h"

namespace gossamer::bindings {

// (pointer, three strides, dtype code)
using PyCube = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int>;
// (number of sequences, length of each, pointer of int64 offsets or 0)
using PySequences = std::tuple<int64_t, int64_t, uintptr_t>;
// (x, weight, bias, initial state, sequences, C, W, S, whether SiLU follows)
using PyCausalConv = std::tuple<PyCube, PyMatrix, PyVector, PyCube, PySequences, int64_t, int64_t, int64_t, bool>;

inline FloatCube cube(const PyCube& c) {
  const auto& [base, first, second, third, dtype] = c;
  return {reinterpret_cast<void*>(base), {first, second, third}, static_cast<DType>(dtype)};
}

inline Sequences sequences(const PySequences& s) {
  const auto& [count, length, offsets] = s;
  return {count, length, pointer<const int64_t>(offsets)};
}

inline int64_t checked_taps(int64_t taps) {
  if (taps >= 1 && taps <= kMostTaps) return taps;
  throw py::value_error("gossamer._C: a convolution has 1 to " + std::to_string(kMostTaps) + " taps, got " +
                        std::to_string(taps));
}

inline CausalConvArgs causal_conv_args(const PyCausalConv& conv) {
  const auto& [x, weight, bias, initial, of, channels, taps, state_size, silu] = conv;
  return {sequences(of), channels,       checked_taps(taps), state_size,   silu,
          cube(x),       matrix(weight), row_matrix(bias),   cube(initial)};
}

void register_causal_conv1d(py::module_& m) {
  m.def(
      "causal_conv1d",
      [](const PyCausalConv& conv, const PyCube& y, const PyCube& final_state, int num_threads) {
        const CausalConvForwardArgs args{causal_conv_args(conv), cube(y), cube(final_state)};
        py::gil_scoped_release release;
        causal_conv1d(args, num_threads);
      },
      "Depthwise causal convolution along sequences.");
  m.def(
      "causal_conv1d_backward",
      [](const PyCausalConv& conv, const PyCube& dy, const PyCube& dfinal_state, const PyCube& dx, const PyMatrix& dweight,
         const PyVector& dbias, const PyCube& dinitial_state, int num_threads) {
        const CausalConvBackwardArgs args{causal_conv_args(conv), cube(dy),          cube(dfinal_state),  cube(dx),
                                          matrix(dweight),        row_matrix(dbias), cube(dinitial_state)};
        py::gil_scoped_release release;
        causal_conv1d_backward(args, num_threads);
      },
      "Its gradients; those that are not wanted have null pointers.");
  m.def(
      "causal_conv1d_step",
      [](const PyMatrix& x, const PyMatrix& weight, const PyVector& bias, const PyCube& state, int64_t batch, int64_t channels,
         int64_t taps, int64_t state_size, bool silu, const PyMatrix& y, int num_threads) {
        const CausalConvStepArgs args{batch,     channels,       checked_taps(taps), state_size,  silu,
                                      matrix(x), matrix(weight), row_matrix(bias),   cube(state), matrix(y)};
        py::gil_scoped_release release;
        causal_conv1d_step(args, num_threads);
      },
      "One position of each sequence, with the state moved on in place.");
}

}  // namespace gossamer::bindings
