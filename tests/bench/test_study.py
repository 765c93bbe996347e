"""Studies: what the runner stores, what may be said of a case, and the study of routers itself."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from typer.testing import CliRunner

from gossamer.bench.harness import study, study_plot
from gossamer.bench.harness.study import Case, Metric, Outcome, Study, Unfit
from gossamer.bench.studies import byte_lm, decode, expert_compression, routers
from gossamer.cli import app
from gossamer.nn import Experts, MoE
from gossamer.nn.moe.routers import ROUTERS
from gossamer.ops.quantized_expert_weight import FORMATS


@dataclass(frozen=True)
class Effort:
    runs: int = 1


# Three seeds a case, of which those of the baseline are 0.2 apart.
LOSSES = {"base": (1.0, 1.2, 1.1), "low": (0.6, 0.7, 0.65), "near": (0.9, 0.85, 0.95), "high": (1.5, 1.45, 1.55)}


def fake(run=None, **change):
    def losses(name, seed, settings, report):
        report(0.5, "half")
        return Outcome(7, {"loss": LOSSES[name][seed], "size": 3.0}, [0.0, 1.0, 2.0], [2.0, 1.5, LOSSES[name][seed]])

    return Study(
        name="fake",
        title="A study",
        question="Which?",
        baseline="base",
        headline="loss",
        metrics=(Metric("loss", "loss in bits", 2), Metric("size", "size", 0)),
        x_label="cost",
        y_label="loss",
        cases=lambda: [
            Case(name, "group", "its note" if name == "low" else "") for name in ("base", "low", "near", "high")
        ],
        settings={"quick": Effort(), "full": Effort()},
        seeds={"quick": 3, "full": 3},
        run=run or losses,
        **change,
    )


def test_only_a_gap_wider_than_the_spread_is_a_difference():
    """Ranges that do not overlap may still be too near each other, and two seeds decide nothing."""
    chosen = fake()
    record = study.run(chosen, chosen.cases())
    found = {case["name"]: study.verdict(record, case) for case in record["cases"]}
    assert found == {"base": "baseline", "low": "better", "near": "within the spread", "high": "worse"}
    few = study.run(chosen, chosen.cases(), seeds=2)
    assert {study.verdict(few, case) for case in few["cases"]} == {"baseline", "under 3 seeds"}
    assert "wider than either range and both have at least 3 seeds. A full run" in study.notes(few)[0]


def test_table_and_notes():
    """Best first within its group, the mean with the range, the rule and the notes below."""
    chosen = fake()
    record = study.run(chosen, chosen.cases(), effort="quick")
    head, lines = study.rows(record)
    assert head == ["", "against the baseline", "loss in bits", "size", "parameters"]
    assert [line[0] for line in lines] == ["low *", "near", "base", "high"]
    assert lines[0][1:] == ["better", "0.65 (0.60 to 0.70)", "3", "7"]
    text = "\n".join(study.notes(record))
    assert text.startswith(
        "3 seeds per case. A case counts as better or worse than base only if the gap between the ranges of their"
    )
    assert "* low: its note." in text
    assert study.markdown(record).startswith("| " + " | ".join(head) + " |\n| --- | --- | --: | --: | --: |\n| low * |")


def test_runs_seed_after_seed_and_keeps_what_is_there():
    """The record grows run by run; cases that cannot be built are left out; an interrupted study keeps its runs."""
    order, sizes, progress = [], [], []

    def run(name, seed, settings, report):
        order.append((seed, name))
        if name == "low":
            raise Unfit("it needs more")
        if (seed, name) == (1, "near"):
            raise KeyboardInterrupt
        report(0.5, "half")
        return Outcome(1, {"loss": 1.0, "size": 1.0})

    chosen = fake(run)
    record = study.run(
        chosen,
        chosen.cases(),
        report=lambda name, share, note: progress.append(share),
        so_far=lambda found: sizes.append(sum(len(case["runs"]) for case in found["cases"])),
    )
    assert order == [(0, "base"), (0, "low"), (0, "near"), (0, "high"), (1, "base"), (1, "near")]
    assert sizes == [1, 2, 3, 4] and progress == sorted(progress)
    assert record["interrupted"] and record["left_out"] == [{"name": "low", "reason": "it needs more"}]
    assert [case["name"] for case in record["cases"]] == ["base", "near", "high"]
    assert "low was left out: it needs more." in study.notes(record)
    assert json.loads(json.dumps(record)) == record


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    chosen = fake()
    path = study_plot.save(study.run(chosen, chosen.cases()), tmp_path)
    text = path.read_text()
    assert path.name == "fake.svg" and all(word in text for word in ("loss in bits", "near", "A study (full run)"))


def test_choice_of_cases_and_names():
    chosen = fake()
    assert [case.name for case in study.chosen_cases(chosen, ["high"])] == ["base", "high"]
    with pytest.raises(ValueError, match="cases must be among base, low, near, high, got none"):
        study.chosen_cases(chosen, ["none"])
    assert "routers" in study.names()
    with pytest.raises(ValueError, match=r"the study must be one of .*routers.*, got 'tables of'"):
        study.study("tables of")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study"], "study needs a name, one of"),
        (["study", "nothing"], "the study must be one of"),
        (["study", "routers", "--cases", "nothing"], "cases must be among softmax_topk"),
        (["study", "routers", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["study", "routers", "--dtype", "bf16"], "--dtype must not be given with a study"),
        (["moe", "routers"], "a second name is for studies, as in gossamer bench study routers"),
        (["moe", "--seeds", "2"], "--seeds is for studies"),
    ],
)
def test_bad_requests(arguments, message):
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2 and message in done.stderr


TINY = routers.Settings(byte_lm.Sizes(1, 16, 2, 8, 4, 2, 16), batch=4, steps=6, looks=2, eval_windows=4)


@pytest.fixture
def small_text(monkeypatch):
    """Text that takes no time to read."""
    text = torch.randint(32, 64, (2000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    monkeypatch.setattr(routers, "corpus", lambda: (text, text[:200]))


@pytest.mark.parametrize("name", [case.name for case in routers.cases()])
def test_every_case_trains_within_the_budget(name, small_text):
    """All routers and layers learn something, spend the budget and no more than a step beyond, and have numbers."""
    settings = TINY if name != "product_key" else replace(TINY, sizes=replace(TINY.sizes, intermediate_size=32))
    outcome = routers.train(name, 0, settings, lambda share, note: None)
    allowed = routers.budget(settings)
    assert allowed <= outcome.x[-1] < 2 * allowed and len(outcome.x) == len(outcome.y)
    assert outcome.y[0] == pytest.approx(8.0, abs=1e-4) and outcome.y[-1] < 8.0
    assert 0 < outcome.metrics["experts"] and outcome.metrics["load"] >= 1
    assert 0 <= outcome.metrics["dead"] < 1 and outcome.metrics["step_ms"] > 0


@pytest.mark.parametrize("name", list(expert_compression.CASES))
def test_every_compression_has_its_share(name, small_text, monkeypatch):
    """Every case has fewer parameters, at most as many as the bases, and nearer matrices than zeros would be."""
    monkeypatch.setattr(expert_compression, "corpus", routers.corpus)
    expert_compression.trained.cache_clear()
    sizes = byte_lm.Sizes(1, 32, 2, 16, 8, 2, 16)
    settings = expert_compression.Settings(sizes, batch=4, steps=3, num_bases=2, fit_steps=60, eval_windows=4)
    outcome = expert_compression.run(name, 0, settings, lambda share, note: None)
    assert settings.share == 0.75 and outcome.metrics["share"] == pytest.approx(0.75, abs=0.03)
    assert 0 < outcome.metrics["error"] < 0.5
    with pytest.raises(Unfit, match="8 bases have no fewer parameters than 8 experts"):
        expert_compression.run(name, 0, replace(settings, num_bases=8), lambda share, note: None)


def test_a_run_is_the_same_twice(small_text):
    one, two = (routers.train("softmax_topk", 3, TINY, lambda share, note: None) for _ in range(2))
    assert one.y == two.y and one.metrics["loss"] == two.metrics["loss"]


def test_parameters_are_equal():
    """Every case within a twentieth of the plain model at the sizes of a full run."""
    settings = routers.STUDY.settings["full"]
    with torch.device("meta"):
        plain = sum(p.numel() for p in byte_lm.ByteLM(settings.sizes).parameters())
    for case in routers.cases():
        if case.group == routers.EXPERTS:
            model, _ = routers.build(case.name, settings)
            assert sum(p.numel() for p in model.parameters()) == pytest.approx(plain, rel=0.05), case.name


def test_flops_of_the_plain_model():
    """Counted by hand: projections, causal products, router, experts, head."""
    sizes = byte_lm.Sizes(2, 32, 2, 24, 4, 2, 8)
    model = byte_lm.ByteLM(sizes)
    _, routings = model(torch.zeros(3, 8, dtype=torch.int64))
    layer = 2 * 4 * 32 * 32 + 2 * 32 * 8 + 2 * 32 * 4 + 2 * (2 * 3 * 32 * 24)
    assert byte_lm.forward_flops(model, routings, 24) == 24 * (2 * layer + 2 * 32 * 256)


def test_equal_sizes():
    wanted = sum(p.numel() for p in Experts(4, 16, 10, device="meta").parameters())
    assert byte_lm.of_equal_size(lambda inner: Experts(4, 16, inner), wanted) == 10
    assert byte_lm.of_equal_size(lambda inner: Experts(4, 16, inner), wanted + 150) == 11
    assert byte_lm.of_equal_size(lambda inner: Experts(4, 16, inner), 1) == 1


def test_every_router_is_in_the_study():
    """A router that is added to the package is compared."""
    assert {case.name for case in routers.cases() if case.group == routers.ROUTERS} == set(ROUTERS) - {"topk_softmax"}


def test_the_model_is_the_examples():
    """Its experts lie where the example's files have them."""
    model = byte_lm.ByteLM(byte_lm.Sizes(1, 16, 2, 8, 4, 2, 16))
    assert isinstance(model.blocks[0].moe, MoE) and "blocks.0.moe.experts.gate_up_proj" in model.state_dict()


@pytest.mark.parametrize("name", ["transformers eager", "gossamer", "gossamer int8", "gossamer int8 with int8 rows"])
def test_decoding(name):
    """The parts of a step sum to it, and the logits are the model's up to rounding or the format's error."""
    pytest.importorskip("transformers")
    settings = decode.Settings(64, 32, 4, 2, 1, 2, 96, "float32", prompt=5, prefills=1, steps=2)
    outcome = decode.run(name, 0, settings, lambda share, note: None)
    found = outcome.metrics
    parts = [found[part] for part in (*decode.PARTS, "framework")]
    assert sum(parts) == pytest.approx(1) and all(0 < part < 1 for part in parts)
    assert found["decode"] == pytest.approx(1e3 / found["step_ms"]) and found["prefill"] > 0
    model = decode.make_model(0, settings)
    whole = sum(p.nbytes for p in [*model.parameters(), *model.buffers()]) / 1e6
    if name.startswith("gossamer int8"):
        assert 1e-4 < found["error"] < 0.05 and found["megabytes"] < 0.6 * whole
    else:
        assert found["error"] < 1e-5 and found["megabytes"] == pytest.approx(whole)


def test_decoding_times_every_format():
    names = {f"gossamer {f}" for f in FORMATS} | {f"gossamer {f} with int8 rows" for f in ("int8", "int4", "mxfp4")}
    assert {case.name for case in decode.cases() if case.group == "quantised"} == names
