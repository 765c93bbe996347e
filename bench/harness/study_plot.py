"""Draws the picture of a study: curves by group, and each metric of every case with its seeds."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gossamer.bench.harness.plot import DENSE_COLOR, INK, OTHERS, style
from gossamer.bench.harness.study import values
from gossamer.bench.harness.study_points import budget_points

# The baseline is drawn in INK, the other cases in these colours in turn, and dashed once all are used.
LINES = ("-", "--", ":")
MARKS = "osD^v<>P*X"


def _styles(cases: list[dict], baseline: str) -> dict[str, tuple[str, str]]:
    """The colour and line style of each case."""
    others = [case["name"] for case in cases if case["name"] != baseline]
    found = {
        name: (OTHERS[number % len(OTHERS)], LINES[number // len(OTHERS) % len(LINES)])
        for number, name in enumerate(others)
    }
    return {baseline: (INK, "-")} | found


def _curves(axis: Axes, record: dict, cases: list[dict], styles: dict[str, tuple[str, str]]) -> None:
    """Draw one line per seed; all lines of a case look alike."""
    for case in cases:
        color, line = styles[case["name"]]
        for number, run in enumerate(case["runs"]):
            label = case["name"] if number == 0 else None
            # The first point is from before training.
            axis.plot(run["x"][1:], run["y"][1:], line, color=color, linewidth=1.1, alpha=0.85, label=label)
    axis.set(xlabel=record["x_label"], ylabel=record["y_label"])
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _dots(axis: Axes, record: dict, metric: dict, cases: list[dict], styles: dict[str, tuple[str, str]]) -> None:
    """Draw one line per case: its seeds as dots, their mean as a stroke, and the baseline's range shaded."""
    for place, case in enumerate(cases):
        found, (color, _) = values(case, metric["name"]), styles[case["name"]]
        if case["name"] == record["baseline"]:
            axis.axvspan(min(found), max(found), color=DENSE_COLOR, alpha=0.25, linewidth=0)
        axis.plot(found, [place] * len(found), "o", color=color, markersize=4, alpha=0.7)
        axis.plot([statistics.fmean(found)], [place], "|", color=color, markersize=14)
    axis.set_yticks(range(len(cases)), [case["name"] for case in cases])
    axis.invert_yaxis()
    axis.set_xlabel(metric["label"])


def draw(record: dict) -> Figure:
    """Draw the curves of each group of cases, if there are any, and below them a panel for each metric."""
    curved = [case for case in record["cases"] if any(run["x"] for run in case["runs"])]
    groups = list(dict.fromkeys(case["group"] for case in curved))
    by_group = {group: [case for case in record["cases"] if case["group"] == group] for group in groups}
    base = [case for case in record["cases"] if case["name"] == record["baseline"]]
    ordered = sorted(record["cases"], key=lambda case: statistics.fmean(values(case, record["headline"])))
    metrics = record["metrics"]
    columns = max(len(groups), 3)
    lines = -(-len(metrics) // columns)
    with style():
        curves, dots = 4.2 if curved else 0.0, lines * (1.0 + 0.22 * len(ordered))
        figure = Figure(figsize=(4.4 * columns, 0.4 + curves + dots), layout="constrained")
        *above, below = figure.subfigures(2, 1, height_ratios=[curves, dots]) if curved else [figure.subfigures()]
        figure.suptitle(f"{record['title']} ({record['effort']} run)")
        for axis, group in zip(
            above[0].subplots(1, len(groups), squeeze=False)[0] if above else [], groups, strict=True
        ):
            mine = by_group[group] + [case for case in base if case not in by_group[group]]
            _curves(axis, record, mine, _styles(mine, record["baseline"]))
            axis.set_title(group)
        styles = _styles(ordered, record["baseline"])
        axes = below.subplots(lines, columns, squeeze=False).flatten()
        for axis, metric in zip(axes, metrics, strict=False):
            _dots(axis, record, metric, ordered, styles)
        for axis in axes[len(metrics) :]:
            axis.remove()
    return figure


def draw_budgets(record: dict) -> Figure:
    """Draw each case's headline at its budgets against bytes served, and at the least budgets against lookup time.

    Marks are means of the seeds, upright strokes their range; the baseline's range is shaded.
    """
    metric = next(metric for metric in record["metrics"] if metric["name"] == record["headline"])
    styles = _styles(record["cases"], record["baseline"])
    with style():
        figure = Figure(figsize=(12.5, 5.6), layout="constrained")
        by_bytes, by_time = figure.subplots(1, 2)
        for place, case in enumerate(record["cases"]):
            color, line = styles[case["name"]]
            look = {"color": color, "marker": MARKS[place % len(MARKS)], "markersize": 5, "linewidth": 1.1}
            points = sorted(budget_points(case), key=lambda point: point["share"])
            x, y = ([point[key] for point in points] for key in ("share", "mean"))
            by_bytes.plot(x, y, line, label=case["name"], **look)
            for point in points:
                by_bytes.plot([point["share"]] * 2, point["range"], color=color, linewidth=0.8)
            # Every case once, at the budget nearest to a tenth.
            point = min(points, key=lambda point: abs(point["share"] - 0.1))
            by_time.plot([point["lookup_us"]], [point["mean"]], **look)
            by_time.plot([point["lookup_us"]] * 2, point["range"], color=color, linewidth=0.8)
            if case["name"] == record["baseline"]:
                for axis in (by_bytes, by_time):
                    axis.axhspan(*point["range"], color=DENSE_COLOR, alpha=0.25, linewidth=0)
        by_bytes.set(xscale="log", xlabel="bytes served over the dense tables'", ylabel=metric["label"])
        by_time.set(
            xscale="log", xlabel="us of thread time to look up 4096 impressions, at the budget nearest to a tenth"
        )
        figure.legend(*by_bytes.get_legend_handles_labels(), fontsize=8, loc="outside right center")
        figure.suptitle(f"{record['title']} ({record['effort']} run)")
    return figure


def save(record: dict, folder: Path) -> Path:
    """Write the picture, named after the study, into a folder; and one of the budgets if the study has any."""
    path = folder / f"{record['study']}.svg"
    draw(record).savefig(path, metadata={"Date": None})
    if any(run.get("points") for case in record["cases"] for run in case["runs"]):
        draw_budgets(record).savefig(folder / f"{record['study']}-budgets.svg", metadata={"Date": None})
    return path
