#include "cuda/hopper/launch.cuh"
#include "cuda/hopper/weight_gradient.cuh"

namespace gossamer::cuda {

const char* grouped_matmul_dweight(const GroupedDweightArgs& args, const Where& where) {
  using namespace hopper;
  WeightGradientParams params{};
  if (const char* error = encode_rows(&params.a_map, args.bfloat16, args.a)) return error;
  if (const char* error = encode_rows(&params.b_map, args.bfloat16, args.b)) return error;
  params.experts = experts_of(args.routing);
  params.a = rows_of(args.a);
  params.b = rows_of(args.b);
  params.out = args.out;
  params.stride_e = args.expert_stride;
  params.stride_m = args.outer_stride;
  params.aligned = vectors_fit(args.out, args.outer_stride) && args.expert_stride % 8 == 0;
  const auto run = [&]<typename T>(T) {
    using Problem = WeightGradient<Shape<T, 128, 256, 4, false, true>>;
    params.num_row_tiles = static_cast<int32_t>(divide_up(args.a.width, Problem::S::kBlockM));
    params.num_columns = static_cast<int32_t>(divide_up(args.b.width, Problem::S::kBlockN));
    const int64_t tiles = int64_t{params.num_row_tiles} * params.num_columns;
    return launch<Problem>(params, tiles * args.routing.num_experts, where);
  };
  return args.bfloat16 ? run(__nv_bfloat16{}) : run(__half{});
}

}  // namespace gossamer::cuda
