#include "cuda/grouped_matmul.cuh"

#include <atomic>

#include "cuda/hopper/launch.cuh"
#include "cuda/hopper/plain_finish.cuh"

namespace gossamer::cuda {
namespace {

using namespace hopper;

template <typename T>
using Gathered = RowProduct<Shape<T, 128, 256, 4, false, true>, PlainFinish<T>>;
template <typename T>
using Wide = RowProduct<Shape<T, 128, 256, 4, false, false>, PlainFinish<T>>;
// For short sums, or where 192 columns waste less, ping-pong: the stores of one tile overlap the product of the next.
template <typename T>
using Alternating = RowProduct<Shape<T, 128, 192, 4, true, false>, PlainFinish<T>>;
// For many rows per expert.
template <typename T>
using PairedGathered = RowProduct<Shape<T, 128, 256, 4, false, true, 2>, PlainFinish<T>>;
template <typename T>
using PairedWide = RowProduct<Shape<T, 128, 256, 4, false, false, 2>, PlainFinish<T>>;
// For few rows per expert.
template <typename T>
using FewGathered = RowProduct<Shape<T, 64, 256, 4, true, true>, PlainFinish<T>>;
template <typename T>
using FewSorted = RowProduct<Shape<T, 64, 256, 4, true, false>, PlainFinish<T>>;

constexpr int64_t kShort = 1024;

std::atomic<int64_t> least_paired{1024};

template <class Problem>
const char* run(PlainParams params, const GroupedMatmulArgs& args, const Where& where) {
  using S = typename Problem::S;
  params.product.num_columns = static_cast<int32_t>(divide_up(args.n, S::kBlockN));
  return launch<Problem>(params, most_row_tiles(args.routing, S::kTileRows) * params.product.num_columns, where);
}

template <typename T>
const char* choose(const PlainParams& params, const GroupedMatmulArgs& args, const Where& where) {
  const bool gathered = args.x.div != 0, paired = many_rows(args.routing);
  if (few_rows(args.routing) && !paired) {
    return gathered ? run<FewGathered<T>>(params, args, where) : run<FewSorted<T>>(params, args, where);
  }
  if (gathered) {
    return paired ? run<PairedGathered<T>>(params, args, where) : run<Gathered<T>>(params, args, where);
  }
  const int64_t wide = divide_up(args.n, 256) * 256, narrow = divide_up(args.n, 192) * 192;
  const bool alternate = args.c <= kShort ? narrow <= wide + wide / 8 : narrow < wide;
  if (alternate) return run<Alternating<T>>(params, args, where);
  return paired ? run<PairedWide<T>>(params, args, where) : run<Wide<T>>(params, args, where);
}

}  // namespace

bool with_hopper() { return true; }

int64_t paired_from() { return least_paired; }

void set_paired_from(int64_t rows) { least_paired = rows; }

const char* grouped_matmul(const GroupedMatmulArgs& args, const Where& where) {
  PlainParams params{};
  if (const char* error = encode_rows(&params.product.x_map, args.bfloat16, args.x)) return error;
  if (const char* error = encode_weight(&params.product.w_map, args.bfloat16, args.weight)) return error;
  params.product.experts = experts_of(args.routing);
  params.product.x = rows_of(args.x);
  params.product.steps = static_cast<int32_t>(divide_up(args.c, kPanel));
  params.product.w_transposed = args.weight.transposed;
  params.y = args.y;
  params.bias = args.bias;
  params.stride_y = args.n;
  params.n = static_cast<int32_t>(args.n);
  params.scatter = args.scatter;
  params.zero_dropped = args.zero_dropped;
  params.aligned = vectors_fit(args.y, args.n);
  params.bias_aligned = vectors_fit(args.bias, args.n);
  return args.bfloat16 ? choose<__nv_bfloat16>(params, args, where) : choose<__half>(params, args, where);
}

}  // namespace gossamer::cuda
