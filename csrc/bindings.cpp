#include <pybind11/pybind11.h>

namespace py = pybind11;

#ifdef GOSSAMER_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of gossamer: raw pointers, sizes and strides in elements, dtype codes.";
  m.attr("with_cuda") = kWithCuda;
}
