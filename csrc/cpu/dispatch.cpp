#include "cpu/dispatch.h"

#include <omp.h>

#include <algorithm>
#include <vector>

namespace gossamer {
namespace {

// Below this many slots per thread, starting it costs more than it saves.
constexpr int64_t kSlotsPerThread = 8192;

template <class Id>
int64_t sort_slots(const DispatchArgs& a, int num_threads) {
  const auto* ids = static_cast<const Id*>(a.expert_ids);
  const int64_t num_slots = a.num_tokens * a.top_k, buckets = a.num_experts + 1;
  const int threads = static_cast<int>(std::clamp<int64_t>(num_slots / kSlotsPerThread, 1, num_threads));
  std::vector<int64_t> first_negative(threads, -1);
  std::vector<int32_t> counts(static_cast<size_t>(threads) * buckets, 0);
  std::vector<int32_t> expert_of(num_slots);
  bool negative = false;

#pragma omp parallel num_threads(threads)
  {
    // The team may be smaller than requested, so ranges depend on its actual size.
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = num_slots * thread / team, end = num_slots * (thread + 1) / team;
    int32_t* count = counts.data() + thread * buckets;
    int64_t token = begin / a.top_k, k = begin % a.top_k;
    for (int64_t slot = begin; slot < end; ++slot) {
      const int64_t id = ids[token * a.token_stride + k * a.slot_stride];
      if (id < 0) {
        first_negative[thread] = slot;
        break;
      }
      const auto expert = static_cast<int32_t>(std::min(id, a.num_experts));
      expert_of[slot] = expert;
      ++count[expert];
      if (++k == a.top_k) {
        k = 0;
        ++token;
      }
    }
#pragma omp barrier
#pragma omp single
    {
      negative = std::any_of(first_negative.begin(), first_negative.end(), [](int64_t s) { return s >= 0; });
      // Each (expert, thread) pair's count becomes the position of its first slot.
      int32_t place = 0;
      for (int64_t e = 0; e < buckets; ++e) {
        a.offsets[e] = place;
        for (int t = 0; t < team; ++t) {
          const int32_t mine = counts[t * buckets + e];
          counts[t * buckets + e] = place;
          place += mine;
        }
      }
    }
    if (!negative) {
      for (int64_t slot = begin; slot < end; ++slot) {
        const int32_t row = count[expert_of[slot]]++;
        a.slots[row] = static_cast<int32_t>(slot);
        a.rows[slot] = row;
      }
    }
  }
  for (const int64_t slot : first_negative) {
    if (slot >= 0) return slot;
  }
  return -1;
}

}  // namespace

int64_t dispatch(const DispatchArgs& args, int num_threads) {
  return args.wide ? sort_slots<int64_t>(args, num_threads) : sort_slots<int32_t>(args, num_threads);
}

}  // namespace gossamer
