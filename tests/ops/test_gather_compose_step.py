"""gossamer.gather_compose_step: its step against the gradient of the plain lookup."""

import pytest
import torch
from composed_rows import CASES, N, functions
from helpers import flat, ragged, run

import gossamer
from gossamer.ops.gather_compose import GatherCompose, checked_compose
from gossamer.ops.gather_compose_step import GatherComposeStep
from gossamer.ops.sparse_update import check_state


@pytest.mark.parametrize("case", ["multiplied digits", "joined digits", "blocks that wrap", "bytes"])
@pytest.mark.parametrize("long", [False, True])
def test_step(any_backend, device, case, long):
    """One step of plain gradient descent in the backward pass, by the gradient of the plain lookup."""
    parts, shape = CASES[case](device)
    ids, offsets = (
        ragged([2, 0, 300 if any_backend == "native" else 6], N, device)
        if long
        else (torch.randint(9, (3, 4), device=device), None)
    )
    table = torch.randn(shape, device=device)
    weights = torch.randn(ids.shape, device=device)
    dout = torch.randn(3, parts.dim, device=device)
    optimizer = gossamer.optim.SGD(lr=0.5)
    with gossamer.backend(any_backend):
        plain = run(
            functions(ids, parts, offsets, backend=any_backend)[0],
            {"table": table, "weights": weights},
            ["table", "weights"],
            dout,
        )
        stepped, given = table.clone(), weights.clone().requires_grad_()
        state = optimizer.state(*shape, device)
        handle = torch.zeros(0, device=device, requires_grad=True)
        y = gossamer.gather_compose_step(
            stepped, ids, parts, offsets, given, handle=handle, optimizer=optimizer, state=state
        )
        assert torch.equal(y, plain["out"])
        y.backward(dout)
    assert torch.equal(given.grad, plain["weights"]) and state["step"].item() == 1
    torch.testing.assert_close(stepped, table - 0.5 * plain["table"], rtol=1e-5, atol=1e-6)
    untouched = plain["table"] == 0
    assert torch.equal(stepped[untouched], table[untouched])


def test_operators(device):
    parts, shape = CASES["multiplied digits"](device)
    ids, offsets = ragged([2, 0, 3], N, device)
    table = torch.randn(shape, device=device)
    bags = checked_compose(table, ids, parts, offsets, None, "mean", True, "reference")
    compose = GatherCompose(table, bags, parts, table.dtype)
    handle = torch.zeros(0, device=device, requires_grad=True)
    optimizer = gossamer.optim.SGD(lr=0.5)
    update = check_state(optimizer, optimizer.state(*shape, device), table)
    step = GatherComposeStep(handle, compose, update)
    tests = ("test_schema", "test_faketensor")  # its backward pass changes the table
    torch.library.opcheck(torch.ops.gossamer.gather_compose_step.default, flat(step, "reference"), test_utils=tests)


def test_one_step_a_graph(device):
    """Backward a second time, or with a graph of its own, is refused before anything is stepped."""
    parts, shape = CASES["added digits"](device)
    ids, table = torch.randint(N, (3, 4), device=device), torch.randn(shape, device=device)
    optimizer, before = gossamer.optim.SGD(lr=0.5), table.clone()
    state, handle = optimizer.state(*shape, device), torch.zeros(0, device=device, requires_grad=True)
    y = gossamer.gather_compose_step(table, ids, parts, handle=handle, optimizer=optimizer, state=state)
    with pytest.raises(RuntimeError, match=r"of a lookup with a fused optimizer step cannot be differentiated"):
        torch.autograd.grad(y.sum(), handle, create_graph=True)
    assert torch.equal(table, before)
    y.sum().backward(retain_graph=True)
    stepped = table.clone()
    with pytest.raises(RuntimeError, match="has been taken; its graph cannot run backward a second time"):
        y.sum().backward()
    assert torch.equal(table, stepped) and not torch.equal(table, before)
