"""XMoE: the sheet's cases, null experts, capacity by rank."""

import pytest
import torch
from contracts import LogitsContract, RouterContract, assert_near

from gossamer.nn import MoE, ThresholdRouter, limit_capacity, load_balance_loss, softmax_threshold

RUNNING = [[2.0, 1, 0, -1], [0, 2, 1, -1], [1, 0, 2, -1], [2, 0, -1, 1]]


def live(routing):
    return [[e for e in row if e < routing.num_experts] for row in routing.expert_ids.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_worked_values(device, dtype):
    """A rank joins while the sum before it is below the threshold: at equality it does not."""

    def route(probabilities, threshold, **options):
        logits = torch.tensor([probabilities], dtype=torch.float64).log().to(device, dtype)
        return softmax_threshold(logits, threshold, **options)

    routing = route([0.5, 0.3, 0.15, 0.05], 0.9)
    assert live(routing) == [[0, 1, 2]] and float(routing.weights.sum()) == pytest.approx(0.95)
    assert len(live(route([0.25] * 4, 0.5))[0]) == 2
    assert live(route([0.5, 0.3, 0.15, 0.05], 1e-9)) == [[0]]
    assert live(route([0.5, 0.3, 0.15, 0.05], 1.0)) == [[0, 1, 2, 3]]
    assert live(route([0.5, 0.3, 0.15, 0.05], 0.9, max_experts=2)) == [[0, 1]]
    routing = softmax_threshold(torch.tensor(RUNNING, dtype=dtype, device=device), 0.9)
    assert live(routing) == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 3, 1]]
    expected = torch.tensor([0.643914, 0.236883, 0.087144, 0], dtype=torch.float64, device=device)
    assert bool(((routing.weights - expected).abs() < 1e-6).all())


def test_null_experts(device):
    """They take probability and slots; what is left of a token's choice runs, in front."""
    probabilities = torch.tensor([[0.2, 0.3, 0.5], [0.05, 0.05, 0.9], [0.6, 0.3, 0.1]], dtype=torch.float64)
    logits = probabilities.log().to(device).requires_grad_()
    routing = softmax_threshold(logits, 0.7, null_experts=1)
    assert live(routing) == [[1], [], [0, 1]] and routing.num_experts == 2 and routing.top_k == 2
    assert_near(routing.weights, torch.tensor([[0.3, 0], [0, 0], [0.6, 0.3]], dtype=torch.float64, device=device))
    assert_near(routing.probabilities[0], torch.tensor([0.4, 0.6], dtype=torch.float64, device=device))
    assert bool(load_balance_loss(routing).isfinite())
    (gradient,) = torch.autograd.grad(routing.weights.sum(), logits)
    p = probabilities.to(device)
    picked = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 1, 0]], device=device, dtype=torch.float64)
    assert_near(gradient, p * (picked - (p * picked).sum(1, keepdim=True)))

    moe = MoE(16, 8, 4, router="threshold", threshold=0.5, null_experts=3, device=device)
    assert moe.router.weight.shape == (7, 16) and moe.top_k == 4
    x = torch.randn(30, 16, generator=torch.Generator().manual_seed(3)).to(device)
    y, routing = moe(x, return_routing=True)
    idle = (routing.expert_ids >= 4).all(1)
    assert bool(idle.any()) and not y[idle].any() and bool(y[~idle].any(1).all())


def test_capacity_by_rank(device):
    """First choices go before second ones, whatever the order of tokens."""
    logits = torch.tensor([[1.0, 0.9, -9], [-9, 1, 0.9], [0.9, 1, -9], [-9, 1, 0.9]], device=device)
    routing = softmax_threshold(logits, 0.9)
    assert live(routing) == [[0, 1], [1, 2], [1, 0], [1, 2]]
    assert live(limit_capacity(routing, capacity=2, priority="choice")) == [[0], [1, 2], [1, 0], [2]]
    assert live(limit_capacity(routing, capacity=2)) == [[0, 1], [1, 2], [0], [2]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ThresholdRouter(16, 4, 0), ValueError, "threshold must be above 0 and at most 1, got 0"),
        (lambda: ThresholdRouter(16, 4, 1.1), ValueError, r"threshold must be above 0 and at most 1, got 1\.1"),
        (lambda: ThresholdRouter(16, 4, 0.5, 0), ValueError, "max_experts must be at least 1, got 0"),
        (lambda: ThresholdRouter(16, 4, 0.5, 6, null_experts=1), ValueError, "max_experts=6, num_experts=5"),
        (lambda: ThresholdRouter(16, 4, 0.5, null_experts=-1), ValueError, "null_experts must be at least 0, got -1"),
        (lambda: ThresholdRouter(16, 4, 0.5, null_experts=0.5), TypeError, "null_experts must be an int, got float"),
        (lambda: ThresholdRouter(16, 0, 0.5, null_experts=3), ValueError, "num_experts must be at least 1, got 0"),
        (
            lambda: softmax_threshold(torch.zeros(2, 4), 0.5, null_experts=4),
            ValueError,
            "null_experts must leave at least one expert, got 4 of 4",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


TestThreshold = RouterContract.over(
    threshold=lambda num_experts, hidden_size, **factory: ThresholdRouter(hidden_size, num_experts, 0.7, **factory),
    null=lambda num_experts, hidden_size, **factory: ThresholdRouter(
        hidden_size, num_experts, 0.5, null_experts=2, rows_per_token=5, **factory
    ),
)
TestFunction = LogitsContract.over(threshold=lambda logits: softmax_threshold(logits, 0.7))
