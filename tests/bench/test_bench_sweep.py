"""Sweeps, routing skews, and a run against an earlier one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from gossamer.bench.families import skew
from gossamer.bench.harness import compare, record, runner, sweep
from gossamer.bench.harness.case import Case, Request
from gossamer.bench.harness.ceilings import Ceilings

CPU = torch.device("cpu")


def base_request(family, shape):
    return runner.requests(family, CPU, shape=shape, dtype="fp32", direction="forward")[0]


def test_values_of_a_sweep_are_given_or_multiples_within_the_rule():
    moe = runner.family("moe")
    base = base_request(moe, "64,32,16,8,4")
    assert sweep.parse(moe, "tokens", base).values == (16, 32, 64, 128, 256)
    assert sweep.parse(moe, "experts", base) == sweep.Sweep("experts", "E", (4, 8, 16, 32))
    assert sweep.parse(moe, "K", base) == sweep.Sweep("K", "K", (1, 2, 4, 8))
    assert sweep.parse(moe, "hidden=16, 8,16", base).values == (16, 8)
    assert sweep.parse(moe, "skew", base).values == skew.EXPERT_SKEWS
    assert sweep.parse(moe, "skew=one,trained", base).values == ("one", "trained")
    bag = runner.family("gather_reduce")
    assert sweep.parse(bag, "rows=10", base_request(bag, "50,8,4,3")).symbol == "N"


def test_every_family_has_dimensions_of_its_own_symbols():
    for name in runner.FAMILIES:
        family = runner.family(name)
        assert set(family.dimensions.values()) <= set(family.symbols)
        assert set(family.work) <= set(family.symbols)


def test_cases_of_a_sweep_differ_in_that_alone():
    moe = runner.family("moe")
    base = base_request(moe, "64,32,16,8,4")
    both = [base, replace(base, dtype="bf16")]
    sized = sweep.expand(sweep.Sweep("experts", "E", (4, 16)), both)
    assert [(r.sizes["E"], r.dtype) for r in sized] == [(4, "fp32"), (4, "bf16"), (16, "fp32"), (16, "bf16")]
    assert sized[0].shape == "64,32,16,8,4 E=4" and sized[0].sizes == {**base.sizes, "E": 4}
    spread = sweep.expand(sweep.Sweep("skew", "skew", ("uniform", "one")), [base])
    assert [(r.skew, r.shape, r.sizes) for r in spread] == [(s, base.shape, base.sizes) for s in ("uniform", "one")]


def test_trained_routing_has_the_spread_that_was_measured():
    counts = torch.tensor(json.loads(skew.COUNTS.read_text())["counts_layer_expert"]).double()
    loads = (counts / counts.mean(1, keepdim=True)).flatten().sort(descending=True).values
    assert torch.equal(skew.trained_popularity(len(loads)), loads)
    for experts in (4, 16, 256):
        popularity = skew.trained_popularity(experts)
        assert popularity.shape == (experts,) and (popularity.diff() <= 0).all()
        assert loads[-1] <= popularity[-1] and popularity[0] <= loads[0]
        assert popularity.mean() == pytest.approx(1, abs=0.05)
    drawn = skew.expert_ids(60_000, 16, 1, "trained").flatten().bincount(minlength=16) / 60_000
    expected = skew.trained_popularity(16) / skew.trained_popularity(16).sum()
    # Three standard deviations of the count of an expert that has a sixteenth of the draws.
    assert (drawn - expected).abs().max() < 3 * (1 / 16 / 60_000) ** 0.5
    several = skew.expert_ids(100, 16, 4, "trained", seed=1)
    assert all(len(set(row)) == 4 for row in several.tolist())
    assert torch.equal(several, skew.expert_ids(100, 16, 4, "trained", seed=1))


def test_counts_are_read_from_the_examples_metrics():
    counts = [[[step, 1], [2, 3 * step]] for step in range(5)]
    metrics = {"routing": {"counts_step_layer_expert": counts}, "settings": {"steps": 5}, "versions": {"torch": "2"}}
    found = skew.counts_of_training(metrics, steps=2)
    assert found["counts_layer_expert"] == [[7, 2], [4, 21]]
    assert "the last 2 of 5 training steps" in found["what"] and found["settings"] == {"steps": 5}
    shipped = json.loads(skew.COUNTS.read_text())
    assert shipped.keys() == found.keys()
    assert len(shipped["counts_layer_expert"]) == shipped["settings"]["layers"]
    assert {len(row) for row in shipped["counts_layer_expert"]} == {shipped["settings"]["num_experts"]}


def results(*times, versions=None, device="cpu", shape="s"):
    """A run of one case whose variants have the given samples: ours, then dense."""
    request = Request(shape, {"N": 4}, "fp32", torch.device(device), "forward", "uniform")
    case = Case("fake", shape, request.sizes, "fp32", request.device, "forward", (), {}, 8.0, 8.0, {}, "all", "even")
    rows = [
        record.Row(name, name, "ok", None, "", list(seconds), list(range(len(seconds))), [True] * len(seconds))
        for name, seconds in zip(("ours", "dense"), times, strict=False)
    ]
    environment = {"cpu": "X", "threads": 2, "gpus": [], "versions": versions or {"torch": "2"}}
    found = record.CaseResult(case, rows, 1e-3, request)
    return record.Results(environment, Ceilings({"fp32": 1.0}, 1.0), [found])


def test_a_change_is_one_where_spreads_do_not_meet():
    then = results([1.0, 1.1, 1.2], [1.0, 1.0, 1.0]).as_json()
    now = results([1.5, 1.6, 1.7], [1.015, 1.015, 1.015]).as_json()
    ours, dense = compare.changes(then, now)
    assert (ours.variant, ours.verdict) == ("ours", "slower") and ours.ratio == pytest.approx(1.6 / 1.1)
    assert dense.verdict == "same"
    back, _ = compare.changes(now, then)
    assert back.verdict == "faster"
    wide, _ = compare.changes(then, results([0.5, 2.0, 3.5], [1.0]).as_json())
    assert wide.verdict == "same" and wide.ratio > 1.5
    assert compare.changes(then, results([1.0]).as_json() | {"cases": []}) == []


def test_what_two_runs_do_not_share_is_named():
    then = results([1.0], versions={"torch": "2.12", "triton": "3.6"}).as_json()
    now = results([1.0], versions={"torch": "2.13", "triton": "3.6"}).as_json()
    assert compare.differences(then, then) == []
    assert compare.differences(then, now) == ["torch: 2.12 then, 2.13 now"]
    now["environment"] |= {"threads": 8, "gpus": [{"name": "H100"}]}
    now["cases"][0]["device"] = "cuda:0"
    assert compare.differences(then, now) == [
        "threads: 2 then, 8 now",
        "GPUs: [] then, ['H100'] now",
        "device: cpu then, cuda:0 now",
        "torch: 2.12 then, 2.13 now",
    ]


def test_the_ratio_is_dense_time_over_ours():
    run = results([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])
    assert run.cases[0].speed_of_dense == 0.5
    assert compare.too_slow(run, 0.5) == []
    (line,) = compare.too_slow(run, 0.51)
    assert line.endswith("0.500x the speed of dense")
    (line,) = compare.too_slow(results([1.0]), 0.1)
    assert "no ratio" in line
    unjudged = replace(run, left_out=("moe of giants, which does not fit into memory",))
    assert compare.too_slow(unjudged, 0.1) == ["not measured: moe of giants, which does not fit into memory"]


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"schema": 2, "cases": []}',
        '{"schema": 1}',
        '{"schema": 1, "cases": []}',
        '{"schema": 1, "environment": {}}',
        '{"schema": 1, "environment": {}, "cases": [{"family": "moe"}]}',
        '{"schema": 1, "environment": {}, "cases": [3]}',
    ],
)
def test_other_json_is_no_earlier_run(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json was not written by gossamer bench --json"):
        compare.load(path)
