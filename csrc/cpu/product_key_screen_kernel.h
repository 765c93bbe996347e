// Finds the sub-keys that can be among the highest of a query by products in 8 bits, where the processor sums products of bytes.
//
// A sub-key c = s·d + x and a query q = t·p + y have codes d and p, whole numbers of 7 bits and a sign, scales s and t, and
// remainders x and y. So ⟨c, q⟩ / t differs from s·⟨d, p⟩ by at most |s·d|·|y/t| + |x|·(|p| + |y/t|). These bounds leave about twice as
// many sub-keys as are wanted; only their products are computed in float32.
#pragma once

#include "cpu/dot_bytes.h"
#include "cpu/product_key_topk_kernel.h"

namespace gossamer::GOSSAMER_ISA {
namespace {

#if GOSSAMER_VNNI

// Queries that are multiplied together, and vectors of sub-keys.
constexpr int kScreened = 4, kScreenVectors = 4;
// Above this size whole products are no exact floats.
constexpr int64_t kMostScreenedHalf = 512;
// Values are coded if the largest of a row is at least the first of these and below the second; then no product is infinite.
constexpr float kLeastCoded = 0x1p-60f, kMostCoded = 0x1p50f;

// Whether screening saves time: with few sub-keys most remain.
inline bool can_screen(const ProductKeySearchArgs& a) {
  return a.side >= 16 * a.top_k && a.half <= kMostScreenedHalf && a.top_k <= kMostPairs;
}

// A row v = scale · codes + remainder, in words of four codes.
struct CodedRow {
  float scale;
  int32_t sum;                  // of the codes
  float codes_norm, rest_norm;  // Euclidean, of the codes and of the remainder over the scale
};

// Codes a row; false if its largest value is too small or too large.
inline bool code_row(const float* row, int64_t size, int64_t words, int8_t* codes, CodedRow& out) {
  constexpr int n = kLanes<float>;
  UInts most{};
  for (int64_t i = 0; i < size; i += n) {
    const UInts bits = (UInts)load_first(row + i, static_cast<int>(std::min<int64_t>(n, size - i))) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  const float largest = bits_to_float(_mm512_reduce_max_epu32((__m512i)most));
  if (!(largest >= kLeastCoded && largest < kMostCoded)) return false;
  SignedInts sums{};
  Vec<float> squares{}, rest{};
  for (int64_t i = 0; i < 4 * words; i += n) {
    const Vec<float> value = load_first(row + i, static_cast<int>(std::clamp<int64_t>(size - i, 0, n))) * (127 / largest);
    const SignedInts code = nearest_codes(value);
    const Vec<float> whole = __builtin_convertvector(code, Vec<float>), left = value - whole;
    sums += code;
    squares += whole * whole;
    rest += left * left;
    const int64_t kept = std::min<int64_t>(n, 4 * words - i);
    _mm_mask_storeu_epi8(codes + i, static_cast<__mmask16>((1u << kept) - 1), _mm512_cvtepi32_epi8((__m512i)code));
  }
  out = {largest / 127, _mm512_reduce_add_epi32((__m512i)sums), std::sqrt(sum_lanes<float>(squares)),
         std::sqrt(sum_lanes<float>(rest))};
  return true;
}

// One list of sub-keys in codes, raised by 128: of each kScreenVectors vectors of them, word after word.
struct CodedKeys {
  const float* keys;  // (side, half)
  int64_t side, half, words, padded;
  std::unique_ptr<uint32_t[]> codes;
  std::unique_ptr<float[]> scale, norm;  // s and |s·d|
  float rest = 0;                        // the largest |x| / s
  bool sound = true;

  CodedKeys(const float* keys, int64_t side, int64_t half) : keys(keys), side(side), half(half), words((half + 3) / 4) {
    constexpr int64_t n = kLanes<float>, together = kScreenVectors * n;
    padded = (side + together - 1) / together * together;
    codes.reset(new uint32_t[padded * words]());
    scale.reset(new float[padded]());
    norm.reset(new float[padded]());
    std::vector<int32_t> row(words);
    for (int64_t key = 0; key < side; ++key) {
      CodedRow coded;
      sound = code_row(keys + key * half, half, words, reinterpret_cast<int8_t*>(row.data()), coded);
      if (!sound) return;
      scale[key] = coded.scale;
      norm[key] = coded.scale * coded.codes_norm;
      rest = std::max(rest, coded.rest_norm);
      uint32_t* to = codes.get() + key / together * together * words + key % together;
      for (int64_t w = 0; w < words; ++w) to[w * together] = static_cast<uint32_t>(row[w]) ^ 0x80808080u;
    }
  }
};

// One half of kScreened queries in codes. A bound is s·margin + |s·d|·rest.
struct CodedQueries {
  std::vector<int32_t> codes;
  int32_t start[kScreened];  // makes up for raised codes, and adds the margin
  float margin[kScreened];   // |x|/s · (|p| + |y/t|), rounded up, and what roundings of float32 add
  float rest = 0;            // the largest |y/t|
  bool sound[kScreened];

  explicit CodedQueries(const CodedKeys& keys) : codes(kScreened * keys.words) {}

  template <class Query>
  void code(int64_t count, const CodedKeys& keys, const Query& query) {
    rest = 0;
    for (int64_t i = 0; i < kScreened; ++i) {
      CodedRow row{};
      sound[i] =
          i < count && code_row(query(i), keys.half, keys.words, reinterpret_cast<int8_t*>(codes.data() + i * keys.words), row);
      const float roundings = 4 + static_cast<float>(keys.half) / 16;
      const auto whole = static_cast<int32_t>(keys.rest * (row.codes_norm + row.rest_norm) + roundings);
      margin[i] = static_cast<float>(whole);
      start[i] = whole - 128 * row.sum;
      rest = std::max(rest, row.rest_norm);
    }
  }
};

// Upper bounds (kScreened, padded) of the scores of queries, in units of the queries' scales.
inline void bound_scores(const CodedQueries& queries, const CodedKeys& keys, float* upper) {
  constexpr int n = kLanes<float>, together = kScreenVectors * n;
  const int64_t words = keys.words;
  for (int64_t key = 0; key < keys.padded; key += together) {
    const uint32_t* codes = keys.codes.get() + key * words;
    SignedInts sums[kScreened][kScreenVectors];
    for (int q = 0; q < kScreened; ++q) {
      for (auto& sum : sums[q]) sum = queries.start[q] - SignedInts{};
    }
    for (int64_t w = 0; w < words; ++w, codes += together) {
      UInts of[kScreenVectors];
      for (int v = 0; v < kScreenVectors; ++v) of[v] = load_bytes<UInts>(codes + v * n);
      for (int q = 0; q < kScreened; ++q) {
        const UInts word = static_cast<uint32_t>(queries.codes[q * words + w]) - UInts{};
        for (int v = 0; v < kScreenVectors; ++v) sums[q][v] = dot_bytes(of[v], word, sums[q][v]);
      }
    }
    for (int v = 0; v < kScreenVectors; ++v) {
      const Vec<float> scale = load(keys.scale.get() + key + v * n), slack = load(keys.norm.get() + key + v * n) * queries.rest;
      for (int q = 0; q < kScreened; ++q) {
        store(upper + q * keys.padded + key + v * n, fma(__builtin_convertvector(sums[q][v], Vec<float>), scale, slack));
      }
    }
  }
}

// Bounds that `wanted` of the lower bounds of each query reach, and few more: see rank_scores().
inline void reached_bounds(const float* upper, const CodedQueries& queries, const CodedKeys& keys, int64_t wanted,
                           float (&reached)[kScreened]) {
  constexpr int n = kLanes<float>;
  constexpr int64_t most_sets = 4 * kMostPairs / n;
  const int64_t vectors = keys.side / n, sets = std::min((4 * wanted + n - 1) / n, most_sets);
  alignas(64) float maxima[kScreened][most_sets * n];
  const Vec<float> none = splat(kMaskedKey), twice = splat(2 * queries.rest);
  for (int64_t set = 0; set < sets; ++set) {
    __m512 highest[kScreened];
    for (auto& h : highest) h = (__m512)none;
    for (int64_t v = set; v < vectors; v += sets) {
      const Vec<float> scale = load(keys.scale.get() + v * n), gap = load(keys.norm.get() + v * n) * twice;
      for (int q = 0; q < kScreened; ++q) {
        const Vec<float> lower = load(upper + q * keys.padded + v * n) - fma(scale, splat(2 * queries.margin[q]), gap);
        highest[q] = _mm512_max_ps(highest[q], (__m512)lower);
      }
    }
    for (int q = 0; q < kScreened; ++q) _mm512_store_ps(maxima[q] + set * n, highest[q]);
  }
  // Queries take turns, since each step waits for the one before it.
  float least[kScreened], most[kScreened];
  for (int q = 0; q < kScreened; ++q) {
    __m512 low = _mm512_load_ps(maxima[q]), high = low;
    for (int64_t set = 1; set < sets; ++set) {
      const __m512 x = _mm512_load_ps(maxima[q] + set * n);
      low = _mm512_min_ps(low, x);
      high = _mm512_max_ps(high, x);
    }
    least[q] = _mm512_reduce_min_ps(low);
    most[q] = _mm512_reduce_max_ps(high);
  }
  for (int step = 0; step < 7; ++step) {
    for (int q = 0; q < kScreened; ++q) {
      const float middle = least[q] + (most[q] - least[q]) / 2;
      const __m512 bound = _mm512_set1_ps(middle);
      int64_t count = 0;
      for (int64_t set = 0; set < sets; ++set) {
        count += __builtin_popcount(_mm512_cmp_ps_mask(_mm512_load_ps(maxima[q] + set * n), bound, _CMP_GE_OQ));
      }
      const bool enough = count >= wanted;
      least[q] = enough ? middle : least[q];
      most[q] = enough ? most[q] : middle;
    }
  }
  std::copy_n(least, kScreened, reached);
}

// The sub-keys whose upper bounds reach `reached`, in their order; returns how many.
inline int64_t screen(const float* upper, int64_t side, float reached, int32_t* found) {
  constexpr int n = kLanes<float>;
  const __m512 reach = _mm512_set1_ps(reached);
  __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t count = 0;
  const auto keep = [&](__mmask16 mask) __attribute__((always_inline)) {
    _mm512_storeu_si512(found + count, _mm512_maskz_compress_epi32(mask, index));
    count += __builtin_popcount(mask);
    index = _mm512_add_epi32(index, _mm512_set1_epi32(n));
  };
  int64_t at = 0;
  for (; at + n <= side; at += n) keep(_mm512_cmp_ps_mask(_mm512_loadu_ps(upper + at), reach, _CMP_GE_OQ));
  if (at < side) {
    const auto valid = static_cast<__mmask16>((1u << (side - at)) - 1);
    keep(_mm512_mask_cmp_ps_mask(valid, _mm512_loadu_ps(upper + at), reach, _CMP_GE_OQ));
  }
  return count;
}

// Ranks whole vectors of values by counting how many are ahead of each; values beyond `count` are -inf.
template <int kVectors>
inline void rank_vectors(const float* values, const int32_t* index, int64_t count, Ranking& best) {
  constexpr int n = kLanes<float>;
  __m512 of[kVectors];
  __m512i ahead[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    of[v] = (__m512)load(values + v * n);
    ahead[v] = _mm512_setzero_si512();
  }
  const __m512i one = _mm512_set1_epi32(1);
  for (int from = 0; from < kVectors; ++from) {
    for (int lane = 0; lane < n; ++lane) {
      const __m512 value = (__m512)splat(values[from * n + lane]);
      for (int v = 0; v < kVectors; ++v) {
        // Of equal values the first is ahead.
        __mmask16 higher;
        if (v < from) {
          higher = _mm512_cmp_ps_mask(value, of[v], _CMP_GT_OQ);
        } else if (v > from) {
          higher = _mm512_cmp_ps_mask(value, of[v], _CMP_GE_OQ);
        } else {
          const auto later = static_cast<__mmask16>(0xfffeu << lane);
          higher = _mm512_cmp_ps_mask(value, of[v], _CMP_GT_OQ) | _mm512_mask_cmp_ps_mask(later, value, of[v], _CMP_EQ_OQ);
        }
        ahead[v] = _mm512_mask_add_epi32(ahead[v], higher, ahead[v], one);
      }
    }
  }
  alignas(64) int32_t place[kVectors * n];
  for (int v = 0; v < kVectors; ++v) _mm512_store_si512(place + v * n, ahead[v]);
  for (int64_t i = 0; i < count; ++i) {
    best.value[place[i]] = values[i];
    best.index[place[i]] = index[i];
  }
  best.filled = std::min(best.size, count);
}

// Ranks `count` finite values with their indices; there is room for a vector behind both.
inline void rank_found(float* values, const int32_t* index, int64_t count, Ranking& best) {
  constexpr int n = kLanes<float>;
  store(values + count, splat(kMaskedKey));
  if (count <= n) return rank_vectors<1>(values, index, count, best);
  if (count <= 2 * n) return rank_vectors<2>(values, index, count, best);
  if (count <= 3 * n) return rank_vectors<3>(values, index, count, best);
  for (int64_t i = 0; i < count; ++i) best.show(values[i], index[i]);
}

// Searches groups of queries [begin, end) of one group of sub-keys.
inline void screened_search(const ProductKeySearchArgs& a, int64_t group, const CodedKeys (&keys)[2], int64_t begin,
                            int64_t end) {
  const int64_t padded = keys[0].padded, room = a.side + kLanes<float>;
  const std::unique_ptr<float[]> upper(new float[2 * kScreened * padded]), values(new float[2 * room]);
  const std::unique_ptr<int32_t[]> found(new int32_t[room]);
  CodedQueries queries[2] = {CodedQueries(keys[0]), CodedQueries(keys[1])};
  for (int64_t at = begin; at < end; at += kScreened) {
    const int64_t count = std::min<int64_t>(kScreened, end - at);
    const auto query = [&](int64_t i, int64_t list) {
      return a.queries + ((at + i) * a.groups + group) * a.row_stride + list * a.half;
    };
    float reached[2][kScreened];
    for (int64_t list = 0; list < 2; ++list) {
      float* bounds = upper.get() + list * kScreened * padded;
      queries[list].code(count, keys[list], [&](int64_t i) { return query(i, list); });
      bound_scores(queries[list], keys[list], bounds);
      reached_bounds(bounds, queries[list], keys[list], a.top_k, reached[list]);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = (at + i) * a.groups + group;
      if (!queries[0].sound[i] || !queries[1].sound[i]) {
        float* scores = values.get();
        for (int64_t list = 0; list < 2; ++list) {
          float* to = scores + list * room;
          const float* row = query(i, list);
          std::fill_n(to, a.side, 0.0f);
          // Zero queries, as of padding, are common.
          if (std::all_of(row, row + a.half, [](float v) { return v == 0; })) continue;
          for (int64_t key = 0; key < a.side; ++key) to[key] = row_dot(keys[list].keys + key * a.half, row, a.half);
        }
        if (!search_pairs(scores, a.side, scores + room, a.side, a.top_k, nullptr, a.ids + place * a.top_k)) {
          __atomic_store_n(a.bad, true, __ATOMIC_RELAXED);
        }
        score_pairs(a, place);
        continue;
      }
      Ranking best[2] = {Ranking(a.top_k), Ranking(a.top_k)};
      for (int64_t list = 0; list < 2; ++list) {
        const float* bounds = upper.get() + (list * kScreened + i) * padded;
        const int64_t number = screen(bounds, a.side, reached[list][i], found.get());
        for (int64_t k = 0; k < number; ++k) {
          values[k] = row_dot(keys[list].keys + found[k] * a.half, query(i, list), a.half);
        }
        rank_found(values.get(), found.get(), number, best[list]);
      }
      choose_pairs(best[0], best[1], a.side, a.scores + place * a.top_k, a.ids + place * a.top_k);
    }
  }
}

#endif

}  // namespace
}  // namespace gossamer::GOSSAMER_ISA
