"""Balance losses and the bias update: hand-worked values, float64 loops, transformers' loss, and a simulation."""

import math

import pytest
import torch
from contracts import assert_near

from gossamer.nn import (
    Routing,
    SigmoidRouter,
    expert_counts,
    given_experts,
    gshard_balance_loss,
    importance_loss,
    load_balance_loss,
    load_loss,
    router_z_loss,
    sequence_balance_loss,
    sigmoid_topk,
    slot_balance_loss,
    softmax_top_p,
    softmax_topk,
    switch_balance_loss,
    topk_softmax,
    update_expert_bias,
)
from gossamer.testing import assert_close

EXAMPLE = [[2.0, 1.0, 0.0, -1.0], [0.0, 2.0, 1.0, -1.0], [1.0, 0.0, 2.0, -1.0], [2.0, 0.0, -1.0, 1.0]]
INF = float("inf")


def random_logits(rows, experts, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, experts, generator=generator) * 2).to(device)


def plain_scores(logits, kind):
    if kind == "softmax":
        return torch.softmax(logits, -1)
    scores = torch.sigmoid(logits)
    return scores / scores.sum(-1, keepdim=True)


def plain_load_balance(logits, ids, kept, kind):
    """The formula over the rows that ``kept`` names, with counts taken slot by slot."""
    slots = ids[kept].flatten().tolist()
    fractions = [slots.count(e) / int(kept.sum()) for e in range(logits.shape[1])]
    fractions = torch.tensor(fractions, dtype=logits.dtype, device=logits.device)
    return logits.shape[1] * (fractions * plain_scores(logits, kind)[kept].mean(0)).sum()


def plain_sequence_balance(logits, ids, kept, batch, kind):
    top_k, experts = ids.shape[1], logits.shape[1]
    losses = []
    for l, i, m in zip(logits.chunk(batch), ids.chunk(batch), kept.chunk(batch), strict=True):
        if m.any():
            slots = i[m].flatten().tolist()
            fractions = [experts / (top_k * int(m.sum())) * slots.count(e) for e in range(experts)]
            losses.append(
                (torch.tensor(fractions, dtype=l.dtype, device=l.device) * plain_scores(l, kind)[m].mean(0)).sum()
            )
    return sum(losses) / len(losses)


def three(batches, function):
    """``function`` of each batch of logits, and its gradients: by us, in float64, and in float32 by plain torch.

    Over many batches, because the error of one scalar is a matter of luck.
    """
    results = []
    for dtype, ours in ((torch.float32, True), (torch.float64, False), (torch.float32, False)):
        leaves = [b.to(dtype, copy=True).requires_grad_() for b in batches]
        values = torch.stack([function(leaf, ours) for leaf in leaves])
        values.sum().backward()
        results.append((values, torch.stack([leaf.grad for leaf in leaves])))
    return zip(*results, strict=True)


def test_running_example(device):
    logits = torch.tensor(EXAMPLE, device=device, dtype=torch.float64)
    both = softmax_topk(logits, 2)
    assert round(float(load_balance_loss(softmax_topk(logits, 1))), 6) == 1.319699
    assert round(float(load_balance_loss(both)), 6) == 2.319699
    assert round(float(load_balance_loss(both)) / 2, 6) == 1.159850
    assert round(float(router_z_loss(both)), 6) == 5.954526
    assert round(float(sequence_balance_loss(both, 1)), 6) == 1.159850
    assert round(float(slot_balance_loss(both)), 6) == 1.159850
    assert round(float(switch_balance_loss(both)), 6) == 1.319699
    assert round(float(gshard_balance_loss(both)), 6) == round(1.319699 / 16, 6)
    assert expert_counts(both).tolist() == [3, 2, 2, 1]
    importance = both.probabilities.sum(0)
    assert_near(importance_loss(both), importance.var(correction=0) / importance.mean() ** 2)


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_values_at_equal_logits(device, top_k):
    """Equal probabilities give K, (ln E)² and 1 whatever the counts."""
    logits = torch.full((6, 8), -0.5, dtype=torch.float64, device=device)
    for routing in (softmax_topk(logits, top_k), topk_softmax(logits, top_k), sigmoid_topk(logits, top_k)):
        assert float(load_balance_loss(routing)) == pytest.approx(top_k, rel=1e-12)
        assert float(sequence_balance_loss(routing, 2)) == pytest.approx(1.0, rel=1e-12)
        assert float(slot_balance_loss(routing)) == pytest.approx(1.0, rel=1e-12)
        assert float(switch_balance_loss(routing)) == pytest.approx(1.0, rel=1e-12)
        assert float(gshard_balance_loss(routing)) == pytest.approx(1 / 64, rel=1e-12)
        assert float(importance_loss(routing)) == pytest.approx(0.0, abs=1e-24)
    assert float(router_z_loss(softmax_topk(logits + 0.5, top_k))) == pytest.approx(math.log(8) ** 2, rel=1e-12)


def masks(tokens, device):
    """No mask; padding at the ends of two sequences; one sequence wholly padding."""
    half = tokens // 2
    ends = torch.ones(tokens, dtype=torch.bool, device=device)
    ends[half - 3 : half] = ends[-5:] = False
    one = torch.arange(tokens, device=device) >= half
    return {"none": None, "ends": ends, "one": one}


@pytest.mark.parametrize("mask", ["none", "ends", "one"])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_load_balance_and_sequence_balance(device, kind, mask):
    batches = [random_logits(26, 7, device, seed) for seed in range(12)]
    mask = masks(26, device)[mask]
    kept = torch.ones(26, dtype=torch.bool, device=device) if mask is None else mask
    route = softmax_topk if kind == "softmax" else sigmoid_topk

    def balance(leaf, ours):
        if ours:
            return load_balance_loss(route(leaf, 3), mask=mask)
        return plain_load_balance(leaf, leaf.topk(3).indices, kept, kind)

    def sequence(leaf, ours):
        if ours:
            # Any shape of T values serves as a mask, and integers do as well as booleans.
            shaped = None if mask is None else mask.long().view(2, 13)
            return sequence_balance_loss(route(leaf, 3), 2, mask=shaped)
        return plain_sequence_balance(leaf, leaf.topk(3).indices, kept, 2, kind)

    for function in (balance, sequence):
        values, gradients = three(batches, function)
        assert_close(*values, f"{function.__name__} loss")
        assert_close(*gradients, f"d{function.__name__}/dlogits")
        assert not gradients[0][:, ~kept].any()


@pytest.mark.parametrize("mask", ["none", "ends"])
def test_z_loss(device, mask):
    batches = [random_logits(26, 7, device, seed) for seed in range(12)]
    for logits in batches:
        logits[:, 3] = -INF
    mask = masks(26, device)[mask]
    kept = torch.ones(26, dtype=torch.bool, device=device) if mask is None else mask

    def z(leaf, ours):
        if ours:
            return router_z_loss(softmax_topk(leaf, 2), mask=mask)
        return leaf[kept].logsumexp(1).square().mean()

    values, gradients = three(batches, z)
    assert_close(*values, "z-loss")
    assert_close(*gradients, "dlogits")


FAMILY = {
    "load": (load_balance_loss, False, lambda c, p, rows: len(p) * (c / rows * p / rows).sum()),
    "slot": (slot_balance_loss, False, lambda c, p, rows: len(p) * (c / c.sum() * p / rows).sum()),
    "switch": (switch_balance_loss, True, lambda c, p, rows: len(p) * (c / rows * p / rows).sum()),
    "gshard": (gshard_balance_loss, True, lambda c, p, rows: (c / rows * p / rows).sum() / len(p)),
    "importance": (importance_loss, False, lambda c, p, rows: p.var(correction=0) / p.mean() ** 2),
}


@pytest.mark.parametrize("name", FAMILY)
def test_family(device, name):
    """Each member by its own formula, over slots that vary in number, with padding, and several layers as one batch."""
    function, first, formula = FAMILY[name]
    leaves = [random_logits(26, 7, device, seed).double().requires_grad_() for seed in range(2)]
    for mask in masks(26, device).values():
        kept = torch.ones(26, dtype=torch.bool, device=device) if mask is None else mask
        counts, sums = torch.zeros(7, dtype=torch.float64, device=device), 0
        for logits in leaves:
            probabilities = logits.softmax(1)
            ranked = probabilities.sort(descending=True)
            live = ranked.values.cumsum(1) - ranked.values <= 0.6
            live[:, 1:] &= not first
            for e in range(7):
                counts[e] += int(((ranked.indices == e) & live)[kept].sum())
            sums = sums + probabilities[kept].sum(0)
        expected = formula(counts, sums, 2 * int(kept.sum()))
        found = function([softmax_top_p(logits, 0.6) for logits in leaves], mask=mask)
        assert_near(found.detach(), expected.detach())
        for mine, plain in zip(*(torch.autograd.grad(loss, leaves) for loss in (found, expected)), strict=True):
            assert_near(mine, plain, slack=4096)


@pytest.mark.parametrize("top_k", [1, 3])
def test_load_loss(device, top_k):
    """Each expert's chance to be among the K highest were its own noise drawn again, expert by expert."""
    clean = random_logits(9, 5, device).double().requires_grad_()
    noise = random_logits(9, 5, device, 1).double() / 2
    std = torch.linspace(0.5, 1.5, 5, dtype=torch.float64, device=device)
    mask = torch.arange(9, device=device) < 7
    load = []
    for e in range(5):
        others = (clean + noise * std)[:, [i for i in range(5) if i != e]]
        bar = others.sort(descending=True).values[:, top_k - 1]
        load.append((0.5 * (1 + torch.erf((clean[:, e] - bar) / std[e] / math.sqrt(2))))[:7].sum())
    load = torch.stack(load)
    expected = load.var(correction=0) / load.mean() ** 2
    found = load_loss(clean, clean + noise * std, std, top_k, mask=mask)
    assert_near(found.detach(), expected.detach())
    assert_near(*(torch.autograd.grad(loss, clean)[0] for loss in (found, expected)), slack=4096)
    assert float(load_loss(clean[:0].detach(), clean[:0].detach(), 1.0, top_k)) == 0


def test_gradient_formulas(device):
    logits = random_logits(11, 5, device).double().requires_grad_()
    routing = softmax_topk(logits, 2)
    p, f = routing.probabilities.detach(), routing.counts.double() / 11
    (balance,) = torch.autograd.grad(load_balance_loss(routing), logits, retain_graph=True)
    (z,) = torch.autograd.grad(router_z_loss(routing), logits)
    lse = logits.detach().logsumexp(1, keepdim=True)
    torch.testing.assert_close(balance, 5 / 11 * p * (f - (p * f).sum(1, keepdim=True)), rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(z, 2 * lse * p / 11, rtol=1e-10, atol=1e-15)


def test_transformers_loss(device):
    """Over several layers, with and without an attention mask."""
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    models = [[random_logits(24, 6, device, 3 * seed + layer) for layer in range(3)] for seed in range(12)]
    mask = torch.ones(2, 12, dtype=torch.int64, device=device)
    mask[0, -4:] = mask[1, -7:] = 0
    for attention_mask in (None, mask):
        kept = torch.ones(72, dtype=torch.bool, device=device)
        if attention_mask is not None:
            kept = attention_mask.flatten().bool().repeat(3)
        rows = [torch.cat(layers) for layers in models]
        truth = [plain_load_balance(l.double(), l.topk(2).indices, kept, "softmax") for l in rows]
        theirs = [mixtral.load_balancing_loss_func(tuple(layers), 6, 2, attention_mask) for layers in models]
        ours = [load_balance_loss([topk_softmax(l, 2) for l in layers], mask=attention_mask) for layers in models]
        assert_close(torch.stack(ours), torch.stack(truth), torch.stack(theirs), "loss")


def test_masked_experts_and_masked_tokens_give_finite_losses(device):
    logits = random_logits(6, 5, device)
    logits[:, 1] = -INF
    logits[2] = -INF
    for route in (softmax_topk, topk_softmax, sigmoid_topk):
        leaf = logits.clone().requires_grad_()
        routing = route(leaf, 2)
        loss = load_balance_loss(routing) + router_z_loss(routing) + sequence_balance_loss(routing, 3)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(leaf.grad).all()
        assert not leaf.grad[2].any() and not leaf.grad[:, 1].any()


def test_no_tokens(device):
    """Nothing to balance is a loss of 0 with zero gradient, not NaN."""
    for rows, mask in ((0, None), (6, torch.zeros(6, dtype=torch.bool, device=device))):
        leaf = random_logits(rows, 5, device).requires_grad_()
        routing = sigmoid_topk(leaf, 2)
        loss = load_balance_loss(routing, mask=mask) + router_z_loss(routing, mask=mask)
        loss = (
            loss
            + sequence_balance_loss(routing, 2, mask=mask)
            + sum(f(routing, mask=mask) for f, *_ in FAMILY.values())
        )
        loss.backward()
        assert float(loss.detach()) == 0 and not leaf.grad.any()


def test_dropped_slots_do_not_count(device):
    routing = softmax_topk(random_logits(8, 4, device).double(), 2)
    ids = routing.expert_ids.clone()
    ids[3, 1] = ids[5, 0] = 4
    dropped = Routing(ids, routing.weights, 4, routing.logits)
    f = torch.stack([(ids == e).sum() for e in range(4)]).double() / 8
    expected = float(4 * (f * routing.probabilities.mean(0)).sum())
    assert float(load_balance_loss(dropped)) == pytest.approx(expected, rel=1e-12)
    assert float(sequence_balance_loss(dropped, 1)) == pytest.approx(expected / 2, rel=1e-12)


def test_compiles_without_a_graph_break(device):
    def losses(leaf):
        routing = softmax_topk(leaf, 2)
        kept = leaf[:, 0] > 0
        return load_balance_loss(routing, mask=kept) + router_z_loss(routing) + sequence_balance_loss(routing, 2)

    results = []
    for function in (losses, torch.compile(losses, fullgraph=True, backend="aot_eager")):
        leaf = random_logits(10, 6, device).requires_grad_()
        value = function(leaf)
        value.backward()
        results.append((value.detach(), leaf.grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_sign_rule(device):
    """(3, 2, 2, 1) against a mean of 2 moves by (−u, 0, 0, +u), in place, exactly also past what float32 counts."""
    bias = torch.zeros(4, device=device)
    assert update_expert_bias(bias, torch.tensor([3, 2, 2, 1], device=device), 1e-3) is bias
    step = torch.tensor(1e-3).item()
    assert bias.tolist() == [-step, 0.0, 0.0, step]
    update_expert_bias(bias, torch.tensor([1, 1, 1, 1], dtype=torch.int32, device=device), 1e-3)
    assert bias.tolist() == [-step, 0.0, 0.0, step]

    large = 2**30
    counts = torch.tensor([large + 1, large, large, large - 1], dtype=torch.int32, device=device)
    bias = update_expert_bias(torch.zeros(4, device=device, dtype=torch.float64), counts, 0.5)
    assert bias.tolist() == [-0.5, 0.0, 0.0, 0.5]


def test_update_between_forward_and_backward(device):
    router = SigmoidRouter(16, 8, 2, device=device)
    x = random_logits(32, 16, device)
    gradients = []
    for update in (False, True):
        router.weight.grad = None
        routing = router(x)
        if update:
            update_expert_bias(router.e_score_correction_bias, routing.counts, 0.1)
        routing.weights[:, 0].sum().backward()
        gradients.append(router.weight.grad)
    assert torch.equal(*gradients)
    assert router.e_score_correction_bias.any()


def test_bias_equalises_load(device):
    """Experts of very different popularity: the heaviest load falls from over twice the mean to within 15% of it."""
    generator = torch.Generator().manual_seed(1)
    popularity = torch.linspace(-1.0, 1.0, 8).to(device)
    bias = torch.zeros(8, device=device)

    def violation(counts):
        return float(counts.max() / counts.double().mean()) - 1

    history = []
    for _ in range(300):
        logits = torch.randn(512, 8, generator=generator).to(device) + popularity
        counts = sigmoid_topk(logits, 2, correction_bias=bias).counts
        history.append(counts)
        update_expert_bias(bias, counts, 5e-3)
    assert violation(history[0]) > 1.0
    assert violation(torch.stack(history[-50:]).sum(0)) < 0.15
    assert (bias.diff() < 0).all(), "the more popular, the lower the bias"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda r: load_balance_loss([]), ValueError, "routing must hold at least one Routing"),
        (lambda r: load_balance_loss([r.logits]), TypeError, "routing must be a Routing or a sequence"),
        (lambda r: router_z_loss(given_experts(r.expert_ids, 4)), ValueError, "router_z_loss needs the router's"),
        (lambda r: load_balance_loss([r, softmax_topk(torch.zeros(2, 5), 1)]), ValueError, "got 4 and 5"),
        (
            lambda r: load_balance_loss(r, mask=torch.ones(5)),
            ValueError,
            r"mask must have one value for each of T = 6 tokens, got shape \(5,\)",
        ),
        (lambda r: sequence_balance_loss(r, 4), ValueError, "batch_size must be at least 1 and divide T = 6, got 4"),
        (lambda r: sequence_balance_loss(r, 0), ValueError, "batch_size must be .* got 0"),
        (lambda r: sequence_balance_loss(r, 2.0), TypeError, "batch_size must be an int, got float"),
        (lambda r: sequence_balance_loss([r], 2), TypeError, "routing must be a Routing, got list"),
        (lambda r: update_expert_bias(torch.zeros(3), r.counts, 1e-3), ValueError, r"counts must have shape .* \(4,\)"),
        (
            lambda r: update_expert_bias(torch.zeros(4, dtype=torch.bfloat16), r.counts, 1e-3),
            TypeError,
            "bias must be float32 or float64, got torch.bfloat16",
        ),
        (lambda r: update_expert_bias(torch.zeros(4), r.counts.float(), 1e-3), TypeError, "counts must be int32 or"),
        (
            lambda r: update_expert_bias(torch.zeros(4), r.counts, -1.0),
            ValueError,
            "rate must be at least 0 .* got -1.0",
        ),
        (lambda r: update_expert_bias(torch.zeros(4), r.counts, float("nan")), ValueError, "rate must be .* got nan"),
        (lambda r: load_balance_loss(r, group=0), TypeError, "group must be a torch.distributed.ProcessGroup or None"),
        (lambda r: expert_counts([r]), TypeError, "routing must be a Routing, got list"),
        (lambda r: load_loss(r.logits, r.logits, 1.0, 4), ValueError, "top_k must be below num_experts, got top_k=4"),
        (lambda r: load_loss(r.logits, r.logits[:3], 1.0, 1), ValueError, "noisy_logits must have shape"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(softmax_topk(torch.zeros(6, 4), 2))
