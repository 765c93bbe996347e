"""Experts by domain, and the learned fallback."""

import pytest
import torch
from contracts import RouterContract, assert_near

from gossamer.nn import DomainRouter, MoE, SoftmaxRouter, TopPRouter, router_losses


def test_domains_and_fallback(device):
    """Tokens with an id go by the table, those without by the router, in one batch."""
    table = torch.tensor([[0, 3], [1, 2], [4, 0]])
    router = DomainRouter(table, SoftmaxRouter(16, 5, 1, device=device)).to(device)
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(9)).to(device)
    ids = torch.tensor([[2, -1, 0], [-7, 1, 1]], device=device)
    routing = router(x, token_ids=ids)
    own = router.router(x)
    for t, domain in enumerate(ids.flatten().tolist()):
        experts = routing.expert_ids[t].tolist()
        if domain >= 0:
            assert experts == table[domain].tolist() and routing.weights[t].tolist() == [0.5, 0.5]
            share = [0.5 if e in experts else 0.0 for e in range(5)]
            assert routing.probabilities[t].tolist() == share
        else:
            assert experts == [int(own.expert_ids[t, 0]), 5]
            assert routing.weights[t].tolist() == [float(own.weights[t, 0].detach()), 0.0]
            assert torch.equal(routing.probabilities[t], own.probabilities[t])
    p = own.probabilities
    terms = [
        -(p[t, table[d]].sum()).log() if d >= 0 else torch.zeros((), device=device)
        for t, d in enumerate(ids.flatten().tolist())
    ]
    assert_near(router_losses(routing)["domain"], torch.stack(terms).mean())
    assert torch.equal(router(x).expert_ids, own.expert_ids)
    assert not router.eval()(x, token_ids=ids).losses


def test_the_fallback_learns_the_domains(device):
    """By the term alone: the experts that it picks without ids are in the end those of the domains."""
    torch.manual_seed(2)
    centres = 2 * torch.randn(4, 16, device=device)
    moe = MoE(16, 8, 4, 1, router="domain", device=device)
    assert moe.router.table.tolist() == [[0], [1], [2], [3]]
    optimizer = torch.optim.Adam(moe.router.parameters(), lr=0.05)
    for _ in range(60):
        domains = torch.randint(4, (64,), device=device)
        x = centres[domains] + torch.randn(64, 16, device=device)
        _, routing = moe(x, token_ids=domains, return_routing=True)
        assert torch.equal(routing.expert_ids[:, 0], domains)
        optimizer.zero_grad()
        router_losses(routing)["domain"].backward()
        optimizer.step()
    domains = torch.randint(4, (200,), device=device)
    _, routing = moe(centres[domains] + torch.randn(200, 16, device=device), return_routing=True)
    assert float((routing.expert_ids[:, 0] == domains).double().mean()) > 0.95


def fallback():
    return SoftmaxRouter(16, 4, 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: DomainRouter(torch.tensor([0, 4]), fallback()),
            ValueError,
            "table must hold ids from 0 to num_experts",
        ),
        (
            lambda: DomainRouter(torch.zeros(0).long(), fallback()),
            ValueError,
            "table must have at least one domain, got 0",
        ),
        (lambda: DomainRouter(torch.zeros(3), fallback()), TypeError, "table must be int32 or int64"),
        (lambda: DomainRouter(torch.zeros(3).long(), None), TypeError, r"router must be a gossamer\.nn\.Router"),
        (
            lambda: DomainRouter(torch.zeros(3).long(), fallback())(torch.zeros(2, 16), token_ids=torch.tensor([0, 3])),
            IndexError,
            "token_ids must be from 0 to D - 1 = 2, got 0 to 3",
        ),
        (
            lambda: DomainRouter(torch.zeros(3).long(), fallback())(torch.zeros(2, 16), token_ids=torch.tensor([0])),
            ValueError,
            "token_ids must be one for each of T = 2 tokens, got 1",
        ),
        (
            lambda: DomainRouter(torch.zeros(3).long(), fallback())(torch.zeros(2, 16), token_ids=torch.zeros(2)),
            TypeError,
            "token_ids must be int32 or int64",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def domains(num_experts, hidden_size, device, dtype):
    table = (torch.arange(20) % num_experts).to(device)
    return DomainRouter(table, TopPRouter(hidden_size, num_experts, 0.5, device=device, dtype=dtype))


class WithSomeIds(DomainRouter):
    """Half of the ids that the suite gives are taken away."""

    def forward(self, x, *, token_ids=None):
        return super().forward(x, token_ids=torch.where(token_ids % 2 == 0, token_ids, -1))


def some(num_experts, hidden_size, device, dtype):
    table = (torch.arange(40).view(20, 2) % num_experts).to(device)[:, : min(2, num_experts)]
    return WithSomeIds(table, SoftmaxRouter(hidden_size, num_experts, 1, device=device, dtype=dtype))


TestDomains = RouterContract.over(some=some)


class TestAllGiven(RouterContract.over(all=domains)):
    def test_gradients(self, make, device):
        """Nothing that depends on the hidden states is left where all ids are given, but for the losses."""
        router = make(num_experts=5, hidden_size=32, device=device, dtype=torch.float64)
        x = torch.randn(7, 32, dtype=torch.float64, device=device)
        routing = router(x, token_ids=torch.arange(7, device=device))
        (gradient,) = torch.autograd.grad(routing.probabilities.square().sum(), router.router.weight, retain_graph=True)
        assert not gradient.any()
        assert torch.autograd.grad(routing.losses["domain"].sum(), router.router.weight)[0].any()
