"""gossamer.gather_matmul: sums of products of matrices that ids choose, and their gradients, against float64."""

import pytest
import torch
from helpers import assert_same_bits, check, flat, ragged, run

import gossamer
from gossamer.ops._bags import Bags
from gossamer.ops.composed_rows import Parts
from gossamer.ops.dispatch import sort_ids
from gossamer.ops.gather_matmul import (
    GatherMatmul,
    ProductGradient,
    gather_matmul_reference,
    pairs_of,
    product_gradient_reference,
)
from gossamer.ops.map_ids import IdMaps

N = 28


def quotients(dim):
    """Seven matrices on the left and four on the right."""
    return Parts.of(dim, "matmul", IdMaps.of([7, 4], divisors=[4, 1], limit=N))


def functions(ids, parts, inner, offsets=None, *, backend, mode="sum"):
    def function(left, right, weights=None):
        with gossamer.backend(backend):
            return gossamer.gather_matmul(left, right, ids, parts, inner, offsets, weights, mode=mode)

    def reference(left, right, weights=None):
        bags = Bags(ids, offsets, weights, mode=mode)
        return gather_matmul_reference(GatherMatmul(left, right, bags, parts, inner, left.dtype))

    return function, reference


def tables(sizes, device, dtype=torch.float32):
    m, k, n = sizes
    return {
        "left": torch.randn(7, m * k, device=device, dtype=dtype),
        "right": torch.randn(4, k * n, device=device, dtype=dtype),
    }


# (M, K, N): a tensor train's, single rows and columns, whole vectors and more, and odd ones.
SIZES = [(4, 16, 4), (9, 4, 4), (1, 3, 1), (2, 5, 32), (9, 2, 67), (5, 1, 7)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_fixed_width(kernel_backend, device, sizes):
    """Bags of J ids: the sum and the gradients of both tables and of weights."""
    ids = torch.randint(N, (5, 4), device=device)
    inputs = tables(sizes, device) | {"weights": torch.randn(5, 4, device=device)}
    check(*functions(ids, quotients(sizes[0] * sizes[2]), sizes[1], backend=kernel_backend), inputs)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_ragged(kernel_backend, device, mode):
    """Empty bags, one longer than a block of ids, and ids outside all bags."""
    longest = 600 if kernel_backend == "native" else 6
    ids, offsets = ragged([0, 3, longest, 0, 9], N, device, torch.int32)
    ids, offsets = torch.cat([ids[:4], ids, ids[:3]]), offsets + 4
    check(*functions(ids, quotients(8), 3, offsets, backend=kernel_backend, mode=mode), tables((2, 3, 4), device))


def test_dtypes(kernel_backend, dtype, device):
    check(
        *functions(torch.randint(N, (3, 4), device=device), quotients(24), 3, backend=kernel_backend),
        tables((2, 3, 12), device, dtype),
    )


def test_listed_pairs(any_backend, device):
    """Rows that are listed instead of computed."""
    rows = torch.tensor([[6, 0], [0, 3], [2, 2]], device=device)
    given = tables((2, 3, 4), device)
    with gossamer.backend(any_backend):
        found = gossamer.gather_matmul(**given, ids=torch.arange(3, device=device), parts=pairs_of(rows, 8), inner=3)
    expected = torch.bmm(given["left"][rows[:, 0]].view(3, 2, 3), given["right"][rows[:, 1]].view(3, 3, 4))
    torch.testing.assert_close(found, expected.flatten(1), rtol=1e-6, atol=1e-6)


def test_codes_of_no_ids(any_backend, device):
    """No ids are looked up; bags are none, or empty and zero."""
    given = tables((2, 3, 4), device)
    given |= {"parts": pairs_of(torch.empty(0, 2, dtype=torch.int64, device=device), 8), "inner": 3}
    given["ids"] = torch.empty(0, dtype=torch.int64, device=device)
    with gossamer.backend(any_backend):
        assert gossamer.gather_matmul(**given).shape == (0, 8)
        empty = gossamer.gather_matmul(**given, offsets=torch.zeros(3, dtype=torch.int64, device=device))
    assert torch.equal(empty, torch.zeros(2, 8, device=device))


def test_finite_differences(device):
    """Gradients and theirs, in float64."""
    ids, offsets = ragged([2, 0, 3], N, device)
    given = [t.requires_grad_() for t in tables((2, 3, 2), device, torch.float64).values()]
    weights = torch.randn(5, dtype=torch.float64, device=device, requires_grad=True)

    def function(left, right, weights):
        return gossamer.gather_matmul(left, right, ids, quotients(4), 3, offsets, weights)

    assert torch.autograd.gradcheck(function, (*given, weights))
    assert torch.autograd.gradgradcheck(function, (*given, weights))


@pytest.mark.parametrize("learned", ["left", "right"])
def test_one_table_learns(kernel_backend, device, learned):
    """The gradient of a table alone is that beside the other one's."""
    ids = torch.randint(N, (40, 7), device=device)
    given, dout = tables((2, 5, 3), device), torch.randn(40, 6, device=device)
    function = functions(ids, quotients(6), 5, backend=kernel_backend, mode="mean")[0]
    both, alone = run(function, given, list(given), dout), run(function, given, [learned], dout)
    torch.testing.assert_close(alone[learned], both[learned], rtol=1e-5, atol=1e-5)


def test_same_bits(device):
    """The same bits for any number of threads, forward and backward."""
    ids, offsets = ragged([700, 0, 5, 1300, 90], N, device)
    given, dout = tables((4, 16, 4), device), torch.randn(5, 16, device=device)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        function = functions(ids, quotients(16), 16, offsets, backend="native" if device == "cpu" else "triton")[0]
        results.append(run(function, given, list(given), dout))
    torch.set_num_threads(threads)
    for more in results[1:]:
        assert_same_bits(results[0], more)


@pytest.mark.parametrize("bad", [-1, N])
def test_ids_outside(any_backend, device, bad):
    given, ids = tables((2, 3, 4), device), torch.tensor([[3, bad, 4]], device=device)
    with gossamer.backend(any_backend):
        if device == "cpu" and any_backend != "triton":
            with pytest.raises(IndexError, match=rf"must be in \[0, N\) with N=28, got {bad} at (flat )?position 1"):
                gossamer.gather_matmul(**given, ids=ids, parts=quotients(8), inner=3)
        else:
            good = gossamer.gather_matmul(**given, ids=ids[:, ::2], parts=quotients(8), inner=3)
            assert torch.equal(gossamer.gather_matmul(**given, ids=ids, parts=quotients(8), inner=3), good)


def test_bad_arguments(device):
    given = tables((2, 3, 4), device) | {"ids": torch.zeros(2, 3, dtype=torch.int64, device=device)}
    given |= {"parts": quotients(8), "inner": 3}
    codes = torch.zeros(3, 2, dtype=torch.int32, device=device)
    coded = Parts.of(8, "matmul", gossamer.IdMaps.of([1, 1], limit=3), coded=2, codes=codes, bits=[32])
    for wrong, message in (
        ({"mode": "max"}, "mode must be 'sum' or 'mean' for products, got 'max'"),
        ({"inner": 5}, "inner must divide the columns 6 and 12, got 5"),
        ({"parts": quotients(9)}, "parts must have operation='matmul', two maps and dim 8"),
        ({"right": given["right"][:3]}, "right must have at least 4 rows, which its map reaches, got 3"),
        (
            {"right": given["right"][:0], "parts": coded},
            "right must have at least 1 rows, which its map reaches, got 0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            gossamer.gather_matmul(**given | wrong)
    with pytest.raises(TypeError, match=r"right must have the dtype of left, torch\.float32, got torch\.float64"):
        gossamer.gather_matmul(**given | {"right": given["right"].double()})


def test_operator(any_backend, device):
    given = [t.requires_grad_() for t in tables((2, 3, 4), device).values()]
    ids, offsets = ragged([2, 0, 3], N, device)
    args = GatherMatmul(*given, Bags(ids, offsets, mode="mean"), quotients(8), 3, torch.float32)
    torch.library.opcheck(torch.ops.gossamer.gather_matmul.default, flat(args, any_backend))


@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_operator(any_backend, device, weighted):
    """Both gradients in one pass: left matrices without positions, and positions without a left matrix."""
    sizes, bags = (5, 19, 3), 6
    m, k, n = sizes
    of_left = torch.tensor([3, 1, 5, 1, 1, 3, 5, 1], device=device)
    positions, offsets = sort_ids(of_left.unsqueeze(1), 5, "reference" if device == "cpu" else "triton")
    rows = torch.stack([torch.arange(8, device=device) % bags, torch.arange(8, device=device) % 2], 1).int()
    factor = torch.randn(8, device=device, dtype=torch.float64) if weighted else None
    values = (torch.randn(5, m * k), torch.randn(2, n * k), torch.randn(bags, m * n))
    args = ProductGradient(*(v.to(device).double() for v in values), factor, positions, offsets, rows, k)
    found, expected = torch.ops.gossamer.product_gradient(*flat(args, any_backend)), product_gradient_reference(args)
    for got, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)
    assert not found[0][[0, 2, 4]].any()
    torch.library.opcheck(torch.ops.gossamer.product_gradient.default, flat(args, any_backend))
