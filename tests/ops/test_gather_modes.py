"""gossamer.gather_reduce: means and maxima, output dtypes, bounds, single ids and sparse gradients."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits, check, flat, ragged, run

import gossamer
from gossamer.ops._bags import Bags
from gossamer.ops.gather_max import GatherMax


def pooled(index, offsets=None, *, backend, **settings):
    """A pooling under test and its reference, of table and weights."""

    def of(name):
        def function(table, weights=None):
            with gossamer.backend(name):
                return gossamer.gather_reduce(table, index, offsets, weights, **settings)

        return function

    return of(backend), of("reference")


@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("dim", [1, 33, 64])
def test_modes(kernel_backend, dtype, device, mode, dim):
    """Means, weighted or not, and maxima: padding counts for nothing, empty bags and bags of padding alone are zero."""
    index, offsets = ragged([3, 0, 2, 9, 8], 11, device, torch.int32)
    index[3:5] = 4
    inputs = {"table": torch.randn(11, dim, device=device, dtype=dtype)}
    if mode == "mean":
        inputs["weights"] = torch.rand(index.shape, device=device)
    function, reference = pooled(index, offsets, backend=kernel_backend, mode=mode, padding_idx=4)
    results = check(function, reference, inputs)
    assert not results["out"][1:3].any() and not results["table"][4].any()
    index = torch.randint(11, (6, 5), device=device)
    check(*pooled(index, backend=kernel_backend, mode=mode), {"table": inputs["table"]})


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_modes_are_those_of_embedding_bag(mode):
    """The reference itself, against torch's embedding bag in float64: results, gradients, padding, ties."""
    index, offsets = ragged([0, 3, 1, 0, 20, 2], 11, "cpu")
    table = torch.randint(-2, 3, (11, 5)).double()
    dout = torch.randn(6, 5, dtype=torch.float64)
    expected = run(
        lambda table: F.embedding_bag(index, table, offsets, mode=mode, include_last_offset=True, padding_idx=4),
        {"table": table},
        ["table"],
        dout,
    )
    _, reference = pooled(index, offsets, backend="reference", mode=mode, padding_idx=4)
    for name, value in run(reference, {"table": table}, ["table"], dout).items():
        torch.testing.assert_close(value, expected[name])


def test_maximum_of_nan(any_backend, device):
    """NaN counts as the largest, the first of them; infinities are ordinary."""
    nan, inf = float("nan"), float("inf")
    rows = [[1.0, nan, -inf, -inf], [nan, 2.0, -inf, inf], [nan, 3.0, -inf, 0.0]]
    table = torch.tensor(rows, device=device, requires_grad=True)
    with gossamer.backend(any_backend):
        out = gossamer.gather_reduce(table, torch.tensor([[0, 1, 2]], device=device), mode="max")
    torch.testing.assert_close(out.detach().cpu(), torch.tensor([[nan, nan, -inf, inf]]), equal_nan=True)
    out.backward(torch.ones(1, 4, device=device))
    assert table.grad.tolist() == [[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_output_dtype(kernel_backend, dtype, device, mode, out_dtype):
    """Results are rounded once to the dtype asked for, and gradients come in those of the inputs."""
    if kernel_backend == "triton" and device == "cpu" and out_dtype == torch.bfloat16:
        pytest.skip("the interpreter does not compute in bfloat16")
    index = torch.randint(9, (7, 5), device=device)
    inputs = {"table": torch.randn(9, 33, device=device, dtype=dtype)}
    if mode != "max":
        inputs["weights"] = torch.rand(7, 5, device=device).to(dtype)
    function, _ = pooled(index, backend=kernel_backend, mode=mode, out_dtype=out_dtype)
    exact, _ = pooled(index, backend=kernel_backend, mode=mode, out_dtype=torch.float32)
    dout = torch.randn(7, 33, device=device)
    results = run(function, inputs, inputs, dout)
    assert results["out"].dtype == out_dtype
    torch.testing.assert_close(results["out"], exact(**inputs).to(out_dtype))
    wide = run(exact, inputs, inputs, dout.to(out_dtype).float())
    for name in inputs:
        assert results[name].dtype == inputs[name].dtype
        torch.testing.assert_close(results[name], wide[name])


def test_single_ids(any_backend, device):
    """A flat list without offsets looks up each id, with weights too."""
    table = torch.randn(9, 5, device=device)
    index, weights = torch.randint(9, (7,), device=device), torch.rand(7, device=device)
    with gossamer.backend(any_backend):
        assert torch.equal(gossamer.gather_reduce(table, index), table[index])
        torch.testing.assert_close(
            gossamer.gather_reduce(table, index, weights=weights), table[index] * weights.unsqueeze(1)
        )


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bounds(any_backend, device, mode):
    """Clamped ids read the edge rows, dropped ones nothing, and a mean does not count them; both are counted."""
    table = torch.randn(5, 3, device=device)
    index = torch.tensor([0, -1, 2**31 - 1, 3, 2], device=device)
    offsets = torch.tensor([-2, 3, 2, 9], device=device)
    bags = {"clamp": [[0, 0, 4], [], [3, 2]], "drop": [[0], [], [3, 2]]}
    reduce = {"sum": lambda t: t.sum(0), "mean": lambda t: t.mean(0), "max": lambda t: t.amax(0)}[mode]
    for bounds, lists in bags.items():
        count = torch.zeros(1, dtype=torch.int64, device=device)
        with gossamer.backend(any_backend):
            out = gossamer.gather_reduce(table, index, offsets, mode=mode, bounds=bounds, bounds_count=count)
        expected = torch.stack([reduce(table[ids]) if ids else table.new_zeros(3) for ids in lists])
        torch.testing.assert_close(out, expected)
        assert count.item() == 2 + 3


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_sparse_gradient(any_backend, device, mode):
    """A coalesced COO gradient of the touched rows, equal to the dense one, which torch.optim takes."""
    index, offsets = ragged([3, 0, 5], 9, device)
    table = torch.randn(30, 5, device=device, requires_grad=True)
    weights = torch.rand(8, device=device)
    dout = torch.randn(3, 5, device=device)
    grads = []
    with gossamer.backend(any_backend):
        for sparse in (True, False):
            settings = {"mode": mode, "padding_idx": 2, "sparse_grad": sparse}
            out = gossamer.gather_reduce(table, index, offsets, weights, **settings)
            grads += torch.autograd.grad(out, table, dout)
    assert grads[0].is_sparse and grads[0].is_coalesced()
    assert grads[0].indices()[0].tolist() == sorted(set(index.tolist()) - {2})
    torch.testing.assert_close(grads[0].to_dense(), grads[1])
    table.grad = grads[0]
    before = table.detach().clone()
    torch.optim.SGD([table], 0.5).step()
    torch.testing.assert_close(table.detach(), before - 0.5 * grads[1])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_values_of_lists(backend):
    """Weights that are NaN, and offsets that fall or lead beyond the list, are refused on the CPU."""
    table, index = torch.randn(9, 4), torch.zeros(3, dtype=torch.int64)
    with gossamer.backend(backend):
        with pytest.raises(ValueError, match="weights must not be NaN, got nan at flat position 2"):
            gossamer.gather_reduce(table, index, torch.tensor([0, 3]), torch.tensor([1, 1, float("nan")]))
        for offsets, at in (([0, 2, 1], "1 at position 2"), ([0, 4], "4 at position 1"), ([-1, 3], "-1 at position 0")):
            for mode in ("sum", "max"):
                with pytest.raises(ValueError, match=rf"offsets must ascend within \[0, L\] with L=3, got {at}"):
                    gossamer.gather_reduce(table, index, torch.tensor(offsets), mode=mode)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "max", "weights": torch.ones(3, 2)}, ValueError, "weights cannot be given with mode='max'"),
        ({"mode": "max", "sparse_grad": True}, ValueError, "sparse_grad cannot be given with mode='max'"),
        ({"bounds": "wrap"}, ValueError, "bounds must be one of .* got 'wrap'"),
        ({"bounds_count": torch.zeros(1)}, TypeError, "bounds_count must be int64 with one element, got torch.float32"),
        ({"out_dtype": "half"}, TypeError, "out_dtype must be a torch.dtype, got str"),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype must be float32"),
    ],
)
def test_mode_errors(change, error, message):
    """What the poolings and the bounds modes refuse."""
    arguments = {"table": torch.randn(9, 4), "index": torch.zeros(3, 2, dtype=torch.int64)} | change
    with pytest.raises(error, match=message):
        gossamer.gather_reduce(**arguments)


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_gradcheck_of_modes(device, mode):
    """Finite differences in float64, on the CPU's kernels."""
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    index, offsets = ragged([2, 0, 4], 5, device)
    function, _ = pooled(index, offsets, backend="native", mode=mode)
    table = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, dtype=torch.float64, requires_grad=True) if mode == "mean" else None
    assert torch.autograd.gradcheck(function, (table, weights))


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_modes_compile(kernel_backend, device, mode):
    """Traced whole, with its gradient, and the operator for maxima is well formed."""
    torch._dynamo.reset()
    index = torch.randint(9, (6, 4), device=device)
    table = torch.randn(9, 33, device=device, requires_grad=True)
    function, _ = pooled(index, backend=kernel_backend, mode=mode, bounds="clamp")

    def plain(table):
        return gossamer.gather_reduce(table, index, mode=mode, bounds="clamp")

    dout = torch.randn(6, 33, device=device)
    expected = run(function, {"table": table}, ["table"], dout)
    with gossamer.backend(kernel_backend):
        compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
        assert_same_bits(run(compiled, {"table": table}, ["table"], dout), expected)
        args = GatherMax(table, Bags(index, mode="max", drop=True), torch.float32, need_argmax=True)
        torch.library.opcheck(torch.ops.gossamer.gather_max.default, flat(args, kernel_backend))
