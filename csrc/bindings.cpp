#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <new>
#include <string>
#include <tuple>

#include "cpu/dispatch.h"
#include "cpu/expert_mlp.h"
#include "cpu/gather_reduce.h"
#include "cpu/grouped_matmul.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/page_pool.h"
#include "dlpack.h"
#ifdef GOSSAMER_WITH_CUDA
#include <stdexcept>

#include "cuda/dispatch.cuh"
#endif

namespace py = pybind11;

namespace {

#ifdef GOSSAMER_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

using gossamer::Bags;
using gossamer::DType;
using gossamer::FloatMatrix;
using gossamer::IndexArray;

// (pointer, row stride, column stride, dtype code), as python/gossamer/cpu_kernels/_native.py writes it.
using PyMatrix = std::tuple<uintptr_t, int64_t, int64_t, int>;
// (pointer, stride, dtype code)
using PyVector = std::tuple<uintptr_t, int64_t, int>;

// (slots, offsets, number of rows, number of experts)
using PyGroups = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t>;
// (pointer, expert stride, row stride, column stride)
using PyWeights = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

FloatMatrix matrix(const PyMatrix& m) {
  const auto& [pointer, row_stride, col_stride, dtype] = m;
  return {reinterpret_cast<void*>(pointer), row_stride, col_stride, static_cast<DType>(dtype)};
}

FloatMatrix row_matrix(const PyVector& v) {
  const auto& [pointer, stride, dtype] = v;
  return {reinterpret_cast<void*>(pointer), 0, stride, static_cast<DType>(dtype)};
}

IndexArray index_array(const PyVector& v) {
  const auto& [pointer, stride, dtype] = v;
  return {reinterpret_cast<const void*>(pointer), stride, static_cast<DType>(dtype) == DType::kInt64};
}

void register_dispatch(py::module_& m) {
  m.def(
      "dispatch",
      [](uintptr_t expert_ids, int dtype, int64_t num_tokens, int64_t top_k, int64_t token_stride, int64_t slot_stride,
         int64_t num_experts, uintptr_t slots, uintptr_t rows, uintptr_t offsets, int num_threads) {
        const gossamer::DispatchArgs args{reinterpret_cast<const void*>(expert_ids),
                                          static_cast<DType>(dtype) == DType::kInt64,
                                          num_tokens,
                                          top_k,
                                          token_stride,
                                          slot_stride,
                                          num_experts,
                                          reinterpret_cast<int32_t*>(slots),
                                          reinterpret_cast<int32_t*>(rows),
                                          reinterpret_cast<int32_t*>(offsets)};
        py::gil_scoped_release release;
        return gossamer::dispatch(args, num_threads);
      },
      "Counting sort by expert; returns -1, or the first flat slot whose id is negative.");
}

// Checks the lists with the lock released, and raises what is wrong with them.
void raise_bad_bags(const Bags& bags, int64_t num_rows, int num_threads) {
  gossamer::BagsError error;
  {
    py::gil_scoped_release release;
    error = gossamer::check_bags(bags, num_rows, num_threads);
  }
  if (error.kind == gossamer::BagsError::kIndex) {
    throw py::index_error("index must be in [0, N) with N=" + std::to_string(num_rows) + ", got " +
                          std::to_string(error.value) + " at flat position " + std::to_string(error.position));
  }
  if (error.kind == gossamer::BagsError::kOffset) {
    throw py::value_error("offsets must ascend within [0, L] with L=" + std::to_string(bags.num_positions) + ", got " +
                          std::to_string(error.value) + " at position " + std::to_string(error.position));
  }
}

void register_gather_reduce(py::module_& m) {
  py::class_<Bags>(m, "Bags", "The lists of ids of gather_reduce.")
      .def(py::init([](const PyVector& index, const PyVector& offsets, int64_t bag_size, int64_t num_positions,
                       int64_t num_bags, int64_t limit, int64_t padding_idx) {
        const auto all = std::numeric_limits<int64_t>::max();
        return Bags{index_array(index), index_array(offsets), bag_size, num_positions, num_bags, limit < 0 ? all : limit,
                    padding_idx};
      }));
  m.def(
      "gather_reduce",
      [](const PyMatrix& table, int64_t num_rows, int64_t dim, const Bags& bags, const PyVector& weights, uintptr_t out,
         int num_threads) {
        raise_bad_bags(bags, num_rows, num_threads);
        const gossamer::GatherArgs args{matrix(table), num_rows, dim, bags, row_matrix(weights), reinterpret_cast<void*>(out)};
        py::gil_scoped_release release;
        gossamer::gather_reduce(args, num_threads);
      },
      "out[b] = sum over the live ids of bag b of weight · table[id].");
  m.def(
      "gather_dot",
      [](const PyMatrix& dout, const PyMatrix& table, int64_t num_rows, int64_t dim, const Bags& bags, const PyVector& out,
         int num_threads) {
        raise_bad_bags(bags, num_rows, num_threads);
        const gossamer::GatherDotArgs args{matrix(dout), matrix(table), num_rows, dim, bags, row_matrix(out)};
        py::gil_scoped_release release;
        gossamer::gather_dot(args, num_threads);
      },
      "out[p] = <dout[bag of p], table[index[p]]>, zero where the id is skipped.");
}

gossamer::Groups groups(const PyGroups& g) {
  const auto& [slots, offsets, num_rows, num_experts] = g;
  return {reinterpret_cast<const int32_t*>(slots), reinterpret_cast<const int32_t*>(offsets), num_rows, num_experts};
}

gossamer::ExpertWeights expert_weights(const PyWeights& w) {
  const auto& [pointer, expert_stride, row_stride, col_stride] = w;
  return {reinterpret_cast<void*>(pointer), expert_stride, row_stride, col_stride};
}

void register_grouped_matmul(py::module_& m) {
  m.def(
      "grouped_matmul",
      [](const PyGroups& g, int64_t n, int64_t c, const PyMatrix& x, int64_t x_div, const PyWeights& weight,
         const PyMatrix& bias, uintptr_t y, bool y_grouped, int num_threads) {
        const gossamer::GroupedMatmulArgs args{matrix(x).dtype,        groups(g),    n, c, {matrix(x), x_div},
                                               expert_weights(weight), matrix(bias), reinterpret_cast<void*>(y), y_grouped};
        py::gil_scoped_release release;
        gossamer::grouped_matmul(args, num_threads);
      },
      "y[r] = x[g(r)] · weight[e(r)]^T + bias[e(r)], zero for dropped rows.");
  m.def(
      "grouped_matmul_dweight",
      [](const PyGroups& g, int64_t n, int64_t c, const PyMatrix& x, int64_t x_div, const PyMatrix& dy, int64_t dy_div,
         uintptr_t dweight, bool transposed, uintptr_t dbias, int num_threads) {
        const gossamer::GroupedDweightArgs args{matrix(x).dtype,
                                                groups(g),
                                                n,
                                                c,
                                                {matrix(x), x_div},
                                                {matrix(dy), dy_div},
                                                reinterpret_cast<void*>(dweight),
                                                transposed,
                                                reinterpret_cast<void*>(dbias)};
        py::gil_scoped_release release;
        gossamer::grouped_matmul_dweight(args, num_threads);
      },
      "dweight[e] = sum over the rows of e of dy[g(r)]^T x[g'(r)], and dbias[e] = sum of dy[g(r)].");
}

// A block of the page pool as a DLPack capsule of bytes, which goes back to the pool with its last owner.
py::capsule take_pages(int64_t bytes) {
  struct Owner {
    gossamer::DLManagedTensor managed;
    int64_t shape, stride;
  };
  void* data = gossamer::PagePool::instance().take(static_cast<size_t>(bytes));
  if (!data) throw std::bad_alloc();
  auto* owner = new Owner{};
  owner->shape = bytes;
  owner->stride = 1;
  owner->managed.tensor = {data, {1, 0}, 1, {1, 8, 1}, &owner->shape, &owner->stride, 0};
  owner->managed.context = owner;
  owner->managed.deleter = [](gossamer::DLManagedTensor* self) {
    gossamer::PagePool::instance().give_back(self->tensor.data);
    delete static_cast<Owner*>(self->context);
  };
  // Whoever imports the tensor renames the capsule and owns it from then on.
  return py::capsule(&owner->managed, "dltensor", [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    auto* managed = static_cast<gossamer::DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    managed->deleter(managed);
  });
}

void register_memory(py::module_& m) {
  m.def(
      "advise_huge_pages",
      [](uintptr_t data, size_t bytes) { gossamer::advise_huge_pages(reinterpret_cast<void*>(data), bytes); },
      "Ask for huge pages under a fresh allocation.");
  m.def("take_pages", &take_pages, "A reusable block of at least so many bytes, as a DLPack capsule.");
  m.def(
      "trim_pages", [] { return gossamer::PagePool::instance().trim(); },
      "Return the blocks that are kept for reuse to the system; says how many bytes they were.");
}

// (code, gated, interleaved, alpha, limit)
using PyActivation = std::tuple<int, bool, bool, double, double>;

gossamer::ExpertMlpArgs expert_mlp_args(const PyGroups& g, const std::tuple<int64_t, int64_t, int64_t, int64_t>& sizes,
                                        const PyActivation& activation, const PyMatrix& x, const PyWeights& gate_up,
                                        const PyWeights& down, const PyMatrix& gate_up_bias, const PyMatrix& down_bias,
                                        const PyMatrix& weights, uintptr_t preact) {
  const auto& [tokens, hidden, inner, top_k] = sizes;
  const auto& [code, gated, interleaved, alpha, limit] = activation;
  return {matrix(x).dtype,
          groups(g),
          tokens,
          hidden,
          inner,
          top_k,
          {code, gated, interleaved, alpha, limit},
          matrix(x),
          expert_weights(gate_up),
          expert_weights(down),
          matrix(gate_up_bias),
          matrix(down_bias),
          matrix(weights),
          reinterpret_cast<void*>(preact)};
}

// The arguments that forward and backward share, for the signatures below.
#define GOSSAMER_EXPERT_MLP_PARAMETERS                                                                             \
  const PyGroups &g, const std::tuple<int64_t, int64_t, int64_t, int64_t>&sizes, const PyActivation &activation,   \
      const PyMatrix &x, const PyWeights &gate_up, const PyWeights &down, const PyMatrix &gate_up_bias,            \
      const PyMatrix &down_bias, const PyMatrix &weights, uintptr_t preact
#define GOSSAMER_EXPERT_MLP_ARGUMENTS \
  g, sizes, activation, x, gate_up, down, gate_up_bias, down_bias, weights, preact

void register_expert_mlp(py::module_& m) {
  m.def(
      "expert_mlp",
      [](GOSSAMER_EXPERT_MLP_PARAMETERS, uintptr_t y, int num_threads) {
        const gossamer::ExpertMlpForwardArgs args{expert_mlp_args(GOSSAMER_EXPERT_MLP_ARGUMENTS),
                                                  reinterpret_cast<void*>(y)};
        py::gil_scoped_release release;
        gossamer::expert_mlp(args, num_threads);
      },
      "y[t] = sum over the token's experts of weight · (act(x[t]·W1^T + b1)·W2^T + b2).");
  m.def(
      "expert_mlp_backward",
      [](GOSSAMER_EXPERT_MLP_PARAMETERS, const PyMatrix& dy, uintptr_t dx, const std::pair<uintptr_t, bool>& dgate_up,
         const std::pair<uintptr_t, bool>& ddown, const PyMatrix& dweights, uintptr_t dgate_up_bias,
         uintptr_t ddown_bias, int num_threads) {
        const gossamer::ExpertMlpBackwardArgs args{expert_mlp_args(GOSSAMER_EXPERT_MLP_ARGUMENTS),
                                                   matrix(dy),
                                                   reinterpret_cast<void*>(dx),
                                                   {reinterpret_cast<void*>(dgate_up.first), dgate_up.second},
                                                   {reinterpret_cast<void*>(ddown.first), ddown.second},
                                                   matrix(dweights),
                                                   reinterpret_cast<void*>(dgate_up_bias),
                                                   reinterpret_cast<void*>(ddown_bias)};
        py::gil_scoped_release release;
        gossamer::expert_mlp_backward(args, num_threads);
      },
      "The gradients of expert_mlp whose pointers are not null.");
}

#ifdef GOSSAMER_WITH_CUDA
void register_cuda_dispatch(py::module_& m) {
  m.def("cuda_dispatch_scratch_size", &gossamer::cuda::dispatch_scratch_size,
        "Elements of int32 scratch that cuda_dispatch needs.");
  m.def(
      "cuda_dispatch",
      [](uintptr_t expert_ids, bool int64_ids, int64_t num_rows, int64_t top_k, int64_t token_stride,
         int64_t slot_stride, int64_t num_experts, uintptr_t slots, uintptr_t rows, uintptr_t offsets,
         uintptr_t scratch, int device, uintptr_t stream) {
        const gossamer::cuda::DispatchArgs args{reinterpret_cast<const void*>(expert_ids),
                                                int64_ids,
                                                num_rows,
                                                top_k,
                                                token_stride,
                                                slot_stride,
                                                num_experts,
                                                reinterpret_cast<int32_t*>(slots),
                                                reinterpret_cast<int32_t*>(rows),
                                                reinterpret_cast<int32_t*>(offsets),
                                                reinterpret_cast<int32_t*>(scratch)};
        const char* error = gossamer::cuda::dispatch(args, device, reinterpret_cast<void*>(stream));
        if (error != nullptr) throw std::runtime_error(std::string("gossamer dispatch: CUDA error: ") + error);
      },
      "Counting sort by expert on a stream of the device.");
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of gossamer: raw pointers, sizes and strides in elements, dtype codes.";
  m.attr("with_cuda") = kWithCuda;
  m.def("isa", [] { return gossamer::kernels().name; }, "The instruction set whose kernels are in use.");
  m.def(
      "choose_isa",
      [](const std::string& name) {
        if (!gossamer::choose_kernels(name.empty() ? nullptr : name.c_str())) {
          throw py::value_error("isa must be one that this processor runs, of avx512, avx2 and generic, got " + name);
        }
      },
      "Use the kernels of another instruction set, for tests; the empty string stands for the best one.");
  register_memory(m);
  register_dispatch(m);
  register_gather_reduce(m);
  register_grouped_matmul(m);
  register_expert_mlp(m);
#ifdef GOSSAMER_WITH_CUDA
  register_cuda_dispatch(m);
#endif
}
