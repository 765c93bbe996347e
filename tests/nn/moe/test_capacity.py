"""Capacity factors: which slots are dropped, against a loop over tokens, and the layers that drop them."""

import pytest
import torch
from helpers import randn

from gossamer.nn import Experts, MoE, Routing, limit_capacity, load_balance_loss
from gossamer.testing import random_expert_ids

T, E, K, H, I = 37, 5, 2, 12, 10


def loop(ids, factor):
    """Token by token, slot by slot: what still fits."""
    capacity = int(factor * (ids.shape[1] * ids.shape[0] / E))
    served, kept = [0] * E, ids.clone()
    for t, k in torch.cartesian_prod(torch.arange(ids.shape[0]), torch.arange(ids.shape[1])).tolist():
        e = int(ids[t, k])
        if e >= E:
            kept[t, k] = E
        elif capacity and served[e] == capacity:
            kept[t, k] = E
        else:
            served[e] += 1
    return kept, served


@pytest.mark.parametrize(("skew", "dropped"), [("uniform", 0.0), ("zipf", 0.2), ("one", 0.0), ("few", 0.0)])
@pytest.mark.parametrize("factor", [0.5, 1, 1.25, 100.0])
def test_slots_that_fit(device, skew, dropped, factor):
    ids = random_expert_ids(T, E, K, skew=skew, dropped=dropped, seed=1)
    weights = torch.rand(T, K)
    limited = limit_capacity(Routing(ids.to(device), weights.to(device), E), factor)
    kept, served = loop(ids, factor)
    assert torch.equal(limited.expert_ids.cpu().clamp(max=E), kept) and limited.counts.tolist() == served
    assert torch.equal(limited.weights.cpu(), weights)
    assert torch.equal(limited.dispatch.offsets.cpu(), torch.tensor([0, *served]).cumsum(0).int())


def test_by_hand():
    """Seven tokens, three experts, equal shares of two: the first expert, with five tokens, loses its last three."""
    ids = torch.tensor([[0], [0], [2], [0], [0], [2], [0]])
    limited = limit_capacity(Routing(ids, torch.ones(7, 1), 3), 1)
    assert limited.expert_ids.flatten().tolist() == [0, 0, 2, 3, 3, 2, 3] and limited.counts.tolist() == [2, 0, 2]


def test_fewer_tokens_than_experts_lose_none(device):
    """int(1.0 · 1·2/5) is 0, which is no limit rather than no room."""
    ids = torch.zeros(2, 1, dtype=torch.long, device=device)
    assert limit_capacity(Routing(ids, torch.ones(2, 1, device=device), E), 1.0).counts.tolist() == [2, 0, 0, 0, 0]
    assert limit_capacity(Routing(ids[:0], torch.ones(0, 1, device=device), E), 1.0).counts.tolist() == [0] * E


def test_experts_and_layer(device):
    """The layer is the layer without limit on what fits; the routing it returns, and its loss, are the router's own."""
    moe = MoE(H, I, E, K, capacity_factor=0.75, device=device)
    free = MoE(H, I, E, K, device=device)
    free.load_state_dict(moe.state_dict())
    x = randn(T, H, device=device).requires_grad_()
    y, routing = moe(x, return_routing=True)
    kept, _ = loop(routing.expert_ids.cpu(), 0.75)
    assert (kept == E).any() and not (routing.expert_ids == E).any()
    expected = free.experts(x, kept.to(device), routing.weights.detach())
    assert torch.equal(y, expected)
    dropped = (kept == E).all(1).to(device)
    assert dropped.any() and not y[dropped].any()
    assert torch.equal(load_balance_loss(routing), load_balance_loss(free(x, return_routing=True)[1]))
    mine = torch.autograd.grad(y.square().sum(), moe.experts.parameters(), retain_graph=True)
    plain = torch.autograd.grad(expected.square().sum(), free.experts.parameters())
    assert all(torch.equal(*pair) for pair in zip(mine, plain, strict=True))
    (dweights,) = torch.autograd.grad(y.square().sum(), routing.weights)
    assert dweights[kept.to(device) < E].any() and not dweights[kept.to(device) == E].any()
    assert "capacity_factor=0.75" in repr(moe.experts)
    ids = torch.zeros(T, 1, dtype=torch.long, device=device)
    weights = torch.rand(T, 1).to(device)
    y = moe.experts(x, ids, weights)
    room = int(0.75 * (T / E))
    assert y[:room].any(1).all() and not y[room:].any()


def test_traces_without_a_graph_break(device):
    moe = MoE(H, I, E, K, capacity_factor=1.0, device=device)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    for tokens in (T, 22, 1):
        x = randn(tokens, H, device=device)
        assert torch.equal(compiled(x), moe(x))


@pytest.mark.parametrize("priority", ["token", "choice", "probability"])
def test_priorities(device, priority):
    """Slot by slot in each order, dropped ones and equal weights among them."""
    generator = torch.Generator().manual_seed(3)
    ids = random_expert_ids(T, E, K, skew="zipf", dropped=0.1, seed=2)
    weights = (torch.rand(T, K, generator=generator) * 8).round() / 8
    limited = limit_capacity(Routing(ids.to(device), weights.to(device), E), capacity=6, priority=priority)
    tokens = list(range(T))
    if priority == "probability":
        tokens.sort(key=lambda t: -float(weights[t].max()))
    order = (
        [(t, k) for k in range(K) for t in tokens]
        if priority != "token"
        else [(t, k) for t in tokens for k in range(K)]
    )
    served, kept = [0] * E, ids.clamp(max=E)
    for t, k in order:
        e = int(kept[t, k])
        if e < E:
            kept[t, k] = e if served[e] < 6 else E
            served[e] += 1
    assert torch.equal(limited.expert_ids.cpu().clamp(max=E), kept)
    assert limited.counts.tolist() == [min(s, 6) for s in served] and max(served) > 6


def test_bad_factors():
    with pytest.raises(ValueError, match="capacity_factor must be positive and finite, got 0"):
        Experts(E, H, I, capacity_factor=0)
    with pytest.raises(ValueError, match="capacity_factor must be positive and finite, got inf"):
        MoE(H, I, E, K, capacity_factor=float("inf"))
    routing = Routing(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1), E)
    with pytest.raises(TypeError, match="capacity_factor must be a number or None, got str"):
        limit_capacity(routing, "1")
    with pytest.raises(ValueError, match="capacity_factor must be None beside a capacity, got 2"):
        limit_capacity(routing, 2, capacity=3)
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        limit_capacity(routing, capacity=0)
    with pytest.raises(ValueError, match=r"priority must be one of .* got 'best'"):
        limit_capacity(routing, 1.0, priority="best")
    with pytest.raises(TypeError, match="capacity_factor must be a number, got NoneType"):
        limit_capacity(routing)
