"""gossamer.BlockTopology and BlockSparseTensor: lists of blocks, constructors, dense and BSR forms, bad arguments."""

import dataclasses

import pytest
import torch

import gossamer
from gossamer import BlockSparseTensor, BlockTopology

# Torch says so once a process, of every tensor in that layout.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse BSR tensor support")

# Rows 0 to 3: two blocks, none, three, one; column 3 is empty.
MASK = torch.tensor([[1, 0, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 1, 0, 0]], dtype=torch.bool)
BLOCK = (32, 16)


def values_of(topology, dtype=torch.float32):
    """Random values, zero from the last block on, on the topology's device."""
    values = torch.randn(topology.nnz_blocks, *topology.block, device=topology.device).to(dtype)
    count = int(topology.row_offsets[-1])
    return values.index_fill(0, torch.arange(count, topology.nnz_blocks, device=values.device), 0)


def assert_same_topology(first, second, skip=("padded_offsets",)):
    for field in dataclasses.fields(first):
        if field.name not in skip:
            a, b = getattr(first, field.name), getattr(second, field.name)
            same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            assert same, f"{field.name}: {a} and {b}"


def test_lists_of_a_small_mask(device):
    """Every field by hand, with room for one block more than there are."""
    t = BlockTopology.from_mask(MASK.to(device), BLOCK, nnz=7)
    assert t.shape == (128, 80) and t.grid == (4, 5) and t.block == BLOCK and t.order is None
    assert t.nnz_blocks == 7 and t.density == 7 / 20 and t.device.type == device
    expected = {
        "row_offsets": [0, 2, 2, 5, 6],
        "column_indices": [0, 4, 0, 1, 2, 2, 5],
        "row_indices": [0, 0, 2, 2, 2, 3, 4],
        "column_offsets": [0, 2, 3, 5, 5, 6],
        "row_indices_t": [0, 2, 2, 2, 3, 0, 4],
        "column_indices_t": [0, 0, 1, 2, 2, 4, 5],
        "order_t": [0, 2, 3, 4, 5, 1, 6],
        "row_schedule": [2, 0, 3, 1],
        "column_schedule": [0, 2, 1, 4, 3],
    }
    for name, value in expected.items():
        found = getattr(t, name)
        assert found.dtype == torch.int32 and found.tolist() == value, name
    assert torch.equal(t.to_mask().cpu(), MASK)


def test_transposed_is_a_view(device):
    """The transposed topology is that of the transposed mask but for the order of values, and shares its memory."""
    t = BlockTopology.from_mask(MASK.to(device), BLOCK)
    view, built = t.transposed(), BlockTopology.from_mask(MASK.t().to(device), BLOCK[::-1])
    assert_same_topology(view, built, skip=("padded_offsets", "order", "order_t"))
    assert view.row_offsets.data_ptr() == t.column_offsets.data_ptr()
    assert view.order.data_ptr() == t.order_t.data_ptr() and view.order_t is None
    assert_same_topology(view.transposed(), t)
    assert torch.equal(view.to_mask(), t.to_mask().t())


def test_from_indices(device):
    """Indices in order, and in any order with sort, give the topology of their mask."""
    rows, cols = MASK.nonzero(as_tuple=True)
    rows, cols = rows.to(device), cols.to(device)
    expected = BlockTopology.from_mask(MASK.to(device), BLOCK)
    assert_same_topology(BlockTopology.from_indices(rows, cols, (128, 80), BLOCK), expected)
    order = torch.randperm(len(rows), device=device)
    shuffled = rows[order].int(), cols[order].int()
    assert_same_topology(BlockTopology.from_indices(*shuffled, (128, 80), BLOCK, sort=True), expected)
    none = rows[:0]
    assert not BlockTopology.from_indices(none, none, (128, 80), BLOCK).to_mask().any()


def expert_ids(counts):
    """One expert a token, ``counts[e]`` tokens for expert e, shuffled; the last count is of dropped ones."""
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return ids[torch.randperm(len(ids))].unsqueeze(1)


def test_from_dispatch_by_hand(device):
    """MegaBlocks' layout worked out on paper: two blocks of rows for expert 0, none for 1, one for 2."""
    dispatch = gossamer.dispatch(expert_ids([20, 0, 8, 0]).to(device), 3)
    t = BlockTopology.from_dispatch(dispatch, 32, 16)
    # 28 slots on three experts never need more than four blocks of rows.
    assert t.shape == (64, 96) and t.padded_offsets.tolist() == [0, 32, 32, 48]
    expected = {
        "row_offsets": [0, 2, 4, 6, 6],
        "column_indices": [0, 1, 0, 1, 4, 5, 6, 6],
        "row_indices": [0, 0, 1, 1, 2, 2, 4, 4],
        "order_t": [0, 2, 1, 3, 4, 5, 6, 7],
        "row_indices_t": [0, 1, 0, 1, 2, 2, 4, 4],
        "column_offsets": [0, 2, 4, 4, 4, 5, 6],
    }
    for name, value in expected.items():
        assert getattr(t, name).tolist() == value, name
    assert t.live_rows is None and t.live_columns is None
    skipping = BlockTopology.from_dispatch(dispatch, 32, 16, skip_padding=True)
    assert_same_topology(skipping, dataclasses.replace(t, live_rows=skipping.live_rows))
    assert skipping.live_rows.tolist() == [16, 4, 8, 0] and skipping.live_rows.dtype == torch.int32
    assert skipping.transposed().live_columns is skipping.live_rows and skipping.transposed().live_rows is None
    assert skipping.transposed().transposed().live_rows is skipping.live_rows


@pytest.mark.parametrize("counts", [[20, 0, 8, 3], [0, 0, 1, 0], [0, 0, 0, 5], [1, 1, 1, 0], [17, 33, 16, 0]])
def test_from_dispatch(device, counts):
    """Against the topology of the mask, and each slot's padded row against its expert; drops, idle experts, one row."""
    ids = expert_ids(counts).to(device)
    dispatch, size = gossamer.dispatch(ids, 3), 64
    t = BlockTopology.from_dispatch(dispatch, size, (16, 32))
    assert_same_topology(t, BlockTopology.from_mask(t.to_mask(), (16, 32), nnz=t.nnz_blocks))
    rows = t.padded_rows(dispatch).long()
    live = ids.view(-1) < 3
    assert (rows[~live] == t.shape[0]).all()
    begin, end = t.padded_offsets[:-1].long(), t.padded_offsets[1:].long()
    assert (rows[live] >= begin[ids[live, 0]]).all() and (rows[live] < end[ids[live, 0]]).all()
    assert ((end - begin).cpu() == (torch.tensor(counts[:3]) + 15) // 16 * 16).all()
    slots = t.padded_slots(dispatch).long()
    assert torch.equal(slots[rows[live]], torch.arange(len(ids), device=device)[live])
    assert (slots < len(ids)).sum() == live.sum() and slots.max() <= len(ids)
    # Each live row block has all the columns of its expert.
    columns = t.to_mask().repeat_interleave(16, 0)[rows[live]].view(-1, 3, 2)
    assert torch.equal(columns, torch.nn.functional.one_hot(ids[live, 0], 3).bool().unsqueeze(2).expand(-1, -1, 2))


def test_from_dispatch_of_no_tokens(device):
    """No rows, no blocks."""
    dispatch = gossamer.dispatch(torch.empty(0, 2, dtype=torch.int64, device=device), 4)
    t = BlockTopology.from_dispatch(dispatch, 32, 16)
    assert t.shape == (0, 128) and t.nnz_blocks == 0 and t.column_offsets.tolist() == [0] * 9
    assert t.padded_slots(dispatch).numel() == 0 and t.padded_rows(dispatch).numel() == 0


def test_random():
    """The asked number of blocks, rows even when balanced, and the same draw from the same seed."""

    def draw(seed=0, **options):
        return BlockTopology.random(
            (160, 112), (32, 16), 0.37, generator=torch.Generator().manual_seed(seed), **options
        )

    for options in ({}, {"balanced": True}):
        t = draw(**options)
        assert t.nnz_blocks == int(t.row_offsets[-1]) == int(t.to_mask().sum()) == 13
        assert_same_topology(t, draw(**options))
        assert not torch.equal(t.to_mask(), draw(1, **options).to_mask())
    lengths = draw(balanced=True).row_offsets.diff()
    assert lengths.max() - lengths.min() == 1
    assert draw().row_offsets.diff().max() > 3
    for density, full in ((0.0, False), (1.0, True)):
        for balanced in (False, True):
            mask = BlockTopology.random((64, 64), 16, density, balanced=balanced).to_mask()
            assert bool(mask.all()) == full and bool(mask.any()) == full
    assert BlockTopology.random((0, 64), 16, 0.5).grid == (0, 4)


def test_dense_forms(device):
    """to_dense and from_dense by loop, of a matrix and its transpose, with gradients, and room that is not used."""
    t = BlockTopology.from_mask(MASK.to(device), BLOCK, nnz=8)
    values = values_of(t).requires_grad_()
    s = BlockSparseTensor(values, t)
    expected = torch.zeros(128, 80, device=device)
    for i, (r, c) in enumerate(MASK.nonzero().tolist()):
        expected[32 * r : 32 * r + 32, 16 * c : 16 * c + 16] = values[i]
    assert torch.equal(s.to_dense(), expected) and torch.equal(s.t().to_dense(), expected.t())
    assert s.t().values.data_ptr() == values.data_ptr() and s.t().shape == (80, 128)
    dense = torch.randn(128, 80, device=device, requires_grad=True)
    taken = BlockSparseTensor.from_dense(dense, t)
    mask = MASK.to(device).repeat_interleave(32, 0).repeat_interleave(16, 1)
    assert torch.equal(taken.to_dense(), dense * mask)
    taken_t = BlockSparseTensor.from_dense(dense.t(), t.transposed())
    assert torch.equal(taken_t.values, taken.values.transpose(1, 2)) and taken_t.topology.order is t.order_t
    weight = torch.randn(128, 80, device=device)
    (dvalues,) = torch.autograd.grad((s.t().to_dense() * weight.t()).sum(), values)
    assert torch.equal(dvalues, BlockSparseTensor.from_dense(weight, t).values)
    (ddense,) = torch.autograd.grad((taken.values * values.detach()).sum(), dense)
    assert torch.equal(ddense, expected)


def test_bsr_round_trip(device):
    """To torch's layout and back, from a view and with unused room, and from rows whose blocks are out of order."""
    t = BlockTopology.from_mask(MASK.to(device), BLOCK, nnz=8)
    s = BlockSparseTensor(values_of(t), t)
    for matrix in (s, s.t()):
        bsr = matrix.to_sparse_bsr()
        assert bsr.layout == torch.sparse_bsr and torch.equal(bsr.to_dense(), matrix.to_dense())
        back = BlockSparseTensor.from_sparse_bsr(bsr)
        assert torch.equal(back.to_dense(), matrix.to_dense()) and back.topology.nnz_blocks == 6
    bsr = s.to_sparse_bsr()
    assert BlockSparseTensor.from_sparse_bsr(bsr).values.data_ptr() == bsr.values().data_ptr()
    swap = [1, 0, 4, 3, 2, 5]
    swapped = torch.sparse_bsr_tensor(
        bsr.crow_indices(), bsr.col_indices()[swap], bsr.values()[swap], bsr.shape, check_invariants=False
    )
    assert torch.equal(BlockSparseTensor.from_sparse_bsr(swapped).to_dense(), s.to_dense())


def test_to_and_detach():
    """Other dtypes and devices take the values, and where needed the topology, along."""
    t = BlockTopology.from_mask(MASK, BLOCK)
    s = BlockSparseTensor(values_of(t).requires_grad_(), t)
    half = s.to(dtype=torch.float16)
    assert half.dtype == torch.float16 and half.topology is t and half.values.requires_grad
    assert torch.equal(half.values, s.values.half())
    meta = s.to("meta")
    assert meta.device.type == meta.topology.device.type == "meta" and meta.dtype == torch.float32
    assert not s.detach().values.requires_grad and s.detach().values.data_ptr() == s.values.data_ptr()


def index(*values):
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BlockTopology.from_mask(MASK.int(), 32), TypeError, "mask must be bool, got torch.int32"),
        (lambda: BlockTopology.from_mask(MASK[0], 32), ValueError, r"mask must have shape \(rows/bm, cols/bn\)"),
        (lambda: BlockTopology.from_mask(MASK, 24), ValueError, r"each one of \(16, 32, 64, 128\), got 24"),
        (lambda: BlockTopology.from_mask(MASK, (32, 8)), ValueError, r"block must be \(bm, bn\).* got \(32, 8\)"),
        (lambda: BlockTopology.from_mask(MASK, 32, nnz=5), ValueError, "nnz must be at least .* 6, got 5"),
        (lambda: BlockTopology.from_mask(MASK, 32, nnz=-1), ValueError, "nnz must not be negative, got -1"),
        (
            lambda: BlockTopology.from_indices(index(0, 4, 9), index(0, 0, 0), (64, 64), 16),
            ValueError,
            r"rows must be block indices in \[0, 4\), got 4 at entry 1",
        ),
        (
            lambda: BlockTopology.from_indices(index(0, 1), index(0, -1), (64, 64), 16),
            ValueError,
            r"cols must be block indices in \[0, 4\), got -1 at entry 1",
        ),
        (
            lambda: BlockTopology.from_indices(index(0, 1, 1), index(0, 2, 1), (64, 64), 16),
            ValueError,
            r"row-major order unless sort=True, got \(1, 1\) at entry 2",
        ),
        (
            lambda: BlockTopology.from_indices(index(0, 1, 1), index(0, 2, 2), (64, 64), 16),
            ValueError,
            r"must not be given twice, got \(1, 2\) at entry 2",
        ),
        (
            lambda: BlockTopology.from_indices(index(1, 0, 1), index(2, 0, 2), (64, 64), 16, sort=True),
            ValueError,
            r"must not be given twice, got \(1, 2\) at entry 2",
        ),
        (
            lambda: BlockTopology.from_indices(index(0), index(0), (64, 72), 16),
            ValueError,
            "cols 72 is not a multiple of 16; pad it to 80",
        ),
        (lambda: BlockTopology.from_indices(index(0), index(0), (64,), 16), ValueError, "shape must be"),
        (
            lambda: BlockTopology.from_indices(index(0), index(0, 1), (64, 64), 16),
            ValueError,
            r"cols must have shape \(nnz,\) = \(1\), got \(2,\)",
        ),
        (
            lambda: BlockTopology.from_indices(index(0.0), index(0), (64, 64), 16),
            TypeError,
            "rows must be int32 or int64",
        ),
        (lambda: BlockTopology.random((64, 64), 16, 1.1), ValueError, "density must be from 0 to 1, got 1.1"),
        (lambda: BlockTopology.random((60, 64), 16, 0.5), ValueError, "rows 60 is not a multiple of 16; pad it to 64"),
        (
            lambda: BlockTopology.from_dispatch(gossamer.dispatch(index([0], [1]), 2), 40, 16),
            ValueError,
            "ffn_size must be a positive multiple of the block's 16 columns, got 40; pad it to 48",
        ),
        (lambda: BlockTopology.from_dispatch(MASK, 32, 16), TypeError, "dispatch must be a gossamer.Dispatch"),
        (
            lambda: BlockTopology.from_mask(MASK, 16).padded_rows(gossamer.dispatch(index([0], [1]), 2)),
            ValueError,
            "must be the one that BlockTopology.from_dispatch made",
        ),
        (
            lambda: BlockSparseTensor(torch.zeros(5, 32, 16), BlockTopology.from_mask(MASK, BLOCK)),
            ValueError,
            r"values must have shape \(nnz, bm, bn\) = \(6, 32, 16\), got \(5, 32, 16\)",
        ),
        (lambda: BlockSparseTensor(torch.zeros(6, 32, 16), MASK), TypeError, "topology must be a"),
        (
            lambda: BlockSparseTensor.from_dense(torch.zeros(128, 64), BlockTopology.from_mask(MASK, BLOCK)),
            ValueError,
            r"dense must have shape \(rows, cols\) = \(128, 80\), got \(128, 64\)",
        ),
        (lambda: BlockSparseTensor.from_sparse_bsr(torch.zeros(4, 4)), TypeError, "layout torch.sparse_bsr"),
        (
            lambda: BlockSparseTensor.from_sparse_bsr(torch.zeros(8, 8).to_sparse_bsr((4, 4))),
            ValueError,
            r"block must be \(bm, bn\).* got \(4, 4\)",
        ),
    ],
)
def test_errors(make, error, message):
    """Each documented error names the argument, the rule and the first value that breaks it."""
    with pytest.raises(error, match=message):
        make()
