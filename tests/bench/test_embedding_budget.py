"""The study of compressed tables: its clicks can be learnt, and its cases meet their budgets."""

import dataclasses

import pytest
import torch

from gossamer.bench.harness.study import Unfit
from gossamer.bench.studies.clicks import FIELDS, Clicks, Population, auc
from gossamer.bench.studies.embedding_budget import CASES, STUDY, merged

SMALL = dataclasses.replace(
    STUDY.settings["quick"], population=Population(600, 300, 80), batch=128, steps=20, eval_batches=2, budgets=(0.5,)
)


def test_clicks_are_a_function_of_seed_and_number():
    first, second = (Clicks(SMALL.population, 3).batch(7, 64) for _ in range(2))
    other = Clicks(SMALL.population, 4).batch(7, 64)
    rows = SMALL.population.rows
    for name in FIELDS:
        assert torch.equal(first.ids[name], second.ids[name]) and not torch.equal(first.ids[name], other.ids[name])
        assert 0 <= int(first.ids[name].min()) and int(first.ids[name].max()) < rows[name]
    assert torch.equal(first.clicks, second.clicks) and 0 < first.clicks.mean() < 1


def test_area_under_the_curve():
    """Every pair of a clicked and another impression, ties for one half."""
    scores, clicks = torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([0.0, 1, 0, 1])
    assert auc(scores, clicks) == (1 + 0.5 + 1 + 1) / 4


NAMES = ["dense", "hash", "frequency", "clustered", "pruned", "searched_dimension", "quantized"]


@pytest.mark.parametrize("name", NAMES)
def test_cases(name):
    """A case trains both models, serves what it may, and gives every metric of the table."""
    outcome = STUDY.run(name, 0, SMALL, lambda share, note: None)
    dense = 4 * SMALL.dim * sum(SMALL.population.rows.values()) / 1e6
    assert set(outcome.metrics) == {metric.name for metric in STUDY.metrics}
    assert outcome.metrics["served"] <= (1.0 if name == "dense" else 0.5) * dense + 1e-9
    assert 0.3 < outcome.metrics["loss"] < 0.8 and outcome.x[0] == outcome.x[1]


def test_budgets_that_maps_alone_exceed():
    with pytest.raises(Unfit, match="its maps hold 1/16 of the dense bytes"):
        STUDY.run("clustered", 0, dataclasses.replace(SMALL, budgets=(0.05,)), lambda share, note: None)
    assert "semantic_id" not in CASES
    assert merged(torch.tensor([0, 1, 1, 2, 3, 3]), 2).tolist() == [0, 0, 0, 1, 1, 1]


def test_learns_what_is_planted():
    """More training tells clicks apart better."""
    longer = dataclasses.replace(SMALL, steps=150, batch=256)
    short, long = (STUDY.run("dense", 0, s, lambda share, note: None).metrics["auc"] for s in (SMALL, longer))
    assert long > max(short, 0.6)
