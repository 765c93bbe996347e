"""Tables of hash routers: equal shares of ids and of frequencies."""

import pytest
import torch
from contracts import RouterContract

from gossamer.nn import HashRouter, MoE, frequency_table


@pytest.mark.parametrize(("vocabulary", "experts", "top_k"), [(20, 5, 1), (23, 5, 2), (7, 3, 3), (3, 8, 2)])
def test_balanced(device, vocabulary, experts, top_k):
    router = HashRouter.balanced(vocabulary, experts, top_k, seed=1).to(device)
    routing = router(torch.arange(vocabulary, device=device))
    least = vocabulary * top_k // experts
    assert set(routing.counts.tolist()) <= {least, least + 1}
    assert all(len(set(row)) == top_k for row in routing.expert_ids.tolist())
    again = HashRouter.balanced(vocabulary, experts, top_k, seed=1).table
    assert torch.equal(router.table.cpu(), again)
    assert vocabulary < 20 or not torch.equal(again, HashRouter.balanced(vocabulary, experts, top_k, seed=2).table)


@pytest.mark.parametrize("top_k", [1, 2])
def test_frequency_aware(top_k):
    """Loads within the frequency of one id, and far nearer than by ids alone where ids are as frequent as words."""
    frequencies = 1e6 / torch.arange(10, 2010)
    loads = {}
    for name, table in (
        ("aware", frequency_table(frequencies, 8, top_k, seed=3)),
        ("balanced", HashRouter.balanced(2000, 8, top_k, seed=3).table),
    ):
        loads[name] = torch.zeros(8).index_add(0, table.flatten(), frequencies.repeat_interleave(top_k))
    mean = frequencies.sum() * top_k / 8
    assert float(loads["aware"].max() - loads["aware"].min()) <= float(frequencies.max())
    assert float(loads["aware"].max() / mean) < 1.001 < 1.02 < float(loads["balanced"].max() / mean)


def test_one_frequent_id_has_an_expert_alone():
    table = frequency_table(torch.tensor([100.0, 1, 1, 1, 1]), 2)
    assert len(set(table[1:, 0].tolist())) == 1 and table[0, 0] != table[1, 0]


def test_by_name(device):
    moe = MoE(16, 8, 4, 2, router="hash", vocabulary=30, device=device)
    x, ids = torch.randn(5, 16, device=device), torch.tensor([3, 3, 9, 0, 29], device=device)
    _, routing = moe(x, token_ids=ids, return_routing=True)
    assert torch.equal(routing.expert_ids, moe.router.table[ids])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: HashRouter.balanced(0, 4), ValueError, "vocabulary must be at least 1, got 0"),
        (lambda: HashRouter.balanced(9, 4, 5), ValueError, "top_k must be at most num_experts, got top_k=5"),
        (
            lambda: frequency_table(torch.tensor([1.0, -1.0]), 2),
            ValueError,
            r"frequencies must be finite .* got -1\.0 to",
        ),
        (lambda: frequency_table(torch.ones(2, 2), 2), ValueError, r"frequencies must have shape \(V,\)"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


TestHash = RouterContract.over(
    frequency=lambda num_experts, hidden_size, device, dtype: HashRouter.by_frequency(
        torch.arange(20), num_experts, min(2, num_experts)
    ).to(device)
)
