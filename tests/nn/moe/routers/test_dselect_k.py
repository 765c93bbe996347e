"""DSelect-k: the sheet's values, bits by a loop, and training that turns it sparse."""

import pytest
import torch
from contracts import RouterContract, assert_near

from gossamer.nn import DSelectKRouter, MoE, router_losses, selector_gates


def test_worked_values(device):
    codes = torch.tensor([[[0.6, -0.7], [0.25, 0.6]]], dtype=torch.float64, device=device)
    mixture = torch.tensor([[0.0, 1.0]], dtype=torch.float64, device=device)
    gates, picked = selector_gates(codes, mixture, 4, 1.0)
    assert picked[0].tolist() == [[0, 0, 1, 0], [0, pytest.approx(0.15625), 0, pytest.approx(0.84375)]]
    assert gates[0].tolist() == pytest.approx([0, 0.114228, 0.268941, 0.616831], abs=1e-6)
    router = DSelectKRouter(5, 3, 2, 1.0, device=device, dtype=torch.float64)
    routing = router.route(torch.cat([codes.flatten(1), mixture], dim=1))
    assert float(router_losses(routing)["selector_unreachable"]) == pytest.approx(1 / (1 + 1e-6) + 6.399959, abs=1e-6)
    assert routing.expert_ids.tolist() == [[3, 1, 2]]
    assert_near(routing.probabilities.sum(1), torch.ones(1, dtype=torch.float64, device=device))
    four = DSelectKRouter(5, 4, 2, 1.0, device=device, dtype=torch.float64)
    losses = router_losses(four.route(torch.cat([codes.flatten(1), mixture], dim=1)))
    entropy = -sum(r * torch.tensor(r + 1e-6).log() for r in (1.0, 0.15625, 0.84375))
    assert set(losses) == {"selector_entropy"} and float(losses["selector_entropy"]) == pytest.approx(
        float(entropy), abs=1e-6
    )
    assert not router_losses(four.eval().route(torch.cat([codes.flatten(1), mixture], dim=1)))


@pytest.mark.parametrize("experts", [1, 2, 5, 8, 11])
def test_against_a_loop(device, experts):
    bits = (experts - 1).bit_length()
    generator = torch.Generator().manual_seed(14)
    codes = (torch.rand(6, 3, bits, generator=generator, dtype=torch.float64) - 0.5) * 1.4
    mixture = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    gates, _ = selector_gates(codes.to(device), mixture.to(device), experts, 1.0)
    for t in range(6):
        share = mixture[t].softmax(0).tolist()
        for e in range(experts):
            total = 0.0
            for j in range(3):
                reach = 1.0
                for b in range(bits):
                    v = min(max(float(codes[t, j, b]), -0.5), 0.5)
                    q = -2 * v**3 + 1.5 * v + 0.5
                    reach *= q if e >> (bits - 1 - b) & 1 else 1 - q
                total += share[j] * reach
            assert float(gates[t, e]) == pytest.approx(total, rel=1e-12, abs=1e-15)


def test_static(device):
    """Codes and mixture that are parameters themselves: one routing for all tokens, with gradients for them."""
    router = DSelectKRouter(16, 4, 2, 1.0, static=True, device=device)
    assert {name for name, _ in router.named_parameters()} == {"bias"} and router.bias.shape == (6,)
    with torch.no_grad():
        router.bias.copy_(torch.tensor([0.6, -0.7, 0.25, 0.6, 0, 1]))
    routing = router(torch.randn(3, 16, device=device))
    for row in routing.weights.tolist():
        assert row == pytest.approx([0, 0.114228, 0.268941, 0.616831], abs=1e-6)
    routing.weights[:, 3].sum().backward()
    assert bool(router.bias.grad[[2, 4, 5]].all()) and not router.bias.grad[[0, 1, 3]].any()
    assert router(torch.zeros(0, 16, device=device)).num_tokens == 0


def test_it_turns_sparse(device):
    torch.manual_seed(4)
    x = torch.randn(128, 16, device=device)
    moe = MoE(16, 8, 6, 2, router="dselect_k", device=device)
    optimizer = torch.optim.Adam(moe.router.parameters(), lr=0.03)
    for _ in range(150):
        routing = moe.router(x)
        losses = router_losses(routing)
        optimizer.zero_grad()
        (0.3 * losses["selector_entropy"] + 1e-2 * losses["selector_unreachable"]).backward()
        optimizer.step()
    routing = moe.router(x)
    assert float((routing.expert_ids < 6).sum(1).double().mean()) < 2.5
    assert float(routing.weights.detach().sum(1).mean()) > 0.9


def test_scores_that_are_no_numbers(device):
    router = DSelectKRouter(16, 4, 2, 1.0, device=device)
    scores = torch.randn(5, 6, generator=torch.Generator().manual_seed(15)).to(device)
    for place in (1, 5):
        for value in (torch.nan, torch.inf):
            wrong = scores.clone()
            wrong[2, place] = value
            if device == "cpu":
                with pytest.raises(
                    ValueError, match=rf"logits must hold neither NaN nor \+inf .* got {value} at token 2"
                ):
                    router.route(wrong)
            else:
                assert bool(router.route(wrong).weights.isfinite().all())
    masked = scores.clone()
    masked[1, 4:] = masked[2, 5] = masked[3, 0] = -torch.inf
    weights = router.route(masked).weights
    assert not weights[1].any() and not weights[3][2:].sum() > scores[3, 4:].softmax(0)[1] + 1e-6
    assert bool(weights.isfinite().all())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: DSelectKRouter(16, 4, 0, 1.0), ValueError, "num_selectors must be at least 1, got 0"),
        (lambda: DSelectKRouter(16, 4, 2, -1.0), ValueError, r"gamma must be positive and finite, got -1\.0"),
        (lambda: DSelectKRouter(16, 0, 2, 1.0), ValueError, "num_experts must be at least 1, got 0"),
        (lambda: DSelectKRouter(16, 4, 2, 1.0, 5), ValueError, "max_experts must be at most num_experts"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


TestSelectors = RouterContract.over(
    all=lambda num_experts, hidden_size, **factory: DSelectKRouter(hidden_size, num_experts, 2, 1.0, **factory),
    bounded=lambda num_experts, hidden_size, **factory: DSelectKRouter(
        hidden_size, num_experts, 2, 1.0, min(3, num_experts), **factory
    ),
)
