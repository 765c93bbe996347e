"""Every router before every expert layer: the weighted sum of experts, and gradients that reach both."""

import pytest
import torch
from contracts import assert_near, sum_of_slots

from gossamer.nn import BasisExperts, Experts, LatentExperts, LoRAExperts, MoE
from gossamer.nn.moe.routers import ROUTERS

T, H, I, E = 14, 16, 16, 6
LAYERS = {
    "grouped": lambda: Experts(E, H, I, bias=True),
    "block-sparse": lambda: Experts(E, H, I, form="block_sparse"),
    "low-rank": lambda: LoRAExperts(E, H, I, 2),
    "latent": lambda: LatentExperts(E, H, I, 8, group_size=2),
    "bases": lambda: BasisExperts(E, H, I, 3),
}
OPTIONS = {
    "hash": {"vocabulary": 20},
    "token_rounding": {"tile": 4},
    "learned_permutation": {"temperatures": (1.0, 0.1)},
    "cluster": {"num_clusters": 2},
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("router", ROUTERS)
def test_pair(device, router, layer):
    torch.manual_seed(0)
    moe = MoE(H, None, E, 2, router=router, experts=LAYERS[layer](), **OPTIONS.get(router, {})).to(device).double()
    x = torch.randn(2, T // 2, H, dtype=torch.float64, device=device).requires_grad_()
    token_ids = None if router == "domain" else torch.arange(T, device=device).view(2, -1) % 7
    y, routing = moe(x, token_ids=token_ids, return_routing=True)
    flat = x.view(T, H)
    expected = sum_of_slots(moe.experts, flat, routing.expert_ids, routing.weights.double())
    if routing.residual is not None:
        expected = expected + routing.residual.unsqueeze(1) * flat
    assert_near(y.view(T, H), expected)
    trained = [p for p in moe.parameters() if p.requires_grad]
    factors = torch.randn(T, H, dtype=torch.float64, device=device)
    found, plain = (
        torch.autograd.grad((out.view(T, H) * factors).sum(), [x, *trained], allow_unused=True, retain_graph=True)
        for out in (y, expected)
    )
    for mine, theirs in zip(found, plain, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert_near(mine, theirs, slack=1e5)
    if moe.router.training and any(p.requires_grad for p in moe.router.parameters()):
        reached = torch.autograd.grad(y.square().sum(), list(moe.router.parameters()), allow_unused=True)
        assert any(g is not None and bool(g.any()) for g in reached)
