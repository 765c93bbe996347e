"""The study of compressed tables: its clicks can be learnt, and its cases meet their budgets."""

import dataclasses

import pytest
import torch

from gossamer.bench.harness import study_points
from gossamer.bench.harness.study import Unfit, at_budgets, study
from gossamer.bench.studies.clicks import FIELDS, Clicks, Population, auc
from gossamer.bench.studies.embedding_budget import CASES, STUDY
from gossamer.integrations.compress import METHODS

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


NAMES = ["dense", "frequency", "clustered", "deduplicated", "pruned", "searched_dimension", "semantic_id", "quantized"]


@pytest.mark.parametrize("name", NAMES)
def test_cases(name):
    """A case trains both models, serves what it may, and gives every metric of the table."""
    outcome = STUDY.run(name, 0, SMALL, lambda share, note: None)
    dense = 4 * SMALL.dim * sum(SMALL.population.rows.values()) / 1e6
    assert set(outcome.metrics) == {metric.name for metric in STUDY.metrics}
    assert outcome.metrics["served"] <= (1.0 if name == "dense" else 0.5) * dense + 1e-9
    if name not in ("dense", "quantized"):
        assert outcome.metrics["served"] > 0.98 * 0.5 * dense
    assert 0.3 < outcome.metrics["loss"] < 0.8 and outcome.x[0] == outcome.x[1]


def test_budgets_that_maps_alone_exceed():
    with pytest.raises(Unfit, match="its maps hold 1/16 of the dense bytes"):
        STUDY.run("clustered", 0, dataclasses.replace(SMALL, budgets=(0.05,)), lambda share, note: None)
    assert set(METHODS) < set(CASES)


def test_learns_what_is_planted():
    """More training tells clicks apart better."""
    shorter = dataclasses.replace(SMALL, batch=256, eval_batches=20)
    longer = dataclasses.replace(shorter, steps=150)
    short, long = (STUDY.run("dense", 0, s, lambda share, note: None).metrics["auc"] for s in (shorter, longer))
    assert long > max(short, 0.6)


def test_budgets_reached_and_missed():
    """A case keeps the numbers of every budget that it reaches; bytes are counted in the frozen tables."""
    few = dataclasses.replace(SMALL, steps=4, budgets=(0.5, 0.0001))
    outcome = STUDY.run("hash", 0, few, lambda share, note: None)
    assert set(outcome.points) == {"0.5"} and 0.49 < outcome.points["0.5"]["share"] <= 0.5
    assert outcome.points["0.5"]["loss"] == outcome.metrics["loss"]
    with pytest.raises(Unfit, match="budget must be at least"):
        STUDY.run("hash", 0, dataclasses.replace(few, budgets=(0.0001, 0.5)), lambda share, note: None)


def test_the_same_result_twice():
    """Everything except measured times is a function of the seed."""
    few = dataclasses.replace(SMALL, steps=4)
    first, again, other = (STUDY.run("hash", seed, few, lambda share, note: None).points for seed in (0, 0, 1))
    for budget, numbers in first.items():
        for metric in ("loss", "auc", "served", "training", "share"):
            assert numbers[metric] == again[budget][metric]
        assert numbers["loss"] != other[budget]["loss"]


def test_chosen_budgets():
    """``--budgets`` replaces the budgets of one effort, and nothing else."""
    chosen = at_budgets(STUDY, "quick", "0.5,0.02")
    assert chosen.settings["quick"] == dataclasses.replace(STUDY.settings["quick"], budgets=(0.5, 0.02))
    assert chosen.settings["full"] is STUDY.settings["full"] and at_budgets(STUDY, "quick", None) is STUDY
    for wrong in ("", "0.5,", "0.5,0.5", "0", "1.5", "nan", "half"):
        with pytest.raises(ValueError, match=r"--budgets must be different numbers in \(0, 1\]"):
            at_budgets(STUDY, "quick", wrong)
    with pytest.raises(ValueError, match="--budgets must not be given with study routers"):
        at_budgets(study("routers"), "quick", "0.5")


def record(losses):
    """A stored study with the losses of each case's seeds at each budget."""
    cases = []
    for name, points in losses.items():
        runs = [
            {
                "metrics": {"loss": next(iter(points.values()))[seed]},
                "points": {
                    b: {
                        "loss": values[seed],
                        "share": 1.0 if b == "all" else (0.8 if name == "codes" else 0.995) * float(b),
                        "lookup_us": 7.0,
                    }
                    for b, values in points.items()
                },
            }
            for seed in range(3)
        ]
        cases.append({"name": name, "note": "", "runs": runs})
    metrics = [{"name": "loss", "label": "log loss", "digits": 2}]
    return {"headline": "loss", "baseline": "dense", "metrics": metrics, "cases": cases}


LOSSES = {
    "dense": {"all": (0.50, 0.51, 0.52)},
    "low": {"0.1": (0.60, 0.61, 0.62), "0.5": (0.51, 0.52, 0.53)},
    "near": {"0.1": (0.61, 0.62, 0.64)},
    "high": {"0.1": (0.70, 0.71, 0.72)},
    "codes": {"0.26": (0.50, 0.51, 0.52), "0.32": (0.4, 0.4, 0.4)},
}


def test_table_of_budgets():
    """Only gaps wider than the seeds' ranges are named, against dense and against the least at a budget."""
    text = study_points.markdown(record(LOSSES))
    assert "| dense | 0.51 (0.50 to 0.52), baseline at 1 |  |  |  |\n" in text
    assert "| low | 0.52 (0.51 to 0.53) |  | 0.61 (0.60 to 0.62), worse |  |\n" in text
    assert "| codes |  | at 0.26: 0.51 (0.50 to 0.52) |  |  |\n" in text
    assert "At 1/10, low has the lowest mean. Not distinguished from it: near. Worse: high.\n" in text
    assert "At 1/2, low has the lowest mean. Not distinguished from it: none. Worse: none.\n" in text
    assert "At 1/4" not in text
    assert "between 0.99 and 0.995 of the budget, except for codes (0.80)." in text


def test_picture_of_budgets():
    """Each case's means stand at the bytes that were counted; dense is one mark at all of them."""
    pytest.importorskip("matplotlib")
    from gossamer.bench.harness import study_plot

    figure = study_plot.draw_budgets(record(LOSSES) | {"title": "Tables", "effort": "quick"})
    lines = {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}
    assert set(lines) == set(LOSSES) and list(lines["dense"].get_xdata()) == [1.0]
    assert list(lines["low"].get_xdata()) == pytest.approx([0.0995, 0.4975])
    assert list(lines["low"].get_ydata()) == pytest.approx([0.61, 0.52])
