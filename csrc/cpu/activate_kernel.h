// The activation of rows and its gradient, of one instruction set; see isa_kernels.h.

// Even and odd lanes of two vectors that follow each other.
template <class S>
GOSSAMER_INLINE GateUp<S> deinterleaved(Vec<S> a, Vec<S> b) {
  return [&]<size_t... I>(std::index_sequence<I...>) {
    return GateUp<S>{__builtin_shufflevector(a, b, (2 * I)...), __builtin_shufflevector(a, b, (2 * I + 1)...)};
  }(std::make_index_sequence<kLanes<S>>{});
}

// Lanes of `gate` and `up` in turn: those of their lower halves, or of their upper ones.
template <bool kUpper, class S>
GOSSAMER_INLINE Vec<S> interleaved(Vec<S> gate, Vec<S> up) {
  constexpr size_t n = sizeof(Vec<S>) / sizeof(S);
  return [&]<size_t... I>(std::index_sequence<I...>) {
    return __builtin_shufflevector(gate, up, (kUpper * n / 2 + I / 2 + I % 2 * n)...);
  }(std::make_index_sequence<n>{});
}

// Calls f(row, column, valid lanes) for vectors of the values begin .. end of (R, I), row by row.
template <class S, class F>
GOSSAMER_INLINE void for_vectors(int64_t begin, int64_t end, int64_t inner, F&& f) {
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / inner, first = at % inner, last = std::min(inner, first + end - at);
    for (int64_t i = first; i < last; i += kLanes<S>) f(row, i, static_cast<int>(std::min<int64_t>(kLanes<S>, last - i)));
    at += last - first;
  }
}

// Lanes of the second of two vectors that have `pairs` pairs of values.
template <class S>
GOSSAMER_INLINE int second_valid(int pairs) {
  return std::max(0, 2 * pairs - kLanes<S>);
}

template <class T>
GOSSAMER_INLINE GateUp<Accumulator<T>> load_gate_up(const ActivateArgs& a, const T* preact, int64_t i, int valid) {
  using S = Accumulator<T>;
  if (!a.form.gated) {
    const Vec<S> gate = load_valid(preact + i, valid);
    return {gate, gate};
  }
  if (!a.form.interleaved) return {load_valid(preact + i, valid), load_valid(preact + a.inner + i, valid)};
  const T* pairs = preact + 2 * i;
  const int more = second_valid<S>(valid);
  return deinterleaved<S>(load_valid(pairs, std::min(2 * valid, kLanes<S>)), more ? load_valid(pairs + kLanes<S>, more) : Vec<S>{});
}

template <class T>
GOSSAMER_INLINE void store_gate_up(const ActivateArgs& a, T* to, int64_t i, Vec<Accumulator<T>> gate, Vec<Accumulator<T>> up,
                                   int valid) {
  using S = Accumulator<T>;
  if (!a.form.gated || !a.form.interleaved) {
    store_valid(to + i, gate, valid);
    if (a.form.gated) store_valid(to + a.inner + i, up, valid);
    return;
  }
  store_valid(to + 2 * i, interleaved<false, S>(gate, up), std::min(2 * valid, kLanes<S>));
  if (const int more = second_valid<S>(valid)) store_valid(to + 2 * i + kLanes<S>, interleaved<true, S>(gate, up), more);
}

// Calls f(tag of the type, activation as a function of a GateUp).
template <class F>
void visit_activate(const ActivateArgs& a, F&& f) {
  visit_float(a.preact.dtype, [&](auto tag) {
    using S = Accumulator<typename decltype(tag)::type>;
    visit_activation<S>(a.form, [&](auto activation) { f(tag, activation); });
  });
}

void activate_rows(const ActivateArgs& a, int64_t begin, int64_t end) {
  visit_activate(a, [&](auto tag, auto activation) {
    using T = typename decltype(tag)::type;
    const auto* preact = static_cast<const T*>(a.preact.base);
    auto* out = static_cast<T*>(a.out);
    for_vectors<Accumulator<T>>(begin, end, a.inner, [&](int64_t row, int64_t i, int valid) {
      const auto in = load_gate_up(a, preact + row * a.preact.row_stride, i, valid);
      store_valid(out + row * a.inner + i, activation(in).value, valid);
    });
  });
}

void activate_backward_rows(const ActivateArgs& a, int64_t begin, int64_t end) {
  visit_activate(a, [&](auto tag, auto activation) {
    using T = typename decltype(tag)::type;
    const auto* preact = static_cast<const T*>(a.preact.base);
    const auto* dact = static_cast<const T*>(a.dact.base);
    auto* out = static_cast<T*>(a.out);
    for_vectors<Accumulator<T>>(begin, end, a.inner, [&](int64_t row, int64_t i, int valid) {
      const auto s = activation(load_gate_up(a, preact + row * a.preact.row_stride, i, valid));
      const auto d = load_valid(dact + row * a.dact.row_stride + i, valid);
      store_gate_up(a, out + row * a.inner * a.form.halves(), i, d * s.dgate, d * s.dup, valid);
    });
  });
}
