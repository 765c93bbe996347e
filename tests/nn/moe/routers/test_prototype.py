"""Expert prototyping: the sheet's cases, and a softmax, argmax and count for each prototype."""

import pytest
import torch
from contracts import LogitsContract, RouterContract, assert_near

from gossamer.nn import PrototypeRouter, softmax_prototypes


def test_worked_values(device):
    routing = softmax_prototypes(torch.tensor([[1.0, 0, 0, 2]], dtype=torch.float64, device=device), 2)
    assert routing.expert_ids.tolist() == [[0, 3]]
    assert routing.weights.tolist() == [[pytest.approx(0.731059, abs=1e-6), pytest.approx(0.880797, abs=1e-6)]]
    # Capacity by prototype: T = 1024, E = 32, two prototypes, 1.25 gives 80, here on one expert of each.
    logits = torch.zeros(1024, 32, device=device)
    logits[:, 5] = logits[:, 20] = 1
    routing = softmax_prototypes(logits, 2, capacity_factor=1.25)
    counts = routing.counts.tolist()
    assert counts[5] == counts[20] == 80 and sum(counts) == 160
    assert bool((routing.expert_ids[:80] < 32).all()) and not routing.weights[80:].any()


@pytest.mark.parametrize("capacity_factor", [None, 0.5, 1.3])
def test_against_a_loop(device, capacity_factor):
    tokens, experts, prototypes = 37, 12, 3
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    routing = softmax_prototypes(logits.to(device), prototypes, capacity_factor=capacity_factor)
    room = tokens if capacity_factor is None else -int(-capacity_factor * tokens // 4)
    served = [0] * experts
    for t in range(tokens):
        for z in range(prototypes):
            within = logits[t, 4 * z : 4 * z + 4].softmax(0)
            expert = 4 * z + int(within.argmax())
            served[expert] += 1
            kept = served[expert] <= room
            assert int(routing.expert_ids[t, z]) == (expert if kept else experts)
            assert float(routing.weights[t, z]) == pytest.approx(float(within.max()) if kept else 0.0, rel=1e-12)
    mean = logits.view(tokens, prototypes, 4).softmax(-1).view(tokens, experts) / prototypes
    assert_near(routing.probabilities, mean.to(device))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PrototypeRouter(16, 8, 3), ValueError, "num_prototypes must divide num_experts, got num_prototypes=3"),
        (lambda: PrototypeRouter(16, 8, 0), ValueError, "num_prototypes must be at least 1, got 0"),
        (lambda: PrototypeRouter(16, 8, 2.0), TypeError, "num_prototypes must be an int, got float"),
        (lambda: PrototypeRouter(16, 8, 2, capacity_factor=0), ValueError, "capacity_factor must be positive"),
        (lambda: softmax_prototypes(torch.zeros(2, 8), 5), ValueError, "num_prototypes=5, num_experts=8"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def prototypes(num_experts, hidden_size, **factory):
    # Five experts, or one, are as many prototypes of one expert, or one prototype.
    return PrototypeRouter(hidden_size, num_experts, 1, capacity_factor=0.8, **factory)


TestPrototypes = RouterContract.over(
    one=prototypes,
    of_one=lambda num_experts, hidden_size, **factory: PrototypeRouter(
        hidden_size, num_experts, num_experts, bias=True, **factory
    ),
)
TestFunction = LogitsContract.over(one=lambda logits: softmax_prototypes(logits, 1))
