// Packed matrices: how rows reach the products. Included by isa_kernels.h.
//
// A panel holds a matrix of `depth` rows and `width` columns as blocks of columns, each block row after row. A block is
// kPanelWidth columns wide, the last one as many vectors as it needs. Products run along depth
// and hold columns in vector lanes. The same rows of tokens make a panel in two ways: with the tokens as columns (depth
// is the feature dimension) for products with weights, and with the tokens as rows for weight gradients.

template <class S>
constexpr int kPanelWidth = GOSSAMER_TILE_VECTORS * kLanes<S>;

template <class S>
struct Panel {
  S* data;
  int64_t depth, width;

  int64_t num_blocks() const { return (width + kPanelWidth<S> - 1) / kPanelWidth<S>; }
  int block_vectors(int64_t block) const {
    const int64_t left = (width - block * kPanelWidth<S> + kLanes<S> - 1) / kLanes<S>;
    return static_cast<int>(std::min<int64_t>(left, GOSSAMER_TILE_VECTORS));
  }
  S* block(int64_t b) const { return data + b * kPanelWidth<S> * depth; }
  // One vector of columns, `column` a multiple of kLanes.
  S* at(int64_t row, int64_t column) const {
    const int64_t b = column / kPanelWidth<S>;
    return block(b) + row * block_vectors(b) * kLanes<S> + column % kPanelWidth<S>;
  }
};

// Calls f with the number of vectors of a block as a constant.
template <class F>
GOSSAMER_INLINE void with_vectors(int vectors, F&& f) {
  if constexpr (GOSSAMER_TILE_VECTORS > 2) {
    if (vectors == 3) return f(std::integral_constant<int, 3>{});
  }
  if (vectors == 2) return f(std::integral_constant<int, 2>{});
  f(std::integral_constant<int, 1>{});
}

template <class V, size_t... I>
GOSSAMER_INLINE V interleave_low(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * sizeof...(I))...);
}
template <class V, size_t... I>
GOSSAMER_INLINE V interleave_high(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + sizeof...(I) / 2 + (I % 2) * sizeof...(I))...);
}

// Transposes kLanes vectors of kLanes: interleaving the two halves of the list, log2(kLanes) times.
template <class S>
GOSSAMER_INLINE void transpose(Vec<S> (&v)[kLanes<S>]) {
  constexpr int n = kLanes<S>;
  constexpr auto lanes = std::make_index_sequence<n>{};
  for (int stage = 1; stage < n; stage *= 2) {
    Vec<S> next[n];
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = interleave_low(v[i], v[i + n / 2], lanes);
      next[2 * i + 1] = interleave_high(v[i], v[i + n / 2], lanes);
    }
    for (int i = 0; i < n; ++i) v[i] = next[i];
  }
}

// Columns [first, last) of the source rows become panel rows: tokens in lanes. `first` is a multiple of kLanes.
template <class T, class S>
void pack_as_columns(const Panel<S>& panel, const T* const* rows, int64_t first, int64_t last) {
  constexpr int n = kLanes<S>;
  for (int64_t token = 0; token < panel.width; token += n) {
    const int tokens = static_cast<int>(std::min<int64_t>(n, panel.width - token));
    for (int64_t k = first; k < last; k += n) {
      const int columns = static_cast<int>(std::min<int64_t>(n, last - k));
      Vec<S> v[n];
      for (int i = 0; i < n; ++i) {
        v[i] = i >= tokens ? Vec<S>{} : columns == n ? load(rows[token + i] + k) : load_some(rows[token + i] + k, columns);
      }
      transpose<S>(v);
      for (int i = 0; i < columns; ++i) store(panel.at(k + i, token), v[i]);
    }
  }
}

// Columns [first, last) of the source rows stay columns; `first` is a multiple of kLanes.
template <class T, class S>
void pack_as_rows(const Panel<S>& panel, const T* const* rows, int64_t first, int64_t last) {
  constexpr int n = kLanes<S>;
  for (int64_t token = 0; token < panel.depth; ++token) {
    for (int64_t c = first; c < last; c += n) {
      const int columns = static_cast<int>(std::min<int64_t>(n, last - c));
      store(panel.at(token, c), columns == n ? load(rows[token] + c) : load_some(rows[token] + c, columns));
    }
  }
}

// Columns [first, last) of `to` from the same rows of `from`; `first` is a multiple of kLanes.
template <class S>
void transpose_panel(const Panel<S>& to, const Panel<S>& from, int64_t first, int64_t last) {
  constexpr int n = kLanes<S>;
  for (int64_t token = 0; token < from.width; token += n) {
    const int tokens = static_cast<int>(std::min<int64_t>(n, from.width - token));
    for (int64_t c = first; c < last; c += n) {
      const int columns = static_cast<int>(std::min<int64_t>(n, last - c));
      Vec<S> v[n];
      for (int i = 0; i < n; ++i) v[i] = i < columns ? load(from.at(c + i, token)) : Vec<S>{};
      transpose<S>(v);
      for (int i = 0; i < tokens; ++i) store(to.at(token + i, c), v[i]);
    }
  }
}

// Calls f(token, column, vector, valid lanes) over the transpose of c, `columns` rows of `tokens` values.
template <class S, class F>
GOSSAMER_INLINE void for_transposed(const S* c, int64_t c_stride, int64_t columns, int64_t tokens, F&& f) {
  constexpr int n = kLanes<S>;
  for (int64_t token = 0; token < tokens; token += n) {
    const int num_tokens = static_cast<int>(std::min<int64_t>(n, tokens - token));
    for (int64_t column = 0; column < columns; column += n) {
      const int valid = static_cast<int>(std::min<int64_t>(n, columns - column));
      Vec<S> v[n];
      for (int i = 0; i < n; ++i) v[i] = i < valid ? load(c + (column + i) * c_stride + token) : Vec<S>{};
      transpose<S>(v);
      for (int i = 0; i < num_tokens; ++i) f(token + i, column, v[i], valid);
    }
  }
}

template <class T>
GOSSAMER_INLINE void store_valid(T* to, Vec<Accumulator<T>> v, int valid) {
  if (valid == kLanes<Accumulator<T>>) {
    store(to, v);
  } else {
    store_some(to, v, valid);
  }
}

template <class T>
GOSSAMER_INLINE Vec<Accumulator<T>> load_valid(const T* from, int valid) {
  return valid == kLanes<Accumulator<T>> ? load(from) : load_some(from, valid);
}
