"""What a benchmark's report says: words, names, labels, and a run that was interrupted."""

from __future__ import annotations

import io
import itertools
import json
from types import SimpleNamespace

import matplotlib
import pytest
import torch
from typer.testing import CliRunner

from gossamer.bench.harness import profile_report, record, report, runner, timing
from gossamer.bench.harness.case import DENSE, OURS, REFERENCE, Case, Request
from gossamer.bench.harness.ceilings import Ceilings
from gossamer.bench.harness.compare import Change
from gossamer.bench.harness.profile_memory import MemoryPhase, MemoryTimeline
from gossamer.cli import app


def measured(role, seconds):
    return record.Row(role, role, "ok", None, "", list(seconds), list(range(len(seconds))), [True] * len(seconds))


def result_of(*rows):
    device = torch.device("cpu")
    case = Case("fake", "s", {"N": 4}, "fp32", device, "forward", (), {}, 8.0, 8.0, {}, "all")
    return record.CaseResult(case, list(rows), 1.0, Request("s", {"N": 4}, "fp32", device, "forward", "uniform"))


ONES = [1.0] * 60


@pytest.mark.parametrize(
    ("ratio", "word"),
    [(0.9, "1.11x faster than"), (1.1, "1.10x slower than"), (0.99, "as fast as"), (1.01, "as fast as")],
)
def test_ratios_that_are_clear_have_words(ratio, word):
    ours = measured(OURS, [ratio] * len(ONES))
    found = report.compare(result_of(ours, measured(REFERENCE, ONES), measured(DENSE, ONES)))
    assert f"{OURS} is {word} {REFERENCE}" in found
    assert "measurabl" not in found


@pytest.mark.parametrize(
    "ratios", [[0.8, 0.8, 0.8, 0.8, 1.1], [1.2, 1.2, 0.9, 1.2, 1.2], [0.94, 1.05, 0.94, 0.94, 1.05]]
)
def test_a_ratio_whose_interval_spans_one_is_neither_faster_nor_slower(ratios):
    """The median is well away from 1 in each."""
    ours, reference, dense = measured(OURS, ratios), measured(REFERENCE, ONES[:5]), measured(DENSE, ONES[:5])
    low, high = ours.times_interval(reference)
    assert low <= 1 <= high
    found = report.compare(result_of(ours, reference, dense))
    assert "faster" not in found and "slower" not in found
    assert f"not measurably different from (×{low:.2f}–{high:.2f}) {REFERENCE}" in found
    assert f"the time of {DENSE} ({low:.2f}–{high:.2f}: no measurable difference)" in found


def test_piped_tables_keep_names_whole(capsys):
    names = ["a name of many words " * 8 + "end", "another, without spaces: " + "x" * 150]
    changes = [Change(names[0], names[1], (1.0, 1.1, 1.2), (2.0, 2.1, 2.2))]
    report.print_changes(report.make_console(), changes, (), "earlier.json")
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "slower" in line)
    assert row.startswith(names[0]) and names[1] in row


@pytest.mark.parametrize("ends", [(5, 20, 30), (0.2, 29.9, 30), (29.7, 29.8, 30), (0.1, 0.2, 30)])
def test_labels_of_the_memory_picture_do_not_overlap(ends, monkeypatch, tmp_path):
    """Nor do they cover a curve or leave the picture, however short a phase is."""
    starts, mib = (0, *ends[:2]), 2.0**20
    phases = [
        MemoryPhase(name, start / 1e3, end / 1e3, 80 * mib, 0.0)
        for name, start, end in zip(("forward", "backward", "step"), starts, ends, strict=True)
    ]
    times = tuple(1e-3 * t for t in (0, *ends[:2], *ends[2:]))
    timelines = [MemoryTimeline(name, times, (0.0, 80 * mib, 40 * mib, 0.0), tuple(phases)) for name in ("a", "b")]
    matplotlib.use("Agg")
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    profile_report.plot_memory(SimpleNamespace(memory=timelines), tmp_path / "memory.png")
    figure = pyplot.gcf()
    monkeypatch.undo()
    try:
        figure.canvas.draw()
        for axis in figure.axes:
            boxes = [text.get_window_extent() for text in axis.texts]
            assert len(boxes) == 3
            assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
            frame, (_, top) = axis.get_window_extent(), axis.transData.transform((0, 80))
            for box in boxes:
                assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and top < box.y0 and box.y1 <= frame.y1
    finally:
        pyplot.close(figure)


@pytest.fixture
def quick(monkeypatch):
    """No time is spent on ceilings, and each case is timed by itself."""
    monkeypatch.setattr(runner, "measure", lambda device, dtypes: Ceilings(dict.fromkeys(dtypes, 1e12), 1e10, 2e10))
    monkeypatch.setitem(runner.BUDGET, "full", 0.05)
    monkeypatch.setitem(timing.SETTLE_LIMIT, "cpu", 0.0)
    monkeypatch.setattr(runner, "TOGETHER", 1)


def test_an_interrupted_run_keeps_its_finished_cases(quick, monkeypatch, tmp_path):
    check, checked, written = runner._Checked, [], []

    def interrupted_in_the_third(case, *rest):
        checked.append(case)
        if len(checked) == 3:
            written.append(json.loads(stored.read_text()))
            raise KeyboardInterrupt
        return check(case, *rest)

    monkeypatch.setattr(runner, "_Checked", interrupted_in_the_third)
    stored = tmp_path / "run.json"
    arguments = ["bench", "dispatch", "--shape", "64,8,2", "--device", "cpu", "--sweep", "tokens=64,128,256"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(stored)], catch_exceptions=False)
    assert result.exit_code == 130
    assert "The run was interrupted; these are the cases that had finished." in result.stdout
    # What a kill at that moment would have left is the same.
    for found in (written[0], json.loads(stored.read_text())):
        assert found["interrupted"] and [case["sizes"]["T"] for case in found["cases"]] == [64, 128]
        assert all(variant["median"] > 0 for case in found["cases"] for variant in case["variants"])
    assert list(tmp_path.iterdir()) == [stored]


def test_a_whole_run_is_not_called_interrupted(quick, tmp_path):
    stored = tmp_path / "run.json"
    arguments = ["bench", "dispatch", "--shape", "64,8,2", "--device", "cpu", "--json", str(stored)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "interrupted" not in result.stdout
    assert json.loads(stored.read_text())["interrupted"] is False


def test_no_words_without_a_time_of_ours():
    assert report.compare(result_of(measured(REFERENCE, ONES), measured(DENSE, ONES))) == ""
    assert isinstance(report.make_console().file, (report.UntilClosed, io.TextIOBase))
