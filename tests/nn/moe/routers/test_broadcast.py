"""GW-MoE: the sheet's entropies, sequences, and evaluation that changes nothing."""

import pytest
import torch
from contracts import RouterContract, assert_near

from gossamer.nn import BroadcastUncertain, MoE, SoftmaxRouter, broadcast_uncertain, softmax_topk


def test_worked_values(device):
    rows = torch.tensor([[0.4] + [0.6 / 7] * 7, [0.65] + [0.05] * 7, [0.125] * 8], dtype=torch.float64, device=device)
    for bound, broadcast in {
        1.3283: [True, True, True],
        1.6: [True, False, True],
        1.8404: [True, False, True],
        1.8406: [False, False, True],
        2.0793: [False, False, True],
        2.08: [False, False, False],
    }.items():
        routing = broadcast_uncertain(softmax_topk(rows.log(), 1), bound)
        assert ((routing.expert_ids < 8).sum(1) == 8).tolist() == broadcast
        assert ((routing.expert_ids < 8).sum(1) == 1).tolist() == [not b for b in broadcast]
        for t, whole in enumerate(broadcast):
            assert_near(routing.weights[t].sum(), rows[t].sum() if whole else rows[t].max())


def test_output(device):
    """Uncertain tokens get Σ_e p_e·E_e(x), the others their own expert."""
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(8)).to(device)
    router = BroadcastUncertain(SoftmaxRouter(16, 5, 1, device=device), 1.55)
    moe = MoE(16, 8, router=router, device=device)
    y = moe(x)
    base = router.router(x)
    p = base.probabilities
    entropy = -(p * (p + 1e-5).log()).sum(1)
    uncertain = entropy >= 1.55
    assert 0 < int(uncertain.sum()) < 9
    everywhere = moe.experts(x, torch.arange(5, device=device).expand(9, 5).contiguous(), p)
    assert_near(y, torch.where(uncertain[:, None], everywhere, moe.experts(x, base)))
    moe.eval()
    assert torch.equal(moe(x), moe.experts(x, base))


def test_slots_count_by_sequence(device):
    """Of each sequence of the hidden states the first uncertain tokens alone are broadcast."""
    router = BroadcastUncertain(SoftmaxRouter(16, 4, 1, device=device), 0.0, slots=2)
    x = torch.randn(3, 5, 16, device=device)
    routing = router(x)
    assert ((routing.expert_ids < 4).sum(1) == 4).view(3, 5).tolist() == [[True, True, False, False, False]] * 3
    assert routing.max_rows == 15 + 3 * 2 * 4
    assert int(((router(x.view(15, 16)).expert_ids < 4).sum(1) == 4).sum()) == 2
    moe = MoE(16, 8, router=router, device=device)
    assert int(moe(x, return_routing=True)[1].counts.sum()) == 6 * 4 + 9


def test_masked_experts_stay_out(device):
    logits = torch.tensor([[0.0, -torch.inf, 0.0]], device=device)
    routing = broadcast_uncertain(softmax_topk(logits, 1), 0.5)
    assert routing.expert_ids.tolist() == [[0, 3, 2]] and routing.weights.tolist() == [[0.5, 0, 0.5]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BroadcastUncertain(SoftmaxRouter(16, 4, 1), -1), ValueError, "entropy must be at least 0, got -1"),
        (lambda: BroadcastUncertain(SoftmaxRouter(16, 4, 1), "1"), TypeError, "entropy must be a number, got str"),
        (
            lambda: BroadcastUncertain(SoftmaxRouter(16, 4, 1), 1, slots=0),
            ValueError,
            "slots must be at least 1, got 0",
        ),
        (
            lambda: broadcast_uncertain(softmax_topk(torch.zeros(5, 4), 1), 1, slots=1, sequence_length=2),
            ValueError,
            "sequence_length must divide T = 5, got 2",
        ),
        (lambda: broadcast_uncertain(None, 1), TypeError, "routing must be a Routing, got NoneType"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def around(entropy):
    return lambda num_experts, hidden_size, **factory: BroadcastUncertain(
        SoftmaxRouter(hidden_size, num_experts, min(2, num_experts), **factory), entropy
    )


TestBroadcast = RouterContract.over(some=around(1.5), all=around(0.0))
