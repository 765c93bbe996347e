"""MoEC: the sheet's loss, cosine routing in a loop, survivors, capacity."""

import math

import pytest
import torch
from contracts import RouterContract, assert_near

from gossamer.nn import ClusterRouter, MoE, Routing, cluster_variance_loss, softmax_topk, step_routers


def routing_of(sums, fractions, device):
    """A routing of eight tokens whose probabilities have these column sums and whose first choices these shares."""
    p = torch.tensor(sums, dtype=torch.float64, device=device).expand(8, 4) / 8
    ids = torch.arange(4, device=device).repeat_interleave((8 * torch.tensor(fractions, device=device)).long())
    return Routing(ids[:, None], torch.ones(8, 1, dtype=torch.float64, device=device), 4, probabilities=p)


def test_worked_values(device):
    routing = routing_of([4.0, 2, 1, 1], [0.5, 0.25, 0.125, 0.125], device)
    balance = 4 * (2.75 + 8e-6)
    options = {"mean": False}
    assert float(cluster_variance_loss(routing, 2, **options)) == pytest.approx(balance + 4 * 1.0)
    assert float(cluster_variance_loss(routing, 2, **options)) == pytest.approx(15, abs=1e-4)
    assert float(cluster_variance_loss(routing, 2, form="all", **options)) == pytest.approx(balance + 4 * 2.0)
    assert float(cluster_variance_loss(routing, 2, variance_weight=0.5, **options)) == pytest.approx(balance + 2.0)
    gap = math.exp((4 + 2) / 16 - (1 + 1) / 16)
    assert float(cluster_variance_loss(routing, 2, form="gap", **options)) == pytest.approx(balance + 4 / gap)
    # As means, over one token or many alike.
    assert float(cluster_variance_loss(routing, 2)) == pytest.approx(balance / 8 + 4 / 64)
    # Clusters of one have no variance; of survivors alone, two in each of two clusters are one in each.
    assert float(cluster_variance_loss(routing, 4, **options)) == pytest.approx(balance)
    first = torch.tensor([0], device=device)
    expected = 2 * (4 * 0.5 + 1 * 0.125 + 5e-6)
    assert float(cluster_variance_loss(routing, 2, survivors=first, **options)) == pytest.approx(expected)


def test_loss_flattens_clusters(device):
    """Its gradient pulls the probabilities of a cluster together, padding aside."""
    generator = torch.Generator().manual_seed(17)
    logits = torch.randn(40, 6, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    mask = torch.arange(40, device=device) % 3 > 0
    loss = cluster_variance_loss(softmax_topk(logits, 1), 2, variance_weight=3.0, mask=mask)
    p = logits.softmax(1)[mask]
    c = torch.stack([(p.argmax(1) == e).double().mean() for e in range(6)]) + 1e-6
    m = p.mean(0)
    expected = 6 * ((m * c).sum() + 3 * (m[:3].var() + m[3:].var()) / 2)
    assert_near(loss.detach(), expected.detach())
    assert_near(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)), slack=4096)


def test_against_a_loop(device):
    """Cosines, gates and the mix with the token itself."""
    torch.manual_seed(9)
    router = ClusterRouter(16, 6, 2, projection_size=4, device=device)
    moe = MoE(16, 8, router=router, device=device).eval()
    x = torch.randn(7, 16, device=device)
    y, routing = moe(x, return_routing=True)
    for t in range(7):
        h = router.weight @ x[t]
        cosines = torch.stack([h @ c / (h.norm() * c.norm()) for c in router.centroids])
        best = int(cosines.argmax())
        gate = torch.sigmoid(cosines[best] / 0.07)
        assert routing.expert_ids[t].tolist() == [best]
        assert_near(routing.weights[t, 0], gate)
        assert_near(routing.probabilities[t], (cosines / 0.07).softmax(0))
        expert = moe.experts(x[t : t + 1], torch.tensor([[best]], device=device), torch.ones(1, 1, device=device))
        assert_near(y[t], gate * expert[0] + (1 - gate) * x[t])
    gradients = torch.autograd.grad(y.square().sum(), [router.weight, router.centroids, router.temperature])
    assert all(bool(g.any()) for g in gradients)


def test_experts_drop_out(device):
    """Half of every cluster in training, the same places everywhere, anew each period; all of them in evaluation."""
    router = ClusterRouter(16, 24, 3, resample_every=2, device=device)
    x = torch.randn(500, 16, device=device)
    drawn = []
    for _ in range(8):
        survivors = router.survivors.tolist()
        drawn.append(tuple(survivors))
        assert len(survivors) == 4 and sorted(set(survivors)) == survivors
        alive = {8 * g + s for g in range(3) for s in survivors}
        routing = router(x)
        used = set(routing.expert_ids.flatten().tolist())
        assert used <= alive and len(used) > 6
        assert not routing.probabilities.sum(0)[[e for e in range(24) if e not in alive]].any()
        step_routers(router)
    assert all(drawn[i] == drawn[i + 1] for i in (0, 2, 4, 6)) and len(set(drawn)) > 2
    again = ClusterRouter(16, 24, 3, resample_every=2, device=device)
    for _ in range(6):
        again.step()
    assert tuple(again.survivors.tolist()) == drawn[6]
    resumed = ClusterRouter(16, 24, 3, resample_every=2, device=device)
    resumed.load_state_dict(router.state_dict())
    assert resumed.num_steps == 8 and torch.equal(resumed.survivors, router.survivors)
    assert len(set(router.eval()(x).expert_ids.flatten().tolist())) > 12


def test_tokens_past_capacity_pass(device):
    router = ClusterRouter(16, 4, 2, dropout=0.0, capacity_factor=0.5, device=device)
    moe = MoE(16, 8, router=router, device=device)
    x = torch.randn(40, 16, device=device)
    y, routing = moe(x, return_routing=True)
    assert max(routing.counts.tolist()) == 5
    passed = (routing.expert_ids == 4)[:, 0]
    assert int(passed.sum()) >= 20 and torch.equal(y[passed], x[passed])
    assert not routing.weights[passed].any() and bool((routing.residual[~passed] < 1).all())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ClusterRouter(16, 8, 3), ValueError, "num_clusters must divide num_experts, got num_clusters=3"),
        (lambda: ClusterRouter(16, 8, 0), ValueError, "num_clusters must be at least 1, got 0"),
        (lambda: ClusterRouter(16, 8, 2, dropout=1.0), ValueError, r"dropout must be at least 0 and below 1, got 1\.0"),
        (lambda: ClusterRouter(16, 8, 2, temperature=0.0), ValueError, "temperature must be positive and finite"),
        (lambda: ClusterRouter(16, 8, 2, resample_every=0), ValueError, "resample_every must be at least 1, got 0"),
        (
            lambda: cluster_variance_loss(softmax_topk(torch.zeros(2, 4), 1), 3),
            ValueError,
            "num_clusters must divide num_experts, got num_clusters=3, num_experts=4",
        ),
        (
            lambda: cluster_variance_loss(softmax_topk(torch.zeros(2, 4), 1), 2, form="between"),
            ValueError,
            "form must be one of",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def clusters(**options):
    return lambda num_experts, hidden_size, **factory: ClusterRouter(
        hidden_size, num_experts, 1, projection_size=8, **options, **factory
    )


TestClusters = RouterContract.over(dropout=clusters(), all=clusters(dropout=0.0, capacity_factor=0.8, bias=True))


def test_weights_elsewhere_are_refused():
    with pytest.raises(ValueError, match="weights must be on the device of expert_ids, cpu, got meta"):
        Routing(torch.tensor([[0], [1]]), torch.ones(2, 1, device="meta"), 2, torch.randn(2, 2))
