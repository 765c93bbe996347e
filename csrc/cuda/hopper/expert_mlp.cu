#include "cuda/expert_mlp.cuh"

#include "cuda/hopper/glu_finish.cuh"
#include "cuda/hopper/launch.cuh"

namespace gossamer::cuda {
namespace {

using namespace hopper;

template <typename T>
using Up = RowProduct<Shape<T, 128, 256, 4, false, true>, GluFinish<T>>;
// The epilogue moves more data than the product, so it must overlap the next product.
template <typename T>
using DownBackward = RowProduct<Shape<T, 128, 128, 6, true, true>, GluBackwardFinish<T>>;
// For many rows per expert.
template <typename T>
using PairedUp = RowProduct<Shape<T, 128, 256, 4, false, true, 2>, GluFinish<T>>;
template <typename T>
using PairedDownBackward = RowProduct<Shape<T, 128, 128, 6, true, true, 2>, GluBackwardFinish<T>>;
// For few rows per expert.
template <typename T>
using FewUp = RowProduct<Shape<T, 64, 256, 4, true, true>, GluFinish<T>>;
template <typename T>
using FewDownBackward = RowProduct<Shape<T, 64, 128, 8, true, true>, GluBackwardFinish<T>>;

constexpr int kUpColumns = 256;
constexpr int kBackwardColumns = 128;

PreactLayout layout_of(const ActivationView& activation, int64_t inner) {
  return {static_cast<int32_t>(inner),
          {activation.code, activation.gated, activation.interleaved, activation.alpha, activation.limit},
          false};
}

const char* product_of(RowProductParams& product, bool bfloat16, const RoutingView& routing, const RowsView& x,
                       const WeightView& weight, int64_t c, int64_t num_columns) {
  product.experts = experts_of(routing);
  product.x = rows_of(x);
  product.num_columns = static_cast<int32_t>(num_columns);
  product.steps = static_cast<int32_t>(divide_up(c, kPanel));
  product.w_transposed = weight.transposed;
  return encode_weight(&product.w_map, bfloat16, weight);
}

template <class Problem, class Params>
const char* run(const Params& params, const RoutingView& routing, const Where& where) {
  return launch<Problem>(params, most_row_tiles(routing, Problem::S::kTileRows) * params.product.num_columns, where);
}

// By the tiles that suit the mean rows of an expert.
template <class Usual, class Paired, class Few, class Params>
const char* choose(const Params& params, const RoutingView& routing, const Where& where) {
  if (many_rows(routing)) return run<Paired>(params, routing, where);
  return few_rows(routing) ? run<Few>(params, routing, where) : run<Usual>(params, routing, where);
}

template <typename T>
constexpr auto up = choose<Up<T>, PairedUp<T>, FewUp<T>, GluParams>;
template <typename T>
constexpr auto down_backward = choose<DownBackward<T>, PairedDownBackward<T>, FewDownBackward<T>, GluBackwardParams>;

}  // namespace

const char* expert_up(const ExpertUpArgs& args, const Where& where) {
  const bool halves = args.activation.gated && !args.activation.interleaved;
  const int64_t num_columns = divide_up(args.inner, args.activation.gated ? kUpColumns / 2 : kUpColumns);
  GluParams params{};
  if (const char* error = product_of(params.product, args.bfloat16, args.routing, args.x, args.gate_up, args.c, num_columns)) {
    return error;
  }
  params.product.second_half = halves ? static_cast<int32_t>(args.inner) : 0;
  params.layout = layout_of(args.activation, args.inner);
  params.layout.aligned = vectors_fit(args.act, args.inner) && vectors_fit(args.preact, args.inner);
  params.act = args.act;
  params.preact = args.preact;
  params.bias = args.bias;
  params.bias_aligned = vectors_fit(args.bias, args.inner);
  return args.bfloat16 ? up<__nv_bfloat16>(params, args.routing, where) : up<__half>(params, args.routing, where);
}

int64_t expert_down_backward_columns(int64_t inner) { return divide_up(inner, kBackwardColumns); }

const char* expert_down_backward(const ExpertDownBackwardArgs& args, const Where& where) {
  const int64_t num_columns = expert_down_backward_columns(args.inner);
  GluBackwardParams params{};
  if (const char* error = product_of(params.product, args.bfloat16, args.routing, args.dy, args.down, args.c, num_columns)) {
    return error;
  }
  params.layout = layout_of(args.activation, args.inner);
  params.layout.aligned =
      vectors_fit(args.preact, args.inner) && vectors_fit(args.dpreact, args.inner) && vectors_fit(args.act, args.inner);
  params.preact = args.preact;
  params.dpreact = args.dpreact;
  params.act = args.act;
  params.partial = args.partial;
  params.weights = args.weights;
  params.weights_float32 = args.weights_float32;
  return args.bfloat16 ? down_backward<__nv_bfloat16>(params, args.routing, where)
                       : down_backward<__half>(params, args.routing, where);
}

}  // namespace gossamer::cuda
