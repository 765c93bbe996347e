"""The lists of blocks of an expert layer, from its dispatch: against plain torch, and what a dispatch may look like."""

import dataclasses

import pytest
import torch
from helpers import OperatorLog

import gossamer
from gossamer import BlockTopology
from gossamer.ops import _expert_topology as ops
from gossamer.testing import random_expert_ids


def make(num_tokens, experts, top_k, device, **options):
    return gossamer.dispatch(random_expert_ids(num_tokens, experts, top_k, **options).to(device), experts)


def both(backend, dispatch, wide, bm, spare=0):
    """Topology and places of the backend, and of the reference, by name; with room for ``spare`` block rows more."""
    counts = dispatch.counts.long()
    rows = int(((counts + bm - 1) // bm).sum()) + spare
    found = []
    for name in (backend, "reference"):
        with gossamer.backend(name):
            lists = ops.expert_topology(dispatch.offsets, rows, wide, bm)
            places = ops.expert_places(dispatch.offsets, lists["padded_offsets"], dispatch.slots, rows * bm)
        found.append(lists | dict(zip(("slots", "rows"), places, strict=True)))
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == torch.int32 and value.is_contiguous(), name
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dropped", [0.0, 0.4])
@pytest.mark.parametrize("skew", ["uniform", "zipf", "one", "few"])
def test_as_the_reference(kernel_backend, device, skew, dropped):
    """All skews (empty experts in "few"), dropped slots, one block column and several, room to spare and none."""
    dispatch = make(57, 5, 3, device, skew=skew, dropped=dropped)
    for wide, bm, spare in ((1, 16, 0), (3, 16, 2), (2, 64, 1)):
        assert_same(*both(kernel_backend, dispatch, wide, bm, spare))


@pytest.mark.parametrize(
    ("num_tokens", "experts", "top_k", "wide"), [(1, 1, 1, 1), (9, 20, 2, 2), (40, 3, 1, 40), (0, 4, 2, 3)]
)
def test_sizes(monkeypatch, kernel_backend, device, num_tokens, experts, top_k, wide):
    """One of all; more experts than are added up at a time; more columns than are written at a time; no tokens."""
    if kernel_backend == "triton":
        module = ops._kernels("triton")
        monkeypatch.setattr(module, "CHUNK", 8)
        monkeypatch.setattr(module, "TILE", 32)
    assert_same(*both(kernel_backend, make(num_tokens, experts, top_k, device), wide, 16, spare=1))


def test_no_slot_has_an_expert(kernel_backend, device):
    """All are dropped: no block row has blocks."""
    dispatch = gossamer.dispatch(torch.full((7, 2), 3, device=device), 3)
    found, expected = both(kernel_backend, dispatch, 2, 16, spare=2)
    assert_same(found, expected)
    assert not found["row_offsets"].any() and not found["live_rows"].any() and (found["slots"] == 14).all()


def test_places_by_hand(any_backend, device):
    """Tokens 0 to 4 with experts 1, 0, 1, none, 1: one block row of 16 each."""
    dispatch = gossamer.dispatch(torch.tensor([[1], [0], [1], [2], [1]], device=device), 2)
    with gossamer.backend(any_backend):
        t = BlockTopology.from_dispatch(dispatch, 16, 16, skip_padding=True)
        slots, rows = t.padded_slots(dispatch).tolist(), t.padded_rows(dispatch).tolist()
    assert t.live_rows.tolist() == [1, 3] and t.padded_offsets.tolist() == [0, 16, 32]
    assert slots == [1] + [5] * 15 + [0, 2, 4] + [5] * 13
    assert rows == [16, 0, 17, 32, 18]


def test_another_dispatch_is_refused_or_harmless(any_backend, device):
    """More rows than the topology has: an error on the CPU; on CUDA, which would have to wait, they are left out."""
    small, large = make(20, 3, 1, device), make(400, 3, 1, device)
    t = BlockTopology.from_dispatch(small, 16, 16)
    with gossamer.backend(any_backend):
        if device == "cpu" and any_backend != "triton":
            with pytest.raises(ValueError, match=r"made from dispatch: expert 0 has \d+ rows and room for \d+"):
                t.padded_slots(large)
        else:
            assert t.padded_slots(large).shape == (t.shape[0],)


def test_dispatches_made_by_hand(device):
    """Offsets that no sort gives, slots that are none, other dtypes and devices: an error, and no memory is touched."""
    dispatch = make(20, 3, 1, device)
    t = BlockTopology.from_dispatch(dispatch, 16, 16)

    def changed(**fields):
        return dataclasses.replace(dispatch, **fields)

    offsets = torch.tensor([0, 5, 3, 20], dtype=torch.int32, device=device)
    if device == "cpu":
        for wrong in (offsets, torch.tensor([0, 5, 9, 4000], dtype=torch.int32)):
            with pytest.raises(ValueError, match=r"ascend from 0 and need at most 4 block rows of 16, got \["):
                BlockTopology.from_dispatch(changed(offsets=wrong), 16, 16)
            with pytest.raises(ValueError, match="made from dispatch: expert"):
                t.padded_rows(changed(offsets=wrong))
        with pytest.raises(ValueError, match=r"slots must be slots in \[0, 20\)"):
            t.padded_rows(changed(slots=dispatch.slots + 1))
    with pytest.raises(TypeError, match=r"offsets must be int32, got torch\.int64"):
        BlockTopology.from_dispatch(changed(offsets=dispatch.offsets.long()), 16, 16)
    with pytest.raises(ValueError, match=f"topology must be on the device of dispatch, {device}.*, got meta"):
        t.to("meta").padded_slots(dispatch)


def test_one_operator_each(device):
    """A topology is one operator, and so are the places of its rows."""
    dispatch = make(50, 4, 2, device)
    with OperatorLog() as log:
        t = BlockTopology.from_dispatch(dispatch, 64, 16)
        t.padded_slots(dispatch)
    assert [name for name, *_ in log.calls] == ["expert_topology", "expert_places"]


def test_operators_are_well_formed(kernel_backend, device):
    """Schemas, fake kernels and traceability."""
    dispatch = make(20, 3, 2, device)
    args = (dispatch.offsets, 6, 2, 16, kernel_backend)
    torch.library.opcheck(torch.ops.gossamer.expert_topology.default, args)
    padded = torch.ops.gossamer.expert_topology.default(*args)[-1]
    args = (dispatch.offsets, padded, dispatch.slots, 96, kernel_backend)
    torch.library.opcheck(torch.ops.gossamer.expert_places.default, args)
