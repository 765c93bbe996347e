// The launches of the kernels for Hopper, on the host.
#include "bindings/hopper.cpp"
#include "cuda/hopper/expert_mlp.cu"
#include "cuda/hopper/grouped_matmul.cu"
#include "cuda/hopper/grouped_matmul_dweight.cu"

PYBIND11_MODULE(hopper_on_host, m) { gossamer::bindings::register_hopper(m); }
