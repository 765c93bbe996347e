// The activation of rows and its gradient, of one instruction set.
#pragma once

#include "cpu/activate.h"
#include "cpu/activation_kernel.h"
#include "cpu/panel.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Even and odd lanes of two consecutive vectors.
template <class S>
GOSSAMER_INLINE GateUp<S> deinterleaved(Vec<S> a, Vec<S> b) {
  return [&]<size_t... I>(std::index_sequence<I...>) {
    return GateUp<S>{__builtin_shufflevector(a, b, (2 * I)...), __builtin_shufflevector(a, b, (2 * I + 1)...)};
  }(std::make_index_sequence<kLanes<S>>{});
}

// Alternating lanes of `gate` and `up`, from their lower or from their upper halves.
template <bool kUpper, class S>
GOSSAMER_INLINE Vec<S> interleaved(Vec<S> gate, Vec<S> up) {
  constexpr size_t n = sizeof(Vec<S>) / sizeof(S);
  return [&]<size_t... I>(std::index_sequence<I...>) {
    return __builtin_shufflevector(gate, up, (kUpper * n / 2 + I / 2 + I % 2 * n)...);
  }(std::make_index_sequence<n>{});
}

// The positions of a value's gate and up in a row.
enum class Layout { kGateAlone, kHalves, kInTurn };

// A row of pre-activations or of their gradients, for `inner` values.
template <Layout kLayout, class T>
struct GateUpRow {
  using S = Accumulator<std::remove_const_t<T>>;
  static constexpr int n = kLanes<S>;
  T* base;
  int64_t inner;

  // `valid` values, starting with the i-th.
  GateUp<S> load_from(int64_t i, int valid) const {
    if constexpr (kLayout == Layout::kGateAlone) {
      return {load_valid(base + i, valid), Vec<S>{}};
    } else if constexpr (kLayout == Layout::kHalves) {
      return {load_valid(base + i, valid), load_valid(base + inner + i, valid)};
    } else {
      const int more = 2 * valid - n;
      return deinterleaved<S>(load_valid(base + 2 * i, std::min(2 * valid, n)),
                              more > 0 ? load_valid(base + 2 * i + n, more) : Vec<S>{});
    }
  }

  void store_to(int64_t i, Vec<S> gate, Vec<S> up, int valid) const {
    if constexpr (kLayout == Layout::kInTurn) {
      store_valid(base + 2 * i, interleaved<false, S>(gate, up), std::min(2 * valid, n));
      if (2 * valid > n) store_valid(base + 2 * i + n, interleaved<true, S>(gate, up), 2 * valid - n);
    } else {
      store_valid(base + i, gate, valid);
      if constexpr (kLayout == Layout::kHalves) store_valid(base + inner + i, up, valid);
    }
  }
};

// Calls f(row, column, valid lanes) for vectors of the values begin .. end of (R, I), row by row.
template <class S, class F>
GOSSAMER_INLINE void for_vectors(int64_t begin, int64_t end, int64_t inner, F&& f) {
  constexpr int n = kLanes<S>;
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / inner, first = at % inner, last = std::min(inner, first + end - at);
    int64_t i = first;
    for (; i + n <= last; i += n) f(row, i, n);
    if (i < last) f(row, i, static_cast<int>(last - i));
    at += last - first;
  }
}

// Calls f(tag of the type, layout as a constant, activation as a function of a GateUp).
template <class F>
void visit_activate(const ActivateArgs& a, F&& f) {
  const auto call = [&](auto tag, auto layout, auto activation) { f(tag, layout, activation); };
  visit_float(a.preact.dtype, [&](auto tag) {
    using S = Accumulator<typename decltype(tag)::type>;
    visit_activation<S>(a.form, [&](auto activation) {
      if constexpr (!decltype(activation)::kGated) {
        call(tag, std::integral_constant<Layout, Layout::kGateAlone>{}, activation);
      } else if (a.form.interleaved) {
        call(tag, std::integral_constant<Layout, Layout::kInTurn>{}, activation);
      } else {
        call(tag, std::integral_constant<Layout, Layout::kHalves>{}, activation);
      }
    });
  });
}

void activate_rows(const ActivateArgs& a, int64_t begin, int64_t end) {
  visit_activate(a, [&](auto tag, auto layout, auto activation) {
    using T = typename decltype(tag)::type;
    const auto* preact = static_cast<const T*>(a.preact.base);
    auto* out = static_cast<T*>(a.out);
    const int64_t inner = a.inner, stride = a.preact.row_stride;
    for_vectors<Accumulator<T>>(begin, end, inner, [&](int64_t row, int64_t i, int valid) {
      const GateUpRow<layout, const T> from{preact + row * stride, inner};
      store_valid(out + row * inner + i, activation(from.load_from(i, valid)).value, valid);
    });
  });
}

void activate_backward_rows(const ActivateArgs& a, int64_t begin, int64_t end) {
  visit_activate(a, [&](auto tag, auto layout, auto activation) {
    using T = typename decltype(tag)::type;
    const auto* preact = static_cast<const T*>(a.preact.base);
    const auto* dact = static_cast<const T*>(a.dact.base);
    auto* out = static_cast<T*>(a.out);
    const int64_t inner = a.inner, stride = a.preact.row_stride, dact_stride = a.dact.row_stride,
                  wide = inner * a.form.halves();
    for_vectors<Accumulator<T>>(begin, end, inner, [&](int64_t row, int64_t i, int valid) {
      const GateUpRow<layout, const T> from{preact + row * stride, inner};
      const GateUpRow<layout, T> to{out + row * wide, inner};
      const auto s = activation(from.load_from(i, valid));
      const auto d = load_valid(dact + row * dact_stride + i, valid);
      to.store_to(i, d * s.dgate, d * s.dup, valid);
    });
  });
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
