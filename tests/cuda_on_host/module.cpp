// The launches of CUDA kernels, on the host.
#include "bindings/dispatch.cpp"
#include "bindings/hopper.cpp"
#include "cpu/dispatch.cpp"
#include "cuda/dispatch.cu"
#include "cuda/hopper/expert_mlp.cu"
#include "cuda/hopper/grouped_matmul.cu"
#include "cuda/hopper/grouped_matmul_dweight.cu"

PYBIND11_MODULE(cuda_on_host, m) {
  gossamer::bindings::register_dispatch(m);
  gossamer::bindings::register_hopper(m);
}
