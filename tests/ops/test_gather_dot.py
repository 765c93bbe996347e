"""gossamer.gather_dot and its form whose backward pass takes an optimizer's step."""

import math

import pytest
import torch
from helpers import assert_same_bits, check, flat, run

import gossamer
from gossamer import optim
from gossamer.ops._bags import Bags
from gossamer.ops.gather_dot import GatherDotStep
from gossamer.ops.gather_reduce import GatherDot
from gossamer.ops.sparse_update import Update

PRIMITIVE = "gather_reduce"


def problem(device, dtype=torch.float32, rows=20, dim=33):
    """A table, ids that repeat within a bag and between bags, and the rows to multiply."""
    index = torch.randint(rows, (9, 4), device=device)
    index[0, 1] = index[0, 0]
    index[3, 2] = index[0, 0]
    return torch.randn(rows, dim, device=device, dtype=dtype), index, torch.randn(9, dim, device=device, dtype=dtype)


def plain(table, index, x):
    """The formula in plain torch."""
    wide = torch.promote_types(table.dtype, torch.float32)
    return torch.einsum("bd,bjd->bj", x.to(wide), table[index].to(wide))


def test_formula_and_gradients(kernel_backend, dtype, device):
    table, index, x = problem(device, dtype)

    def function(table, x):
        with gossamer.backend(kernel_backend):
            return gossamer.gather_dot(table, index, x)

    found = check(function, lambda table, x: plain(table, index, x), {"table": table, "x": x})
    assert found["out"].dtype == torch.float32


def test_lists(any_backend, device):
    """Ragged bags, single ids, a padding row and ids outside that are dropped."""
    table, _, x = problem(device)
    flat_ids = torch.randint(20, (11,), device=device)
    offsets = torch.tensor([0, 0, 3, 4, 11], device=device)
    bag = torch.repeat_interleave(torch.arange(4, device=device), offsets.diff())
    expected = (x[bag] * table[flat_ids]).sum(1)
    with gossamer.backend(any_backend):
        torch.testing.assert_close(gossamer.gather_dot(table, flat_ids, x[:4], offsets), expected)
        single = gossamer.gather_dot(table, flat_ids[:9].int(), x)
        torch.testing.assert_close(single, (x * table[flat_ids[:9]]).sum(1))
        odd = torch.tensor([[0, 25], [-3, 2]], device=device)
        z = gossamer.gather_dot(table, odd, x[:2], padding_idx=2, bounds="drop")
    torch.testing.assert_close(z[0, 0], x[0] @ table[0])
    assert not z[0, 1] and not z[1].any()


def test_mixed_dtypes(kernel_backend, device):
    """Rows in 16 bits with a table in 32, and the other way round; gradients in the dtype of what they belong to."""
    table, index, x = problem(device)
    for left, right in [(torch.float32, torch.float16), (torch.float16, torch.float32)]:
        inputs = {"table": table.to(left), "x": x.to(right)}
        with gossamer.backend(kernel_backend):
            found = run(
                lambda table, x: gossamer.gather_dot(table, index, x), inputs, inputs, torch.ones(9, 4).to(device)
            )
        assert found["table"].dtype == left and found["x"].dtype == right
        torch.testing.assert_close(found["out"], plain(inputs["table"], index, inputs["x"]), rtol=1e-5, atol=1e-4)


def test_nan_in_the_gradient(kernel_backend, device):
    """A gradient that is NaN, as loss scalers expect to see one, arrives at its rows and no others."""
    table, index, x = (t.clone() for t in problem(device))
    index[0], index[1:] = 3, index[1:] % 3
    table.requires_grad_()
    x.requires_grad_()
    with gossamer.backend(kernel_backend):
        z = gossamer.gather_dot(table, index, x)
        dz = torch.ones_like(z)
        dz[0] = math.nan
        z.backward(dz)
    assert bool(x.grad[0].isnan().all()) and bool(x.grad[1:].isfinite().all())
    assert bool(table.grad[3].isnan().all()) and bool(table.grad[:3].isfinite().all())


def test_differentiable_twice(kernel_backend, device):
    """The gradient of gather_reduce's weights has gradients itself."""
    table, index, x = problem(device, torch.float64 if kernel_backend == "native" else torch.float32, 6, 4)
    weights = torch.rand(index.shape, device=device, dtype=table.dtype)
    index = index % 6

    def squared(gather, table, weights):
        leaves = table.clone().requires_grad_(), weights.clone().requires_grad_()
        y = gather(*leaves)
        (dweights,) = torch.autograd.grad((y * x).sin().sum(), leaves[1], create_graph=True)
        return torch.autograd.grad(dweights.square().sum(), leaves)

    with gossamer.backend(kernel_backend):
        found = squared(lambda t, w: gossamer.gather_reduce(t, index, weights=w), table, weights)
    expected = squared(lambda t, w: torch.einsum("bj,bjd->bd", w, t[index]), table, weights)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_step(any_backend, device):
    """Result, gradient of x and step are those of gather_dot and of sparse_update_ with the gradient as weights."""
    table, index, x = problem(device)
    dz = torch.randn(9, 4, device=device)
    optimizer = optim.Adam(0.1)
    handle = torch.zeros(0, device=device, requires_grad=True)
    fused, state = table.clone(), optimizer.state(20, 33, device)
    other, other_state = table.clone(), optimizer.state(20, 33, device)
    with gossamer.backend(any_backend):
        for _ in range(2):
            mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
            z = gossamer.gather_dot_step(fused, index, mine, handle=handle, optimizer=optimizer, state=state)
            expected = gossamer.gather_dot(other, index, theirs)
            assert torch.equal(z, expected)
            z.backward(dz)
            expected.backward(dz)
            torch.testing.assert_close(mine.grad, theirs.grad)
            gossamer.sparse_update_(other, index, x, None, dz, optimizer=optimizer, state=other_state)
    assert_same_bits({"table": fused, **state}, {"table": other, **other_state})
    assert not torch.equal(fused, table) and state["step"].item() == 2 and fused.grad is None


def test_step_compiles(kernel_backend, device):
    torch._dynamo.reset()
    table, index, x = problem(device)
    optimizer = optim.RowwiseAdagrad(torch.tensor(0.1, device=device))

    def loss(handle, table, state, x):
        return gossamer.gather_dot_step(table, index, x, handle=handle, optimizer=optimizer, state=state).sin().sum()

    results = []
    with gossamer.backend(kernel_backend):
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            mine, state, rows = table.clone(), optimizer.state(20, 33, device), x.clone().requires_grad_()
            function(torch.zeros(0, device=device, requires_grad=True), mine, state, rows).backward()
            results.append({"table": mine, "x": rows.grad, **state})
    assert not torch.equal(results[1]["table"], table)
    for name, value in results[1].items():
        torch.testing.assert_close(value, results[0][name])


def test_second_backward_pass(any_backend, device):
    table, index, x = problem(device)
    optimizer = optim.SGD(0.1)
    handle = torch.zeros(0, device=device, requires_grad=True)
    how = {"handle": handle, "optimizer": optimizer, "state": optimizer.state(20, 33, device)}
    with gossamer.backend(any_backend):
        z = gossamer.gather_dot_step(table, index, x, **how)
        z.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="has been taken; its graph cannot run backward a second time"):
            z.sum().backward()
        z = gossamer.gather_dot_step(table, index, x, **how)
        with pytest.raises(RuntimeError, match="cannot be differentiated"):
            z.sum().backward(create_graph=True)
    assert how["state"]["step"].item() == 1


def test_operators_are_well_formed(kernel_backend, device):
    table, index, x = problem(device)
    dot = GatherDot(x.requires_grad_(), table.requires_grad_(), Bags(index), torch.float32)
    torch.library.opcheck(torch.ops.gossamer.gather_dot.default, flat(dot, kernel_backend))
    optimizer = optim.SGD(0.1)
    step = Update(optimizer.step_rule(), None, optimizer.state(20, 33, device)["step"], None, None)
    handle = torch.zeros(0, device=device, requires_grad=True)
    args = GatherDotStep(handle, dot._replace(table=table.detach()), step)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.gossamer.gather_dot_step.default, flat(args, kernel_backend), test_utils=checks)


def test_errors():
    table, index, x = problem("cpu")
    for arguments, error, message in [
        ((None, index, x), TypeError, "table must be a torch.Tensor, got NoneType"),
        ((table, index, x[:8]), ValueError, r"x must have shape \(B, D\) = \(9, 33\), got \(8, 33\)"),
        ((table, index, x.double()), TypeError, "x must be floating, and float64 for a float64 table alone"),
        ((table, index, torch.zeros(9, 33, dtype=torch.int64)), TypeError, "x must be floating"),
        ((table, index + 20, x), IndexError, r"index must be in \[0, N\) with N=20"),
        ((table, index.float(), x), TypeError, "index must be int32 or int64"),
    ]:
        with pytest.raises(error, match=message):
            gossamer.gather_dot(*arguments)
