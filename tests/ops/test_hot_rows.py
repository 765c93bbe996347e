"""gossamer.sparse_update_ on rows that much of a batch lists: sums cut into pieces, whatever else is in the batch."""

import importlib
import importlib.util

import pytest
import torch
from helpers import check_draws

import gossamer
from gossamer import optim

N, D = 40, 33
# Around the pieces that long runs are cut into, and a run of several of them.
PIECE = 16
LENGTHS = (1, 2, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 1, 5 * PIECE)
OPTIMIZERS = [
    optim.SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    optim.Adagrad(lr=0.1, weight_decay=0.01),
    optim.RowwiseAdagrad(lr=0.1, weight_decay=0.1, decoupled=True, clip_norm=2.0),
    optim.AdamW(lr=torch.tensor(0.1), clip_value=0.3),
    optim.PartialRowwiseAdam(lr=0.1, weight_decay=0.1),
    optim.LAMB(lr=0.1, weight_decay=0.1),
]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Shorter pieces than Triton's own, for the interpreter's sake."""
    if importlib.util.find_spec("triton"):
        # Import both modules before changing either: one copies the constant from the other when it is imported.
        names = [f"gossamer.triton_kernels.{name}" for name in ("row_gradients", "sparse_update")]
        for module in [importlib.import_module(name) for name in names]:
            monkeypatch.setattr(module, "PIECE", PIECE)


def hot_ids(device) -> torch.Tensor:
    """Row k listed ``LENGTHS[k]`` times, in no order."""
    ids = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    return ids[torch.randperm(len(ids))].to(device)


def take(backend, table, lists, dout, optimizer, steps=2, **options):
    """Table and state after some steps, in the dtype of ``table``."""
    wide = torch.float64 if table.dtype == torch.float64 else torch.float32
    if isinstance(optimizer.lr, torch.Tensor):
        optimizer = optim.AdamW(lr=optimizer.lr.to(table.device), clip_value=optimizer.clip_value)
    table, state = table.clone(), optimizer.state(*table.shape, table.device, wide)
    with gossamer.backend(backend):
        for _ in range(steps):
            gossamer.sparse_update_(table, *lists[:1], dout, *lists[1:], optimizer=optimizer, state=state, **options)
    return {"table": table} | {k: v for k, v in state.items() if k != "step"}


def draws(table, lists, dout, optimizer, **options):
    """Truth and baseline of the problem with rows and gradients rolled."""

    def draw(i):
        plain, gradient = table.roll(i, 0), dout.roll(-i, 0)
        wide = [x.double() if x.is_floating_point() else x for x in lists]
        truth = take("reference", plain.double(), wide, gradient.double(), optimizer, **options)
        return truth, take("reference", plain, lists, gradient, optimizer, **options)

    return draw


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_long_runs(kernel_backend, device, optimizer):
    """Rules with each kind of state, on rows listed once and hundreds of times"""
    ids = hot_ids(device)
    order = torch.randperm(len(ids) // 5 * 5).to(device)
    offsets = torch.arange(0, len(order) + 1, 5, device=device)
    weights = torch.rand(len(order), device=device)
    dout = torch.randn(len(offsets) - 1, D, device=device)
    table = torch.randn(N, D, device=device)
    lists = (ids[order], offsets, weights)
    actual = take(kernel_backend, table, lists, dout, optimizer)
    check_draws(actual, draws(table, lists, dout, optimizer))


def test_same_bits(kernel_backend, device):
    """Two runs agree bit by bit, and so do the rows that are left when every other one is padding instead."""
    ids = hot_ids(device)
    offsets = torch.tensor([0, 3, 3, 90, len(ids)], device=device)
    weights = torch.rand(len(ids), device=device)
    dout = torch.randn(4, D, device=device)
    table = torch.randn(N, D, device=device)
    optimizer = optim.RowwiseAdagrad(lr=0.1)
    first, again = (take(kernel_backend, table, (ids, offsets, weights), dout, optimizer) for _ in range(2))
    without = (torch.where(ids % 2 == 0, ids, N - 1), offsets, weights)
    half = take(kernel_backend, table, without, dout, optimizer, padding_idx=N - 1)
    for name, value in first.items():
        assert torch.equal(again[name], value)
        assert torch.equal(half[name][: len(LENGTHS) : 2], value[: len(LENGTHS) : 2])


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_modes(kernel_backend, device, mode):
    """Fixed-width bags: a mean counts what is not padding, a maximum gives its column's gradient to one position."""
    index = torch.randint(6, (40, 4), device=device)
    index[torch.rand(40, 4, device=device) < 0.5] = 5
    index[::7, 1] = 3
    table = torch.randn(N, D, device=device)
    dout = torch.randn(40, D, device=device)
    options = {"mode": mode, "padding_idx": 3, "steps": 1}
    optimizer = optim.RowwiseAdagrad(lr=0.1)
    actual = take(kernel_backend, table, (index,), dout, optimizer, **options)
    check_draws(actual, draws(table, (index,), dout, optimizer, **options))
    assert torch.equal(actual["table"][3], table[3])


@pytest.mark.parametrize("table_dtype", [torch.float16, torch.bfloat16])
def test_stochastic_rounding(kernel_backend, device, table_dtype):
    """The reference's bits, where the step itself is exact: a sum of few bits times a power of two, subnormals too."""
    table = (torch.randint(-64, 64, (N, D), device=device) / 32).to(table_dtype)
    table[:4] *= 2.0**-14
    index = torch.randint(N, (60, 2), device=device)
    dout = torch.randint(-8, 8, (60, D), device=device) * 2.0**-12
    optimizer = optim.SGD(lr=2.0**-8, stochastic_rounding=True, seed=2**62 + 5)
    actual = take(kernel_backend, table, (index,), dout, optimizer, steps=3)["table"]
    expected = take("reference", table, (index,), dout, optimizer, steps=3)["table"]
    assert torch.equal(actual, expected) and not torch.equal(actual, table)
    other = optim.SGD(lr=2.0**-8, stochastic_rounding=True, seed=3)
    assert not torch.equal(take(kernel_backend, table, (index,), dout, other, steps=3)["table"], actual)


def test_half_and_strided(kernel_backend, device):
    """Half tables, gradients and states that lie apart in memory, and a broadcast gradient."""
    storage = torch.randn(N, 4 * D, device=device).half()
    table = storage[:, D : 2 * D]
    optimizer = optim.Adagrad(lr=0.1)
    wide = torch.zeros(N, 3 * D, device=device)
    state = optimizer.state(N, D, device) | {"sum": wide[:, D : 2 * D]}
    index = torch.randint(N, (30, 5), device=device).t()
    dout = torch.randn(1, D, device=device).half().expand(5, D)
    expected = take("reference", table, (index,), dout, optimizer, steps=1)
    before = storage.clone()
    with gossamer.backend(kernel_backend):
        gossamer.sparse_update_(table, index, dout, optimizer=optimizer, state=state)
    torch.testing.assert_close(table, expected["table"], rtol=2e-3, atol=0)
    torch.testing.assert_close(state["sum"].contiguous(), expected["sum"])
    assert torch.equal(storage[:, :D], before[:, :D]) and torch.equal(storage[:, 2 * D :], before[:, 2 * D :])
    assert not wide[:, :D].any() and not wide[:, 2 * D :].any()
