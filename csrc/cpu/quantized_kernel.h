// Products with quantised weights for one instruction set.
//
// Codes are decoded in registers for few tokens, and into a tile of weights for many. With kScalesSums, sums are over the codes
// themselves, and each segment of segment_columns() is multiplied by the scale of its columns. A token's sums are the same
// either way.
#pragma once

#include "cpu/int8_rows_kernel.h"
#include "cpu/memory.h"
#include "cpu/tile_gemm.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Which products decode codes in registers: tiles multiply as many rows at a time anyway, and float64 does not need it.
template <class P>
constexpr bool kDecodesFew = !kTiled<P> && !std::is_same_v<P, double>;

// Number of columns that are summed before the sum is added to the total.
template <class P>
int64_t segment_columns(const QuantizedMatrix& w) {
  if constexpr (kScalesSums<P>) return int64_t{1} << std::min(w.weights->column_shift, 8);
  return segment_of<P>(w.depth()) * kTerms<P>;
}

// The units of weight rows that are handed out in quarters; see quartered() of gemm.h.
template <class P>
GOSSAMER_INLINE int64_t quartered(const QuantizedMatrix&, int64_t tokens, int64_t units) {
  return tokens <= kFewQuantized || kTiled<P> ? 0 : units;
}

// fetch_first_rows() of gemm.h: two steps of few_tokens_product_of().
inline void fetch_first_rows(const QuantizedMatrix& w, int64_t n, int64_t rows) {
  if (rows > kFewQuantized || w.transposed) return;
  const QuantizedWeights& weights = *w.weights;
  const int64_t bytes = std::min<int64_t>(weights.row_bytes(), 256), step = weights.in_panels ? kCodePanel : 1;
  for (int64_t i = n / step * step; i < std::min(n + kGroup, weights.rows); i += step) {
    prefetch_lines<1, Fetch::kReadLater>(w.row(i), bytes * step);
  }
}

// Columns of a tile of weights, whole segments.
template <class P>
constexpr int64_t kTileColumns = kDepth * kTerms<P>;

// Number of columns of codes that are brought into the lanes together: a word of each of kLanes rows, kLanes times.
template <WeightFormat Format>
constexpr int kCodeColumns = kLanes<float> * kWordBits / kCodeBits<Format>;

// A product's other operand: the tokens as columns of a panel and, if there are few, also the values of all tokens for each index
// along the depth, without the panel's padding; or the tokens in 8 bits, if the product rounds them.
template <class P>
struct QuantizedOperand {
  Panel<P> panel;
  const P* few;
  const Int8Rows* rounded = nullptr;
};

// A thread's memory for the operands of products with quantised weights.
template <class P>
class OperandMemory {
 public:
  OperandMemory() = default;
  // For products of at most `depth` with at most `tokens` tokens, some of which may round them.
  OperandMemory(int64_t depth, int64_t tokens, bool rounds)
      : few_(allocate_scratch(kDecodesFew<P> ? few_depth(depth) * kFewQuantized * sizeof(P) : 0)),
        int8_(rounds ? Int8Memory(depth, tokens) : Int8Memory()) {}

  QuantizedOperand<P> operand(const QuantizedMatrix& w, const Panel<P>& panel) {
    if constexpr (!std::is_same_v<P, double>) {
      if (w.weights->rounds_rows && !w.transposed) {
        rounded_ = int8_.round(w, panel);
        return {panel, nullptr, &rounded_};
      }
    }
    if constexpr (kDecodesFew<P>) {
      if (panel.width <= kFewQuantized && !w.transposed) {
        return {panel, copy(panel.depth, panel.width, [&](int64_t k, int64_t t) { return panel.data[k * kLanes<P> + t]; })};
      }
    }
    return {panel, nullptr};
  }
  template <class T>
  const Panel<P>& operand(const Weight<T>&, const Panel<P>& panel) {
    return panel;
  }

  // The operand of tokens that already lie index by index along the depth, few_width() values each, up to few_depth() indices.
  static QuantizedOperand<P> operand_of_few(const P* values, int64_t depth, int64_t tokens) {
    return {Panel<P>{nullptr, packed_depth<P>(depth), tokens}, values};
  }
  static int64_t few_width(int64_t tokens) {
    int64_t width = 1;
    with_few_tokens<kFewQuantized>(tokens, [&](auto rounded) { width = rounded; });
    return width;
  }
  // Whole words of codes are multiplied: values past the depth are zero.
  static int64_t few_depth(int64_t depth) { return (packed_depth<P>(depth) + kDepth - 1) / kDepth * kDepth; }

  // Whether a product with so many tokens reads them as operand_of_rows() gives them, and needs no panel. More rows, which may share
  // a cache set, are transposed faster into a panel.
  static bool reads_rows(const QuantizedMatrix& w, int64_t tokens) {
    constexpr int64_t most = std::min(4, kFewQuantized);
    return kDecodesFew<P> && tokens <= most && !w.transposed && !w.weights->rounds_rows;
  }
  // The operand of `tokens` rows of `depth` values.
  template <class T>
  QuantizedOperand<P> operand_of_rows(const T* const* rows, int64_t depth, int64_t tokens) {
    const int64_t packed = packed_depth<P>(depth);
    return {Panel<P>{nullptr, packed, tokens}, copy(packed, tokens, [&](int64_t k, int64_t t) {
              return t < tokens ? packed_value<P>(rows[t] + k * kTerms<P>, 1, depth - k * kTerms<P>) : P{};
            })};
  }

 private:
  // value(k, t) of each token for each index along the depth; also of tokens after the last one, which some numbers are rounded up by.
  template <class F>
  const P* copy(int64_t depth, int64_t count, F&& value) {
    P* to = reinterpret_cast<P*>(few_.get());
    with_few_tokens<kFewQuantized>(count, [&](auto tokens) {
      const int64_t last = (depth + kDepth - 1) / kDepth * kDepth;
      for (int64_t k = 0; k < depth; ++k) {
        for (int t = 0; t < tokens; ++t) to[k * tokens + t] = value(k, t);
      }
      std::memset(static_cast<void*>(to + depth * tokens), 0, (last - depth) * tokens * sizeof(P));
    });
    return to;
  }

  Scratch few_;
  Int8Memory int8_;
  Int8Rows rounded_;
};

// Memory for the products of weights; only quantised weights need it.
template <class P, class... W>
OperandMemory<P> operand_memory(int64_t depth, int64_t tokens, const W&... weights) {
  if constexpr ((std::is_same_v<W, QuantizedMatrix> && ...)) {
    return OperandMemory<P>(depth, tokens, !std::is_same_v<P, double> && (weights.weights->rounds_rows || ...));
  } else {
    return {};
  }
}

// One step along the depth of few_tokens_product(): columns 0 .. count of it, `run` of which share a scale and a segment at most.
template <int Tokens, class P>
struct CodeStep {
  CodeWords<kCodeVectors<Tokens>> words;
  const P* x;
  const Vec<float>* scales;  // as CodeRows::scales() gives them
  int64_t count, run, segment, group_shift, first_group;
  bool last;
};

#if GOSSAMER_BF16_DOT
// The smallest group of columns of a four-bit format.
constexpr int kLeastGroup = 32;

// Adds Segments segments of a step, from column `first` on, to total[vector][token]. kWords is the number of a segment's words, or 0
// where the step says it: the code is shorter if it is known.
template <WeightFormat Format, int Tokens, int Segments, int kWords>
GOSSAMER_INLINE void add_segments(const CodeStep<Tokens, BFloat16Pair>& step, const Codebook<Format>& book, int64_t first,
                                  Vec<float>* total) {
  constexpr int lanes = kLanes<float>, in_word = kWordBits / kCodeBits<Format>, vectors = kCodeVectors<Tokens>;
  const uint64_t begin = static_cast<uint64_t>(first) / in_word, size = kWords ? kWords : step.segment / in_word;
  const uint64_t last = static_cast<uint64_t>(step.count + in_word - 1) / in_word;
  const uint64_t end = kWords || Segments > 1 ? begin + size : std::min(begin + size, last);
  Vec<float> sum[Segments][vectors][Tokens] = {};
  for (uint64_t i = begin; i < end; ++i) {
#pragma GCC unroll 4
    for (int s = 0; s < Segments; ++s) {
      const uint64_t at = i + s * size;
      const BFloat16Pair* values = step.x + at * (in_word / 2) * Tokens;
      UInts word[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        step.words.fetch_ahead(v, at);
        word[v] = step.words.at(v, at);
      }
      const auto add_words = [&](auto normal) __attribute__((always_inline)) {
        UInts pairs[vectors][kPairsInWord<Format>];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) decode_pairs<Format, normal, (Tokens > 4)>(word[v], book, pairs[v]);
#pragma GCC unroll 4
        for (int p = 0; p < kPairsInWord<Format>; ++p) {
#pragma GCC unroll 16
          for (int t = 0; t < Tokens; ++t) {
            const BFloat16Pair& factor = values[p * Tokens + t];
#pragma GCC unroll 2
            for (int v = 0; v < vectors; ++v) {
              Vec<float>& to = sum[s][v][t];
              // Where chains of sums are long, or products many, broadcasts hide behind them.
              constexpr bool in_product = kWords > 0 ? Tokens <= 4 : Tokens == 4;
              to = in_product ? fma_splat(pairs[v][p], factor, to) : fma(pairs[v][p], splat(factor), to);
            }
          }
        }
      };
      bool normal = true;
      if constexpr (Format == WeightFormat::kFp8) {
        for (int v = 0; v < vectors; ++v) normal = normal && all_normal_e4m3(word[v]);
      }
      if (normal) {
        add_words(std::true_type{});
      } else {
        add_words(std::false_type{});
      }
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < Segments; ++s) {
    // Steps start with whole sets of segments of the least group.
    const uint64_t from = kWords ? first : first + s * step.segment;
    const uint64_t group = step.first_group + (kWords ? from / kLeastGroup : from >> step.group_shift);
    const Vec<float>* scales = step.scales + group % lanes + (kWords ? s : 0);
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 16
      for (int t = 0; t < Tokens; ++t) {
        total[v * Tokens + t] = fma(sum[s][v][t], scales[v * lanes], total[v * Tokens + t]);
      }
    }
  }
}

// Adds a step, whose segments are whole, to total[vector][token]. A sum is a chain of additions, and few tokens have too few of them to
// hide their latency: they add several segments at the same time, and keep the totals in registers.
template <WeightFormat Format, int Tokens>
__attribute__((noinline)) void add_scaled_step(const CodeStep<Tokens, BFloat16Pair>& step, const Codebook<Format>& book,
                                               Vec<float>* total) {
  constexpr int sums = kCodeVectors<Tokens> * Tokens, kept = Tokens <= 4 ? sums : 1;
  Vec<float> own[kept];
  Vec<float>* to = Tokens <= 4 ? own : total;
  if constexpr (Tokens <= 4) {
#pragma GCC unroll 8
    for (int i = 0; i < kept; ++i) own[i] = total[i];
  }
  int64_t r = 0;
  const auto add = [&](auto together, auto words, int64_t last) __attribute__((always_inline)) {
    for (; r + last <= step.count; r += together * step.segment) {
      add_segments<Format, Tokens, together, words>(step, book, r, to);
      // Keeps the totals out of the registers.
      if constexpr (Tokens > 4) asm volatile("" : : "r"(total) : "memory");
    }
  };
  const auto add_all = [&](auto words) __attribute__((always_inline)) {
    if constexpr (Tokens == 1) add(std::integral_constant<int, 4>{}, words, 4 * step.segment);
    if constexpr (Tokens <= 2) add(std::integral_constant<int, 2>{}, words, 2 * step.segment);
    add(std::integral_constant<int, 1>{}, words, 1);
  };
  constexpr int least = kCodeBits<Format> == 4 ? kLeastGroup * 4 / kWordBits : 0;
  if (least > 0 && step.segment == kLeastGroup) {
    add_all(std::integral_constant<int, least>{});
  } else {
    add_all(std::integral_constant<int, 0>{});
  }
  if constexpr (Tokens <= 4) {
#pragma GCC unroll 8
    for (int i = 0; i < kept; ++i) total[i] = own[i];
  }
}
#endif

// Adds a step to total[vector][token]. Sums of an unfinished segment stay in `open`.
template <WeightFormat Format, int Tokens, class P>
__attribute__((noinline)) void add_code_step(const CodeStep<Tokens, P>& step, const Codebook<Format>& book,
                                             Vec<SumOf<P>>* total, Vec<SumOf<P>>* open) {
  using S = SumOf<P>;
  constexpr int lanes = kLanes<S>, in_word = kWordBits / kCodeBits<Format>, vectors = kCodeVectors<Tokens>;
  const P* values = step.x;
  Vec<S> sum[vectors][Tokens];
#pragma GCC unroll 16
  for (int i = 0; i < vectors * Tokens; ++i) sum[i / Tokens][i % Tokens] = open[i];
  for (int64_t r = 0; r < step.count; r += step.run) {
    const Vec<float>* scales = step.scales + ((step.first_group + (r >> step.group_shift)) % lanes);
    const int64_t last_word = (std::min(step.count, r + step.run) + in_word - 1) / in_word;
    for (int64_t i = r / in_word; i < last_word; ++i) {
      UInts word[vectors];
      bool normal = true;
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        step.words.fetch_ahead(v, i);
        word[v] = step.words.at(v, i);
        if constexpr (Format == WeightFormat::kFp8) normal = normal && all_normal_e4m3(word[v]);
      }
      const auto add_words = [&](auto normal) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) {
          // Loaded again for each vector, as an operand of the product: keeping the values would leave too few registers for
          // the sums.
          const P* factors = values;
          asm volatile("" : "+r"(factors));
          const auto add = [&](int place, Vec<P> weights) __attribute__((always_inline)) {
#pragma GCC unroll 16
            for (int t = 0; t < Tokens; ++t) sum[v][t] = fma(weights, splat(factors[place * Tokens + t]), sum[v][t]);
          };
          const Vec<float> scale = scales[v * lanes];
          [&]<int... Place>(std::integer_sequence<int, Place...>) __attribute__((always_inline)) {
            (add(Place, decode_place<Format, Place, normal>(word[v], book) * scale), ...);
          }(std::make_integer_sequence<int, in_word>{});
        }
      };
      if (normal) {
        add_words(std::true_type{});
      } else {
        add_words(std::false_type{});
      }
      values += in_word / kTerms<P> * Tokens;
    }
    // A segment is a power of two.
    if (((r + step.run) & (step.segment - 1)) != 0 && !(step.last && r + step.run >= step.count)) continue;
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 16
      for (int t = 0; t < Tokens; ++t) {
        Vec<S>& to = total[v * Tokens + t];
        to += sum[v][t];
        sum[v][t] = Vec<S>{};
      }
    }
    // Keeps the totals out of the registers.
    asm volatile("" : : "r"(total) : "memory");
  }
#pragma GCC unroll 16
  for (int i = 0; i < vectors * Tokens; ++i) open[i] = sum[i / Tokens][i % Tokens];
}

// c[row][token], or c[token][row], = the products of the rows n .. n+count with Tokens tokens, stored at x index by index along the
// depth.
template <WeightFormat Format, int Tokens, class P>
void few_tokens_product_of(const QuantizedMatrix& w, int64_t n, int64_t count, const P* x, SumOf<P>* c, int64_t c_stride,
                           bool by_token) {
  using S = SumOf<P>;
  constexpr int lanes = kLanes<S>, bits = kCodeBits<Format>, vectors = kCodeVectors<Tokens>, height = vectors * lanes;
  constexpr int64_t columns = kTileColumns<P>;
  const Codebook<Format> book(*w.weights);
  const int64_t depth = w.depth(), segment = segment_columns<P>(w);
  const int shift = std::min(w.weights->column_shift, 40);
  const int64_t run = std::min(segment, int64_t{1} << shift);
  alignas(64) uint8_t words[CodeWords<vectors>::room(columns * bits / kWordBits)];
  for (int64_t i = 0; i < count; i += height) {
    CodeRows<vectors> rows(w, n + i, n + count);
    Vec<S> total[vectors * Tokens] = {};
    [[maybe_unused]] Vec<S> open[vectors * Tokens] = {};
    for (int64_t k = 0; k < depth; k += columns) {
      const int64_t last = std::min(depth, k + columns);
      const CodeStep<Tokens, P> step{rows.words(k, columns, words),
                                     x + k / kTerms<P> * Tokens,
                                     rows.scales(k >> shift),
                                     last - k,
                                     run,
                                     segment,
                                     shift,
                                     k >> shift,
                                     last == depth};
      if constexpr (kScalesSums<P>) {
#if GOSSAMER_BF16_DOT
        add_scaled_step<Format, Tokens>(step, book, total);
#endif
      } else {
        add_code_step<Format, Tokens, P>(step, book, total, open);
      }
    }
    store_totals<Tokens, vectors>(total, c, c_stride, i, count, by_token);
  }
}

// Whether a tile's totals stay in registers together with its sums, which helps if segments are short, and the tiles for which
// they do.
template <int Rows, int Vecs>
constexpr bool kKeepsTotals = 2 * Rows * Vecs + Vecs < 30;
template <int Vecs>
constexpr int kShortTileRows = Vecs == 1 ? 8 : 4;

// block_product() of a tile of codes, whose rows are kDepth apart: the sum of each segment times the scale of row and segment, at
// scales[segment · kGroup + row].
template <int Rows, int Vecs, bool Half, class P>
__attribute__((noinline)) void scaled_block_product(const P* a, const P* b, int depth, int segment, bool first,
                                                    const float* scales, float* c, int64_t c_stride, NearLines& ahead) {
  NearLines lines = ahead;
  if constexpr (kKeepsTotals<Rows, Vecs>) {
    Vec<float> total[Rows][Vecs] = {};
    const auto each = [&](auto&& f) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < Vecs; ++v) f(total[i][v], i, v);
      }
    };
    if (!first)
      each([&](Vec<float>& t, int i, int v) __attribute__((always_inline)) { t = load(c + i * c_stride + v * kLanes<float>); });
    for (int k = 0; k < depth; k += segment, scales += kGroup) {
      Vec<float> sum[Rows][Vecs] = {};
      accumulate<P, Half>(sum, a + k, kDepth, 1, b + k * Vecs * kLanes<P>, std::min(segment, depth - k), lines);
      each([&](Vec<float>& t, int i, int v) __attribute__((always_inline)) { t = fma(sum[i][v], splat(scales[i]), t); });
    }
    each([&](Vec<float>& t, int i, int v) __attribute__((always_inline)) { store(c + i * c_stride + v * kLanes<float>, t); });
    ahead = lines;
    return;
  }
  for (int k = 0; k < depth; k += segment, scales += kGroup) {
    Vec<float> sum[Rows][Vecs] = {};
    accumulate<P, Half>(sum, a + k, kDepth, 1, b + k * Vecs * kLanes<P>, std::min(segment, depth - k), lines);
    const bool fresh = first && k == 0;
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) {
        float* to = c + i * c_stride + v * kLanes<float>;
        store(to, fma(sum[i][v], splat(scales[i]), fresh ? Vec<float>{} : load(to)));
      }
    }
  }
  ahead = lines;
}

// Whether products of few rows have the rows of such a weight in their lanes, so that their sums may stay rows of tokens.
template <class P, class W>
constexpr bool kSumsByToken = std::is_same_v<W, QuantizedMatrix> && kDecodesFew<P>;

// c[row][token] = the products of x.few.
template <class P>
void few_product(const QuantizedMatrix& w, int64_t n, int64_t count, const QuantizedOperand<P>& x, SumOf<P>* c,
                 int64_t c_stride, bool by_token) {
  with_few_tokens<kFewQuantized>(x.panel.width, [&](auto tokens) {
    visit_format(w.weights->format,
                 [&](auto format) { few_tokens_product_of<format, tokens>(w, n, count, x.few, c, c_stride, by_token); });
  });
}

// c[token][row] = the sums of group_product() for at most kFewQuantized tokens; whole vectors of rows are written.
template <class P>
void token_rows_product(const QuantizedMatrix& w, int64_t n, int64_t count, const QuantizedOperand<P>& x, SumOf<P>* c,
                        int64_t c_stride) {
  if (x.rounded) return int8_group_product(w, n, count, *x.rounded, c, c_stride, true);
  few_product(w, n, count, x, c, c_stride, true);
}

// group_product() of tile_gemm.h: the same sums in the same order.
template <class P>
void group_product(const QuantizedMatrix& w, int64_t n, int64_t count, const QuantizedOperand<P>& x, SumOf<P>* c,
                   int64_t c_stride, P* pack) {
  using T = Term<P>;
  const Panel<P>& panel = x.panel;
  if constexpr (!std::is_same_v<P, double>) {
    if (x.rounded) return int8_group_product(w, n, count, *x.rounded, c, c_stride, false);
  }
  if constexpr (kDecodesFew<P>) {
    if (x.few) return few_product(w, n, count, x, c, c_stride, false);
  }
  constexpr int room = kTileColumns<P>;
  // Sums are not scaled where the scales' columns are the rows of the product.
  const bool scales_sums = kScalesSums<P> && !w.transposed;
  alignas(64) T tile[kGroup * room];
  alignas(64) float scales[room / 32 * kGroup];
  const int segment = static_cast<int>(scales_sums ? segment_columns<P>(w) / kTerms<P> : segment_of<P>(w.depth()));
  for (int64_t i = 0; i < count; i += kGroup) {
    const int rows = static_cast<int>(std::min<int64_t>(kGroup, count - i));
    [[maybe_unused]] ScalesOfRows scales_of_rows(w, scales_sums ? n + i : 0, scales_sums ? n + i + rows : 1);
    for (int64_t k = 0; k < w.depth(); k += room) {
      const int terms = static_cast<int>(std::min<int64_t>(room, w.depth() - k));
      const int depth = (terms + kTerms<P> - 1) / kTerms<P>;
      NearLines ahead;
      if (w.transposed) {
        decode_tile<true>(w, k, terms, n + i, rows, tile, kGroup);
        const Weight<T> decoded{tile, 1, kGroup, rows, terms};
        if constexpr (kTiled<P>) {
          pack_transposed(decoded, 0, rows, 0, terms, pack);
        } else {
          pack_columns(decoded, 0, rows, 0, terms, pack);
        }
      } else {
        if constexpr (std::is_same_v<T, P>) {
          decode_tile<true>(w, n + i, rows, k, terms, pack, kDepth);
          std::fill(pack + rows * kDepth, pack + (rows + 3) / 4 * 4 * kDepth, P{});
        } else if constexpr (kScalesSums<P>) {
          decode_tile<false>(w, n + i, rows, k, terms, reinterpret_cast<T*>(pack), room);
          for (int j = 0; terms % 2 && j < rows; ++j) pack[j * kDepth + depth - 1].terms[1] = BFloat16{0};
          std::fill(pack + rows * kDepth, pack + (rows + 3) / 4 * 4 * kDepth, P{});
          scales_of_rows.at(k, k + terms, segment * kTerms<P>, scales);
        } else {
          decode_tile<true>(w, n + i, rows, k, terms, tile, room);
          pack_rows(Weight<T>{tile, room, 1, rows, terms}, 0, rows, 0, terms, pack);
        }
        ahead = tile_ahead(w, n + i, rows, k, room);
        ahead.share_among((rows + 3) / 4 * panel.num_blocks() * depth);
      }
      if constexpr (kTiled<P>) {
        tiled_product(pack, kDepth, rows, panel, k / kTerms<P>, depth, k == 0, c + i * c_stride, c_stride, ahead);
      } else {
        for (int64_t block = 0; block < panel.num_blocks(); ++block) {
          with_block(panel, block, [&](auto vectors, auto half) {
            const P* b = panel.block(block) + k / kTerms<P> * vectors * kLanes<P>;
            if constexpr (kScalesSums<P>) {
              if (scales_sums && 4 * segment <= kDepth) {
                return for_tiles<kShortTileRows<vectors>>(rows, [&](auto height, int64_t j) {
                  float* to = c + (i + j) * c_stride + block * kPanelWidth<P>;
                  scaled_block_product<height, vectors, half>(pack + j * kDepth, b, depth, segment, k == 0, scales + j, to,
                                                              c_stride, ahead);
                });
              }
            }
            for_tiles<kTileRows<vectors>>(rows, [&](auto height, int64_t j) {
              SumOf<P>* to = c + (i + j) * c_stride + block * kPanelWidth<P>;
              if (w.transposed) {
                block_product<height, vectors, 1, kGroup, half>(pack + j, 0, b, depth, segment, k == 0, to, c_stride);
                return;
              }
              if constexpr (kScalesSums<P>) {
                scaled_block_product<height, vectors, half>(pack + j * kDepth, b, depth, segment, k == 0, scales + j, to,
                                                            c_stride, ahead);
              } else {
                block_product<height, vectors, kDepth, 1, half, P, NearLines&>(pack + j * kDepth, 0, b, depth, segment, k == 0,
                                                                               to, c_stride, ahead);
              }
            });
          });
        }
      }
    }
  }
}

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
