"""Token rounding: the sheet's counts, and a loop that ranks the tokens of each expert."""

import pytest
import torch
from contracts import RouterContract, assert_near

from gossamer.nn import (
    MoE,
    Routing,
    SigmoidRouter,
    SoftmaxRouter,
    TokenRounding,
    given_experts,
    round_tokens,
    softmax_topk,
)
from gossamer.nn.moe.routers.token_rounding import round_counts

COUNTS = [5, 6, 1, 2, 10]


def test_worked_counts(device):
    counts = torch.tensor(COUNTS, device=device)
    assert round_counts(counts, 4, "nearest").tolist() == [4, 8, 0, 0, 8]
    assert round_counts(counts, 4, "up").tolist() == [8, 8, 4, 4, 12]
    assert round_counts(counts, 4, "down").tolist() == [4, 4, 0, 0, 8]


@pytest.mark.parametrize("mode", ["nearest", "up", "down"])
@pytest.mark.parametrize("tile", [1, 4, 64])
def test_against_a_loop(device, mode, tile):
    """Each expert's tokens by score: its own by weight, then the others by probability; as many as it gets."""
    tokens, experts = 33, 5
    logits = 2 * torch.randn(tokens, experts, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    routing = softmax_topk(logits.to(device), 2, renormalize=True)
    rounded = round_tokens(routing, tile, mode=mode)
    p = logits.softmax(1)
    chosen = routing.expert_ids.tolist()
    kept = 0
    for e in range(experts):
        own = [t for t in range(tokens) if e in chosen[t]]
        weight = {t: float(routing.weights[t, chosen[t].index(e)]) for t in own}
        others = [t for t in range(tokens) if t not in weight]
        ranked = sorted(own, key=lambda t: -weight[t]) + sorted(others, key=lambda t: -float(p[t, e]))
        room = int(round_counts(torch.tensor(len(own)), tile, mode))
        found = (rounded.expert_ids[:, e] == e).nonzero().flatten().tolist()
        assert found == sorted(ranked[:room])
        for t in found:
            assert float(rounded.weights[t, e]) == pytest.approx(weight.get(t, float(p[t, e])), rel=1e-12)
        kept += len(found)
    assert kept <= rounded.max_rows and int((rounded.weights != 0).sum()) == kept
    if tile == 1:
        assert rounded.counts.tolist() == routing.counts.tolist()


def test_multiples_stay_as_they_are(device):
    """Where every count is a multiple of the tile, the layer's output is that of the router alone."""
    ids = torch.tensor([[0, 1], [1, 0], [0, 2], [2, 0]], device=device)
    logits = torch.full((4, 3), -1.0, device=device).scatter(1, ids, torch.tensor([[1.0, 0.5]] * 4, device=device))
    routing = softmax_topk(logits, 2, renormalize=True)
    rounded = round_tokens(routing, 2)
    assert routing.counts.tolist() == rounded.counts.tolist() == [4, 2, 2]
    moe = MoE(8, 16, 3, 2, device=device)
    x = torch.randn(4, 8, device=device)
    assert_near(moe(x, routing=routing), MoE.forward(_any_slots(moe), x, routing=rounded))


def _any_slots(moe):
    moe.top_k = None
    return moe


def test_evaluation_is_the_routers_own(device):
    router = TokenRounding(SoftmaxRouter(16, 6, 2, renormalize=True, device=device), 8)
    x = torch.randn(40, 16, device=device)
    assert bool((router(x).counts % 8 == 0).all())
    router.eval()
    assert torch.equal(router(x).expert_ids, router.router(x).expert_ids)
    moe = MoE(16, 8, 6, 2, router="token_rounding", tile=16, router_options={"renormalize": True}, device=device)
    assert bool((moe(x, return_routing=True)[1].counts % 16 == 0).all()) and moe.router.router.top_k == 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TokenRounding(SoftmaxRouter(16, 4, 2), 0), ValueError, "tile must be at least 1, got 0"),
        (lambda: TokenRounding(SoftmaxRouter(16, 4, 2), mode="odd"), ValueError, "mode must be one of"),
        (lambda: TokenRounding(None), TypeError, r"router must be a gossamer\.nn\.Router, got NoneType"),
        (lambda: round_tokens(given_experts(torch.zeros(2, 1).long(), 3)), ValueError, "routing must have logits"),
        (lambda: round_tokens(torch.zeros(2, 1)), TypeError, "routing must be a Routing, got Tensor"),
        (
            lambda: round_tokens(Routing(torch.tensor([[-1]]), torch.ones(1, 1), 3, torch.zeros(1, 3))),
            ValueError,
            r"routing\.expert_ids must not be negative, got -1",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def around(kind, tile, **options):
    return lambda num_experts, hidden_size, device, dtype: TokenRounding(
        kind(hidden_size, num_experts, min(2, num_experts), device=device, dtype=dtype), tile, **options
    )


TestRounding = RouterContract.over(
    softmax=around(SoftmaxRouter, 4),
    sigmoid=around(SigmoidRouter, 3, mode="up"),
    down=around(SoftmaxRouter, 5, mode="down"),
)
