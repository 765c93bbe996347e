"""Triton kernels that follow slots, rows and offsets stay inside their tensors whatever these hold.

On the CPU what a dispatch holds is checked; on CUDA looking would stall the stream, so the kernels bring it into range.
The interpreter raises where an address leaves the tensors of a launch.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter shows accesses outside of tensors", allow_module_level=True)

import gossamer  # noqa: E402
from gossamer._activation import Activation  # noqa: E402
from gossamer.ops._expert_topology import ExpertPlaces, ExpertTopology  # noqa: E402
from gossamer.ops._groups import Groups  # noqa: E402
from gossamer.ops._weights import Weight  # noqa: E402
from gossamer.ops.expert_mlp import ExpertMlp, ExpertMlpBackward  # noqa: E402
from gossamer.ops.grouped_matmul import GroupedDweight, GroupedMatmul  # noqa: E402
from gossamer.ops.multi_low_rank import MultiLowRank, MultiLowRankBackward  # noqa: E402
from gossamer.triton_kernels import dispatch as triton_dispatch  # noqa: E402
from gossamer.triton_kernels import expert_mlp as triton_expert_mlp  # noqa: E402
from gossamer.triton_kernels import expert_topology as triton_expert_topology  # noqa: E402
from gossamer.triton_kernels import grouped_matmul as triton_grouped_matmul  # noqa: E402
from gossamer.triton_kernels import multi_low_rank as triton_multi_low_rank  # noqa: E402
from gossamer.triton_kernels.common import TABLE_HEAD, row_tiles  # noqa: E402
from gossamer.triton_kernels.grouped_matmul_dweight import padded_rows  # noqa: E402

T, K, E, H, I = 9, 2, 3, 20, 12
SLOTS = T * K
LOWEST, HIGHEST = -(2**31), 2**31 - 1


def drawn(draw, size, high):
    """Numbers around ``[0, high]``, and the ends of int32."""
    numbers = torch.randint(-3, high + 4, (size,), generator=draw)
    ends = torch.tensor([LOWEST, HIGHEST, -1, high])[torch.randint(4, (size,), generator=draw)]
    return torch.where(torch.rand(size, generator=draw) < 0.3, ends, numbers).int()


def foreign(seed, ragged=False):
    """Groups of T tokens whose three tensors hold anything; fewer rows than slots when ``ragged``."""
    draw = torch.Generator().manual_seed(seed)
    slots = drawn(draw, SLOTS - 5 if ragged else SLOTS, SLOTS)
    offsets = drawn(draw, E + 1, SLOTS)
    if seed % 3 == 0:
        # Every group all rows: more tiles than any routing has.
        offsets = torch.tensor([0, HIGHEST] * E)[: E + 1].int()
    return Groups(slots, drawn(draw, SLOTS, SLOTS), offsets)


SEEDS = range(4)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("block_m", [16, 64])
def test_row_tiles(seed, block_m):
    """As many as the table has room for, each inside the rows."""
    groups = foreign(seed)
    table, capacity = row_tiles(groups.offsets, SLOTS, block_m)
    live, total = table[:TABLE_HEAD].tolist()
    assert 0 <= live <= capacity and 0 <= total <= capacity
    experts, rows, ends = table[TABLE_HEAD:].view(3, capacity)[:, :total]
    assert ((experts >= 0) & (experts <= E)).all()
    assert ((rows >= 0) & (rows < ends) & (ends <= SLOTS)).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("quantised", [None, "int8"])
def test_grouped_matmul(seed, quantised):
    """Gathered and sorted rows, scattered and sorted results, and what decodes weights of few bits."""
    weight = torch.randn(E, I, H)
    if quantised:
        weight = gossamer.QuantizedExpertWeight.quantize(weight, quantised).operand()
    else:
        weight = Weight(weight, bias=torch.randn(E, I))
    for x_div in (0, K):
        for y_grouped in (False, True):
            # Only products in sorted order have buffers of fewer rows.
            groups = foreign(seed, ragged=y_grouped)
            x = torch.randn(T if x_div else groups.slots.shape[0], H)
            y = triton_grouped_matmul.grouped_matmul(GroupedMatmul(x, weight, groups, x_div, y_grouped, False))
            assert y.shape == (groups.slots.shape[0], I)


@pytest.mark.parametrize("seed", SEEDS)
def test_weight_gradients(seed):
    """Either operand gathered, with and without the bias's, and the copy to padded rows."""
    groups = foreign(seed, ragged=True)
    rows = groups.slots.shape[0]
    for x_div, dy_div in ((0, K), (K, 0), (0, 0)):
        x, dy = torch.randn(T if x_div else rows, H), torch.randn(SLOTS if dy_div == 1 else T if dy_div else rows, I)
        args = GroupedDweight(x, dy, groups, x_div, dy_div, False, True)
        dweight, dbias = triton_grouped_matmul.grouped_matmul_dweight(args)
        assert dweight.shape == (E, I, H) and dbias.shape == (E, I)
    padded, _ = padded_rows(torch.randn(T, H), groups, K, 16)
    assert padded.isfinite().any()


def layer(groups, rank, form):
    """The arguments of an expert layer of this dispatch."""
    activation, weights = Activation("swiglu"), torch.rand(T, K)
    gate_up = Weight(torch.randn(E, 2 * I, H), bias=torch.randn(E, 2 * I))
    down = Weight(torch.randn(E, H, I), bias=torch.randn(E, H))
    if rank:
        gate_up = gate_up._replace(a=torch.randn(E, rank, H), b=torch.randn(E, 2 * I, rank))
        down = down._replace(a=torch.randn(E, rank, I), b=torch.randn(E, H, rank))
    if form == "quantised":
        gate_up, down = (gossamer.QuantizedExpertWeight.quantize(w.data, "int8").operand() for w in (gate_up, down))
    x = torch.randn(T, H)
    return ExpertMlp(x, gate_up, down, groups, weights, activation, False, form == "saved")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("rank", "form"), [(0, "saved"), (3, "saved"), (0, "unsaved"), (0, "quantised")])
def test_expert_layers(seed, rank, form):
    """Forward, and the whole backward pass with every gradient."""
    args = layer(foreign(seed, ragged=True), rank, form)
    y, preact, s1, s2 = triton_expert_mlp.expert_mlp(args)
    assert y.shape == (T, H)
    if form == "saved":
        needs = [name for name, tensor in args.inputs().items() if tensor is not None]
        backward = ExpertMlpBackward(torch.randn(T, H), args, preact.clone(), s1, s2, needs)
        gradients = triton_expert_mlp.expert_mlp_backward(backward, overwrite=True)
        assert sum(gradient is not None for gradient in gradients.values()) == len(needs)


def test_routing_weight_gradients_of_ragged_rows():
    """Partial sums of several tiles of columns lie as many rows apart as buffers have, not slots."""
    torch.manual_seed(0)
    expert_ids = torch.randint(E, (T, K))
    expert_ids[1:4] = E
    wide = 70
    shapes = {"x": (T, H), "gate_up": (E, 2 * wide, H), "down": (E, H, wide), "weights": (T, K)}
    found = {}
    for backend in ("triton", "reference"):
        torch.manual_seed(1)
        inputs = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}
        dispatch = gossamer.dispatch(expert_ids, E, max_rows=SLOTS - 1)
        with gossamer.backend(backend):
            y = gossamer.expert_mlp(inputs["x"], inputs["gate_up"], inputs["down"], dispatch, inputs["weights"])
            y.square().sum().backward()
        found[backend] = inputs["weights"].grad
    assert dispatch.buffer_rows < SLOTS
    torch.testing.assert_close(found["triton"], found["reference"], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("seed", SEEDS)
def test_low_rank_updates_of_many_adapters(seed):
    """Forward, added in place or not, and every gradient; ranks hold anything too."""
    draw = torch.Generator().manual_seed(seed)
    slots, offsets, ranks = drawn(draw, T, T), drawn(draw, E + 1, T), drawn(draw, E, 3)
    a, b = torch.randn(E, 3, H), torch.randn(E, I, 3)
    args = MultiLowRank(torch.randn(T, H), a, b, slots, offsets, torch.rand(E), ranks, 1.0, True)
    for add in (False, True):
        s = triton_multi_low_rank.multi_low_rank(args, torch.zeros(T, I), add=add)
    found = triton_multi_low_rank.multi_low_rank_backward(
        MultiLowRankBackward(torch.randn(T, I), s, args, ["x", "a", "b"])
    )
    assert {name: tuple(t.shape) for name, t in found.items()} == {"x": (T, H), "a": (E, 3, H), "b": (E, I, 3)}


@pytest.mark.parametrize("seed", SEEDS)
def test_block_topologies(seed):
    """The lists of blocks and the places of rows, and products that follow such lists."""
    groups = foreign(seed)
    rows, wide, block = 4, 2, 16
    lists = triton_expert_topology.expert_topology(ExpertTopology(groups.offsets, rows, wide, block))
    triton_expert_topology.expert_places(ExpertPlaces(groups.offsets, lists[-1], groups.slots, rows * block))
    draw = torch.Generator().manual_seed(seed)
    made = gossamer.BlockTopology.random((64, 96), 16, 0.5)
    tensors = {
        field.name: drawn(draw, value.shape[0], 7)
        for field in dataclasses.fields(made)
        if isinstance(value := getattr(made, field.name), torch.Tensor)
    }
    topology = dataclasses.replace(made, **tensors)
    for checked in (topology, topology.transposed()):
        trust(checked)
    with gossamer.backend("triton"):
        values = gossamer.sdd(torch.randn(64, 8), torch.randn(8, 96), topology)
        assert values.values.shape == (made.nnz_blocks, 16, 16)
        s = gossamer.BlockSparseTensor(torch.randn(made.nnz_blocks, 16, 16), topology)
        assert gossamer.dsd(s, torch.randn(96, 8)).shape == (64, 8)
        assert gossamer.dds(torch.randn(8, 64), s).shape == (8, 96)


def trust(topology):
    """Mark a topology as one whose contents were found right."""
    from gossamer.ops import block_topology

    block_topology.mark(topology, block_topology._tensors(topology))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", ["sum", "max"])
def test_bags(seed, mode):
    """Reductions, their gradients and steps on rows, where ids and offsets hold anything."""
    from gossamer.ops._bags import Bags
    from gossamer.ops.gather_max import GatherMax
    from gossamer.ops.gather_reduce import GatherDot, GatherReduce
    from gossamer.ops.sparse_update import SparseUpdate, check_state
    from gossamer.triton_kernels import gather_max, gather_reduce, sparse_update

    draw = torch.Generator().manual_seed(seed)
    table, bags = torch.randn(11, 5), 6
    for offsets in (None, drawn(draw, bags + 1, SLOTS)):
        index = drawn(draw, SLOTS, 11) if offsets is not None else drawn(draw, bags * 3, 11).view(bags, 3)
        lists = Bags(index, offsets, mode=mode, drop=True)
        dout, argmax = torch.randn(bags, 5), None
        if mode == "max":
            _, argmax = gather_max.gather_max(GatherMax(table, lists, table.dtype, True))
        else:
            y = gather_reduce.gather_reduce(
                GatherReduce(table, lists._replace(weights=torch.rand(index.shape)), table.dtype)
            )
            assert y.shape == (bags, 5)
            gather_reduce.gather_dot(GatherDot(dout, table, lists, torch.float32))
        optimizer = gossamer.optim.Adam(lr=0.1)
        update = check_state(optimizer, optimizer.state(11, 5), table)
        sparse_update.sparse_update_(SparseUpdate(table, lists, dout, argmax, update))


@pytest.mark.parametrize("size", [4, 600])
def test_dispatch_of_foreign_ids(size):
    """Ids below 0 and above E drop their slots, in one launch and in two."""
    ids = drawn(torch.Generator().manual_seed(size), size * K, E).view(size, K)
    slots, rows, offsets = triton_dispatch.dispatch(ids, E)
    assert torch.equal(rows[slots.long()], torch.arange(size * K, dtype=torch.int32))
    kept = (ids >= 0) & (ids < E)
    assert int(offsets[-1]) == int(kept.sum())


@pytest.mark.parametrize("seed", SEEDS)
def test_packed_convolutions(seed):
    """Forward, final states and gradients where the sequences' bounds hold anything."""
    from gossamer.ops.causal_conv1d import CausalConv, CausalConvBackward
    from gossamer.triton_kernels import causal_conv1d

    draw = torch.Generator().manual_seed(seed)
    x, state, weight = torch.randn(1, SLOTS, 4), torch.randn(E, 4, 3), torch.randn(4, 4)
    args = CausalConv(x, weight, torch.randn(4), state, drawn(draw, E + 1, SLOTS).long(), True, True)
    y, final = causal_conv1d.causal_conv1d(args)
    found = {name: torch.zeros_like(getattr(args, name)) for name in ("x", "weight", "bias", "initial_state")}
    causal_conv1d.causal_conv1d_backward(CausalConvBackward(torch.randn_like(y), final, list(found), args), found)
