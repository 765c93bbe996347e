"""Learned permutations: Sinkhorn, the assignment against all permutations, the phases, and absorption."""

import itertools

import pytest
import torch
from contracts import RouterContract, assert_near

from gossamer.nn import (
    DSelectKRouter,
    LearnedPermutation,
    MoE,
    Routing,
    SoftmaxRouter,
    TreeRouter,
    router_losses,
    step_routers,
    tree_gates,
)
from gossamer.nn.moe.routers.dselect_k import selector_gates
from gossamer.nn.moe.routers.permutation import best_assignment, sinkhorn

GATES = [0.237309, 0.264972, 0.381301, 0.116418]
PERMUTATION = [2, 0, 3, 1]
PERMUTED = [0.264972, 0.116418, 0.237309, 0.381301]


class Fixed(SoftmaxRouter):
    """The gates of the sheet, for every token."""

    def route(self, logits):
        gates = torch.tensor(GATES, device=logits.device).expand(logits.shape[0], 4)
        ids = torch.arange(4, device=logits.device).expand_as(gates).contiguous()
        return Routing(ids, gates, 4, probabilities=gates)


def test_worked_values(device):
    """π of the sheet, by a matrix in the search and by ids after it."""
    permutation = LearnedPermutation(Fixed(8, 4, 4, device=device), 2, device=device)
    with torch.no_grad():
        permutation.log_weights.zero_()
        permutation.log_weights[range(4), PERMUTATION] = 1
    x = torch.zeros(3, 8, device=device)
    searching = permutation(x)
    assert_near(permutation.matrix(), torch.eye(4, device=device, dtype=torch.float64)[PERMUTATION])
    assert searching.weights[0].tolist() == pytest.approx(PERMUTED, abs=1e-6)
    for _ in range(2):
        step_routers(permutation)
    assert permutation.permutation.tolist() == PERMUTATION
    fixed = permutation(x)
    found = dict(zip(fixed.expert_ids[0].tolist(), fixed.weights[0].tolist(), strict=True))
    assert [found[e] for e in range(4)] == pytest.approx(PERMUTED)
    assert fixed.probabilities[0].tolist() == pytest.approx(PERMUTED)


def test_sinkhorn(device):
    """Columns, normalised last, add up to one; rows come near it with more iterations."""
    scores = 3 * torch.randn(7, 7, generator=torch.Generator().manual_seed(16), dtype=torch.float64).to(device)
    away = []
    for iterations in (1, 5, 100):
        matrix = sinkhorn(scores, iterations)
        assert_near(matrix.sum(0), torch.ones(7, dtype=torch.float64, device=device))
        away.append(float((matrix.sum(1) - 1).abs().max()))
    assert away[0] > away[1] > away[2] and away[2] < 1e-6


@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_assignment_is_the_best_of_all(size):
    generator = torch.Generator().manual_seed(size)
    for _ in range(5):
        profit = torch.randn(size, size, generator=generator, dtype=torch.float64)
        profit = profit if size < 6 else profit.round()  # ties
        best = max(sum(float(profit[i, p[i]]) for i in range(size)) for p in itertools.permutations(range(size)))
        found = best_assignment(profit).tolist()
        assert sorted(found) == list(range(size))
        assert sum(float(profit[i, found[i]]) for i in range(size)) == pytest.approx(best, rel=1e-12, abs=1e-12)


def test_search_against_a_product(device):
    """Weights g·P at their old sum, every expert's probability likewise, and the entropies of P."""
    torch.manual_seed(5)
    permutation = LearnedPermutation(SoftmaxRouter(16, 5, 2, device=device), 10, temperatures=(1.0, 0.1), device=device)
    x = torch.randn(9, 16, device=device)
    routing, base = permutation(x), permutation.router(x)
    matrix = sinkhorn(permutation.log_weights.detach().double(), 20).float()
    dense = torch.zeros(9, 5, device=device).scatter(1, base.expert_ids, base.weights)
    mixed = dense @ matrix
    assert_near(routing.weights, mixed * (dense.sum(1, keepdim=True) / mixed.sum(1, keepdim=True)))
    mixed = base.probabilities @ matrix
    assert_near(routing.probabilities, mixed / mixed.sum(1, keepdim=True))
    rows = matrix / matrix.sum(1, keepdim=True)
    entropy = -sum((p * (p + 1e-6).log()).sum() for p in (matrix, rows))
    assert_near(router_losses(routing)["permutation"], entropy)
    first = permutation.matrix()
    for _ in range(9):
        step_routers(permutation)
    assert_near(permutation.matrix(), sinkhorn(permutation.log_weights.detach().double() / 0.1, 150))
    assert not torch.equal(first, permutation.matrix())
    noisy = LearnedPermutation(permutation.router, 10, temperatures=(1.0, 0.1), noise=1.0, device=device)
    assert not torch.equal(noisy.matrix(), noisy.matrix())
    assert torch.equal(noisy.eval().matrix(), noisy.matrix())


def test_the_end_of_the_phase(device):
    """The assignment is that of the last soft matrix, without gradient; experts that absorb it leave the output."""
    torch.manual_seed(6)
    router = LearnedPermutation(SoftmaxRouter(16, 6, 2, device=device), 3, device=device)
    moe = MoE(16, 8, router=router, bias=True, device=device)
    x = torch.randn(11, 16, device=device)
    with pytest.raises(ValueError, match="permutation must be read after the phase of 3 steps, got step 0"):
        router.absorb(moe.experts)
    for _ in range(2):
        step_routers(moe)
    expected = best_assignment(router.matrix())
    step_routers(moe)
    assert torch.equal(router.permutation.cpu(), expected) and sorted(expected.tolist()) == list(range(6))
    assert expected.tolist() != list(range(6))
    with pytest.raises(ValueError, match=r"matrix\(\) must be called within the phase of 3 steps, got step 3"):
        router.matrix()
    y, routing = moe(x, return_routing=True)
    base = router.router(x)
    assert torch.equal(routing.expert_ids, expected.to(device)[base.expert_ids]) and torch.equal(
        routing.weights, base.weights
    )
    assert torch.equal(routing.logits[:, expected.to(device)], base.logits) and not routing.losses
    assert_near(routing.probabilities[:, expected.to(device)], base.probabilities)
    y.sum().backward()
    assert router.log_weights.grad is None
    step_routers(moe)
    assert torch.equal(moe(x), y)
    moe.router = moe.router.absorb(moe.experts)
    assert isinstance(moe.router, SoftmaxRouter)
    assert_near(moe(x), y)


def test_a_checkpoint_resumes_the_phase(device):
    def make():
        return LearnedPermutation(SoftmaxRouter(16, 4, 2, device=device), 3, device=device)

    first = make()
    step_routers(first)
    second = make()
    second.load_state_dict(first.state_dict())
    assert second.num_steps == 1 and second.searching
    for _ in range(2):
        step_routers(first)
        step_routers(second)
    assert torch.equal(first.permutation, second.permutation)
    third = make()
    third.load_state_dict(first.state_dict())
    assert torch.equal(third.permutation, first.permutation)


def test_it_finds_the_experts_that_fit(device):
    """Experts that each suit one token, and outputs frozen in another order: the search brings them together."""
    torch.manual_seed(7)
    target = torch.tensor([3, 0, 4, 1, 2], device=device)
    inner = SoftmaxRouter(5, 5, 1, device=device)
    inner.weight.requires_grad_(False).copy_(10 * torch.eye(5))
    router = LearnedPermutation(inner, 60, temperatures=(0.3, 0.03), device=device)
    x = torch.eye(5, device=device)
    optimizer = torch.optim.Adam([router.log_weights], lr=0.05)
    for _ in range(60):
        routing = router(x)
        wrong = routing.weights.sum(1) - routing.weights.gather(1, target[:, None])[:, 0]
        optimizer.zero_grad()
        (wrong.sum() + 1e-3 * router_losses(routing)["permutation"]).backward()
        optimizer.step()
        step_routers(router)
    assert torch.equal(router.permutation, target)
    assert torch.equal(router(x).expert_ids[:, 0], target)


def test_no_permutation_is_chosen_by_nan():
    """A search over NaN would never end."""
    router = LearnedPermutation(SoftmaxRouter(4, 3, 1), 1)
    torch.nn.init.constant_(router.log_weights, torch.nan)
    with pytest.raises(ValueError, match="log_weights must be finite to choose a permutation"):
        router.step()
    assert router.searching and router.training


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda r: LearnedPermutation(r, 0), ValueError, "phase_steps must be at least 1, got 0"),
        (
            lambda r: LearnedPermutation(r, 5, temperatures=(1, 0)),
            ValueError,
            r"temperatures must be two positive.* got \(1, 0\)",
        ),
        (lambda r: LearnedPermutation(r, 5, iterations=(1, 0)), ValueError, "iterations must be at least 1, got 0"),
        (lambda r: LearnedPermutation(r, 5, noise=-1), ValueError, "noise must be at least 0 and finite, got -1"),
        (
            lambda r: LearnedPermutation(r, 5, per_part=True),
            ValueError,
            "router must have gates in parts for per_part, as TreeRouter has, got SoftmaxRouter",
        ),
        (lambda r: LearnedPermutation(r, 5, per_part=1), TypeError, "per_part must be a bool"),
        (lambda r: LearnedPermutation(None, 5), TypeError, r"router must be a gossamer\.nn\.Router"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(SoftmaxRouter(8, 4, 2))


def around(steps, per_part=False):
    def make(num_experts, hidden_size, **factory):
        if per_part:
            inner = DSelectKRouter(hidden_size, num_experts, 2, 1.0, **factory)
        else:
            inner = SoftmaxRouter(hidden_size, num_experts, min(2, num_experts), **factory)
        options = {"temperatures": (1.0, 0.5), "iterations": (5, 9), "per_part": per_part}
        router = LearnedPermutation(inner, 3, **options, **factory)
        for _ in range(steps):
            router.step()
        return router

    return make


TestSearching = RouterContract.over(begin=around(0), later=around(2))
TestByPart = RouterContract.over(searching=around(1, per_part=True))


class TestFixed(RouterContract.over(fixed=around(3))):
    def test_gradients(self, make, device):
        """The router within learns on; Λ does not."""
        router = make(num_experts=5, hidden_size=32, device=device, dtype=torch.float64)
        x = torch.randn(7, 32, dtype=torch.float64, device=device)
        gradients = []
        for routing in (router(x), router.router(x)):
            router.zero_grad()
            (routing.weights.square().sum() + routing.probabilities.cos().sum()).backward()
            gradients.append(router.router.weight.grad.clone())
            assert router.log_weights.grad is None
        assert_near(*gradients)


def by_part(kind, gates_of, device, temperatures):
    """A router, its permutation by part, scores, and the gates that each part gives, by the functions of scores."""
    torch.manual_seed(9)
    inner = kind(16, 5, 3, 1.0, device=device, dtype=torch.float64)
    router = LearnedPermutation(inner, 2, temperatures=temperatures, per_part=True, device=device, dtype=torch.float64)
    x = torch.randn(6, 16, device=device, dtype=torch.float64)
    scores = inner.logits(3 * x)
    parts = []
    gates_of(scores, lambda given: parts.append(given) or given)
    return router, 3 * x, parts[0]


def of_trees(scores, arrange):
    return tree_gates(*scores.view(6, 3, 9).split([4, 5], dim=2), 1.0, arrange)[0]


def of_selectors(scores, arrange):
    return selector_gates(scores[:, :9].view(6, 3, 3), scores[:, 9:], 5, 1.0, arrange)[0]


@pytest.mark.parametrize(("kind", "gates_of"), [(TreeRouter, of_trees), (DSelectKRouter, of_selectors)])
def test_a_permutation_for_each_part(device, kind, gates_of):
    """Each tree's or selector's gates times its own matrix, then by its own assignment, which experts cannot absorb."""
    router, x, parts = by_part(kind, gates_of, device, (0.3, 0.2))
    matrix = router.matrix()
    assert matrix.shape == router.log_weights.shape == (3, 5, 5)
    for r in range(3):
        assert_near(matrix[r], sinkhorn(router.log_weights[r].detach() / 0.3, 20))
    mixed = torch.stack([parts[:, r] @ matrix[r] for r in range(3)], 1)
    routing = router(x)
    shares = 1.0 if kind is TreeRouter else router.router.logits(x)[:, 9:].softmax(1).unsqueeze(2)
    gates = (shares * mixed).sum(1)
    total = gates.sum(1, keepdim=True)
    assert_near(routing.weights, gates / total if kind is TreeRouter else gates)
    assert_near(routing.probabilities, gates / total)
    assert_near(routing.losses["permutation"], -sum(
        (p * (p + 1e-6).log()).sum() for p in (matrix, matrix / matrix.sum(2, keepdim=True))
    ))  # fmt: skip
    routing.weights.cos().sum().backward()
    assert bool((router.log_weights.grad != 0).flatten(1).any(1).all())
    for _ in range(2):
        step_routers(router)
    assert router.permutation.shape == (3, 5) and len({tuple(row) for row in router.permutation.tolist()}) > 1
    moved = torch.zeros_like(parts)
    for r in range(3):
        moved[:, r, router.permutation[r]] = parts[:, r]
    gates = (shares * moved).sum(1)
    fixed = router(x)
    assert_near(fixed.weights, gates / gates.sum(1, keepdim=True) if kind is TreeRouter else gates)
    assert "permutation" not in fixed.losses and len(fixed.losses) > 0
    with pytest.raises(NotImplementedError, match="experts cannot absorb 3 permutations, one for each part"):
        router.absorb(MoE(16, 8, router=router, device=device).experts)


def test_around_trees(device):
    """Gates of trees are permuted as one, and stay as many."""
    torch.manual_seed(8)
    router = LearnedPermutation(TreeRouter(16, 4, 2, 1.0, device=device), 1, device=device)
    step_routers(router)
    x = torch.randn(6, 16, device=device)
    dense = torch.zeros(6, 4, device=device)
    routing = router(x)
    dense = dense.scatter(1, routing.expert_ids, routing.weights)
    assert torch.equal(dense[:, router.permutation], router.router(x).weights)
