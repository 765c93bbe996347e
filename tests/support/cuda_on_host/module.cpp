// The launches of CUDA kernels, on the host.
#include "bindings/dispatch_cuda.cpp"
#include "bindings/hash_table_cuda.cpp"
#include "bindings/hopper.cpp"
#include "cuda/dispatch.cu"
#include "cuda/hash_table.cu"
#include "cuda/hopper/expert_mlp.cu"
#include "cuda/hopper/grouped_matmul.cu"
#include "cuda/hopper/grouped_matmul_dweight.cu"

PYBIND11_MODULE(cuda_on_host, m) {
  gossamer::bindings::register_dispatch_cuda(m);
  gossamer::bindings::register_hash_table_cuda(m);
  gossamer::bindings::register_hopper(m);
}
