"""Structures that kernels follow, put together by hand: what is wrong with them is an error before any kernel runs."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch

import gossamer
from gossamer import BlockSparseTensor, BlockTopology, Dispatch
from gossamer.ops import _groups, block_topology
from gossamer.ops.block_topology import check_topology
from gossamer.ops.dispatch import check_dispatch

IDS = torch.tensor([[0, 2], [1, 0], [3, 4], [2, 1], [2, 2]])


def strided(t):
    """The same values two apart."""
    return torch.stack([t, t], 1)[:, 0]


def with_value(t, at, value):
    return t.index_fill(0, torch.tensor([at]), value)


DISPATCHES = {
    "slots_dtype": (
        {"slots": lambda t: t.short()},
        TypeError,
        r"slots must be torch\.int32, got torch\.int16",
    ),
    "rows_dtype": ({"rows": lambda t: t.long()}, TypeError, r"dispatch\.rows must be torch\.int32"),
    "offsets_list": ({"offsets": lambda t: t.tolist()}, TypeError, r"dispatch\.offsets must be a torch\.Tensor"),
    "slots_shape": ({"slots": lambda t: t[1:]}, ValueError, r"dispatch\.slots must have shape \(T·K,\) = \(10\)"),
    "offsets_shape": ({"offsets": lambda t: t[1:]}, ValueError, r"dispatch\.offsets must have shape \(E\+1,\) = \(5\)"),
    "slots_strides": ({"slots": strided}, ValueError, r"dispatch\.slots must be contiguous, got stride 2"),
    "rows_device": ({"rows": lambda t: t.to("meta")}, ValueError, r"dispatch\.rows must be on the device .*, got meta"),
    "slots_outside": (
        {"slots": lambda t: t + 1},
        ValueError,
        r"slots must be in .*, got values from 1 to 10",
    ),
    "slots_negative": (
        {"slots": lambda t: t - 1},
        ValueError,
        r"slots must be in .*, got values from -1 to 8",
    ),
    "slots_twice": ({"slots": lambda t: t * 0}, ValueError, r"rows must be the inverse of dispatch\.slots"),
    "rows_outside": (
        {"rows": lambda t: t + 2**20},
        ValueError,
        r"rows must be the inverse of dispatch\.slots",
    ),
    "offsets_fall": ({"offsets": lambda t: t.flip(0)}, ValueError, r"dispatch\.offsets must ascend from 0"),
    "offsets_outside": (
        {"offsets": lambda t: t * 9},
        ValueError,
        r"dispatch\.offsets must ascend from 0 to at most 10",
    ),
    "top_k": ({"top_k": lambda k: 2.0}, TypeError, r"dispatch\.top_k must be an int, got float"),
    "num_experts": ({"num_experts": lambda e: 0}, ValueError, r"dispatch\.num_experts must be at least 1, got 0"),
}


def consumers(dispatch):
    x, weight = torch.ones(5, 3), torch.ones(4, 6, 3)
    a, b = torch.ones(4, 1, 3), torch.ones(4, 6, 1)
    adapters = replace(dispatch, num_tokens=10, top_k=1) if isinstance(dispatch.top_k, int) else dispatch
    return {
        "grouped_matmul": lambda: gossamer.grouped_matmul(x, weight, dispatch),
        "expert_mlp": lambda: gossamer.expert_mlp(x, weight, torch.ones(4, 3, 3), dispatch, torch.ones(5, 2)),
        "multi_low_rank": lambda: gossamer.multi_low_rank(torch.ones(10, 3), a, b, adapters, scale=1.0),
    }


@pytest.mark.parametrize("name", DISPATCHES)
def test_dispatches(name):
    """Every consumer refuses them by the field's name."""
    changes, error, message = DISPATCHES[name]
    good = gossamer.dispatch(IDS, 4)
    bad = replace(good, **{field: change(getattr(good, field)) for field, change in changes.items()})
    for call in consumers(bad).values():
        with pytest.raises(error, match=message):
            call()


def test_a_dispatch_by_hand_works_and_is_looked_at_again_when_it_changes():
    """One of right parts gives the same bits; after a write to its tensors it is checked anew."""
    good = gossamer.dispatch(IDS, 4)
    own = Dispatch(*(t.clone() for t in (good.slots, good.rows, good.offsets)), 5, 2, 4)
    for name, call in consumers(good).items():
        assert torch.equal(call(), consumers(own)[name]())
    own.slots[0] = 99
    for call in (consumers(own)[name] for name in ("grouped_matmul", "expert_mlp")):
        with pytest.raises(ValueError, match=r"dispatch\.slots must be in .*, got values from \d+ to 99"):
            call()
    with torch.inference_mode():
        inside = gossamer.dispatch(IDS, 4)
        assert torch.equal(consumers(inside)["grouped_matmul"](), consumers(good)["grouped_matmul"]())


def write_through(tensor, how):
    """A write that changes a tensor's values, whether torch counts it or not."""
    with torch.no_grad():
        {"inference": tensor, "numpy": torch.from_numpy(tensor.numpy()), "data": tensor.data}[how][-1] = 4000


WRITES = ["inference", "numpy", "data"]


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("field", ["slots", "offsets"])
def test_kernels_do_not_follow_writes_into_a_checked_dispatch(field, how):
    """Inference tensors have no versions, and torch does not count writes through NumPy or ``.data``."""
    with torch.inference_mode(how == "inference"), gossamer.backend("native"):
        made = gossamer.dispatch(IDS, 4)
        calls = {name: call for name, call in consumers(made).items() if name in ("grouped_matmul", "expert_mlp")}
        for call in calls.values():
            call()
        write_through(getattr(made, field), how)
        for call in calls.values():
            with pytest.raises(ValueError, match=rf"dispatch\.{field} must .*4000"):
                call()


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("field", ["row_offsets", "column_indices", "row_indices"])
def test_kernels_do_not_follow_writes_into_a_checked_topology(field, how):
    with torch.inference_mode(how == "inference"), gossamer.backend("native"):
        made = topology()
        sample(made)()
        write_through(getattr(made, field)[:6] if field != "row_offsets" else made.row_offsets, how)
        with pytest.raises(ValueError, match=r"topology.* must .*4000"):
            sample(made)()


def test_a_structure_of_inference_tensors_is_checked_at_every_use():
    good = gossamer.dispatch(IDS, 4)
    with torch.inference_mode():
        own = Dispatch(*(t.clone() for t in (good.slots, good.rows, good.offsets)), 5, 2, 4)
        call = consumers(own)["grouped_matmul"]
        call()
        own.rows[0] = own.rows[1]
        with pytest.raises(ValueError, match=r"dispatch\.rows must be the inverse of dispatch\.slots"):
            call()


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("slots", lambda t: t + 2**30, r"dispatch\.slots must be in \[0, 10\), got"),
        ("offsets", lambda t: t - 7, r"dispatch\.offsets must ascend from 0 to at most 10, got -7"),
        ("offsets", lambda t: t.long(), r"dispatch\.offsets must be torch\.int32, got torch\.int64"),
        ("slots", strided, r"dispatch\.slots must be contiguous"),
    ],
)
def test_compiled_code_refuses_a_bad_dispatch(field, change, message):
    """Compiled code reads no values, so its kernels do; dtypes and strides are known when it is traced."""
    good = gossamer.dispatch(IDS, 4)
    x, weight = torch.randn(5, 6), torch.randn(4, 3, 6)
    with gossamer.backend("native"):
        compiled = torch.compile(lambda made: gossamer.grouped_matmul(x, weight, made), backend="eager")
        assert torch.equal(compiled(good), gossamer.grouped_matmul(x, weight, good))
        with pytest.raises((ValueError, TypeError), match=message):
            compiled(replace(good, **{field: change(getattr(good, field))}))


TOPOLOGIES = {
    "block": ({"block": lambda b: (15, 16)}, ValueError, r"block must be \(bm, bn\)"),
    "shape": ({"shape": lambda s: (63, 80)}, ValueError, "shape must be in whole blocks"),
    "dtype": ({"row_offsets": lambda t: t.long()}, TypeError, r"topology\.row_offsets must be int32"),
    "list": ({"row_indices_t": lambda t: t.tolist()}, TypeError, r"topology\.row_indices_t must be a torch\.Tensor"),
    "size": ({"order_t": lambda t: t[1:]}, ValueError, r"topology\.order_t must have shape \(nnz,\)"),
    "strides": ({"row_indices": strided}, ValueError, r"topology\.row_indices must be contiguous"),
    "device": ({"order_t": lambda t: t.to("meta")}, ValueError, r"topology\.order_t must be on the device"),
    "no_order": ({"order_t": lambda t: None}, ValueError, "topology must have one of order and order_t"),
    "row_offsets": ({"row_offsets": lambda t: t * 100}, ValueError, r"topology\.row_offsets must ascend from 0 to at"),
    "column_offsets": ({"column_offsets": lambda t: t.flip(0)}, ValueError, r"topology\.column_offsets must ascend"),
    "column": ({"column_indices": lambda t: t + 2**30}, ValueError, r"topology\.column_indices must be in \[0, 5\)"),
    "negative": (
        {"column_indices": lambda t: t - 9},
        ValueError,
        r"topology\.column_indices must be in \[0, 5\), got -",
    ),
    "row_t": ({"row_indices_t": lambda t: t + 4}, ValueError, r"topology\.row_indices_t must be in \[0, 4\)"),
    "row": (
        {"row_indices": lambda t: t.flip(0)},
        ValueError,
        r"topology\.row_indices must be the row that lists the block",
    ),
    "column_t": (
        {"column_indices_t": lambda t: t.flip(0)},
        ValueError,
        r"topology\.column_indices_t must be the column that lists",
    ),
    "unsorted": ({"column_indices": lambda t: with_value(t, 1, 0)}, ValueError, r"column_indices must ascend in each"),
    "order_outside": ({"order_t": lambda t: t + 1}, ValueError, r"topology\.order_t must be in \[0, "),
    "order_twice": ({"order_t": lambda t: t * 0}, ValueError, r"topology\.order_t must have every number once"),
    "order": ({"order_t": lambda t: t.flip(0)}, ValueError, r"topology\.order_t must say where each block"),
    "schedule": ({"row_schedule": lambda t: t + 1}, ValueError, r"topology\.row_schedule must be in \[0, 4\)"),
    "live_rows": ({"live_rows": lambda t: torch.zeros(3).int()}, ValueError, r"topology\.live_rows must have shape"),
    "experts_list": ({"padded_offsets": lambda t: [0, 64]}, TypeError, r"padded_offsets must be a torch\.Tensor"),
    "experts_dtype": (
        {"padded_offsets": lambda t: torch.zeros(3)},
        TypeError,
        r"padded_offsets must be int32",
    ),
    "no_experts": (
        {"padded_offsets": lambda t: torch.zeros(1).int()},
        ValueError,
        r"padded_offsets must have shape",
    ),
    "late_experts": (
        {"padded_offsets": lambda t: torch.tensor([16, 64]).int()},
        ValueError,
        r"topology\.padded_offsets must ascend from 0 to at most 64, got 16 at position 0",
    ),
}


def topology():
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0], [0, 0, 0, 1, 0]], dtype=torch.bool)
    return BlockTopology.from_mask(mask, 16, nnz=8)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_topologies(name):
    """A matrix over one is refused, and so is a product sampled at its blocks."""
    changes, error, message = TOPOLOGIES[name]
    good = topology()
    bad = replace(good, **{field: change(getattr(good, field)) for field, change in changes.items()})
    with pytest.raises(error, match=message):
        gossamer.sdd(torch.ones(64, 3), torch.ones(3, 80), bad)
    with pytest.raises(error, match=message):
        BlockSparseTensor(torch.zeros(8, 16, 16), bad)


def test_a_topology_by_hand_works_and_is_looked_at_again_when_it_changes():
    """One of right parts gives the same bits, transposed too; after a write to its tensors it is checked anew."""
    good, values = topology(), torch.randn(8, 16, 16)
    values[6:] = 0
    own = replace(good, **{k: v.clone() for k, v in vars(good).items() if isinstance(v, torch.Tensor)})
    sparse, x = BlockSparseTensor(values, own), torch.randn(5, 64)
    assert torch.equal(gossamer.dds(x, sparse), gossamer.dds(x, BlockSparseTensor(values, good)))
    assert torch.equal(gossamer.dsd(sparse.t(), x.T), gossamer.dsd(BlockSparseTensor(values, good).t(), x.T))
    view = sparse.t()
    own.column_indices[0] = 4000
    for call in (lambda: gossamer.dds(x, sparse), lambda: gossamer.dsd(view, x.T)):
        with pytest.raises(ValueError, match=r"_indices(_t)? must be in \[0, 5\), got 4000"):
            call()


@pytest.mark.parametrize("value", [-(2**31), -1, 129, 2**31 - 1])
def test_writes_to_tensors_that_are_checked_once(value):
    """Kernels are safe from them: schedules are not read, live rows out of range mean all, expert offsets are compared.

    Products read live rows where they have rectangles, so that these change the results at first.
    """
    routed = gossamer.dispatch(torch.arange(160).lt(60).long().unsqueeze(1), 2)
    made = BlockTopology.from_dispatch(routed, 128, 128, skip_padding=True)
    own = replace(made, **{k: v.clone() for k, v in vars(made).items() if isinstance(v, torch.Tensor)})
    x, weight = torch.randn(own.shape[0], 64), torch.randn(64, own.shape[1])

    def products(t):
        hidden = gossamer.sdd(x, weight, t)
        return hidden.values, gossamer.dsd(hidden, weight.T), gossamer.dsd(hidden.t(), x)

    with gossamer.backend("native"):
        whole = products(replace(made, live_rows=None))
        assert not any(torch.equal(found, wanted) for found, wanted in zip(products(own), whole, strict=True))
        own.padded_places(routed)
        for tensor in (own.row_schedule, own.column_schedule, own.live_rows):
            tensor.fill_(value)
        for found, wanted in zip(products(own), whole, strict=True):
            assert torch.equal(found, wanted)
        for place in range(3):
            own.padded_offsets.copy_(made.padded_offsets)
            own.padded_offsets[place] = value if value != 129 else (300, -5, 100)[place]
            with pytest.raises(ValueError, match=r"must be the one that BlockTopology\.from_dispatch made"):
                own.padded_places(routed)


@pytest.mark.parametrize("moved", ["slots", "offsets"])
def test_places_of_a_dispatch_with_a_part_on_meta(moved):
    """They were memory that nobody wrote to."""
    good = gossamer.dispatch(IDS, 4)
    made = BlockTopology.from_dispatch(good, 16, 16)
    with pytest.raises(ValueError, match=r"dispatch\.offsets must be on the device of dispatch\.slots, "):
        made.padded_places(replace(good, **{moved: getattr(good, moved).to("meta")}))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_places_of_structures_by_hand_are_all_written(backend):
    """Slots that are there twice, and expert offsets that moved after they were checked: no result has other memory."""
    dispatch = gossamer.dispatch(IDS, 4)
    made = BlockTopology.from_dispatch(dispatch, 16, 16)
    twice = replace(dispatch, slots=with_value(dispatch.slots, 1, int(dispatch.slots[0])))
    moved = replace(made, padded_offsets=made.padded_offsets.clone())
    with gossamer.backend(backend):
        slots, rows = made.padded_places(twice)
        assert rows[int(dispatch.slots[1])] == made.shape[0] and slots.min() >= 0 and slots.max() <= 10
        before, _ = moved.padded_places(dispatch)
        moved.padded_offsets[0] = 3
        slots, rows = moved.padded_places(dispatch)
    assert slots[:3].tolist() == [10, 10, 10] and sorted(slots[slots < 10].tolist()) == sorted(
        before[before < 10].tolist()
    )


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_products_keep_a_topology_by_hand(backend):
    """A product over a transposed view that somebody gave expert offsets has that topology, no field left out."""
    own = replace(topology().transposed(), padded_offsets=torch.tensor([0, 16, 80], dtype=torch.int32))
    with gossamer.backend(backend):
        product = gossamer.sdd(torch.ones(80, 3), torch.ones(3, 64), own)
    assert product.topology is own and BlockSparseTensor.from_dense(product.to_dense(), own).topology is own
    blocks = own.to_mask().repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert torch.equal(product.to_dense(), 3.0 * blocks)


@pytest.mark.parametrize("kind", [gossamer.NF4Weight, gossamer.Int8Weight, gossamer.Float8Weight])
def test_quantised_weights_with_parts_elsewhere(kind):
    """A part on another device is refused when the weight is put together."""
    weight = kind.quantize(torch.randn(6, 8))
    for name, part in vars(weight).items():
        if isinstance(part, torch.Tensor):
            with pytest.raises(ValueError, match=r"must be on (the device|cpu|meta).*, got (meta|cpu)"):
                replace(weight, **{name: part.to("meta")})


@pytest.mark.parametrize("change", [lambda t: t.resize_(3), lambda t: t.set_()], ids=["resize_", "set_"])
@pytest.mark.parametrize("kind", [gossamer.NF4Weight, gossamer.Int8Weight, gossamer.Float8Weight])
def test_quantised_weights_whose_parts_were_resized(kind, change):
    """Kernels read the sizes that the weight had when it was made."""
    x, a, b = torch.randn(2, 64), torch.randn(4, 64), torch.randn(96, 4)
    for name, part in vars(kind.quantize(torch.randn(96, 64))).items():
        if not isinstance(part, torch.Tensor):
            continue
        weight = kind.quantize(torch.randn(96, 64))
        gossamer.low_rank_linear(x, weight, a, b, scale=1.0)
        change(getattr(weight, name))
        with pytest.raises(ValueError, match=rf"({kind.__name__}\.{name}|weight) must h"):
            gossamer.low_rank_linear(x, weight, a, b, scale=1.0)


@pytest.mark.parametrize("field", ["data", "scale"])
def test_stacks_whose_strides_changed(field):
    """Kernels read codes and scales one after the other."""
    dispatch = gossamer.dispatch(IDS, 4)
    stacks = [gossamer.QuantizedExpertWeight.quantize(torch.randn(4, *s), "int8") for s in ((64, 32), (32, 32))]
    layer = lambda: gossamer.expert_mlp(torch.ones(5, 32), *stacks, dispatch, torch.ones(5, 2))  # noqa: E731
    with torch.no_grad():
        layer()
        part = getattr(stacks[0], field)
        part.data = strided(part)
        with pytest.raises(ValueError, match="data and scale of a quantised weight must be contiguous"):
            layer()


@pytest.mark.parametrize("make", [lambda: gossamer.dispatch(IDS, 4), topology])
def test_a_copy_remembers_no_check_of_the_original(make):
    """A deep copy has tensors of its own, whose changes the original's version does not count, nor one of inference."""
    with torch.inference_mode():
        inside = copy.deepcopy(make())
    outside = make()
    for original in (outside, inside):
        again = pickle.loads(pickle.dumps(original))
        field = "slots" if isinstance(again, Dispatch) else "column_indices"
        for structure in (copy.deepcopy(original), again):
            call = consumers(structure)["grouped_matmul"] if isinstance(structure, Dispatch) else sample(structure)
            call()
            getattr(structure, field)[0] = 4000
            with pytest.raises(ValueError, match=rf"{field} must be in \[0, .*4000"):
                call()


def sample(structure):
    return lambda: gossamer.sdd(torch.ones(64, 3), torch.ones(3, 80), structure)


@pytest.mark.parametrize("make", [lambda: gossamer.dispatch(IDS, 4), topology])
def test_a_remembered_check_costs_no_error(make, monkeypatch):
    """Under inference mode too, the package makes index tensors that have versions."""
    for mode in (torch.inference_mode, torch.no_grad):
        with mode(), monkeypatch.context() as patch:
            made = make()
            patch.setattr(_groups, "check_tensor", lambda name, tensor: pytest.fail(name))
            patch.setattr(block_topology, "check_block", lambda block: pytest.fail("block"))
            check_dispatch(made) if isinstance(made, Dispatch) else check_topology(made.transposed())
