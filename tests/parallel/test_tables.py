"""Sharded tables in two and four processes: the bits of one, traffic, errors; and the planner."""

from pathlib import Path

import processes
import pytest
import torch
from torch import nn

from gossamer.nn import DynamicEmbedding, EmbeddingBag, TableBatchedEmbeddingBags
from gossamer.optim import Adagrad, RowwiseAdagrad
from gossamer.parallel import measure_lookups, plan_tables

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "table_cases.py"
CASES = processes.cases_of(SCRIPT)


each, results = processes.fixtures(SCRIPT)


@processes.needs_gloo
@pytest.mark.parametrize("case", CASES)
def test_in_processes(results, case):
    failures = [found[case] for found in results if found[case]]
    assert not failures, "\n".join(failures)


def model(**tables):
    return nn.ModuleDict(tables)


def bag(rows, dim=16, **options):
    return EmbeddingBag(rows, dim, device="meta", **options)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 16])
def test_no_rank_holds_more_than_its_share(world):
    """Tables from tiny to as large as all others together."""
    sizes = [200_000, 70_000, 30_000, 30_000, 30_000, 9_000, 500, 100, 3]
    tables = model(**{f"t{i}": bag(rows, 8 * (i + 1)) for i, rows in enumerate(sizes)})
    tables["many"] = TableBatchedEmbeddingBags([(50_000, 32), (1_000, 8), (10, 4)], device="meta")
    plan = plan_tables(tables, world)
    held = plan.rank_nbytes()
    total = 4 * (sum(rows * 8 * (i + 1) for i, rows in enumerate(sizes)) + 50_000 * 32 + 8_000 + 40)
    assert sum(held) == pytest.approx(total, abs=world)
    assert max(held) <= 1.05 * total / world
    assert set(plan.kinds) == {*(f"t{i}" for i in range(9)), "many.0", "many.1", "many.2"}
    # What is more than a share is split, and what has fewer rows than ranks is not.
    for name, info in plan.tables.items():
        assert plan.kinds[name] == "row" or info.nbytes <= 1.05 * total / world
        assert plan.kinds[name] == "table" or info.rows >= world > 1
    assert plan == plan_tables(tables, world)
    report = str(plan)
    assert report.count("of its share") == world and all(name in report for name in plan.kinds)


def test_optimizer_states_count():
    """Where states are as large as tables, a table with one weighs twice."""
    tables = model(a=bag(1000, optimizer=Adagrad(lr=0.1)), b=bag(1000), c=bag(1000))
    plan = plan_tables(tables, 2)
    assert plan.tables["a"].nbytes == pytest.approx(2 * plan.tables["b"].nbytes, rel=0.01)
    assert plan.owners["b"] == plan.owners["c"] != plan.owners["a"]
    batched = TableBatchedEmbeddingBags([(100, 8), (10, 4)], optimizer=RowwiseAdagrad(lr=0.1), device="meta")
    assert plan_tables(model(t=batched), 2).tables["t.0"].nbytes == 4 * (100 * 8 + 100)


def test_lookups_decide_among_equal_bytes():
    """Two hot tables of four of one size go to different ranks; one that is hotter than all is split by rows."""
    tables = model(**{name: EmbeddingBag(64, 16, mode="sum") for name in "abcd"})
    with measure_lookups(tables) as lookups:
        for name, count in zip("abcd", (40, 2, 40, 2), strict=True):
            for _ in range(3):
                tables[name](torch.arange(count).view(2, -1))
    assert lookups["a"].calls == 3 and lookups["a"].lookups == 120 and lookups["a"].bags == 6
    assert lookups["a"].unique == 120
    plan = plan_tables(tables, 2, lookups=lookups)
    assert set(plan.kinds.values()) == {"table"}
    assert plan.owners["a"] != plan.owners["c"] and plan.owners["b"] != plan.owners["d"]
    assert plan.rank_lookups() == [84, 84]
    with measure_lookups(tables) as lookups:
        tables["a"](torch.arange(64).view(1, -1).repeat(4, 1))
        tables["b"](torch.zeros(1, 2, dtype=torch.int64))
    assert lookups["a"].lookups == 256 and lookups["a"].unique == 64
    plan = plan_tables(tables, 2, lookups=lookups)
    assert plan.kinds["a"] == "row" and plan.kinds["b"] == "table"
    # Rows, sums and gradients that go to the other of two ranks.
    assert plan.sent_nbytes("b") == pytest.approx(0.5 * (2 * 4 + 4 + 2 * 64))


def test_lookups_of_batched_and_dynamic_tables():
    batched = TableBatchedEmbeddingBags([(10, 4), (5, 4)], [0, 1, 0])
    tables = model(t=batched, d=DynamicEmbedding(4, 100), r=DynamicEmbedding(4, 100, pooling=None))
    with measure_lookups(tables) as lookups:
        batched(torch.tensor([1, 1, 2, 3, 9]), torch.tensor([0, 2, 2, 3, 4, 4, 5]))
        tables["d"](torch.tensor([5, 5, 7]), torch.tensor([0, 1, 3]))
        tables["r"](torch.tensor([5, 5, 7]))
    counts = {name: (of.calls, of.lookups, of.unique, of.bags) for name, of in lookups.items()}
    assert counts == {"t.0": (1, 3, 2, 4), "t.1": (1, 2, 2, 2), "d": (1, 3, 2, 2), "r": (1, 3, 2, 3)}


def test_planner_errors():
    with pytest.raises(ValueError, match="world must be"):
        plan_tables(model(a=bag(10)), 0)
    with pytest.raises(ValueError, match="must have a table that can be sharded, got none"):
        plan_tables(nn.Linear(2, 2), 2)
    with pytest.raises(ValueError, match=r"lookups must be of the model's tables \['a'\], got 'b'"):
        with measure_lookups(model(b=bag(10))) as lookups:
            pass
        plan_tables(model(a=bag(10)), 2, lookups=lookups)
