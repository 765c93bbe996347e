"""Dynamic routing: the sheet's cases, and sums in a loop over ranks."""

import pytest
import torch
from contracts import LogitsContract, RouterContract, assert_near

from gossamer.nn import MoE, TopPRouter, load_balance_loss, routing_entropy_loss, softmax_top_p


def by_loop(probabilities, top_p, most):
    """Rank by rank until the sum exceeds the bound."""
    chosen = []
    for row in probabilities.tolist():
        total, experts = 0.0, []
        for expert in sorted(range(len(row)), key=lambda e: (-row[e], e)):
            if total > top_p or len(experts) == most:
                break
            experts.append(expert)
            total += row[expert]
        chosen.append(experts)
    return chosen


def live(routing):
    return [[e for e in row if e < routing.num_experts] for row in routing.expert_ids.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("most", [None, 1, 3])
@pytest.mark.parametrize("top_p", [1e-6, 0.4, 0.9, 1.0])
def test_against_a_loop(device, dtype, top_p, most):
    logits = 2 * torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    routing = softmax_top_p(logits.to(device, dtype), top_p, max_experts=most)
    probabilities = logits.softmax(1)
    assert live(routing) == by_loop(probabilities, top_p, most)
    weights = probabilities.to(device).gather(1, routing.expert_ids.clamp(max=6))
    assert_near(routing.weights, weights.masked_fill(routing.expert_ids >= 7, 0).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_worked_values(device, dtype):
    """A rank joins while the sum before it has not passed the bound: at equality it still does."""

    def count(probabilities, top_p):
        logits = torch.tensor([probabilities], dtype=torch.float64).log().to(device, dtype)
        return len(live(softmax_top_p(logits, top_p))[0])

    assert count([1 / 16] * 16, 0.4) == 7
    assert count([0.3, 0.25, 0.25, 0.2], 0.4) == 2
    assert count([0.5, 0.3, 0.15, 0.05], 0.4) == 1
    assert count([0.25] * 4, 0.5) == 3
    assert count([1 / 3] * 3 + [1e-30], 1.0) == 4
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64, device=device).log().requires_grad_()
    routing = softmax_top_p(logits, 0.4)
    assert float(routing_entropy_loss(routing).detach()) == pytest.approx(1.142120, abs=1e-6)


def test_entropy_loss(device):
    """Its gradient, padding, layers together, and probabilities of zero."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    p = logits.detach().softmax(1)
    entropy = -(p * p.log()).sum(1, keepdim=True)
    loss = routing_entropy_loss(softmax_top_p(logits, 0.4))
    assert_near(loss.detach(), entropy.mean())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert_near(gradient, -p * (p.log() + entropy) / 6)

    mask = torch.tensor([1, 0, 1, 1, 0, 0], device=device)
    masked = routing_entropy_loss([softmax_top_p(logits, 0.4), softmax_top_p(2 * logits, 0.4)], mask=mask)
    q = (2 * logits.detach()).softmax(1)
    both = torch.cat([p[mask == 1], q[mask == 1]])
    assert_near(masked.detach(), -(both * both.log()).sum() / 6)
    assert float(routing_entropy_loss(softmax_top_p(logits, 0.4), mask=torch.zeros(6, device=device)).detach()) == 0

    hard = torch.tensor([[0.0, -torch.inf, -torch.inf]], device=device, requires_grad=True)
    loss = routing_entropy_loss(softmax_top_p(hard, 0.4))
    (gradient,) = torch.autograd.grad(loss, hard)
    assert float(loss.detach()) == 0 and not gradient.any()


def test_it_buys_confidence_with_experts(device):
    """The entropy term lowers the number of experts that a token takes; the balance term does not."""
    torch.manual_seed(0)
    x = torch.randn(256, 16, device=device)
    means = {}
    for entropy in (0.0, 0.3):
        torch.manual_seed(1)
        router = TopPRouter(16, 8, 0.6, device=device)
        optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
        for _ in range(40):
            routing = router(x)
            loss = 0.01 * load_balance_loss(routing) + entropy * routing_entropy_loss(routing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        means[entropy] = float((router(x).expert_ids < 8).sum(1).double().mean())
    assert means[0.3] < 2 < 3 < means[0.0]


def test_rows_are_bounded(device):
    """The bound reaches the routing; on the CPU buffers have the exact size, and too small a bound is an error."""
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(2)).to(device)
    moe = MoE(16, 8, 6, router="top_p", top_p=0.5, rows_per_token=4, device=device)
    _, routing = moe(x, return_routing=True)
    rows = int((routing.expert_ids < 6).sum())
    assert routing.max_rows == 161 and moe.top_k == 6
    if device == "cpu":
        assert routing.dispatch.buffer_rows == rows
        moe.router.rows_per_token = 0.5
        with pytest.raises(ValueError, match=f"max_rows must be at least the number of slots with an expert, {rows}"):
            moe(x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TopPRouter(16, 4, 0.0), ValueError, "top_p must be above 0 and at most 1, got 0"),
        (lambda: TopPRouter(16, 4, 1.5), ValueError, "top_p must be above 0 and at most 1, got 1.5"),
        (lambda: TopPRouter(16, 4, float("nan")), ValueError, "top_p must be above 0 and at most 1, got nan"),
        (lambda: TopPRouter(16, 4, "1"), TypeError, "top_p must be a number, got str"),
        (lambda: TopPRouter(16, 4, 0.5, 0), ValueError, "max_experts must be at least 1, got 0"),
        (lambda: TopPRouter(16, 4, 0.5, 5), ValueError, "max_experts must be at most num_experts, got max_experts=5"),
        (lambda: TopPRouter(16, 4, 0.5, rows_per_token=0), ValueError, "rows_per_token must be positive and finite"),
        (lambda: softmax_top_p(torch.zeros(2, 4), 2), ValueError, "top_p must be above 0 and at most 1, got 2"),
        (lambda: softmax_top_p(torch.zeros(2, 4), 0.5, max_experts=5), ValueError, "max_experts=5, num_experts=4"),
        (lambda: softmax_top_p([0.5], 0.5), TypeError, r"logits must be a torch\.Tensor, got list"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


TestTopP = RouterContract.over(
    top_p=lambda num_experts, hidden_size, **factory: TopPRouter(hidden_size, num_experts, 0.5, **factory),
    bounded=lambda num_experts, hidden_size, **factory: TopPRouter(
        hidden_size, num_experts, 1.0, min(3, num_experts), bias=True, rows_per_token=3, **factory
    ),
)
TestFunction = LogitsContract.over(
    top_p=lambda logits: softmax_top_p(logits, 0.6), all=lambda logits: softmax_top_p(logits, 1.0)
)
