#include "cpu/causal_conv1d.h"

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace gossamer {
namespace {

// Number of values above which a second thread is worth waking.
constexpr int64_t kValuesPerThread = int64_t{1} << 15;

int threads_for(int64_t values, int num_threads) {
  return static_cast<int>(std::clamp<int64_t>(values / kValuesPerThread, 1, num_threads));
}

// The last S values of a sequence's initial state (zeros if there is none) followed by its inputs.
template <class T>
void store_final_state(const CausalConvForwardArgs& a, int64_t n, int64_t c) {
  const int64_t length = a.sequences.size(n), size = a.state_size;
  const T* x = a.sequence<const T>(a.x, n) + c * a.x.strides[2];
  for (int64_t j = 0; j < size; ++j) {
    const int64_t at = length + j;
    T& out = a.final_state.at<T>(n, c, j);
    if (at >= size) {
      out = x[(at - size) * a.x.strides[1]];
    } else {
      out = a.initial_state ? a.initial_state.at<T>(n, c, at) : T{};
    }
  }
}

}  // namespace

void causal_conv1d(const CausalConvForwardArgs& args, int num_threads) {
  const int64_t rows = args.rows(), states = args.sequences.count * args.channels;
  parallel_team(threads_for(rows * args.channels, num_threads), [&](Team team) {
    // Divided by rows, which are the longest runs of memory, or by channels if there are few rows.
    const Team::Range all_rows{0, rows}, all_channels{0, args.channels};
    if (rows >= 16 * team.size) {
      kernels().rows.causal_conv1d(args, team.share(rows, 4), all_channels);
    } else {
      kernels().rows.causal_conv1d(args, all_rows, team.share(args.channels, 64));
    }
    if (!args.final_state) return;
    const auto [first, last] = team.share(states);
    visit_float(args.x.dtype, [&](auto tag) {
      for (int64_t i = first; i < last; ++i) {
        store_final_state<typename decltype(tag)::type>(args, i / args.channels, i % args.channels);
      }
    });
  });
}

void causal_conv1d_backward(const CausalConvBackwardArgs& args, int num_threads) {
  const int64_t sums = args.row_tiles() * (args.taps + 1) * args.channels;
  const bool wanted = args.dweight || args.dbias;
  const Scratch partial = allocate_scratch(wanted ? sums * (args.x.dtype == DType::kFloat64 ? 8 : 4) : 0);
  parallel_team(threads_for(args.rows() * args.channels, num_threads),
                [&](Team team) { kernels().rows.causal_conv1d_backward(args, wanted ? partial.get() : nullptr, team); });
}

void causal_conv1d_step(const CausalConvStepArgs& args, int num_threads) {
  parallel_ranges(args.batch * args.channels, kValuesPerThread, num_threads,
                  [&](int64_t begin, int64_t end) { kernels().rows.causal_conv1d_step(args, begin, end); });
}

}  // namespace gossamer
