"""Soft trees: the sheet's values, a recursion over nodes, and training that turns them sparse."""

import pytest
import torch
from contracts import RouterContract, assert_near, differences

from gossamer.nn import MoE, TreeRouter, router_losses, smooth_step, tree_gates
from gossamer.ops.tree_routing import tree_reach


def test_smooth_step(device):
    v = torch.tensor([0.25, -0.1, 0.0, 0.5, -0.5, 3, -3], dtype=torch.float64, device=device, requires_grad=True)
    step = smooth_step(v, 1.0)
    assert step.tolist() == pytest.approx([0.84375, 0.352, 0.5, 1, 0, 1, 0], abs=1e-15)
    (slope,) = torch.autograd.grad(step.sum(), v)
    assert slope.tolist() == pytest.approx([1.5 - 6 * 0.25**2, 1.5 - 6 * 0.1**2, 1.5, 0, 0, 0, 0], abs=1e-15)
    ends = torch.tensor([-torch.inf, torch.nan, torch.inf], device=device)
    assert smooth_step(ends, 0.3).tolist() == [0, 0, 1]
    # The ends are exact, or saturated splits would keep experts alive.
    for dtype in (torch.float32, torch.float64, torch.float16):
        for gamma in (0.001, 0.7, 10.0):
            edge = torch.tensor([-gamma, gamma], dtype=dtype, device=device)
            assert smooth_step(edge, gamma).tolist() == [0, 1]


def test_worked_values(device):
    unset = 9.0
    splits = torch.tensor([[[0.6, -0.1, unset], [-0.7, unset, 0.25]]], dtype=torch.float64, device=device)
    leaves = torch.tensor([[[0.2, -0.3, 0.1, 0.4], [0, 0.5, -0.2, 0.3]]], dtype=torch.float64, device=device)
    gates, reach = tree_gates(splits, leaves, 1.0)
    expected = torch.tensor([[0.352, 0.648, 0, 0], [0, 0, 0.84375, 0.15625]], dtype=torch.float64, device=device)
    assert_near(reach[0], expected)
    assert gates[0].tolist() == pytest.approx([0.237309, 0.264972, 0.381301, 0.116418], abs=1e-6)
    router = TreeRouter(3, 4, 2, 1.0, device=device, dtype=torch.float64)
    routing = router.route(torch.cat([splits, leaves], dim=2).flatten(1))
    assert float(router_losses(routing)["tree_entropy"]) == pytest.approx(1.082071, abs=1e-5)
    assert_near(routing.weights, gates)


def recursion(shares, node, reach, out):
    if node >= len(shares):
        out.append(reach)
        return
    recursion(shares, 2 * node + 1, reach * shares[node], out)
    recursion(shares, 2 * node + 2, reach * (1 - shares[node]), out)


@pytest.mark.parametrize("leaves", [2, 3, 5, 8, 11])
def test_leaves_from_left_to_right(device, leaves):
    shares = torch.rand(4, 2, leaves - 1, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    shares = shares.to(device)
    reach = tree_reach(shares, 1 - shares)
    for t in range(4):
        for j in range(2):
            expected = []
            recursion(shares[t, j].tolist(), 0, 1.0, expected)
            assert reach[t, j].tolist() == pytest.approx(expected, rel=1e-12)


def test_gradients_of_saturated_splits(device):
    """By differences, with some splits saturated: those pass nothing, and nor do leaves that are not reached."""
    generator = torch.Generator().manual_seed(12)
    splits = torch.randn(6, 3, 4, generator=generator, dtype=torch.float64).to(device)
    leaves = torch.randn(6, 3, 5, generator=generator, dtype=torch.float64).to(device)
    factors = torch.randn(6, 5, generator=generator, dtype=torch.float64).to(device)
    assert bool((tree_gates(splits, leaves, 1.0)[1] == 0).any())

    def total(splits, leaves):
        return (tree_gates(splits, leaves, 1.0)[0] * factors).sum()

    for name, exact, difference in differences(total, {"splits": splits, "leaves": leaves}):
        assert exact == pytest.approx(difference, rel=1e-6, abs=1e-8), name


@pytest.mark.parametrize("bad", ["split", "leaf"])
def test_scores_that_are_no_numbers(device, bad):
    router = TreeRouter(16, 4, 2, 1.0, device=device)
    scores = torch.randn(5, 14, generator=torch.Generator().manual_seed(13)).to(device)
    place = 1 if bad == "split" else 4
    for value in (torch.nan, torch.inf):
        wrong = scores.clone()
        wrong[2, place] = value
        if device == "cpu":
            with pytest.raises(ValueError, match=rf"logits must hold neither NaN nor \+inf .* got {value} at token 2"):
                router.route(wrong)
        else:
            assert bool(router.route(wrong).weights.isfinite().all())
    masked = scores.clone()
    masked[2, place] = -torch.inf
    routing = router.route(masked)
    # The split sends all right, or the second leaf of the first tree is out.
    gates = routing.weights[2]
    assert float(gates.sum()) == pytest.approx(1) and bool((gates >= 0).all())
    masked[1, 3:7] = masked[1, 10:] = -torch.inf
    assert not router.route(masked).weights[1].any() and int((router.route(masked).expert_ids[1] < 4).sum()) == 0


def test_it_turns_sparse(device):
    """Training by the entropy term takes tokens from all experts to one of each tree at most."""
    torch.manual_seed(3)
    x = torch.randn(128, 16, device=device)
    moe = MoE(16, 8, 8, 2, router="tree", gamma=0.5, device=device)
    optimizer = torch.optim.Adam(moe.router.parameters(), lr=0.03)
    means = []
    for _ in range(150):
        routing = moe.router(x)
        means.append(float((routing.expert_ids < 8).sum(1).double().mean()))
        optimizer.zero_grad()
        (0.3 * router_losses(routing)["tree_entropy"]).backward()
        optimizer.step()
    assert means[0] == 8 and means[-1] < 2.5
    routing = moe.router(x)
    saturated = (routing.expert_ids < 8).sum(1) <= 2
    assert float(saturated.double().mean()) > 0.7
    if device == "cpu":
        assert moe(x, return_routing=True)[1].dispatch.buffer_rows == int((routing.expert_ids < 8).sum())


def test_bounded(device):
    """The highest gates alone, in descending order, where a bound is asked for."""
    router = TreeRouter(16, 6, 2, 1.0, 3, device=device)
    x = torch.randn(20, 16, device=device)
    gates = tree_gates(*router.logits(x).view(20, 2, 11).split([5, 6], dim=2), 1.0)[0]
    routing = router(x)
    assert routing.top_k == 3 and torch.equal(routing.weights, gates.topk(3).values)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TreeRouter(16, 1, 2, 1.0), ValueError, "num_experts must be at least 2, the leaves of a tree, got 1"),
        (lambda: TreeRouter(16, 4, 0, 1.0), ValueError, "num_trees must be at least 1, got 0"),
        (lambda: TreeRouter(16, 4, 2, 0.0), ValueError, r"gamma must be positive and finite, got 0\.0"),
        (lambda: TreeRouter(16, 4, 2, None), TypeError, "gamma must be a number, got NoneType"),
        (lambda: TreeRouter(16, 4, 2, 1.0, 5), ValueError, "max_experts must be at most num_experts"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def trees(*options, **named):
    return lambda num_experts, hidden_size, **factory: TreeRouter(
        hidden_size, num_experts, 2, *options, **named, **factory
    )


class TestTrees(RouterContract.over(all=trees(1.0), bounded=trees(1.0, 3, rows_per_token=3))):
    def test_one_expert(self, make, device):
        with pytest.raises(ValueError, match=r"num_experts must be at least 2|max_experts must be at most"):
            make(num_experts=1, hidden_size=8, device=device, dtype=torch.float32)
