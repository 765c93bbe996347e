"""gossamer.product_key_topk against brute force over all pairs."""

import math

import pytest
import torch
from helpers import flat, randn

import gossamer
from gossamer.ops.product_key_topk import (
    ProductKeySearch,
    ProductKeyTopk,
    ProductKeyTopkBackward,
    product_key_search,
)

INF = math.inf


def brute_force(scores1, scores2, top_k):
    """All pairs of one row in float32, sorted by their sums and then by the ranks of their two scores."""
    ranks = []
    for scores in (scores1, scores2):
        values = torch.nan_to_num(scores, nan=-INF, posinf=INF, neginf=-INF).tolist()
        order = sorted(range(len(values)), key=lambda i: (-values[i], i))
        ranks.append({place: rank for rank, place in enumerate(order)})
    sums = torch.nan_to_num(scores1.unsqueeze(1) + scores2, nan=-INF, posinf=INF, neginf=-INF).flatten().tolist()
    size = len(ranks[1])
    pairs = [(-total, ranks[0][i // size], ranks[1][i % size], i) for i, total in enumerate(sums)]
    chosen = sorted(pairs)[:top_k]
    return [-pair[0] for pair in chosen], [pair[3] for pair in chosen]


def assert_is_brute_force(values, ids, scores1, scores2):
    for row in range(scores1.shape[0]):
        expected_values, expected_ids = brute_force(scores1[row], scores2[row], values.shape[1])
        assert ids[row].tolist() == expected_ids
        assert values[row].tolist() == expected_values


def test_worked_value(any_backend, device):
    """Three sub-keys a half, two experts: pairs 5 and 8 of nine, with the softmax of 5 and 4."""
    with gossamer.backend(any_backend):
        values, ids = gossamer.product_key_topk(
            torch.tensor([1.0, 3, 2], device=device), torch.tensor([0.5, 0, 2], device=device), 2
        )
    assert ids.tolist() == [5, 8] and values.tolist() == [5, 4]
    torch.testing.assert_close(values.softmax(0).cpu(), torch.tensor([0.731059, 0.268941]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("n1", "n2", "top_k"), [(1, 1, 1), (3, 3, 3), (17, 5, 4), (16, 40, 16), (70, 33, 33), (130, 129, 7)]
)
def test_is_exact(any_backend, device, n1, n2, top_k):
    """Ids, order and values of brute force, also where many scores and many sums are equal."""
    scores1, scores2 = randn(4, n1, seed=1, device=device), randn(4, n2, seed=2, device=device)
    scores1[2:], scores2[2:] = scores1[2:].round(), scores2[2:].round()
    scores1[3] += 2.0**24  # sums of unequal scores round to equal ones
    with gossamer.backend(any_backend):
        values, ids = gossamer.product_key_topk(scores1, scores2, top_k)
    assert values.shape == ids.shape == (4, top_k) and ids.dtype == torch.int64
    assert_is_brute_force(values, ids, scores1, scores2)


def test_all_equal(any_backend, device):
    """Ties of everything go to the lower index of the first list, then of the second."""
    with gossamer.backend(any_backend):
        _, ids = gossamer.product_key_topk(torch.zeros(1, 9, device=device), torch.zeros(1, 9, device=device), 9)
    assert ids.tolist() == [list(range(9))]


def test_masks(any_backend, device):
    """Pairs of masked keys come last, are distinct, and have the value −inf."""
    scores1, scores2 = randn(3, 6, seed=3, device=device), randn(3, 6, seed=4, device=device)
    scores1[0, 2:] = -INF
    scores2[0, 3:] = -INF
    scores1[1], scores2[2] = -INF, -INF
    scores1[2, 0] = -torch.finfo(torch.float32).max
    with gossamer.backend(any_backend):
        values, ids = gossamer.product_key_topk(scores1, scores2, 6)
        again = gossamer.product_key_topk(scores1.requires_grad_(), scores2.requires_grad_(), 6)[0]
        again[again > -INF].sum().backward()
    assert_is_brute_force(values, ids, scores1.detach(), scores2.detach())
    assert all(len(set(row)) == 6 for row in ids.tolist())
    assert bool((values[0] > -INF).all()) and bool((values[1:] == -INF).all())
    assert not scores1.grad[1:].any() and not scores2.grad[1:].any() and scores1.grad[0].sum() == 6


def test_lowest_number_is_no_mask(any_backend, device):
    """The lowest finite score beats a masked one, and sums stop at the largest finite number."""
    most = torch.finfo(torch.float32).max
    with gossamer.backend(any_backend):
        values, ids = gossamer.product_key_topk(
            torch.tensor([[-INF, -most]], device=device), torch.tensor([[-most, -INF]], device=device), 2
        )
        high, _ = gossamer.product_key_topk(
            torch.full((1, 2), most, device=device), torch.full((1, 2), most, device=device), 1
        )
    assert values.tolist() == [[-most, -INF]] and ids[0, 0] == 2 and high.item() == most


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_default_dtype_has_no_effect(any_backend, device, default):
    scores1, scores2 = randn(3, 20, seed=1, device=device), randn(3, 30, seed=2, device=device)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        with gossamer.backend(any_backend):
            values, ids = gossamer.product_key_topk(scores1, scores2, 5)
    finally:
        torch.set_default_dtype(before)
    assert values.dtype == torch.float32
    assert_is_brute_force(values, ids, scores1, scores2)


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_not_a_score(any_backend, device, bad):
    scores1, scores2 = randn(3, 6, seed=3, device=device), randn(3, 7, seed=4, device=device)
    scores2[1, 4] = bad
    with gossamer.backend(any_backend):
        if device == "cpu":
            with pytest.raises(ValueError, match=f"scores2 must hold neither NaN nor .*, got {bad} at row 1, key 4"):
                gossamer.product_key_topk(scores1, scores2, 2)
            scores2[1, 4] = 0
            scores1[2, 5] = bad
            with pytest.raises(ValueError, match=f"scores1 must hold neither NaN nor .*, got {bad} at row 2, key 5"):
                gossamer.product_key_topk(scores1, scores2, 2)
        else:
            values, ids = gossamer.product_key_topk(scores1, scores2, 6)
            usable = torch.nan_to_num(scores2, nan=-INF, posinf=torch.finfo(torch.float32).max, neginf=-INF)
            assert_is_brute_force(values, ids, scores1, usable)


def test_gradients(any_backend, device):
    """Each chosen pair's gradient reaches its two scores, summed where a score is in several pairs."""
    scores1, scores2 = (randn(5, n, seed=n, device=device).requires_grad_() for n in (20, 11))
    factors = randn(5, 8, seed=3, device=device)
    with gossamer.backend(any_backend):
        values, ids = gossamer.product_key_topk(scores1, scores2, 8)
        (values * factors).sum().backward()
    expected1 = torch.zeros(5, 20, dtype=torch.float64, device=device)
    expected2 = torch.zeros(5, 11, dtype=torch.float64, device=device)
    expected1.scatter_add_(1, ids // 11, factors.double())
    expected2.scatter_add_(1, ids % 11, factors.double())
    torch.testing.assert_close(scores1.grad.double(), expected1, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores2.grad.double(), expected2, rtol=1e-6, atol=1e-6)


def test_differences(device):
    """Both derivatives in float64, once and twice."""
    scores1, scores2 = (randn(2, 7, seed=s, device=device, dtype=torch.float64).requires_grad_() for s in (1, 2))

    def values(scores1, scores2):
        return gossamer.product_key_topk(scores1, scores2, 4)[0].sin()

    torch.autograd.gradcheck(values, (scores1, scores2))
    torch.autograd.gradgradcheck(values, (scores1, scores2))


def test_second_derivative(kernel_backend, device):
    scores1, scores2 = (randn(2, 7, seed=s, device=device).requires_grad_() for s in (1, 2))
    results = []
    for name in (kernel_backend, "reference"):
        with gossamer.backend(name):
            values, _ = gossamer.product_key_topk(scores1, scores2, 4)
            (first,) = torch.autograd.grad(values.sin().sum(), scores1, create_graph=True)
            results.append(torch.autograd.grad(first.square().sum(), (scores1, scores2)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_same_bits_and_rows_alone(any_backend, device):
    """Twice the same, and a row does not depend on the rows around it."""
    scores1, scores2 = randn(9, 50, seed=1, device=device), randn(9, 60, seed=2, device=device)
    with gossamer.backend(any_backend):
        whole, again = (gossamer.product_key_topk(scores1, scores2, 12) for _ in range(2))
        part = gossamer.product_key_topk(scores1[4:6], scores2[4:6], 12)
    for a, b, c in zip(whole, again, part, strict=True):
        assert torch.equal(a, b) and torch.equal(a[4:6], c)


def test_shapes_and_dtypes(any_backend, device):
    """Leading sizes, columns that lie apart, no rows, 16 bits as their float32 values."""
    wide = randn(2, 3, 40, seed=1, device=device)
    with gossamer.backend(any_backend):
        values, ids = gossamer.product_key_topk(wide[..., ::2], wide[..., 1::2], 5)
        assert values.shape == (2, 3, 5)
        assert_is_brute_force(
            values.view(6, 5), ids.view(6, 5), wide[..., ::2].reshape(6, 20), wide[..., 1::2].reshape(6, 20)
        )
        empty = gossamer.product_key_topk(wide[:0], wide[:0], 3)
        assert empty[0].shape == empty[1].shape == (0, 3, 3)
        half = wide.bfloat16()
        values, ids = gossamer.product_key_topk(half, half, 5)
        found = gossamer.product_key_topk(half.float(), half.float(), 5)
    assert values.dtype == torch.float32 and torch.equal(values, found[0]) and torch.equal(ids, found[1])


def test_many(any_backend, device):
    """More pairs than kernels keep are left to plain torch, with the same answer."""
    scores1, scores2 = randn(2, 80, seed=1, device=device), randn(2, 80, seed=2, device=device)
    with gossamer.backend(any_backend):
        values, ids = gossamer.product_key_topk(scores1, scores2, 70)
    assert_is_brute_force(values, ids, scores1, scores2)


def test_compiles(any_backend, device):
    scores1, scores2 = (randn(6, 30, seed=s, device=device) for s in (1, 2))

    def loss(scores1, scores2):
        values, ids = gossamer.product_key_topk(scores1, scores2, 4)
        return values.sin().sum() + ids.sum()

    results = []
    with gossamer.backend(any_backend):
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            leaves = scores1.clone().requires_grad_(), scores2.clone().requires_grad_()
            out = function(*leaves)
            results.append([out, *torch.autograd.grad(out, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operators_are_well_formed(any_backend, device):
    scores1, scores2 = (randn(3, n, seed=n, device=device).requires_grad_() for n in (9, 8))
    args = flat(ProductKeyTopk(scores1, scores2, 4), any_backend)
    torch.library.opcheck(torch.ops.gossamer.product_key_topk.default, args)
    values, ids = gossamer.product_key_topk(scores1, scores2, 4)
    dvalues = randn(3, 4, seed=1, device=device).requires_grad_()
    args = flat(ProductKeyTopkBackward(dvalues, values.detach(), ids, [9, 8]), any_backend)
    torch.library.opcheck(torch.ops.gossamer.product_key_topk_backward.default, args)


def test_search_operator_is_well_formed():
    args = flat(ProductKeySearch(randn(6, 8, seed=1), randn(2, 2, 9, 4, seed=2), 3), "native")
    torch.library.opcheck(torch.ops.gossamer.product_key_search.default, args)


def scores_of(queries, keys):
    """The scores of both halves, rows of group r % G."""
    groups, _, side, half = keys.shape
    by_group = queries.view(-1, groups, 2, half)
    return [torch.einsum("rgd,gnd->rgn", by_group[:, :, i], keys[:, i]).reshape(-1, side) for i in (0, 1)]


@pytest.mark.parametrize("groups", [1, 3])
def test_search_is_the_composition(device, groups):
    """Scores and ids of queries are those of product_key_topk, for exact scores: of small integers."""
    generator = torch.Generator().manual_seed(1)
    queries = torch.randint(-8, 9, (42 * groups, 12), generator=generator).float().to(device)
    keys = torch.randint(-8, 9, (groups, 2, 37, 6), generator=generator).float().to(device)
    found = product_key_search(queries, keys, 9)
    assert_is_brute_force(*found, *scores_of(queries, keys))
    with gossamer.backend("reference"):
        assert all(torch.equal(a, b) for a, b in zip(product_key_search(queries, keys, 9), found, strict=True))
    assert [part.shape for part in product_key_search(queries[:0], keys, 9)] == [(0, 9), (0, 9)]
    queries[4, 2] = math.nan
    if device == "cpu":
        with pytest.raises(ValueError, match=r"scores1 must hold neither NaN nor .*, got nan at row 4, key 0"):
            product_key_search(queries, keys, 9)


@pytest.mark.parametrize("groups", [1, 2])
def test_search_differences(device, groups):
    """The gradient of the scores in queries and keys, in float64."""
    queries = randn(4, 6, seed=1, device=device, dtype=torch.float64).requires_grad_()
    keys = randn(groups, 2, 5, 3, seed=2, device=device, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda q, k: product_key_search(q, k, 3)[0].sin(), (queries, keys))


@pytest.mark.parametrize(("groups", "side", "half", "top_k"), [(1, 300, 37, 16), (2, 70, 64, 4), (1, 515, 6, 1)])
def test_search_of_many_keys(isa, groups, side, half, top_k):
    """Exact among keys of any length, many of them equal, and for queries of any size; integers times powers of two."""
    generator = torch.Generator().manual_seed(side)
    keys = torch.randint(-8, 9, (groups, 2, side, half), generator=generator).float()
    keys[:, :, 40:55] = keys[:, :, :1]
    keys[:, :, ::7] *= 64
    keys[:, 1, 1::5] /= 1024
    queries = torch.randint(-8, 9, (22 * groups, 2 * half), generator=generator).float()
    queries[3], queries[5, :half] = 0, 0
    queries *= 2.0 ** torch.randint(-9, 10, (22 * groups, 1), generator=generator)
    queries[6:9] *= torch.tensor([[2.0**-80], [2.0**70], [2.0**-40]])
    # Groups alternate, so that rows are left out in pairs.
    for rows, scale in ((queries, 1.0), (queries[10:], 2.0**-70)):
        values, ids = product_key_search(rows, keys * scale, top_k)
        expected = gossamer.product_key_topk(*scores_of(rows.double(), keys.double() * scale), top_k)
        assert torch.equal(ids, expected[1]) and torch.equal(values.double(), expected[0])
    queries[2, half] = INF
    with pytest.raises(ValueError, match=r"scores2 must hold neither NaN nor .* at row 2"):
        product_key_search(queries, keys, top_k)


def test_search_has_the_same_bits_with_a_gradient(isa):
    """Also alone, so that neither other queries nor autograd change a result."""
    queries, keys = randn(70, 128, seed=3), randn(1, 2, 300, 64, seed=4)
    found = product_key_search(queries, keys, 16)
    for other in (
        product_key_search(queries.clone().requires_grad_(), keys, 16),
        [torch.cat(parts) for parts in zip(*(product_key_search(row[None], keys, 16) for row in queries), strict=True)],
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, other, strict=True))


def test_instruction_sets(isa):
    """Each instruction set's kernels are exact, where they find a bound first and where rows are short."""
    for n1, n2, top_k in ((400, 333, 16), (700, 9, 5), (64, 64, 64)):
        scores1, scores2 = randn(3, n1, seed=1), randn(3, n2, seed=2)
        scores1[1, : n1 // 2] = -INF
        values, ids = gossamer.product_key_topk(scores1, scores2, top_k)
        assert_is_brute_force(values, ids, scores1, scores2)
    queries, keys = randn(70, 128, seed=3), randn(1, 2, 200, 64, seed=4)
    scores = [queries[:, 64 * i : 64 * i + 64].double() @ keys[0, i].double().T for i in (0, 1)]
    expected, _ = gossamer.product_key_topk(*scores, 16)
    _, ids = product_key_search(queries, keys, 16)
    found = scores[0].gather(1, ids // 200) + scores[1].gather(1, ids % 200)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_errors():
    scores = torch.zeros(3, 6)
    for arguments, error, message in [
        ((None, scores, 2), TypeError, "scores1 must be a torch.Tensor, got NoneType"),
        ((scores, scores.long(), 2), TypeError, "scores2 must be floating point, got torch.int64"),
        ((scores, scores.double(), 2), TypeError, "scores2 must have the dtype of scores1"),
        ((scores, scores[:2], 2), ValueError, r"scores2 must have the leading sizes of scores1, \(3,\), got \(2,\)"),
        (
            (scores, scores[:, :4], 5),
            ValueError,
            r"top_k must be at most the number of keys of each list, \(6, 4\), got 5",
        ),
        ((scores, scores, 0), ValueError, "top_k must be at least 1, got 0"),
        ((scores, scores, 2.0), TypeError, "top_k must be an int, got float"),
        ((scores.to_sparse(), scores, 2), TypeError, "scores1 must have the layout torch.strided"),
        ((torch.tensor(0.0), torch.tensor(0.0), 1), ValueError, r"scores1 must have shape \(..., N\), got \(\)"),
    ]:
        with pytest.raises(error, match=message):
            gossamer.product_key_topk(*arguments)
