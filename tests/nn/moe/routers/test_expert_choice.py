"""Expert choice: the sheet's case, ties, and the causal form by thresholds."""

import pytest
import torch
from contracts import LogitsContract, RouterContract, assert_near

from gossamer.nn import ExpertChoiceRouter, MoE, expert_choice, expert_choice_threshold

RUNNING = [[2.0, 1, 0, -1], [0, 2, 1, -1], [1, 0, 2, -1], [2, 0, -1, 1]]


def tokens_of(routing):
    return [(routing.expert_ids[:, e] == e).nonzero().flatten().tolist() for e in range(routing.num_experts)]


def test_worked_values(device):
    routing = expert_choice(torch.tensor(RUNNING, dtype=torch.float64, device=device), 2)
    assert tokens_of(routing) == [[0, 3], [0, 1], [1, 2], [0, 3]]
    assert routing.counts.tolist() == [2] * 4 and routing.max_rows == 8
    weights = torch.tensor(
        [
            [0.643914, 0.236883, 0, 0.032059],
            [0, 0.643914, 0.236883, 0],
            [0, 0, 0.643914, 0],
            [0.643914, 0, 0, 0.236883],
        ],
        dtype=torch.float64,
        device=device,
    )
    assert bool(((routing.weights - weights).abs() < 1e-6).all())


@pytest.mark.parametrize("factor", [0.01, 0.7, 2, 100])
def test_against_a_loop(device, factor):
    """By sorting each column; whole numbers make ties."""
    logits = torch.randint(0, 4, (29, 6), generator=torch.Generator().manual_seed(5)).double()
    logits[:, 2] = -torch.inf
    routing = expert_choice(logits.to(device), factor)
    probabilities = logits.softmax(1)
    room = min(29, max(1, int(factor * 29 / 6)))
    for e, found in enumerate(tokens_of(routing)):
        ranked = sorted(range(29), key=lambda t: (-round(float(probabilities[t, e]), 12), t))
        assert found == ([] if e == 2 else sorted(ranked[:room]))


def test_thresholds_follow_the_training(device):
    """Token by token, the causal form's loads come near those of the batch, and no later token changes an earlier."""
    generator = torch.Generator().manual_seed(6)
    router = ExpertChoiceRouter(16, 4, 1.5, device=device)
    assert router.thresholds.tolist() == [0.25] * 4
    for _ in range(200):
        x = torch.randn(64, 16, generator=generator).to(device)
        router.update_thresholds(router(x), momentum=0.95)
    with pytest.warns(UserWarning, match="not causal: set causal=True"):
        router.eval()
    x = torch.randn(1024, 16, generator=generator).to(device)
    probabilities = router.logits(x).softmax(1)
    router.causal = True
    router.train().eval()
    routing = router(x)
    assert torch.equal(routing.expert_ids < 4, probabilities >= router.thresholds)
    assert_near(routing.weights, torch.where(routing.expert_ids < 4, probabilities, 0))
    loads = routing.counts.double() / 1024
    assert bool((loads > 0.25).all()) and bool((loads < 0.5).all())
    first = router(x[:7])
    assert torch.equal(first.expert_ids, routing.expert_ids[:7])
    # An expert that took no token keeps its threshold.
    empty = router(x[:0])
    before = router.thresholds.clone()
    router.update_thresholds(empty)
    assert torch.equal(router.thresholds, before)
    assert router.to(torch.bfloat16).thresholds.dtype == torch.float32
    assert MoE(16, 8, 4, 2, router="expert_choice", device=device).router.capacity_factor == 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ExpertChoiceRouter(16, 4, 0), ValueError, "capacity_factor must be positive and finite, got 0"),
        (lambda: ExpertChoiceRouter(16, 4, None), TypeError, "capacity_factor must be a number, got NoneType"),
        (lambda: ExpertChoiceRouter(16, 0, 1), ValueError, "num_experts must be at least 1, got 0"),
        (
            lambda: expert_choice(torch.zeros(2, 4), torch.inf),
            ValueError,
            "capacity_factor must be positive and finite",
        ),
        (
            lambda: expert_choice_threshold(torch.zeros(2, 4), torch.zeros(3)),
            ValueError,
            r"thresholds must have shape \(E,\) = \(4\), got \(3,\)",
        ),
        (
            lambda: expert_choice_threshold(torch.zeros(2, 4), torch.zeros(4, dtype=torch.int64)),
            TypeError,
            r"thresholds must be floating point, got torch\.int64",
        ),
        (
            lambda: ExpertChoiceRouter(16, 4, 1).update_thresholds(expert_choice(torch.zeros(2, 3), 1)),
            ValueError,
            "routing must have a slot for each of 4 experts, got 3 slots of 3 experts",
        ),
        (
            lambda: ExpertChoiceRouter(16, 4, 1).update_thresholds(expert_choice(torch.zeros(2, 4), 1), 1.0),
            ValueError,
            r"momentum must be at least 0 and below 1, got 1\.0",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


TestRouter = RouterContract.over(
    batch=lambda num_experts, hidden_size, **factory: ExpertChoiceRouter(hidden_size, num_experts, 1.5, **factory),
    causal=lambda num_experts, hidden_size, **factory: ExpertChoiceRouter(
        hidden_size, num_experts, 1.5, causal=True, bias=True, **factory
    ),
)
TestThresholds = LogitsContract.over(
    thresholds=lambda logits: expert_choice_threshold(logits, torch.full((5,), 0.15, device=logits.device))
)


class TestFunction(LogitsContract.over(batch=lambda logits: expert_choice(logits, 1.5))):
    alone = False
