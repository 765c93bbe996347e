// Replaces csrc/cuda/hopper/ in builds without sm_90a.
#include "cuda/expert_mlp.cuh"
#include "cuda/grouped_matmul.cuh"

namespace gossamer::cuda {
namespace {

constexpr const char* kMissing = "built without sm_90a among the CUDA architectures";

}  // namespace

bool with_hopper() { return false; }

int64_t paired_from() { return 0; }

void set_paired_from(int64_t) {}

const char* grouped_matmul(const GroupedMatmulArgs&, const Where&) { return kMissing; }

const char* grouped_matmul_dweight(const GroupedDweightArgs&, const Where&) { return kMissing; }

const char* expert_up(const ExpertUpArgs&, const Where&) { return kMissing; }

int64_t expert_down_backward_columns(int64_t) { return 0; }

const char* expert_down_backward(const ExpertDownBackwardArgs&, const Where&) { return kMissing; }

}  // namespace gossamer::cuda
