// Products with quantised weights for one instruction set.
//
// Codes are decoded in registers for few tokens, and into a tile of weights for many. With kScalesSums, sums are over the codes
// themselves, and each segment of segment_columns() is multiplied by the scale of its columns. A token's sums are the same
// either way.
#pragma once

#include "cpu/memory.h"
#include "cpu/quantized_decode_kernel.h"
#include "cpu/tile_gemm.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

// Maximum number of tokens for decoding with weight rows in the lanes: as many as leave registers for a vector of rows.
constexpr int kFewQuantized = GOSSAMER_VECTOR_BYTES / sizeof(float);
// Which products do so: tiles multiply as many rows at a time anyway, and float64 does not need it.
template <class P>
constexpr bool kDecodesFew = !kTiled<P> && !std::is_same_v<P, double>;
// Number of vectors of rows, which hide the latency of each other's additions.
template <int Tokens>
constexpr int kCodeVectors = Tokens < kFewQuantized ? 2 : 1;

// The units of weight rows that are handed out in quarters; see quartered() of gemm.h.
template <class P>
GOSSAMER_INLINE int64_t quartered(const QuantizedMatrix&, int64_t tokens, int64_t units) {
  return tokens <= kFewQuantized || kTiled<P> ? 0 : units;
}

// Number of columns that are summed before the sum is added to the total.
template <class P>
int64_t segment_columns(const QuantizedMatrix& w) {
  if constexpr (kScalesSums<P>) return int64_t{1} << std::min(w.weights->column_shift, 8);
  return segment_of<P>(w.depth()) * kTerms<P>;
}

// Columns of a tile of weights, whole segments.
template <class P>
constexpr int64_t kTileColumns = kDepth * kTerms<P>;

// Number of columns of codes that are brought into the lanes together: a word of each of kLanes rows, kLanes times.
template <WeightFormat Format>
constexpr int kCodeColumns = kLanes<float> * kWordBits / kCodeBits<Format>;

// A product's other operand: the tokens as columns of a panel and, if there are few, also the values of all `few_tokens` tokens
// for each index along the depth, without the panel's padding.
template <class P>
struct QuantizedOperand {
  Panel<P> panel;
  const P* few;
};

// A thread's memory for the few tokens of a product.
template <class P>
class FewTokens {
 public:
  FewTokens() = default;
  // For products of at most `depth`.
  explicit FewTokens(int64_t depth) : memory_(allocate_scratch(padded(depth) * kFewQuantized * sizeof(P))) {}

  QuantizedOperand<P> operand(const QuantizedMatrix& w, const Panel<P>& panel) {
    if constexpr (kDecodesFew<P>) {
      if (panel.width <= kFewQuantized && !w.transposed) return {panel, copy(panel)};
    }
    return {panel, nullptr};
  }
  template <class T>
  const Panel<P>& operand(const Weight<T>&, const Panel<P>& panel) {
    return panel;
  }

 private:
  // Whole words of codes are multiplied: values past the depth are zero.
  static int64_t padded(int64_t depth) { return (packed_depth<P>(depth) + kDepth - 1) / kDepth * kDepth; }

  const P* copy(const Panel<P>& panel) {
    P* to = reinterpret_cast<P*>(memory_.get());
    with_few_tokens<kFewQuantized>(panel.width, [&](auto tokens) {
      const int64_t last = (panel.depth + kDepth - 1) / kDepth * kDepth;
      for (int64_t k = 0; k < panel.depth; ++k) {
        for (int t = 0; t < tokens; ++t) to[k * tokens + t] = panel.data[k * kLanes<P> + t];
      }
      std::memset(static_cast<void*>(to + panel.depth * tokens), 0, (last - panel.depth) * tokens * sizeof(P));
    });
    return to;
  }

  Scratch memory_;
};

// Memory for the products of a weight; only quantised weights need it.
template <class P, class W>
FewTokens<P> few_tokens_memory(const W&, int64_t depth) {
  return std::is_same_v<W, QuantizedMatrix> && kDecodesFew<P> ? FewTokens<P>(depth) : FewTokens<P>();
}

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

// One step along the depth of few_tokens_product(): columns 0 .. count of it, `run` of which share a scale and a segment at most.
template <class P>
struct CodeStep {
  const UInts* words;          // of the vectors of rows, one after another
  const uint8_t* const* rows;  // where they come from
  int64_t ahead;               // bytes from there to what is read next
  const P* x;
  const Vec<float>* scales;  // of one vector of rows after the other, kLanes groups each
  int64_t count, run, segment, group_shift, first_group;
  bool last;
};

// Adds a step to total[vector][token]. Sums of an unfinished segment stay in `open`.
template <WeightFormat Format, int Tokens, class P>
__attribute__((noinline)) void add_code_step(const CodeStep<P>& step, const Codebook<Format>& book, Vec<SumOf<P>>* total,
                                             Vec<SumOf<P>>* open) {
  using S = SumOf<P>;
  constexpr int lanes = kLanes<S>, in_word = kWordBits / kCodeBits<Format>, vectors = kCodeVectors<Tokens>;
  constexpr int64_t words_of_step = kTileColumns<P> / in_word;
  const P* values = step.x;
  Vec<S> sum[vectors][Tokens];
#pragma GCC unroll 16
  for (int i = 0; i < vectors * Tokens; ++i) sum[i / Tokens][i % Tokens] = open[i];
  for (int64_t r = 0; r < step.count; r += step.run) {
    const Vec<float>* scales = step.scales + ((step.first_group + (r >> step.group_shift)) % lanes);
    const int64_t last_word = (std::min(step.count, r + step.run) + in_word - 1) / in_word;
    for (int64_t i = r / in_word; i < last_word; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        __builtin_prefetch(step.rows[v * lanes + i % lanes] + step.ahead + i / lanes * 64, 0, 2);
        const UInts word = step.words[v * words_of_step + i];
        // Loaded again for each vector, as an operand of the product: keeping the values would leave too few registers for the
        // sums.
        const P* factors = values;
        asm volatile("" : "+r"(factors));
        const auto add = [&](int place, Vec<P> weights) __attribute__((always_inline)) {
#pragma GCC unroll 16
          for (int t = 0; t < Tokens; ++t) sum[v][t] = fma(splat(factors[place * Tokens + t]), weights, sum[v][t]);
        };
        const auto add_word = [&](auto normal) __attribute__((always_inline)) {
          if constexpr (kScalesSums<P>) {
#if GOSSAMER_BF16_DOT
            UInts pairs[kPairsInWord<Format>];
            decode_pairs<Format, normal>(word, book, pairs);
#pragma GCC unroll 4
            for (int p = 0; p < kPairsInWord<Format>; ++p) add(p, pairs[p]);
#endif
          } else {
            const Vec<float> scale = scales[v * lanes];
            [&]<int... Place>(std::integer_sequence<int, Place...>) __attribute__((always_inline)) {
              (add(Place, decode_place<Format, Place, normal>(word, book) * scale), ...);
            }(std::make_integer_sequence<int, in_word>{});
          }
        };
        if constexpr (Format == WeightFormat::kFp8) {
          if (!all_normal_e4m3(word)) {
            add_word(std::false_type{});
            continue;
          }
        }
        add_word(std::true_type{});
      }
      values += in_word / kTerms<P> * Tokens;
    }
    if ((r + step.run) % step.segment != 0 && !(step.last && r + step.run >= step.count)) continue;
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 16
      for (int t = 0; t < Tokens; ++t) {
        Vec<S>& to = total[v * Tokens + t];
        to = kScalesSums<P> ? fma(sum[v][t], scales[v * lanes], to) : to + sum[v][t];
        sum[v][t] = Vec<S>{};
      }
    }
    // Keeps the totals out of the registers.
    asm volatile("" : : "r"(total) : "memory");
  }
#pragma GCC unroll 16
  for (int i = 0; i < vectors * Tokens; ++i) open[i] = sum[i / Tokens][i % Tokens];
}

// c[row][token] = the products of the rows n .. n+count with Tokens tokens, stored at x index by index along the depth.
template <WeightFormat Format, int Tokens, class P>
void few_tokens_product_of(const QuantizedMatrix& w, int64_t n, int64_t count, const P* x, SumOf<P>* c, int64_t c_stride) {
  using S = SumOf<P>;
  constexpr int lanes = kLanes<S>, bits = kCodeBits<Format>, vectors = kCodeVectors<Tokens>, height = vectors * lanes;
  constexpr int64_t columns = kTileColumns<P>, words_of_step = columns * bits / kWordBits;
  const Codebook<Format> book(*w.weights);
  const int64_t depth = w.depth(), segment = segment_columns<P>(w);
  const int shift = std::min(w.weights->column_shift, 40);
  const int64_t run = std::min(segment, int64_t{1} << shift);
  alignas(64) UInts words[vectors * words_of_step];
  alignas(64) Vec<float> scales[vectors * lanes];
  for (int64_t i = 0; i < count; i += height) {
    const CodeRows<vectors> rows(w, n + i, n + count);
    Vec<S> total[vectors * Tokens] = {}, open[vectors * Tokens] = {};
    int64_t scaled_to = 0;  // groups whose scales have been read
    for (int64_t k = 0; k < depth; k += columns) {
      const int64_t last = std::min(depth, k + columns);
      rows.gather(k * bits / 8, (last * bits + 7) / 8, words, words_of_step);
      if (k >> shift >= scaled_to) {
        const int64_t at = k >> shift;
        scaled_to = std::min(at + lanes, w.weights->scale_columns);
        rows.gather_scales(w, at, static_cast<int>(scaled_to - at), scales);
      }
      // Far enough ahead for memory to answer: two steps, in these rows or the next.
      const int64_t place = k + 2 * columns, past = place - (depth + columns - 1) / columns * columns;
      const int64_t ahead = past < 0 ? place * bits / 8 : height * w.weights->row_bytes() + past * bits / 8;
      add_code_step<Format, Tokens, P>({words, rows.row, ahead, x + k / kTerms<P> * Tokens, scales, last - k, run, segment,
                                        shift, k >> shift, last == depth},
                                       book, total, open);
    }
    for (int v = 0; v < vectors; ++v) {
      Vec<S> out[lanes] = {};
      for (int t = 0; t < Tokens; ++t) out[t] = total[v * Tokens + t];
      transpose<S>(out);
      const int64_t first = i + v * lanes;
      for (int64_t r = 0; r < std::min<int64_t>(lanes, count - first); ++r) store(c + (first + r) * c_stride, out[r]);
    }
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
                                                    const float* scales, float* c, int64_t c_stride) {
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
      accumulate<P, Half>(sum, a + k, kDepth, 1, b + k * Vecs * kLanes<P>, std::min(segment, depth - k));
      each([&](Vec<float>& t, int i, int v) __attribute__((always_inline)) { t = fma(sum[i][v], splat(scales[i]), t); });
    }
    each([&](Vec<float>& t, int i, int v) __attribute__((always_inline)) { store(c + i * c_stride + v * kLanes<float>, t); });
    return;
  }
  for (int k = 0; k < depth; k += segment, scales += kGroup) {
    Vec<float> sum[Rows][Vecs] = {};
    accumulate<P, Half>(sum, a + k, kDepth, 1, b + k * Vecs * kLanes<P>, std::min(segment, depth - k));
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
}

// group_product() of tile_gemm.h: the same sums in the same order.
template <class P>
void group_product(const QuantizedMatrix& w, int64_t n, int64_t count, const QuantizedOperand<P>& x, SumOf<P>* c,
                   int64_t c_stride, P* pack) {
  using T = Term<P>;
  const Panel<P>& panel = x.panel;
  if constexpr (kDecodesFew<P>) {
    if (x.few) {
      return with_few_tokens<kFewQuantized>(panel.width, [&](auto tokens) {
        visit_format(w.weights->format,
                     [&](auto format) { few_tokens_product_of<format, tokens>(w, n, count, x.few, c, c_stride); });
      });
    }
  }
  constexpr int room = kTileColumns<P>;
  // Sums are not scaled where the scales' columns are the rows of the product.
  const bool scales_sums = kScalesSums<P> && !w.transposed;
  alignas(64) T tile[kGroup * room];
  alignas(64) float scales[room / 32 * kGroup];
  const int segment = static_cast<int>(scales_sums ? segment_columns<P>(w) / kTerms<P> : segment_of<P>(w.depth()));
  for (int64_t i = 0; i < count; i += kGroup) {
    const int rows = static_cast<int>(std::min<int64_t>(kGroup, count - i));
    for (int64_t k = 0; k < w.depth(); k += room) {
      const int terms = static_cast<int>(std::min<int64_t>(room, w.depth() - k));
      const int depth = (terms + kTerms<P> - 1) / kTerms<P>;
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
          // A row's scales lie side by side; a segment takes one, or shares it with the next.
          const int64_t group = k >> w.weights->column_shift;
          const int count = static_cast<int>(((k + terms - 1) >> w.weights->column_shift) - group) + 1;
          for (int j = 0; j < kGroup; ++j) {
            alignas(64) float of_row[kLanes<float>] = {};
            if (j < rows) store(of_row, w.scale_run(w.scales(n + i + j) + group, count));
            for (int s = 0; s * segment < depth; ++s) {
              scales[s * kGroup + j] = of_row[((k + s * segment * kTerms<P>) >> w.weights->column_shift) - group];
            }
          }
        } else {
          decode_tile<true>(w, n + i, rows, k, terms, tile, room);
          pack_rows(Weight<T>{tile, room, 1, rows, terms}, 0, rows, 0, terms, pack);
        }
        prefetch_tile(w, n + i, rows, k + room, std::min<int64_t>(room, w.depth() - k - terms));
      }
      if constexpr (kTiled<P>) {
        tiled_product(pack, kDepth, rows, panel, k / kTerms<P>, depth, k == 0, c + i * c_stride, c_stride, {});
      } else {
        for (int64_t block = 0; block < panel.num_blocks(); ++block) {
          with_block(panel, block, [&](auto vectors, auto half) {
            const P* b = panel.block(block) + k / kTerms<P> * vectors * kLanes<P>;
            if constexpr (kScalesSums<P>) {
              if (scales_sums && 4 * segment <= kDepth) {
                return for_tiles<kShortTileRows<vectors>>(rows, [&](auto height, int64_t j) {
                  float* to = c + (i + j) * c_stride + block * kPanelWidth<P>;
                  scaled_block_product<height, vectors, half>(pack + j * kDepth, b, depth, segment, k == 0, scales + j, to,
                                                              c_stride);
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
                                                            c_stride);
              } else {
                block_product<height, vectors, kDepth, 1, half>(pack + j * kDepth, 0, b, depth, segment, k == 0, to, c_stride);
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
