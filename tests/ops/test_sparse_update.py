"""gossamer.sparse_update_: every optimizer against float64 and torch.optim, duplicates, hot rows, rounding, errors."""

import math

import pytest
import torch
from helpers import DRAWS, assert_same_bits, flat, violations

import gossamer
from gossamer import optim
from gossamer._rounding import random_bits, round_stochastically
from gossamer.ops._bags import Bags
from gossamer.ops.sparse_update import SparseUpdate, Update
from gossamer.testing import errors

OPTIMIZERS = [
    optim.SGD(0.1),
    optim.SGD(0.1, weight_decay=0.1),
    optim.SGD(0.1, momentum=0.9),
    optim.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    optim.Adagrad(0.1, weight_decay=0.1),
    optim.Adagrad(0.1, initial_accumulator=0.5, clip_value=0.3),
    optim.RowwiseAdagrad(0.1),
    optim.RowwiseAdagrad(0.1, weight_decay=0.1),
    optim.RowwiseAdagrad(0.1, weight_decay=0.1, decoupled=True, clip_norm=1.0),
    optim.Adam(0.1, weight_decay=0.1),
    optim.AdamW(0.1, clip_value=0.5, clip_norm=1.0),
    optim.PartialRowwiseAdam(0.1, weight_decay=0.1),
    optim.LAMB(0.1, weight_decay=0.1),
    optim.FTRL(0.1, l1=0.1, l2=0.1),
]
NAMES = [f"{i}-{type(o).__name__}" for i, o in enumerate(OPTIMIZERS)]


def ragged(lengths, num_rows, device, index_dtype=torch.int64):
    """Random ids and offsets of bags of the given lengths."""
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(device, index_dtype)
    index = torch.randint(num_rows, (int(offsets[-1]),)).to(device, index_dtype)
    return index, offsets


def steps(backend, table, batches, optimizer, **arguments):
    """The table and the state after one step for each ``(index, dout, offsets, weights)``, in the table's precision."""
    table = table.clone()
    wide = torch.float64 if table.dtype == torch.float64 else torch.float32
    state = optimizer.state(*table.shape, table.device, wide)
    with gossamer.backend(backend):
        for index, dout, offsets, weights in batches:
            gossamer.sparse_update_(table, index, dout, offsets, weights, optimizer=optimizer, state=state, **arguments)
    return {"table": table, **state}


def doubled(batches):
    """The batches in float64."""
    return [(index, dout.double(), offsets, None if w is None else w.double()) for index, dout, offsets, w in batches]


def check_steps(backend, table, batches, optimizer, **arguments):
    """Steps on ``backend`` are as near to float64 as the reference in the same dtype is; returns them.

    Where one draw does not settle it, the reference is judged on others: the same steps, rows and bags rolled.
    """
    actual = steps(backend, table, batches, optimizer, **arguments)
    truth = steps("reference", table.double(), doubled(batches), optimizer, **arguments)
    assert actual["step"].item() == len(batches)
    worst = {}
    for draw in range(DRAWS):
        rolled = [(index, dout.roll(draw, 0), *rest) for index, dout, *rest in batches]
        baseline = steps("reference", table.roll(draw, 0), rolled, optimizer, **arguments)
        wide = steps("reference", table.roll(draw, 0).double(), doubled(rolled), optimizer, **arguments)
        bounds = {name: errors(value, wide[name]) for name, value in baseline.items() if name != "step"}
        worst = {name: tuple(map(max, bound, worst.get(name, bound))) for name, bound in bounds.items()}
        found = violations({name: actual[name] for name in worst}, truth, worst)
        if not found:
            return actual
    raise AssertionError("\n".join(found))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=NAMES)
def test_optimizers(kernel_backend, dtype, device, optimizer):
    """Two steps of each, with weights, duplicates and untouched rows, which keep their bits."""
    table = torch.randn(31, 37, device=device, dtype=dtype)
    batches = []
    for lengths in ([3, 0, 6, 1], [2, 9]):
        index, offsets = ragged(lengths, 20, device)
        weights = torch.rand(index.shape, device=device, dtype=dtype)
        dout = torch.randn(len(lengths), 37, device=device, dtype=dtype)
        batches.append((index, dout, offsets, weights))
    actual = check_steps(kernel_backend, table, batches, optimizer)
    assert torch.equal(actual["table"][20:], table[20:])
    touched = torch.cat([batch[0] for batch in batches])
    untouched = [row for row in range(31) if row not in touched]
    fresh = optimizer.state(31, 37, device)
    for name in optimizer.state_kinds():
        assert torch.equal(actual[name][untouched], fresh[name][untouched]), name


@pytest.mark.parametrize("dim", [1, 16, 64, 200, 700])
def test_dims(kernel_backend, device, dim):
    """One column to many vectors, with an elementwise and a row-wise state."""
    table = torch.randn(9, dim, device=device)
    index = torch.randint(9, (5, 4), device=device)
    batches = [(index, torch.randn(5, dim, device=device), None, None)]
    for optimizer in (optim.SGD(0.1), optim.PartialRowwiseAdam(0.1), optim.LAMB(0.1)):
        check_steps(kernel_backend, table, batches, optimizer)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (optim.SGD(0.1, weight_decay=0.1), lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1)),
        (optim.SGD(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
        (
            optim.SGD(0.1, momentum=0.9, nesterov=True),
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
        ),
        (optim.Adagrad(0.1, weight_decay=0.1), lambda p: torch.optim.Adagrad(p, 0.1, weight_decay=0.1)),
        (optim.Adam(0.1, weight_decay=0.1), lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1)),
        (optim.AdamW(0.1, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1)),
    ],
    ids=["SGD", "momentum", "Nesterov", "Adagrad", "Adam", "AdamW"],
)
def test_reference_is_torch_optim(ours, theirs):
    """The reference itself: where each step touches every row, it is torch.optim's dense rule, in float64."""
    table = torch.randn(6, 5, dtype=torch.float64)
    parameter = torch.nn.Parameter(table.clone())
    optimizer = theirs([parameter])
    batches = []
    for _ in range(3):
        index = torch.cat([torch.arange(6), torch.randint(6, (6,))]).view(4, 3)
        dout = torch.randn(4, 5, dtype=torch.float64)
        batches.append((index, dout, None, None))
        gossamer.gather_reduce(parameter, index).backward(dout)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(steps("reference", table, batches, ours)["table"], parameter.detach())


def test_worked_examples():
    """The other rules, by hand: two occurrences of one row in the first step."""
    table = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    dout = torch.tensor([[0.3, 0.4], [-0.1, 0.4]], dtype=torch.float64)
    batch = [(torch.zeros(2, 1, dtype=torch.int64), dout, None, None)]
    for optimizer, expected in [
        (optim.RowwiseAdagrad(0.1), [0.9657003, -2.1371989]),
        (optim.RowwiseAdagrad(0.1, weight_decay=0.01), [0.9632342, -2.1365587]),
        (optim.RowwiseAdagrad(0.1, weight_decay=0.01, decoupled=True), [0.9647003, -2.1351989]),
        (optim.PartialRowwiseAdam(0.1), [0.9657003, -2.1371989]),
        (optim.LAMB(0.1, eps=1e-8), [0.8418861, -2.1581139]),
    ]:
        result = steps("reference", table, batch, optimizer)["table"]
        torch.testing.assert_close(result, torch.tensor([expected], dtype=torch.float64), atol=1e-6, rtol=0)
    ftrl, zero = optim.FTRL(0.1, beta=1.0, l1=0.1, l2=0.01), torch.zeros(1, 1, dtype=torch.float64)
    one = torch.zeros(1, 1, dtype=torch.int64)
    batches = [(one, torch.tensor([[g]], dtype=torch.float64), None, None) for g in (0.5, -0.2, 0.9)]
    result = steps("reference", zero, batches, ftrl)
    for name, value in (("accumulator", 1.1), ("linear", 1.2799590), ("table", -0.0575643)):
        assert math.isclose(result[name].item(), value, rel_tol=1e-5), name


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("form", ["fixed", "ragged"])
def test_modes(kernel_backend, device, mode, form):
    """Each pooling over either kind of list, with padding, equals its gradient followed by the dense rule."""
    table = torch.randn(12, 21, device=device)
    index, offsets = (torch.randint(12, (6, 4), device=device), None)
    if form == "ragged":
        index, offsets = ragged([4, 0, 7, 1, 5], 12, device, torch.int32)
    num_bags = 6 if form == "fixed" else 5
    weights = None if mode == "max" else torch.rand(index.shape, device=device)
    batch = (index, torch.randn(num_bags, 21, device=device), offsets, weights)
    optimizer = optim.SGD(0.5)
    actual = check_steps(kernel_backend, table, [batch], optimizer, mode=mode, padding_idx=3)
    wide = table.double().requires_grad_()
    with gossamer.backend("reference"):
        y = gossamer.gather_reduce(wide, index, offsets, weights, mode=mode, padding_idx=3)
    y.backward(batch[1].double())
    torch.testing.assert_close(actual["table"].double(), wide.detach() - 0.5 * wide.grad, atol=1e-5, rtol=1e-5)
    assert torch.equal(actual["table"][3], table[3])


# One row takes half of the batch, and another sits on either side of the length from which sums are cut in pieces.
@pytest.mark.parametrize("length", [127, 128, 129, 1500])
def test_hot_rows(kernel_backend, device, length):
    """Long runs of one row are as exact as short ones, with the same bits on every run."""
    index = torch.cat([torch.full((length,), 2), torch.randint(40, (length,))])[torch.randperm(2 * length)].to(device)
    table = torch.randn(40, 19, device=device)
    dout = torch.randn(index.shape[0], 19, device=device)
    for optimizer in (optim.SGD(0.01), optim.RowwiseAdagrad(0.1)):
        batches = [(index, dout, None, torch.rand(index.shape, device=device))]
        first = check_steps(kernel_backend, table, batches, optimizer)
        assert_same_bits(first, steps(kernel_backend, table, batches, optimizer))


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16, torch.float16])
def test_short_rows(device, low):
    """Rows of a few whole vectors, which native kernels sum in passes of their own: short and long runs, two units."""
    if device != "cpu":
        pytest.skip("native kernels run on the CPU")
    native = pytest.importorskip("gossamer._C")
    best = native.isa()
    index = torch.cat([torch.full((300,), 700), torch.randint(900, (2200,))])[torch.randperm(2500)].view(500, 5)
    try:
        for isa in ("generic", "avx2", "avx512"):
            if isa not in native.compiled_isas:
                continue
            if isa not in ("generic", best) and not best.startswith(("avx512", "amx")):
                continue
            native.choose_isa(isa)
            for dim in (8, 16, 32, 64, 128):
                table, dout = torch.randn(900, dim).to(low), torch.randn(500, dim).to(low)
                for optimizer in (optim.SGD(0.01), optim.RowwiseAdagrad(0.1, weight_decay=0.1, decoupled=True)):
                    check_steps("native", table, [(index, dout, None, None)], optimizer)
    finally:
        native.choose_isa("")


@pytest.mark.parametrize("lists", ["weighted", "plain", "padding", "means"])
def test_threads_do_not_matter(device, lists):
    """One thread and several give the same bits, rounding included; bags may be empty, and ids of padding left out."""
    if device != "cpu":
        pytest.skip("threads are the CPU's")
    index = torch.where(torch.rand(6000) < 0.4, 5, torch.randint(300, (6000,)))
    offsets, weights, arguments = None, None, {}
    if lists in ("weighted", "plain"):
        index = index.view(1500, 4)
        weights = torch.rand(1500, 4) if lists == "weighted" else None
    else:
        offsets = torch.cat([torch.tensor([0, 6000]), torch.randint(6001, (1499,))]).sort().values
        arguments = {"padding_idx": 5, "mode": "mean" if lists == "means" else "sum"}
    table = torch.randn(300, 64).bfloat16()
    batches = [(index, torch.randn(1500, 64).bfloat16(), offsets, weights)]
    optimizer = optim.RowwiseAdagrad(0.1, stochastic_rounding=True)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(steps("native", table, batches, optimizer, **arguments))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_batch_position_does_not_matter(kernel_backend, device):
    """A row's bits do not depend on which other rows the batch has."""
    table = torch.randn(40, 33, device=device)
    mine = torch.full((700, 1), 7, device=device)
    dout = torch.randn(700, 33, device=device)
    others = torch.randint(7, (501, 1), device=device)
    alone = steps(kernel_backend, table, [(mine, dout, None, None)], optim.Adam(0.1))
    both = (torch.cat([others, mine]), torch.cat([torch.randn(501, 33, device=device), dout]), None, None)
    beside = steps(kernel_backend, table, [both], optim.Adam(0.1))
    assert torch.equal(alone["table"][7], beside["table"][7])


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_bits(kernel_backend, device, low):
    """Exactly the documented generator: the reference's rounding of the same float32 rows, whatever step and seed."""
    if kernel_backend == "triton" and device == "cpu" and low == torch.bfloat16:
        pytest.skip("the interpreter does not compute in bfloat16")
    # Steps of a power of two times a power of two are exact in float32, whatever is fused.
    table = (torch.randint(-64, 64, (50, 37), device=device) * 2.0**-6).to(low)
    table[:25] *= 2.0**-14  # float16's subnormals, where its grid is fixed
    index = torch.randperm(50, device=device).view(25, 2)
    dout = torch.randint(-99, 99, (25, 37), device=device) * 2.0**-19
    for seed in (0, 2**63 - 1):
        optimizer = optim.SGD(0.25, stochastic_rounding=True, seed=seed)
        batches = [(index, dout, None, None)] * 2
        actual = steps(kernel_backend, table, batches, optimizer)["table"]
        assert torch.equal(actual, steps("reference", table, batches, optimizer)["table"])
        assert not torch.equal(actual, steps(kernel_backend, table, batches, optim.SGD(0.25))["table"])


@pytest.mark.parametrize(("low", "x"), [(torch.float16, 1.0003), (torch.bfloat16, -1.003), (torch.float16, 2.3e-6)])
def test_stochastic_rounding_is_unbiased(low, x):
    """Only the two neighbours occur, each as often as it must so that the mean is x, in independent draws."""
    bits = random_bits(5, torch.tensor([3]), torch.arange(1000), 1000)
    rounded = round_stochastically(torch.full((1000, 1000), x), bits, low).double()
    values = rounded.unique()
    assert values.numel() == 2 and values[0] < x < values[1]
    # Six standard errors of the mean of 10⁶ draws.
    spread = (values[1] - values[0]).item() / 2
    assert abs(rounded.mean().item() - x) < 6 * spread / 1000
    assert abs((rounded[:, 1:] > x).eq(rounded[:, :-1] > x).double().mean() - 0.5) < 0.5  # neither copies its neighbour


def test_rounding_keeps_specials():
    """Infinity and NaN stay, the largest numbers may reach infinity, zero and exact numbers stay."""
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0, -2.5])
    for low in (torch.bfloat16, torch.float16):
        rounded = round_stochastically(x, torch.full(x.shape, 0xFFFFFFFF), low)
        torch.testing.assert_close(rounded, x.to(low), equal_nan=True, rtol=0, atol=0)


def test_learning_rate_tensor(any_backend, device):
    """A tensor gives the same bits as the number, and can be changed between steps."""
    table = torch.randn(9, 5, device=device)
    batch = (torch.randint(9, (4, 2), device=device), torch.randn(4, 5, device=device), None, None)
    lr = torch.tensor(0.25, device=device)
    optimizer = optim.Adam(lr)
    expected = steps(any_backend, table, [batch], optim.Adam(0.25))
    assert_same_bits(steps(any_backend, table, [batch], optimizer), expected)
    lr.zero_()
    assert torch.equal(steps(any_backend, table, [batch], optimizer)["table"], table)


@pytest.mark.parametrize("lr", [0.0, torch.zeros(1)])
def test_ftrl_at_a_rate_of_zero_changes_nothing(any_backend, device, lr):
    """The rule divides by the rate, which is zero at the start of a warm-up."""
    optimizer = optim.FTRL(lr=lr if isinstance(lr, float) else lr.to(device), l1=0.1)
    table, ids = torch.randn(5, 20, device=device), torch.tensor([1, 3, 1], device=device)
    state = {name: tensor + 1 for name, tensor in optimizer.state(5, 20, device).items()}
    before = [tensor.clone() for tensor in (table, state["accumulator"], state["linear"])]
    with gossamer.backend(any_backend):
        gossamer.sparse_update_(table, ids, torch.ones(3, 20, device=device), optimizer=optimizer, state=state)
    assert all(map(torch.equal, (table, state["accumulator"], state["linear"]), before))


def test_views_of_a_wider_storage(kernel_backend, device):
    """Weights and state side by side in rows of one storage, updated in place, and a strided output gradient."""
    storage = torch.randn(12, 50, device=device)
    storage[:, 20:40] = 0
    original = storage.clone()
    optimizer = optim.PartialRowwiseAdam(0.1)
    state = {
        "step": torch.zeros(1, dtype=torch.int64, device=device),
        "exp_avg": storage[:, 20:40],
        "exp_avg_sq": storage[:, 40],
    }
    storage[:, 40] = 0
    index = torch.randint(12, (7, 2), device=device)[:, :1]
    dout = torch.randn(20, 7, device=device).t()
    with gossamer.backend(kernel_backend):
        gossamer.sparse_update_(storage[:, :20], index, dout, optimizer=optimizer, state=state)
    expected = steps(kernel_backend, original[:, :20].contiguous(), [(index, dout, None, None)], optimizer)
    assert torch.equal(storage[:, :20], expected["table"])
    assert torch.equal(storage[:, 20:40], expected["exp_avg"]) and torch.equal(storage[:, 40], expected["exp_avg_sq"])
    assert torch.equal(storage[:, 41:], original[:, 41:])


def test_nothing_touched(any_backend, device):
    """No bags, empty bags and padding alone change the step count only."""
    table = torch.randn(5, 6, device=device)
    none = torch.zeros(0, 3, dtype=torch.int64, device=device)
    empty = torch.zeros(3, dtype=torch.int64, device=device)
    batches = [
        (none, torch.zeros(0, 6, device=device), None, None),
        (empty[:0], torch.ones(2, 6, device=device), empty, None),
        (torch.full((2, 2), 4, device=device), torch.ones(2, 6, device=device), None, None),
    ]
    result = steps(any_backend, table, batches, optim.Adam(0.1), padding_idx=4)
    assert result["step"].item() == 3 and torch.equal(result["table"], table)


@pytest.mark.parametrize("bounds", ["clamp", "drop"])
def test_bounds(any_backend, device, bounds):
    """Clamped ids train the edge rows, dropped ones nothing; both are counted, and repaired offsets too."""
    table = torch.zeros(5, 2, device=device)
    index = torch.tensor([0, -1, 7, 3, 5], device=device)
    offsets = torch.tensor([0, 3, 2, 9], device=device)
    count = torch.full((1,), 10, device=device)
    state = optim.SGD(1.0).state(5, 2, device)
    with gossamer.backend(any_backend):
        gossamer.sparse_update_(
            table,
            index,
            torch.ones(3, 2, device=device),
            offsets,
            optimizer=optim.SGD(1.0),
            state=state,
            bounds=bounds,
            bounds_count=count,
        )
    assert count.item() == 10 + 3 + 2
    expected = [-2.0, 0, 0, -1, -2] if bounds == "clamp" else [-1.0, 0, 0, -1, 0]
    assert table[:, 0].tolist() == expected


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"index": torch.tensor([[0, 9]])},
            IndexError,
            r"index must be in \[0, N\) with N=9, got 9 at flat position 1",
        ),
        (
            {"weights": torch.tensor([[1.0, math.nan]])},
            ValueError,
            "weights must not be NaN, got nan at flat",
        ),
        ({"weights": torch.ones(2, 1)}, ValueError, "weights must have shape that of index"),
        ({"dout": torch.ones(2, 4)}, ValueError, r"dout must have shape that of the result = \(1, 4\), got \(2, 4\)"),
        (
            {"dout": torch.ones(1, 4).double()},
            TypeError,
            "dout must be floating, and float64 for a float64 table",
        ),
        ({"table": torch.ones(9, 4, requires_grad=True)}, ValueError, "table must not require a gradient"),
        ({"table": torch.ones(4, 9).t()}, ValueError, "table must have unit column stride"),
        ({"optimizer": torch.optim.SGD}, TypeError, "optimizer must be a gossamer.optim.Optimizer, got type"),
        ({"state": {}}, ValueError, r"state of Adam must hold \['step', 'exp_avg', 'exp_avg_sq'\], got \[\]"),
        ({"state": optim.Adam().state(8, 4)}, ValueError, r"state\['exp_avg'\] must have shape"),
        (
            {"state": optim.Adam().state(9, 4, dtype=torch.float64)},
            TypeError,
            r"state\['exp_avg'\] must be torch.float32 for a table of torch.float32",
        ),
        ({"bounds": "ignore"}, ValueError, "bounds must be one of .* got 'ignore'"),
        ({"bounds_count": torch.zeros(1)}, TypeError, "bounds_count must be int64 with one element"),
        ({"optimizer": optim.Adam(torch.ones(1, device="meta"))}, ValueError, "lr must be on the device of table"),
    ],
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_errors(backend, change, error, message):
    """Each error names the argument, the rule and the value, and leaves table and state as they were."""
    arguments = {
        "table": torch.ones(9, 4),
        "index": torch.tensor([[0, 1]]),
        "dout": torch.ones(1, 4),
        "optimizer": optim.Adam(),
        "state": optim.Adam().state(9, 4),
    } | change
    table, state = arguments["table"].detach().clone(), {k: v.clone() for k, v in arguments["state"].items()}
    with pytest.raises(error, match=message), gossamer.backend(backend):
        gossamer.sparse_update_(**arguments)
    assert torch.equal(arguments["table"], table)
    assert_same_bits(arguments["state"], state)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("offsets", "at"), [([0, 2, 1], "1 at position 2"), ([0, 5, 5], "5 at position 1")])
def test_bad_offsets(backend, offsets, at):
    """Offsets that fall, or lead beyond the list."""
    table = torch.ones(9, 4)
    with pytest.raises(ValueError, match=rf"offsets must ascend within \[0, L\] with L=3, got {at}"):
        with gossamer.backend(backend):
            gossamer.sparse_update_(
                table,
                torch.zeros(3, dtype=torch.int64),
                torch.ones(2, 4),
                torch.tensor(offsets),
                optimizer=optim.SGD(1.0),
                state=optim.SGD(1.0).state(9, 4),
            )
    assert torch.equal(table, torch.ones(9, 4))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: optim.SGD(-1.0), ValueError, r"lr must be in \[0, inf\), got -1"),
        (lambda: optim.SGD("0.1"), TypeError, "lr must be a number or a floating tensor of one element, got str"),
        (lambda: optim.SGD(torch.ones(2)), TypeError, "lr must be a number or a floating tensor of one element"),
        (lambda: optim.SGD(0.1, momentum=1.0), ValueError, r"momentum must be in \[0, 1\), got 1"),
        (lambda: optim.SGD(0.1, nesterov=True), ValueError, "nesterov needs momentum > 0"),
        (lambda: optim.Adam(betas=(0.9, 1.5)), ValueError, r"betas\[1\] must be in \[0, 1\), got 1.5"),
        (lambda: optim.Adam(eps=-1.0), ValueError, "eps must be in"),
        (lambda: optim.Adagrad(0.1, clip_norm=-1.0), ValueError, "clip_norm must be in"),
        (lambda: optim.Adagrad(0.1, seed=-1), ValueError, "seed must be in"),
        (lambda: optim.FTRL(0.1, weight_decay=0.1), ValueError, "weight_decay must be 0 for FTRL"),
    ],
)
def test_optimizer_errors(make, error, message):
    """A description outside its ranges is refused when it is made."""
    with pytest.raises(error, match=message):
        make()


def test_instruction_sets(device):
    """Each build of the native kernels that this processor runs is right, for a rule of every kind."""
    if device != "cpu":
        pytest.skip("native kernels run on the CPU")
    native = pytest.importorskip("gossamer._C")
    table = torch.randn(31, 37).half()
    index, offsets = ragged([3, 0, 30, 1], 31, device)
    batches = [(index, torch.randn(4, 37).half(), offsets, torch.rand(index.shape))]
    exact = (table.round(), [(torch.arange(30).view(15, 2), torch.randint(-9, 9, (15, 37)) * 2.0**-19, None, None)])
    rounded = []
    best = native.isa()
    try:
        for isa in ("generic", "avx2", "avx512"):
            if isa in native.compiled_isas and (isa in ("generic", best) or best.startswith(("avx512", "amx"))):
                native.choose_isa(isa)
                for optimizer in OPTIMIZERS:
                    check_steps("native", table, batches, optimizer)
                rounded.append(steps("native", *exact, optim.SGD(0.25, stochastic_rounding=True)))
                assert_same_bits(rounded[0], rounded[-1])
    finally:
        native.choose_isa("")


def test_operator_is_well_formed(any_backend, device):
    """Schema, fake kernel and traceability of the mutating operator."""
    table, dout = torch.randn(9, 5, device=device), torch.randn(4, 5, device=device)
    index = torch.randint(9, (4, 2), device=device)
    optimizer = optim.PartialRowwiseAdam(0.1)
    update = Update(optimizer.step_rule(), None, *optimizer.state(9, 5, device).values())
    args = SparseUpdate(table, Bags(index), dout, None, update)
    torch.library.opcheck(torch.ops.gossamer.sparse_update_.default, flat(args, any_backend))


def test_ftrl_keeps_float64():
    """Plain torch takes a learning rate that float32 does not hold as it is, for tables in float64."""
    lr, gradient = 0.1, 2.0
    table = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
    before, optimizer = table[1].clone(), optim.FTRL(lr)
    state = optimizer.state(4, 3, dtype=torch.float64)
    dout = torch.full((1, 3), gradient, dtype=torch.float64)
    with gossamer.backend("reference"):
        gossamer.sparse_update_(table, torch.tensor([[1]]), dout, optimizer=optimizer, state=state)
    z = gradient - gradient / lr * before
    torch.testing.assert_close(state["linear"][1], z, rtol=1e-14, atol=0)
    torch.testing.assert_close(table[1], -z / ((1.0 + gradient) / lr), rtol=1e-14, atol=0)
