// The products on Hopper GPUs, and the logic that their kernels share with tests on the host.
#include <optional>

#include "bindings/arguments.h"
#include "bindings/names.h"
#include "bindings/register.h"
#include "cuda/hopper/activation.h"
#include "cuda/hopper/pipeline.h"
#include "cuda/hopper/schedule.h"
#ifdef GOSSAMER_WITH_CUDA
#include "cuda/expert_mlp.cuh"
#include "cuda/grouped_matmul.cuh"
#endif

namespace gossamer::bindings {

namespace {

using PyTile = std::tuple<int, int, int, int, int>;

// The tiles that the warps of block `block` of `blocks` find.
template <class Schedule>
std::vector<PyTile> tiles(Schedule schedule, int64_t block, int64_t blocks) {
  std::vector<PyTile> found;
  hopper::Tile tile;
  for (int64_t index = block; schedule.seek(index, tile); index += blocks) {
    found.emplace_back(tile.expert, tile.row, tile.row_end, tile.row_tile, tile.column_tile);
  }
  return found;
}

int last(const std::vector<int32_t>& offsets) { return static_cast<int>(offsets.size()) - 1; }

std::pair<int, int> ring_position(int stages, int64_t steps) {
  using hopper::advanced;
  const hopper::RingPosition start{0, 0};
  switch (stages) {
    case 4: {
      const auto at = advanced<4>(start, steps);
      return {at.stage, at.parity};
    }
    case 6: {
      const auto at = advanced<6>(start, steps);
      return {at.stage, at.parity};
    }
    default:
      throw py::value_error("stages must be 4 or 6, got " + std::to_string(stages));
  }
}

void register_logic(py::module_ m) {
  m.attr("PANEL") = hopper::kPanel;
  m.attr("PANEL_BYTES") = hopper::kPanelBytes;
  m.attr("SHARED_LIMIT") = hopper::kSharedLimit;
  m.def("shared_bytes", &hopper::shared_bytes, "Shared memory of a block, by tile rows, tile columns and stages.");
  m.def("panel_offset", &hopper::panel_offset, "Byte of a 16-byte chunk of a row in a panel.");
  m.def("operand_descriptor", &hopper::operand_descriptor, "Descriptor of an operand's panels.");
  m.def("descriptor_step", &hopper::descriptor_step, "What 16 of K add to a descriptor.");
  m.def("staging_offset", &hopper::staging_offset, "Byte of 16 bytes of a row of staged accumulators.");
  m.def("staging_row", &hopper::staging_row, "Row that a lane reads of staged accumulators.");
  m.def("ring_position", &ring_position, "Stage and parity after some uses of a ring.");
  m.def(
      "row_tiles",
      [](const std::vector<int32_t>& offsets, int block_rows, int num_columns, int64_t block, int64_t blocks,
         std::optional<int32_t> rows) {
        const int32_t num_rows = rows.value_or(offsets.back());
        return tiles(hopper::RowSchedule(offsets.data(), last(offsets), num_rows, block_rows, num_columns), block, blocks);
      },
      py::arg("offsets"), py::arg("block_rows"), py::arg("num_columns"), py::arg("block"), py::arg("blocks"),
      py::arg("num_rows") = std::nullopt,
      "Tiles (expert, row, row end, row tile, column tile) of one block over ragged groups of rows, by default all.");
  m.def(
      "weight_tiles",
      [](const std::vector<int32_t>& offsets, int row_tiles, int num_columns, int64_t block, int64_t blocks,
         std::optional<int32_t> rows) {
        const int32_t num_rows = rows.value_or(offsets.back());
        return tiles(hopper::WeightSchedule(offsets.data(), last(offsets), num_rows, row_tiles, num_columns), block, blocks);
      },
      py::arg("offsets"), py::arg("row_tiles"), py::arg("num_columns"), py::arg("block"), py::arg("blocks"),
      py::arg("num_rows") = std::nullopt, "Tiles of one block over one matrix per expert.");
  m.def(
      "glu_gradient",
      [](std::string_view name, bool gated, float alpha, float limit, float dact, float gate, float up) {
        const int code = gate_code(name);
        const hopper::ActivationForm form{code, gated, false, alpha, limit};
        std::tuple<float, float, float, float> out;
        hopper::with_code(code, [&](auto code) {
          const auto g = hopper::glu_gradient<code.value>(dact, gate, up, form);
          out = {hopper::glu<code.value>(gate, up, form), g.act, g.dgate, g.dup};
        });
        return out;
      },
      "The activation forward and backward, and the gradients of gate and up.");
}

#ifdef GOSSAMER_WITH_CUDA
// (slots, offsets, number of rows, number of experts, number of slots)
using PyRouting = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t>;
// (pointer, rows, width, stride, divisor)
using PyRows = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t>;
// (pointer, experts, outer, inner, expert stride, outer stride, transposed)
using PyStoredWeight = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool>;
// (device, stream)
using PyWhere = std::tuple<int, uintptr_t>;

cuda::RoutingView routing(const PyRouting& g) {
  const auto& [slots, offsets, num_rows, num_experts, num_slots] = g;
  return {pointer<const int32_t>(slots), pointer<const int32_t>(offsets), num_rows, num_experts, num_slots};
}

cuda::RowsView rows(const PyRows& r) {
  const auto& [data, num_rows, width, stride, div] = r;
  return {pointer<const void>(data), num_rows, width, stride, div};
}

cuda::WeightView weight(const PyStoredWeight& w) {
  const auto& [data, experts, outer, inner, expert_stride, outer_stride, transposed] = w;
  return {pointer<const void>(data), experts, outer, inner, expert_stride, outer_stride, transposed};
}

cuda::ActivationView activation(const PyActivation& a) {
  const auto& [gate, gated, interleaved, alpha, limit] = a;
  return {gate_code(gate), gated, interleaved, static_cast<float>(alpha), static_cast<float>(limit)};
}

cuda::Where where(const PyWhere& w) { return {std::get<0>(w), pointer<void>(std::get<1>(w))}; }

void raise_of_hopper(const char* error) { raise_cuda("on Hopper", error); }

void register_products(py::module_& m) {
  m.def("hopper_paired_from", &cuda::paired_from, "Mean rows an expert from which two blocks share a weight's tile.");
  m.def("set_hopper_paired_from", &cuda::set_paired_from, "Sets that, for tests and measurements.");
  using py::arg;
  m.def(
      "hopper_grouped_matmul",
      [](bool bfloat16, const PyRouting& g, int64_t n, int64_t c, const PyRows& x, const PyStoredWeight& w, uintptr_t bias,
         uintptr_t y, bool scatter, bool zero_dropped, const PyWhere& at) {
        const cuda::GroupedMatmulArgs args{.bfloat16 = bfloat16,
                                           .routing = routing(g),
                                           .n = n,
                                           .c = c,
                                           .x = rows(x),
                                           .weight = weight(w),
                                           .bias = pointer<const void>(bias),
                                           .y = pointer<void>(y),
                                           .scatter = scatter,
                                           .zero_dropped = zero_dropped};
        raise_of_hopper(cuda::grouped_matmul(args, where(at)));
      },
      "Rows of ragged groups times their expert's weight.", arg("bfloat16"), arg("routing"), arg("n"), arg("c"), arg("x"),
      arg("weight"), arg("bias"), arg("y"), arg("scatter"), arg("zero_dropped"), arg("where"));
  m.def(
      "hopper_grouped_matmul_dweight",
      [](bool bfloat16, const PyRouting& g, const PyRows& a, const PyRows& b, uintptr_t out, int64_t expert_stride,
         int64_t outer_stride, const PyWhere& at) {
        const cuda::GroupedDweightArgs args{.bfloat16 = bfloat16,
                                            .routing = routing(g),
                                            .a = rows(a),
                                            .b = rows(b),
                                            .out = pointer<void>(out),
                                            .expert_stride = expert_stride,
                                            .outer_stride = outer_stride};
        raise_of_hopper(cuda::grouped_matmul_dweight(args, where(at)));
      },
      "Outer products summed over the rows of each expert.", arg("bfloat16"), arg("routing"), arg("a"), arg("b"), arg("out"),
      arg("expert_stride"), arg("outer_stride"), arg("where"));
  m.def(
      "hopper_expert_up",
      [](bool bfloat16, const PyRouting& g, int64_t inner, int64_t c, const PyRows& x, const PyStoredWeight& gate_up,
         uintptr_t bias, const PyActivation& form, uintptr_t act, uintptr_t preact, const PyWhere& at) {
        const cuda::ExpertUpArgs args{.bfloat16 = bfloat16,
                                      .routing = routing(g),
                                      .inner = inner,
                                      .c = c,
                                      .x = rows(x),
                                      .gate_up = weight(gate_up),
                                      .bias = pointer<const void>(bias),
                                      .activation = activation(form),
                                      .act = pointer<void>(act),
                                      .preact = pointer<void>(preact)};
        raise_of_hopper(cuda::expert_up(args, where(at)));
      },
      "The up-projection with its activation.", arg("bfloat16"), arg("routing"), arg("inner"), arg("c"), arg("x"),
      arg("gate_up"), arg("bias"), arg("activation"), arg("act"), arg("preact"), arg("where"));
  m.def("hopper_expert_down_backward_columns", &cuda::expert_down_backward_columns,
        "Rows of partial sums of the routing-weight gradient.");
  m.def(
      "hopper_expert_down_backward",
      [](bool bfloat16, const PyRouting& g, int64_t inner, int64_t c, const PyRows& dy, const PyStoredWeight& down,
         const PyActivation& form, uintptr_t preact, uintptr_t dpreact, uintptr_t act, uintptr_t partial, uintptr_t weights,
         bool weights_float32, const PyWhere& at) {
        const cuda::ExpertDownBackwardArgs args{.bfloat16 = bfloat16,
                                                .routing = routing(g),
                                                .inner = inner,
                                                .c = c,
                                                .dy = rows(dy),
                                                .down = weight(down),
                                                .activation = activation(form),
                                                .preact = pointer<const void>(preact),
                                                .dpreact = pointer<void>(dpreact),
                                                .act = pointer<void>(act),
                                                .partial = pointer<float>(partial),
                                                .weights = pointer<const void>(weights),
                                                .weights_float32 = weights_float32};
        raise_of_hopper(cuda::expert_down_backward(args, where(at)));
      },
      "The gradient through the down-projection and the activation.", arg("bfloat16"), arg("routing"), arg("inner"), arg("c"),
      arg("dy"), arg("down"), arg("activation"), arg("preact"), arg("dpreact"), arg("act"), arg("partial"), arg("weights"),
      arg("weights_float32"), arg("where"));
}
#endif

}  // namespace

void register_hopper(py::module_& m) {
  register_logic(m.def_submodule("hopper_logic", "What the kernels for Hopper compute on the host too, for tests."));
#ifdef GOSSAMER_WITH_CUDA
  m.attr("with_hopper") = cuda::with_hopper();
  register_products(m);
#else
  m.attr("with_hopper") = false;
#endif
}

}  // namespace gossamer::bindings
