"""Tables of integer codes with scales: lookups, their gradients and steps, against the numbers that codes stand for."""

import math

import pytest
import torch
from helpers import check, flat, ragged

import gossamer
from gossamer import optim
from gossamer._rounding import random_bits
from gossamer._row_codes import LEAST_SCALE, encode, moved_scale, scale_rate, scale_slope
from gossamer.ops._bags import Bags
from gossamer.ops.gather_reduce import GatherDot, GatherReduce, gather_reduce_reference
from gossamer.ops.sparse_update import SparseUpdate, Update
from gossamer.testing import assert_close, errors

PRIMITIVE = "gather_reduce"
CODES = pytest.mark.parametrize("codes", [torch.int8, torch.int16], ids=["int8", "int16"])


def table_of(rows, dim, codes, device, scales="row"):
    """Codes over their whole range, and scales that make numbers of about one of them."""
    limits = torch.iinfo(codes)
    table = torch.randint(limits.min, limits.max + 1, (rows, dim), dtype=codes)
    scale = (0.5 + torch.rand(rows if scales == "row" else 1)) / limits.max
    return table.to(device), scale.to(device)


@pytest.mark.parametrize(
    ("codes", "scales", "dim"),
    [
        (torch.int8, "row", 37),
        (torch.int8, "table", 16),
        (torch.int8, "row", 1),
        (torch.int16, "row", 300),
        (torch.int16, "table", 37),
    ],
)
def test_lookups(kernel_backend, device, codes, scales, dim):
    """Sums with weights, and their gradient, of fixed widths and ragged lists; more columns than tiles have."""
    table, scale = table_of(29, dim, codes, device, scales)
    fixed = torch.randint(29, (7, 3), device=device), None
    for index, offsets in (fixed, ragged([0, 3, 0, 40, 1], 29, device, torch.int32)):
        weights = torch.randn(index.shape, device=device)

        def function(weights, index=index, offsets=offsets):
            with gossamer.backend(kernel_backend):
                return gossamer.gather_reduce(table, index, offsets, weights, scale=scale)

        def reference(weights, index=index, offsets=offsets):
            wide = torch.promote_types(weights.dtype, torch.float32)
            return gather_reduce_reference(table.to(wide) * scale.to(wide).unsqueeze(1), Bags(index, offsets, weights))

        check(function, reference, {"weights": weights})


@CODES
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_means(kernel_backend, device, codes, out_dtype):
    """Plain sums and means without a padding row and ids that are dropped, in every dtype of results."""
    if kernel_backend == "triton" and device == "cpu" and out_dtype == torch.bfloat16:
        pytest.skip("the interpreter does not compute in bfloat16")
    table, scale = table_of(29, 40, codes, device)
    index, offsets = ragged([2, 0, 9, 1], 29, device, torch.int64)
    index[4] = 77
    how = {"mode": "mean", "padding_idx": int(index[3]), "bounds": "drop"}
    with gossamer.backend(kernel_backend):
        found = gossamer.gather_reduce(table, index, offsets, scale=scale, out_dtype=out_dtype, **how)
    numbers = table.double() * scale.double().unsqueeze(1)
    truth = gossamer.gather_reduce(numbers, index, offsets, **how)
    assert_close(found, truth, truth.to(out_dtype))


def test_strided_tables_and_scales(kernel_backend, device):
    """Rows apart, columns apart, and scales apart."""
    table, scale = table_of(29, 40, torch.int8, device)
    index = torch.randint(29, (5, 4), device=device)
    with gossamer.backend(kernel_backend):
        expected = gossamer.gather_reduce(table, index, scale=scale)
        for view in (table.repeat(1, 2)[:, :40], table.T.contiguous().T):
            apart = torch.stack([scale, scale + 1], 1)[:, 0]
            assert torch.equal(gossamer.gather_reduce(view, index, scale=apart), expected)


def test_one_id_is_exact(kernel_backend, device):
    """A bag of one id is its row's codes times its scale, rounded once."""
    table, scale = table_of(29, 40, torch.int16, device)
    with gossamer.backend(kernel_backend):
        found = gossamer.gather_reduce(table, torch.arange(29, device=device), scale=scale)
    assert torch.equal(found, table.float() * scale.unsqueeze(1))


def stepped(backend, table, scale, batches, optimizer, scale_lr=0.0):
    """Codes, scales and state after one step for each batch."""
    table, scale = table.clone(), scale.clone()
    state = optimizer.state(*table.shape, table.device)
    with gossamer.backend(backend):
        for index, dout, offsets, weights in batches:
            how = {"optimizer": optimizer, "state": state, "scale": scale, "scale_lr": scale_lr}
            gossamer.sparse_update_(table, index, dout, offsets, weights, **how)
    return {"table": table, "scale": scale, **state}


def exact_problem(codes, device, dim, rows=50):
    """Codes, scales and gradients whose steps of plain descent at a rate of 1/4 are exact in float32."""
    limits = torch.iinfo(codes)
    table = torch.randint(limits.min // 2, limits.max // 2, (rows, dim)).to(device, codes)
    scale = (2.0 ** torch.randint(-7, -4, (rows,))).to(device)
    index = torch.cat([torch.randperm(rows)[: rows // 2], torch.zeros(300, dtype=torch.int64)]).view(-1, 1).to(device)
    dout = (torch.randint(-99, 99, (index.shape[0], dim)) * 2.0**-9).to(device)
    return table, scale, index, dout


# Columns that fill vectors of the processor are stepped in registers, others from memory.
@pytest.mark.parametrize(
    ("codes", "rounding", "dim"),
    [
        (torch.int8, True, 37),
        (torch.int8, True, 32),
        (torch.int8, False, 16),
        (torch.int16, True, 128),
        (torch.int16, False, 37),
    ],
)
def test_steps_round_as_documented(kernel_backend, device, codes, rounding, dim):
    """The reference's codes to the bit, one row in more pieces than one; rows that are not listed stay."""
    table, scale, index, dout = exact_problem(codes, device, dim)
    for seed in (0, 2**63 - 1):
        optimizer = optim.SGD(0.25, stochastic_rounding=rounding, seed=seed)
        batches = [(index, dout, None, None)] * 2
        actual = stepped(kernel_backend, table, scale, batches, optimizer)
        expected = stepped("reference", table, scale, batches, optimizer)
        assert torch.equal(actual["table"], expected["table"]) and torch.equal(actual["scale"], scale)
        assert not torch.equal(actual["table"], table)
        rest = torch.ones(50, dtype=torch.bool, device=device).index_fill(0, index.flatten(), False)
        assert torch.equal(actual["table"][rest], table[rest])


@CODES
@pytest.mark.parametrize(
    "optimizer",
    [
        optim.SGD(0.1, momentum=0.9),
        optim.Adagrad(0.1, clip_value=0.3),
        optim.RowwiseAdagrad(0.1, weight_decay=0.1),
        optim.RowwiseAdagrad(0.1, weight_decay=0.1, decoupled=True),
        optim.Adam(0.1),
        optim.PartialRowwiseAdam(0.1, clip_norm=1.0),
        optim.LAMB(0.1, weight_decay=0.1),
        optim.FTRL(0.1, l1=0.01),
    ],
    ids=lambda o: type(o).__name__,
)
def test_every_optimizer(kernel_backend, device, codes, optimizer):
    """Rows are, to the nearest code, those of a float table that starts from the same numbers, and so are states."""
    limits = torch.iinfo(codes)
    for dim, weights in ((33, torch.rand(9, device=device)), (32, None)):
        table, scale = table_of(20, dim, codes, device)
        table //= 2
        index, offsets = ragged([3, 0, 5, 1], 20, device, torch.int64)
        dout = torch.randn(4, dim, device=device)
        found = stepped(kernel_backend, table, scale, [(index, dout, offsets, weights)], optimizer)
        truth, numbers = optimizer.state(20, dim, device, torch.float64), table.double() * scale.double().unsqueeze(1)
        lists = (index, dout.double(), offsets, None if weights is None else weights.double())
        gossamer.sparse_update_(numbers, *lists, optimizer=optimizer, state=truth)
        units = (numbers / scale.double().unsqueeze(1)).clamp(limits.min, limits.max)
        # Half a code, and what float32 arithmetic moves it by.
        assert bool(((found["table"].double() - units).abs() <= 0.5 + 2e-2).all())
        for name in optimizer.state_kinds():
            assert errors(found[name], truth[name])[1] < 1e-5


def moved_scales(table, scale, grad, rate, wide):
    """New rows of plain descent at a rate of 1/4, and what their scales move to, in ``wide``."""
    limits = torch.iinfo(table.dtype)
    scale, grad = scale.to(wide), grad.to(wide)
    new = table.to(wide) * scale.unsqueeze(1) - 0.25 * grad
    v = new / scale.unsqueeze(1)
    inside = (v >= limits.min) & (v <= limits.max)
    slope = (grad * torch.where(inside, v.round() - v, v.clamp(limits.min, limits.max))).sum(1)
    return new, (scale - rate * slope).clamp(min=2**-20)


@pytest.mark.parametrize(("codes", "dim"), [(torch.int8, 37), (torch.int8, 16), (torch.int16, 64)])
def test_learned_scales(kernel_backend, device, codes, dim):
    """Scales move down their slope before rows are rounded by them, as plain float64 arithmetic says."""
    table, scale, index, dout = exact_problem(codes, device, dim)
    table[3] = torch.iinfo(codes).max
    optimizer = optim.SGD(0.25, stochastic_rounding=True, seed=5)
    for lr in (1e-3, 1e3):
        found = stepped(kernel_backend, table, scale, [(index, dout, None, None)], optimizer, lr)
        grad = torch.zeros(50, dim, dtype=torch.float64, device=device).index_add(0, index.flatten(), dout.double())
        limits = torch.iinfo(codes)
        rate = lr / math.sqrt(index.shape[0] * dim * limits.max)
        new, expected = moved_scales(table, scale, grad, rate, torch.float64)
        listed = torch.zeros(50, dtype=torch.bool, device=device).index_fill(0, index.flatten(), True)
        baseline = moved_scales(table, scale, grad, rate, torch.float32)[1]
        assert_close(found["scale"][listed], expected[listed], baseline[listed])
        assert torch.equal(found["scale"][~listed], scale[~listed])
        assert not torch.equal(found["scale"][listed], scale[listed])
        # Codes are within one of the numbers in units of the new scales, and mostly not the nearest.
        units = (new / found["scale"].double().unsqueeze(1)).clamp(limits.min, limits.max)
        apart = (found["table"].double() - units)[listed].abs()
        assert bool((apart < 1).all()) and (lr == 1e3 or bool((apart > 0.5).any()))


def test_worked_values():
    """A row of 8 bits in steps of 0.01: its codes, the slope of its step, and numbers that round by chance."""
    w = torch.tensor([[0.034, -0.127, 0.4, -1.4]])
    scale, ones = torch.full((1, 1), 0.01), torch.ones(1, 4)
    assert encode(w, scale, torch.int8).tolist() == [[3, -13, 40, -128]]
    slope = scale_slope(w, ones, scale, torch.int8)
    assert slope.item() == pytest.approx(-128.7, rel=1e-5)
    rate = scale_rate(1.0, 1, 4, torch.int8)
    assert rate * slope.item() == pytest.approx(-5.710139, rel=1e-6)
    assert moved_scale(torch.tensor([0.01]), slope, rate).item() == pytest.approx(5.720139, rel=1e-6)
    assert moved_scale(torch.tensor([0.01]), -slope, rate).item() == LEAST_SCALE
    assert moved_scale(torch.tensor([0.01]), slope * math.nan, rate).isnan().all()


@CODES
@pytest.mark.parametrize("x", [0.0234, -0.0071, 1.2755])
def test_rounding_is_unbiased(codes, x):
    """Only the two neighbours occur, each as often as it must so that the mean is x, in independent draws."""
    bits = random_bits(5, torch.tensor([3]), torch.arange(1000), 1000)
    found = encode(torch.full((1000, 1000), x), 0.01, codes, bits).double()
    low = math.floor(x / 0.01)
    values = found.unique().tolist()
    if codes == torch.int8 and x > 1.27:
        assert values == [127]
        return
    assert values == [low, low + 1]
    # Six standard errors of the mean of 10⁶ draws.
    assert abs(found.mean().item() * 0.01 - x) < 6 * 0.005 / 1000


def test_what_has_no_code(any_backend, device):
    """NaN becomes zero and infinity an end of the range in codes; a NaN scale stays one."""
    table, scale = torch.full((3, 4), 7, dtype=torch.int8, device=device), torch.full((3,), 0.5, device=device)
    dout = torch.tensor([[math.nan], [math.inf], [-math.inf]], device=device).expand(3, 4)
    batches = [(torch.arange(3, device=device), dout, None, None)]
    for lr, kept in ((0.0, True), (1.0, False)):
        found = stepped(any_backend, table, scale, batches, optim.SGD(1.0), lr)
        if kept:
            assert found["table"][:, 0].tolist() == [0, -128, 127] and torch.equal(found["scale"], scale)
        else:
            assert bool(found["scale"][0].isnan())


def test_errors():
    table, scale = table_of(5, 4, torch.int8, "cpu")
    index, weights = torch.tensor([[1, 2]]), torch.rand(1, 2)
    gather = gossamer.gather_reduce
    with pytest.raises(TypeError, match=r"scale must be given for a table of torch.int8, got None"):
        gather(table, index)
    with pytest.raises(TypeError, match=r"table must be int8 or int16 when scale is given, got torch.float32"):
        gather(table.float(), index, scale=scale)
    with pytest.raises(TypeError, match=r"table must be int8 or int16 when scale is given, got torch.uint8"):
        gather(table.to(torch.uint8), index, scale=scale)
    with pytest.raises(TypeError, match=r"scale must be strided float32, got torch.float64"):
        gather(table, index, scale=scale.double())
    with pytest.raises(TypeError, match=r"scale must be a torch.Tensor, got float"):
        gather(table, index, scale=0.1)
    for bad in (scale[:3], scale.unsqueeze(1), scale[0]):
        with pytest.raises(ValueError, match=r"scale must have shape \(1,\) or \(N,\) with N=5, got"):
            gather(table, index, scale=bad)
    with pytest.raises(ValueError, match=r"scale must not require a gradient"):
        gather(table, index, scale=scale.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"scale cannot be given with mode='max'"):
        gather(table, index, scale=scale, mode="max")
    optimizer = optim.SGD(0.1)
    how = {"optimizer": optimizer, "state": optimizer.state(5, 4)}
    dout = torch.ones(1, 4)
    with pytest.raises(ValueError, match=r"scale must hold a value a row where scale_lr is not 0, got shape \(1,\)"):
        gossamer.sparse_update_(table, index, dout, scale=scale[:1], scale_lr=0.1, **how)
    with pytest.raises(ValueError, match=r"scale_lr must be in \[0, inf\), got -1"):
        gossamer.sparse_update_(table, index, dout, scale=scale, scale_lr=-1, **how)
    with pytest.raises(TypeError, match=r"scale_lr must be a number, got str"):
        gossamer.sparse_update_(table, index, dout, scale=scale, scale_lr="0.1", **how)
    with pytest.raises(TypeError, match=r"dout must be floating, and float64 for a float64 table alone"):
        gossamer.sparse_update_(table, index, dout.double(), scale=scale, **how)
    with pytest.raises(IndexError, match=r"index must be in \[0, N\) with N=5, got 5"):
        gossamer.sparse_update_(table, torch.tensor([[5]]), dout, weights=weights[:, :1], scale=scale, **how)


def test_operators(any_backend, device):
    """What torch asks of an operator."""
    table, scale = table_of(9, 5, torch.int8, device)
    index, dout = torch.randint(9, (4, 2), device=device), torch.randn(4, 5, device=device)
    weights = torch.rand(4, 2, device=device).requires_grad_()
    args = GatherReduce(table, Bags(index, weights=weights), torch.float16, scale=scale)
    torch.library.opcheck(torch.ops.gossamer.gather_reduce.default, flat(args, any_backend))
    args = GatherDot(dout, table, Bags(index), torch.float32, scale)
    torch.library.opcheck(torch.ops.gossamer.gather_dot.default, flat(args, any_backend))
    optimizer = optim.Adam(0.1, stochastic_rounding=True)
    update = Update(optimizer.step_rule(), None, *optimizer.state(9, 5, device).values(), scale, 0.1)
    args = SparseUpdate(table, Bags(index), dout, None, update)
    torch.library.opcheck(torch.ops.gossamer.sparse_update_.default, flat(args, any_backend))
