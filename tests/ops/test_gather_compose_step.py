"""gossamer.gather_compose_step: its step against the gradient of the plain lookup."""

import pytest
import torch
from composed_rows import CASES, PRIME, N, functions
from helpers import flat, ragged, run

import gossamer
from gossamer import optim
from gossamer._numerics import accumulation_dtype
from gossamer.nn.embeddings.random_block import block_parts
from gossamer.ops.composed_rows import composed_rows
from gossamer.ops.gather_compose import GatherCompose, checked_compose
from gossamer.ops.gather_compose_step import GatherComposeStep
from gossamer.ops.sparse_update import check_state
from gossamer.testing import assert_close


@pytest.mark.parametrize(
    "case", ["multiplied digits", "joined digits", "blocks", "whole blocks", "blocks that wrap", "bytes"]
)
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


RATE = 0.1
OPTIMIZERS = {
    "momentum and decay": optim.SGD(RATE, momentum=0.9, weight_decay=0.1),
    "row-wise Adagrad": optim.RowwiseAdagrad(RATE, eps=1e-2, weight_decay=0.1),
    "Adam": optim.Adam(RATE),
    "partial row-wise Adam": optim.PartialRowwiseAdam(RATE),
    "LAMB": optim.LAMB(RATE, weight_decay=0.1),
    "norms below one": optim.SGD(RATE, clip_norm=1.0),
}


def array_step(optimizer, dtype, ids, offsets, weights, dout, backend="native"):
    """An array of 3000 and its states after two steps on overlapping blocks of 16."""
    constants = torch.randint(1, PRIME, (3,), generator=torch.Generator().manual_seed(5)).tolist()
    parts = block_parts(3000, 32, 16, False, constants)
    table = torch.randn(3000, 1, generator=torch.Generator().manual_seed(6)).bfloat16().to(dtype)
    wide = accumulation_dtype(dtype)
    state = optimizer.state(3000, 1, "cpu", wide)
    handle = torch.zeros(0, requires_grad=True)
    with gossamer.backend(backend):
        for _ in range(2):
            given = None if weights is None else weights.to(dtype)
            y = gossamer.gather_compose_step(
                table, ids, parts, offsets, given, handle=handle, optimizer=optimizer, state=state, out_dtype=wide
            )
            y.backward(dout.to(wide))
    return {"table": table} | {name: value for name, value in state.items() if name != "step"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="native kernels")
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_steps_on_overlapping_blocks(optimizer):
    """Elements get the sum of all blocks over them and one step; others keep their bits, for any number of threads.

    One block is listed more often than a unit of the kernel's work is long, and runs of overlapping blocks are longer
    than the sums that a thread holds. Sums of whole numbers are exact in any order, so the steps are what is compared.
    """
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(150, (3000,), generator=generator)
    ids[500:2600] = 3
    offsets = torch.tensor([0, 0, 40, 1600, 3000])
    weights = torch.randint(-2, 3, (3000,), generator=generator).float()
    dout = torch.randint(-3, 4, (4, 32), generator=generator).float()
    truth = array_step(optimizer, torch.float64, ids, offsets, weights, dout, "reference")
    plain = array_step(optimizer, torch.float32, ids, offsets, weights, dout, "reference")
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(array_step(optimizer, torch.float32, ids, offsets, weights, dout))
    torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert_close(value, truth[name], plain[name], name)
        assert torch.equal(value, results[1][name]) and torch.equal(value, results[2][name])
    before = torch.randn(3000, 1, generator=torch.Generator().manual_seed(6)).bfloat16().float()
    constants = torch.randint(1, PRIME, (3,), generator=torch.Generator().manual_seed(5)).tolist()
    places = composed_rows(ids, block_parts(3000, 32, 16, False, constants), 3000)
    outside = torch.ones(3000, dtype=torch.bool).index_fill(0, places.flatten(), False)
    assert outside.any() and torch.equal(results[0]["table"][outside], before[outside])


@pytest.mark.skipif(torch.cuda.is_available(), reason="native kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_of_16_bits(dtype):
    """Elements of 16 bits are stepped in float32 and rounded by chance as if each were a row."""
    optimizer = optim.SGD(RATE, stochastic_rounding=True, seed=3)
    ids = torch.randint(150, (60, 4), generator=torch.Generator().manual_seed(7))
    dout = torch.randint(-3, 4, (60, 32), generator=torch.Generator().manual_seed(8)).float()
    stepped = [array_step(optimizer, dtype, ids, None, None, dout, kind)["table"] for kind in ("native", "reference")]
    assert torch.equal(*stepped)


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
