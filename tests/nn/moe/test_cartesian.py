"""CartesianMoE against its formula, and the routing over pairs of experts."""

import copy

import pytest
import torch
from contracts import assert_gradients, assert_near, functional, hidden_states, parameters, token_ids
from torch import nn

from gossamer.nn import (
    CartesianMoE,
    Experts,
    HashRouter,
    LatentExperts,
    MoE,
    SigmoidRouter,
    given_experts,
    load_balance_loss,
    product_routing,
    softmax_topk,
)

T, H, I, E, K, S = 13, 16, 6, 4, 2, 5


def make(device, dtype=torch.float64, **options):
    return CartesianMoE(H, I, E, K, device=device, dtype=dtype, **options)


def by_loop(layer, x):
    """Both halves by loops over tokens and experts, with softmax over all experts, the K largest renormalised."""
    for half in layer.halves:
        rows = []
        for token in x:
            u = token / (token.square().mean() + torch.finfo(x.dtype).eps).sqrt() * half.norm.weight
            p = (half.moe.router.weight @ u).softmax(0)
            best = p.topk(K)
            y = torch.zeros_like(u)
            for e, share in zip(best.indices.tolist(), best.values / best.values.sum(), strict=True):
                gate, up = (half.moe.experts.gate_up_proj[e] @ u).chunk(2)
                y = y + share * (half.moe.experts.down_proj[e] @ (nn.functional.silu(gate) * up))
            if half.shared_expert is not None:
                beta = (half.mix.weight @ u + half.mix.bias).softmax(0)
                gate, up = (half.shared_expert.gate_up_proj.weight @ u).chunk(2)
                shared = half.shared_expert.down_proj.weight @ (nn.functional.silu(gate) * up)
                y = beta[0] * y + beta[1] * shared
            rows.append(token + y)
        x = torch.stack(rows)
    return x


@pytest.mark.parametrize("shared", [None, S])
def test_is_the_formula(device, shared):
    layer = make(device, shared_intermediate_size=shared)
    x = hidden_states(T, H, device=device, dtype=torch.float64)
    assert_near(layer(x), by_loop(layer, x))
    assert_near(layer(x.view(1, T, H)), by_loop(layer, x).view(1, T, H))


def test_gradients(device):
    """Of the stream and every parameter, the routers' of both halves among them."""
    layer = make(device, shared_intermediate_size=S)
    x = hidden_states(T, H, device=device, dtype=torch.float64)
    factors = hidden_states(T, H, device=device, dtype=torch.float64, seed=8)
    function = functional(layer, lambda forward, x: (forward(x) * factors).sum())
    assert_gradients(function, {"x": x} | parameters(layer))


def test_idle_second_half_leaves_the_first(device):
    """With all of B's experts zero, what comes out is behind A."""
    layer = make(device)
    first, second = layer.halves
    with torch.no_grad():
        second.moe.experts.down_proj.zero_()
    x = hidden_states(T, H, device=device, dtype=torch.float64)
    assert torch.equal(layer(x), first(x)[0])


def test_parameters_and_pairs(device):
    """Two sides of half-width experts have the parameters of whole ones; two of four a side make 4 of 16 pairs."""
    halves = CartesianMoE(H, I, 8, K)
    whole = MoE(H, 2 * I, 8, K)
    expected = sum(p.numel() for p in whole.experts.parameters())
    assert sum(p.numel() for half in halves.halves for p in half.moe.experts.parameters()) == expected
    _, routings = make(device)(hidden_states(T, H, device=device, dtype=torch.float64), return_routing=True)
    pairs = product_routing(*routings)
    assert (pairs.num_experts, pairs.top_k) == (16, 4)


def test_product_routing(device):
    """Ids and weights of all pairs, an absent side making an absent pair, and a balance loss over the pairs."""
    ids = torch.tensor([[2, 0], [3, 1]], device=device)
    weights = torch.tensor([[0.75, 0.25], [0.0, 1.0]], device=device)
    first, second = given_experts(ids, 3, weights), given_experts(ids.flip(0), 4, weights.flip(0))
    pairs = product_routing(first, second)
    assert pairs.expert_ids.tolist() == [[11, 9, 3, 1], [12, 12, 6, 4]]
    assert pairs.weights.tolist() == [[0.0, 0.75, 0.0, 0.25], [0.0, 0.0, 0.75, 0.25]]
    with pytest.raises(ValueError, match="load_balance_loss needs the router's probabilities"):
        load_balance_loss(pairs)
    logits = hidden_states(T, E, device=device)
    routed = product_routing(softmax_topk(logits, K), softmax_topk(logits.flip(1), K))
    assert_near(routed.probabilities.sum(1), torch.ones(T, device=device))
    assert bool(load_balance_loss(routed).isfinite())
    with pytest.raises(ValueError, match="first and second must be of the same tokens, got 2 and 13 of them"):
        product_routing(first, routed)
    with pytest.raises(TypeError, match="second must be a Routing, got list"):
        product_routing(first, [])


def test_routers_and_experts_of_ones_own(device):
    """Routers that go by tokens, expert layers of another kind, one for each half."""
    factory = {"device": device, "dtype": torch.float64}
    table = torch.arange(20) % E
    layer = CartesianMoE(
        H,
        None,
        router=[HashRouter(table, E).to(device), SigmoidRouter(H, E, K, **factory)],
        experts=[Experts(E, H, I, **factory), LatentExperts(E, H, I, 4, **factory)],
        **factory,
    )
    x, ids = hidden_states(T, H, device=device, dtype=torch.float64), token_ids(T, device)
    y, (first, second) = layer(x, token_ids=ids, return_routing=True)
    assert y.shape == x.shape and (first.top_k, second.top_k) == (1, K)
    assert torch.equal(first.expert_ids[:, 0], (ids % E).to(first.expert_ids.dtype))


def test_one_choice_keeps_the_routers_trained(device):
    """With K = 1 weights are not renormalised, or no gradient would reach the routers."""
    layer = CartesianMoE(H, I, E, 1, device=device)
    layer(hidden_states(T, H, device=device)).square().sum().backward()
    assert all(bool(half.moe.router.weight.grad.any()) for half in layer.halves)


def test_state_bits_and_few_tokens(device):
    """State goes round, the same bits come twice, and no token gives none."""
    first = make(device, torch.float32, shared_intermediate_size=S)
    second = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    second.load_state_dict(first.state_dict())
    x = hidden_states(T, H, device=device)
    assert torch.equal(first(x), second(x)) and torch.equal(first(x), first(x))
    assert first(x[:0]).shape == (0, H)


def test_compiles(device):
    layer = make(device, torch.float32, shared_intermediate_size=S)
    x = hidden_states(T, H, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    wanted = [p for p in layer.parameters() if p.requires_grad]
    found, expected = (
        [y, *torch.autograd.grad(y.square().sum(), wanted)] for y in (function(x) for function in (compiled, layer))
    )
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"router": [nn.Linear(H, E)]}, ValueError, "router must be a pair, got 1 of them"),
        ({"router": SigmoidRouter(H, E, K)}, TypeError, "router must be a pair of modules, .* got one SigmoidRouter"),
        ({"experts": 3}, TypeError, "experts must be a str, a pair of modules or None, got int"),
        ({"experts": [Experts(E, H, I)] * 2}, ValueError, "experts must be two modules, got one twice"),
        ({"n_group": 3}, ValueError, "n_group must divide num_experts"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        CartesianMoE(H, I, E, K, **options)
