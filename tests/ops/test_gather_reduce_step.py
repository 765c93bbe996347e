"""gossamer.gather_reduce_step: the optimizer's step inside the backward pass, in eager mode and compiled."""

import pytest
import torch
from helpers import assert_same_bits, flat

import gossamer
from gossamer import optim
from gossamer.ops._bags import Bags
from gossamer.ops.gather_reduce_step import GatherReduceStep
from gossamer.ops.sparse_update import Update


def problem(device, mode="sum"):
    """A table, lists with weights but for a maximum, and the gradient of the result."""
    index = torch.randint(20, (9, 4), device=device)
    weights = None if mode == "max" else torch.rand(9, 4, device=device)
    return torch.randn(20, 33, device=device), index, weights, torch.randn(9, 33, device=device)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_is_lookup_and_update(kernel_backend, device, mode):
    """Result, gradient of weights and the step are those of gather_reduce and sparse_update_, with the same bits."""
    table, index, weights, dout = problem(device, mode)
    optimizer = optim.Adam(0.1)
    handle = torch.zeros(0, device=device, requires_grad=True)
    fused, state = table.clone(), optimizer.state(20, 33, device)
    plain, plain_state = table.clone(), optimizer.state(20, 33, device)
    settings = {"mode": mode, "padding_idx": 3}
    with gossamer.backend(kernel_backend):
        for _ in range(2):
            mine, theirs = (None if weights is None else weights.clone().requires_grad_() for _ in range(2))
            rule = {"optimizer": optimizer, "state": state}
            y = gossamer.gather_reduce_step(fused, index, None, mine, handle=handle, **rule, **settings)
            expected = gossamer.gather_reduce(plain, index, weights=theirs, **settings)
            assert torch.equal(y, expected)
            y.backward(dout)
            if weights is not None:
                expected.backward(dout)
                assert torch.equal(mine.grad, theirs.grad)
            lists = (index, dout, None, weights)
            gossamer.sparse_update_(plain, *lists, optimizer=optimizer, state=plain_state, **settings)
    assert_same_bits({"table": fused, **state}, {"table": plain, **plain_state})
    assert state["step"].item() == 2 and fused.grad is None and handle.grad.shape == (0,)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(kernel_backend, device, backend):
    """Traced whole with its backward pass: the step happens there, in place, the same as in eager mode."""
    torch._dynamo.reset()
    table, index, weights, _ = problem(device)
    optimizer = optim.RowwiseAdagrad(torch.tensor(0.1, device=device))

    def loss(handle, table, state, weights):
        y = gossamer.gather_reduce_step(table, index, None, weights, handle=handle, optimizer=optimizer, state=state)
        return y.sin().sum()

    results = []
    with gossamer.backend(kernel_backend):
        for function in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
            mine, state = table.clone(), optimizer.state(20, 33, device)
            factors = weights.clone().requires_grad_()
            for _ in range(2):
                handle = torch.zeros(0, device=device, requires_grad=True)
                function(handle, mine, state, factors).backward()
            results.append({"table": mine, "weights": factors.grad, **state})
    assert not torch.equal(results[1]["table"], table)
    for name, value in results[1].items():
        torch.testing.assert_close(value, results[0][name])


def test_second_backward_pass(any_backend, device):
    """A step is taken once: a second pass over the graph, or one that records itself, is refused."""
    table, index, _, dout = problem(device)
    optimizer = optim.SGD(0.1)
    handle = torch.zeros(0, device=device, requires_grad=True)
    state = optimizer.state(20, 33, device)
    with gossamer.backend(any_backend):
        y = gossamer.gather_reduce_step(table, index, handle=handle, optimizer=optimizer, state=state)
        y.backward(dout, retain_graph=True)
        after = table.clone()
        with pytest.raises(RuntimeError, match="has been taken; its graph cannot run backward a second time"):
            y.backward(dout)
        y = gossamer.gather_reduce_step(table, index, handle=handle, optimizer=optimizer, state=state)
        with pytest.raises(RuntimeError, match="cannot be differentiated"):
            y.backward(dout, create_graph=True)
    assert torch.equal(table, after) and state["step"].item() == 1


def test_two_lookups_of_a_table(any_backend, device):
    """Two lookups before one backward pass take two steps; where weights need the table's old rows, that is refused."""
    table, index, weights, dout = problem(device)
    optimizer = optim.SGD(0.5)
    handle = torch.zeros(0, device=device, requires_grad=True)
    state = optimizer.state(20, 33, device)

    def look(weights):
        return gossamer.gather_reduce_step(table, index, None, weights, handle=handle, optimizer=optimizer, state=state)

    wide = table.double().requires_grad_()
    with gossamer.backend("reference"):
        (2 * gossamer.gather_reduce(wide, index, weights=weights)).backward(dout.double())
    with gossamer.backend(any_backend):
        (look(weights) + look(weights)).backward(dout)
        torch.testing.assert_close(table.double(), wide.detach() - 0.5 * wide.grad, rtol=1e-4, atol=1e-5)
        assert state["step"].item() == 2
        weights.requires_grad_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (look(weights) + look(weights)).backward(dout)


def test_nothing_without_a_gradient(any_backend, device):
    """Under no_grad, and where nothing of the result is used, the table stays."""
    table, index, _, _ = problem(device)
    optimizer = optim.SGD(0.5)
    handle = torch.zeros(0, device=device, requires_grad=True)
    state = optimizer.state(20, 33, device)
    before = table.clone()
    with gossamer.backend(any_backend), torch.no_grad():
        y = gossamer.gather_reduce_step(table, index, handle=handle, optimizer=optimizer, state=state)
    assert not y.requires_grad and torch.equal(table, before) and state["step"].item() == 0


def test_errors():
    """What the lookup refuses before anything runs."""
    table, index, _, _ = problem("cpu")
    optimizer = optim.SGD(0.5)
    arguments = {"table": table, "index": index, "optimizer": optimizer, "state": optimizer.state(20, 33)}
    for handle, error, message in [
        (None, TypeError, "handle must be a torch.Tensor, got NoneType"),
        (torch.zeros(0, dtype=torch.int64), TypeError, "handle must be floating, got torch.int64"),
        (torch.zeros(0, device="meta"), ValueError, "handle must be on the device of table"),
    ]:
        with pytest.raises(error, match=message):
            gossamer.gather_reduce_step(**arguments, handle=handle)


def test_operator_is_well_formed(kernel_backend, device):
    """Schema, fake kernel, autograd registration; the gradient's step is no matter for the shape checks."""
    table, index, weights, _ = problem(device)
    optimizer = optim.PartialRowwiseAdam(0.1)
    update = Update(optimizer.step_rule(), None, *optimizer.state(20, 33, device).values())
    handle = torch.zeros(0, device=device, requires_grad=True)
    args = GatherReduceStep(handle, table, Bags(index, weights=weights, mode="mean"), torch.float32, update)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.gossamer.gather_reduce_step.default
    torch.library.opcheck(operator, flat(args, kernel_backend), test_utils=checks)
