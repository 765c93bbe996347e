"""Experts divided among two and four processes, against one process with all of them."""

from pathlib import Path

import processes
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.parallel.token_exchange import fit_slots, plan_rows

SUPPORT = Path(__file__).resolve().parents[1] / "support"
SCRIPT, LOST = SUPPORT / "expert_parallel_cases.py", SUPPORT / "lost_rank_cases.py"
CASES = processes.cases_of(SCRIPT)

pytestmark = processes.needs_gloo


each, results = processes.fixtures(SCRIPT)


@pytest.mark.parametrize("case", CASES)
def test_in_processes(results, case):
    failures = [found[case] for found in results if found[case]]
    assert not failures, "\n".join(failures)


def test_a_rank_that_is_lost(tmp_path):
    """A rank that never calls is an error after the timeout of 2 s, and one that ended at once, not after 60."""
    waited = processes.run(LOST, 2, tmp_path)[0]
    assert set(waited) == {"late", "ended in a backward pass", "ended"}
    for what, seconds in waited.items():
        assert seconds is not None and seconds < 30, (what, seconds)


OWNERS = torch.tensor([[0, 2, 0], [3, 3, 3], [2, 1, 3], [1, 1, 2], [3, 0, 1], [2, 2, 2]])


def naive_plan(owners, num_ranks, capacity, stays):
    """The token and the slots of each row, rank by rank, and how many rows found no room."""
    rows, dropped = [], 0
    for rank in range(num_ranks):
        if rank == stays:
            continue
        mine = []
        for token, slots in enumerate(owners.tolist()):
            if rank in slots:
                mine.append((token, [3 * token + k for k, owner in enumerate(slots) if owner == rank]))
        if capacity is not None:
            dropped += max(len(mine) - capacity, 0)
            mine = (mine + [(len(owners), [])] * capacity)[:capacity]
        rows += mine
    return rows, dropped


@pytest.mark.parametrize("stays", [None, 0, 2])
@pytest.mark.parametrize("capacity", [None, 2, 6])
def test_plans(capacity, stays, device):
    """Owner 3 is not a rank: a slot without an expert."""
    plan = plan_rows(OWNERS.to(device), 3, 3, capacity, stays)
    rows, dropped = naive_plan(OWNERS, 3, capacity, stays)
    assert plan.index.tolist() == [token for token, _ in rows]
    assert [[slot for slot in slots if slot < 18] for slots in plan.slots.tolist()] == [slots for _, slots in rows]
    assert (plan.dropped is None) == (capacity is None) and (capacity is None or int(plan.dropped) == dropped)
    sizes = [capacity or sum(rank in slots for slots in OWNERS.tolist()) for rank in range(3)]
    assert plan.sizes.tolist() == [0 if rank == stays else size for rank, size in enumerate(sizes)]
    starts = [sum(plan.sizes.tolist()[:rank]) for rank in range(4)]
    for token, places in enumerate(plan.places.tolist()):
        for rank, place in enumerate(places):
            mine = range(starts[rank], starts[rank + 1])
            found = [row for row in mine if rows[row][0] == token]
            assert [place] == found or (not found and place == len(rows))
    live = [sum(len(rows[row][1]) for row in range(starts[rank], starts[rank + 1])) for rank in range(3)]
    if stays is not None:
        live[stays] = int((OWNERS == stays).sum())
    assert plan.live.tolist() == live


class RefuseReads(TorchDispatchMode):
    """Raises where a value of a tensor is read on the host, or a size depends on one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert not any(part in name for part in ("_local_scalar_dense", "nonzero", "unique", "masked_select")), name
        return function(*args, **(kwargs or {}))


def test_static_plans_read_nothing_on_the_host(device):
    with RefuseReads():
        plan_rows(OWNERS.to(device), 3, 2, 4)
        plan_rows(OWNERS.to(device), 3, 2, 4, 1)
        fit_slots(OWNERS.to(device), torch.ones(6, 3, device=device), 2)
    with pytest.raises(AssertionError, match="nonzero"), RefuseReads():
        plan_rows(OWNERS.to(device), 3, 2)


def test_slots_are_fitted():
    """Repeated experts become one slot with the sum of weights; others keep their order."""
    ids = torch.tensor([[2, 0, 2, 0], [1, 2, 2, 2], [0, 0, 0, 0]])
    weights = torch.tensor([[1.0, 2, 4, 8], [1, 2, 4, 8], [1, 2, 4, 8]])
    found, sums = fit_slots(ids, weights, 2)
    assert found.tolist() == [[0, 2], [1, 2], [0, 2]]
    assert sums.tolist() == [[10, 5], [1, 14], [15, 0]]
