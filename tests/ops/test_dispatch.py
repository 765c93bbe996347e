"""gossamer.dispatch: the sort itself, its edges, its errors, and how it composes with compile, graphs and streams."""

import dataclasses
import itertools

import pytest
import torch
from helpers import OperatorLog

import gossamer
from gossamer.ops.dispatch import dispatch_reference
from gossamer.testing import random_expert_ids


def by_hand(ids, num_experts):
    """Slots, rows and offsets by a loop in Python."""
    flat = ids.reshape(-1).tolist()
    groups = [[i for i, e in enumerate(flat) if e == expert] for expert in range(num_experts)]
    dropped = [i for i, e in enumerate(flat) if e >= num_experts]
    slots = [i for group in [*groups, dropped] for i in group]
    rows = [0] * len(flat)
    for r, i in enumerate(slots):
        rows[i] = r
    offsets = [0]
    for group in groups:
        offsets.append(offsets[-1] + len(group))
    return slots, rows, offsets


def check(ids, num_experts, backend, device):
    with gossamer.backend(backend):
        d = gossamer.dispatch(ids.to(device), num_experts)
    slots, rows, offsets = by_hand(ids, num_experts)
    assert (d.num_tokens, d.top_k, d.num_experts) == (*ids.shape, num_experts)
    assert d.num_rows == ids.numel()
    for name, expected in (("slots", slots), ("rows", rows), ("offsets", offsets)):
        value = getattr(d, name)
        assert value.dtype == torch.int32 and value.is_contiguous() and value.device.type == device
        assert value.tolist() == expected, name
    assert d.counts.tolist() == [b - a for a, b in itertools.pairwise(offsets)]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dropped", [0.0, 0.4])
@pytest.mark.parametrize("skew", ["uniform", "zipf", "one", "few"])
def test_sorts_by_expert(any_backend, device, skew, dropped, index_dtype):
    """Odd sizes, all skews (empty experts in "few"), with and without dropped slots."""
    ids = random_expert_ids(13, 5, 3, skew=skew, dropped=dropped).to(index_dtype)
    check(ids, 5, any_backend, device)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [
        (1, 1, 1),
        (1, 300, 7),
        (40, 1, 1),
        (64, 4, 4),
        (86, 7, 3),
        (129, 2, 1),
        (300, 70, 2),
        (35, 600, 8),
    ],
)
def test_sizes(any_backend, device, num_tokens, num_experts, top_k):
    """One token, one expert, more experts than rows, sizes around and between tile edges."""
    check(random_expert_ids(num_tokens, num_experts, top_k, dropped=0.1), num_experts, any_backend, device)


@pytest.mark.parametrize("num_rows", [255, 256, 257, 512, 513])
def test_around_tile_edges(any_backend, device, num_rows):
    """One slot less, as many and one more than fit the tiles."""
    check(random_expert_ids(num_rows, 6, 1, skew="zipf"), 6, any_backend, device)


def test_many_tiles_and_experts(kernel_backend, device):
    """More experts than a program follows at once, over several tiles."""
    if kernel_backend == "triton" and device == "cpu":
        num_tokens, num_experts, top_k = 300, 2100, 2
    else:
        num_tokens, num_experts, top_k = 5000, 4096, 8
    ids = random_expert_ids(num_tokens, num_experts, top_k, dropped=0.05).to(device)
    with gossamer.backend(kernel_backend):
        d = gossamer.dispatch(ids, num_experts)
    expected = dispatch_reference(ids, num_experts)
    for value, wanted in zip((d.slots, d.rows, d.offsets), expected, strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("skew", ["uniform", "one"])
def test_spans_of_several_tiles(device, skew, monkeypatch):
    """Programs that go through several tiles, the last of them through fewer, and experts in several chunks."""
    kernels = pytest.importorskip("gossamer.triton_kernels.dispatch")
    monkeypatch.setattr(kernels, "SPANS", 3)
    monkeypatch.setattr(kernels, "MOST_EXPERTS", 32)
    assert [kernels.spans_of(n, 7) for n in (900, 1000, 1200)] == [(3, 3), (3, 3), (3, 4)]
    for num_experts in (7, 70):
        check(random_expert_ids(450, num_experts, 2, skew=skew, dropped=0.1), num_experts, "triton", device)
        check(random_expert_ids(255, num_experts, 2, skew=skew, dropped=0.1), num_experts, "triton", device)


def test_all_on_one_expert(any_backend, device):
    """Every slot of one expert, with all others empty, first and last."""
    for expert in (0, 4):
        check(torch.full((150, 2), expert), 5, any_backend, device)


def test_all_dropped(any_backend, device):
    """No live row: all slots come in order behind empty experts."""
    check(torch.full((100, 3), 9), 4, any_backend, device)


def test_no_tokens(any_backend, device):
    """T = 0 gives empty rows and E + 1 zero offsets."""
    check(torch.empty(0, 3, dtype=torch.int64), 4, any_backend, device)


def test_ids_far_beyond_experts_are_dropped(any_backend, device):
    """Any id from E on means no expert, also one that a narrower integer would wrap."""
    check(torch.tensor([[0, 2**40], [2**33 + 1, 1], [2, 3]]), 2, any_backend, device)


def test_one_expert_twice_in_a_token(any_backend, device):
    """Duplicates within a token keep slot order."""
    check(torch.tensor([[1, 1, 0], [2, 2, 2], [0, 1, 0]]), 3, any_backend, device)


@pytest.mark.parametrize("num_tokens", [13, 200])
def test_strided_ids(any_backend, device, num_tokens):
    """Transposed, sliced and expanded ids are read where they lie."""
    ids = random_expert_ids(num_tokens, 5, 4)
    check(ids.t().contiguous().t(), 5, any_backend, device)
    check(ids[:, ::2], 5, any_backend, device)
    check(ids[::2, 1:3], 5, any_backend, device)
    check(ids[:1].expand(num_tokens, 4), 5, any_backend, device)


def test_same_bits_twice(kernel_backend, device):
    """Two runs agree."""
    ids = random_expert_ids(200, 9, 3, skew="zipf").to(device)
    with gossamer.backend(kernel_backend):
        a, b = gossamer.dispatch(ids, 9), gossamer.dispatch(ids, 9)
    assert torch.equal(a.slots, b.slots) and torch.equal(a.rows, b.rows) and torch.equal(a.offsets, b.offsets)


def test_compiles(kernel_backend, device):
    """Traced whole and with a dynamic token count, without recompilation for another count."""
    torch._dynamo.reset()

    def f(ids):
        d = gossamer.dispatch(ids, 5)
        return d.slots, d.rows, d.offsets, d.counts

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    with gossamer.backend(kernel_backend):
        for i, num_tokens in enumerate((13, 29, 200)):
            ids = random_expert_ids(num_tokens, 5, 3, dropped=0.1).to(device)
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                for value, wanted in zip(compiled(ids), f(ids), strict=True):
                    assert torch.equal(value, wanted)


def test_operator_is_well_formed(kernel_backend, device):
    """Schema, fake kernel and traceability of the operator."""
    ids = random_expert_ids(13, 5, 3).to(device)
    torch.library.opcheck(torch.ops.gossamer.dispatch.default, (ids, 5, None, kernel_backend))


def test_is_one_operator(kernel_backend, device):
    """The public function reads nothing on the host: it is one call of one operator."""
    with OperatorLog() as log, gossamer.backend(kernel_backend):
        gossamer.dispatch(random_expert_ids(13, 5, 3).to(device), 5)
    assert [name for name, _, _ in log.calls] == ["dispatch"]


def test_meta_tensors():
    """Shapes without data, on the meta device."""
    d = gossamer.dispatch(torch.empty(6, 2, dtype=torch.int64, device="meta"), 4)
    assert d.slots.is_meta and d.slots.shape == (12,) and d.rows.shape == (12,) and d.offsets.shape == (5,)
    assert d.slots.dtype == d.rows.dtype == d.offsets.dtype == torch.int32


@pytest.mark.parametrize(
    ("ids", "num_experts", "error", "message"),
    [
        ([[0, 1]], 2, TypeError, "expert_ids must be a torch.Tensor, got list"),
        (torch.zeros(3, 2), 4, TypeError, "expert_ids must be int32 or int64, got torch.float32"),
        (torch.zeros(3, 2, dtype=torch.int16), 4, TypeError, "int32 or int64, got torch.int16"),
        (torch.zeros(3, dtype=torch.int64), 4, ValueError, r"expert_ids must have shape \(T, K\)"),
        (torch.zeros(3, 2, 1, dtype=torch.int64), 4, ValueError, r"got \(3, 2, 1\)"),
        (torch.zeros(3, 2, dtype=torch.int64), 2.0, TypeError, "num_experts must be an int, got float"),
        (torch.zeros(3, 2, dtype=torch.int64), True, TypeError, "num_experts must be an int, got bool"),
        (torch.zeros(3, 2, dtype=torch.int64), 0, ValueError, "num_experts must be at least 1, got 0"),
        (torch.zeros(3, 2, dtype=torch.int64), 1, ValueError, "got K=2, num_experts=1"),
        (torch.zeros(3, 0, dtype=torch.int64), 1, ValueError, "got K=0"),
        (torch.zeros(1, 1, dtype=torch.int32).expand(2**30, 2), 4, ValueError, r"T\*K = 2147483648"),
    ],
)
def test_errors(ids, num_experts, error, message):
    """Each documented error names the argument, the rule and the value."""
    with pytest.raises(error, match=message):
        gossamer.dispatch(ids, num_experts)


BY_HAND = {
    "int16": ({"slots": lambda t: t.short()}, TypeError, "dispatch.slots must be torch.int32, got torch.int16"),
    "int64": ({"slots": lambda t: t.long()}, TypeError, "dispatch.slots must be torch.int32, got torch.int64"),
    "strided": (
        {"slots": lambda t: t.repeat_interleave(2)[::2]},
        ValueError,
        "dispatch.slots must be contiguous, got stride 2",
    ),
    "beyond": ({"slots": lambda t: t + 100}, ValueError, r"dispatch.slots must be in \[0, T·K=8\), got .* 100 to 107"),
    "offsets": ({"offsets": lambda t: t + 1000}, ValueError, "must ascend from 0 to at most 8 rows, got 1000 to 1005"),
    "falling": ({"offsets": lambda t: t.flip(0).contiguous()}, ValueError, "got a decrease after 5"),
    "foreign rows": ({"rows": torch.zeros_like}, ValueError, "dispatch.rows must be the inverse of dispatch.slots"),
    "meta": ({"rows": lambda t: t.to("meta")}, ValueError, "dispatch.rows must be on the device of dispatch.slots"),
    "a bound below": ({"max_rows": lambda _: 2}, ValueError, "must ascend from 0 to at most 2 rows, got 0 to 5"),
    "more experts": ({"num_experts": lambda _: 4}, ValueError, r"dispatch.offsets must have shape \(E\+1,\) = \(5\)"),
    "more tokens": ({"num_tokens": lambda _: 5}, ValueError, r"dispatch.slots must have shape \(T·K,\) = \(10\)"),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_dispatches_made_by_hand_are_checked(name):
    """Parts that do not fit are refused by name before any kernel reads them."""
    change, error, message = BY_HAND[name]
    made = gossamer.dispatch(torch.tensor([[0, 1], [2, 0], [1, 3], [3, 3]]), 3)
    foreign = dataclasses.replace(made, **{field: alter(getattr(made, field)) for field, alter in change.items()})
    x, weights = torch.randn(4, 8), torch.rand(4, 2)
    with pytest.raises(error, match=message):
        gossamer.grouped_matmul(x, torch.randn(3, 5, 8), foreign)
    with pytest.raises(error, match=message):
        gossamer.expert_mlp(x, torch.randn(3, 6, 8), torch.randn(3, 8, 3), foreign, weights)


def test_a_dispatch_is_looked_through_again_when_it_changes():
    """What was found right is not read again, and what changed since is."""
    made = gossamer.dispatch(torch.tensor([[0, 1], [2, 0]]), 3)
    copy = dataclasses.replace(made)
    x, weight = torch.randn(2, 8), torch.randn(3, 5, 8)
    expected = gossamer.grouped_matmul(x, weight, made)
    assert torch.equal(gossamer.grouped_matmul(x, weight, copy), expected)
    copy.offsets[-1] = 99
    with pytest.raises(ValueError, match=r"dispatch\.offsets must ascend from 0 to at most 4 rows, got 0 to 99"):
        gossamer.grouped_matmul(x, weight, copy)


def test_negative_ids(kernel_backend, device):
    """An error on the CPU that names the slot; on CUDA, where nothing is read, the slot is dropped."""
    ids = torch.tensor([[0, 1], [2, -3]])
    if device == "cpu":
        with gossamer.backend(kernel_backend), pytest.raises(ValueError, match="got -3 at token 1, slot 1"):
            gossamer.dispatch(ids, 3)
    else:
        with gossamer.backend(kernel_backend):
            d = gossamer.dispatch(ids.to(device), 3)
        assert d.slots.tolist() == [0, 1, 2, 3] and d.offsets.tolist() == [0, 1, 2, 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_synchronisation_and_graph_capture(kernel_backend, device):
    """Clean under sync debugging, captured in a CUDA graph, and right when replayed on other ids."""
    ids = random_expert_ids(500, 16, 4, seed=1).to(device)
    with gossamer.backend(kernel_backend):
        gossamer.dispatch(ids, 16)
        torch.cuda.set_sync_debug_mode("error")
        try:
            gossamer.dispatch(ids, 16)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            d = gossamer.dispatch(ids, 16)
    ids.copy_(random_expert_ids(500, 16, 4, seed=2, dropped=0.2).to(device))
    graph.replay()
    for value, wanted in zip((d.slots, d.rows, d.offsets), dispatch_reference(ids, 16), strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_large(kernel_backend, device):
    """A training step's size, and the largest skew at it."""
    for skew in ("uniform", "one"):
        ids = random_expert_ids(24576, 128, 8, skew=skew, dropped=0.01).to(device)
        with gossamer.backend(kernel_backend):
            d = gossamer.dispatch(ids, 128)
        for value, wanted in zip((d.slots, d.rows, d.offsets), dispatch_reference(ids, 128), strict=True):
            assert torch.equal(value, wanted)
