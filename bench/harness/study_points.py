"""The table of a study run at several budgets: the headline at each, and which cases the seeds distinguish."""

from __future__ import annotations

import math
import statistics

from gossamer.bench.harness.markdown import markdown_table
from gossamer.bench.harness.study import BASELINE, BETTER, WORSE, difference, spread

# The columns of the table are these budgets. Another budget is shown in the nearest column, beside its value.
COLUMNS = {"1/2": 0.5, "1/4": 0.25, "1/10": 0.1, "1/100": 0.01}
# A case that fills less than this share of a budget is named.
FULL = 0.99


def columns(case: dict) -> dict[str, str]:
    """The budget of a case that each column shows: the one nearest to the column's, where several belong to it."""
    found: dict[str, str] = {}
    for label in case["runs"][0]["points"]:
        if not _is_number(label):
            continue
        column = min(COLUMNS, key=lambda name: abs(math.log(float(label) / COLUMNS[name])))
        if column not in found or _distance(label, column) < _distance(found[column], column):
            found[column] = label
    return found


def _is_number(label: str) -> bool:
    try:
        return float(label) > 0
    except ValueError:
        return False


def _distance(label: str, column: str) -> float:
    return abs(math.log(float(label) / COLUMNS[column]))


def at(case: dict, label: str, metric: str) -> list[float]:
    """A metric of every run of a stored case at one of its budgets."""
    return [run["points"][label][metric] for run in case["runs"] if label in run["points"]]


def _filled(case: dict) -> list[float]:
    """The share of its budget that a case fills, at each budget of each run."""
    found = (run["points"].items() for run in case["runs"])
    return [point["share"] / float(label) for points in found for label, point in points if _is_number(label)]


def budget_points(case: dict) -> list[dict]:
    """``share``, ``lookup_us``, and ``mean`` and ``range`` of the loss at each budget of a case, over its seeds."""
    found = []
    for label in case["runs"][0]["points"]:
        losses = at(case, label, "loss")
        means = {name: statistics.fmean(at(case, label, name)) for name in ("share", "lookup_us")}
        found.append(means | {"mean": statistics.fmean(losses), "range": (min(losses), max(losses))})
    return found


def markdown(record: dict) -> str:
    """The headline of each case at each budget, and the cases that the seeds do not distinguish from the best."""
    headline = record["headline"]
    metric = next(metric for metric in record["metrics"] if metric["name"] == headline)
    base = next(case for case in record["cases"] if case["name"] == record["baseline"])
    base_values = [run["metrics"][headline] for run in base["runs"]]
    others = [case for case in record["cases"] if case is not base]
    lines = []
    for case in others:
        cells, chosen = [], columns(case)
        for column in COLUMNS:
            if column not in chosen:
                cells.append("")
                continue
            label = chosen[column]
            found = at(case, label, headline)
            said = difference(found, base_values)
            text = spread(found, metric["digits"]) + (f", {said}" if said in (BETTER, WORSE) else "")
            cells.append(text if float(label) == COLUMNS[column] else f"at {label}: {text}")
        lines.append([case["name"] + (" *" if case["note"] else ""), *cells])
    lines.sort(key=lambda line: line[0])
    lines.insert(0, [base["name"], f"{spread(base_values, metric['digits'])}, {BASELINE} at 1", *[""] * 3])
    head = [metric["label"], *(f"{column} of the bytes" for column in COLUMNS)]
    text = markdown_table(head, lines) + "\n"
    text += (
        f"“{BETTER}” and “{WORSE}” compare with {base['name']}: the gap between the ranges of their seeds is wider "
        "than either range. Without either word, the seeds do not distinguish the two. An empty cell is a budget that "
        "the method cannot reach, or was not run at. "
    )
    least = {case["name"]: min(_filled(case)) for case in others}
    most = max(max(_filled(case)) for case in others)
    small = [f"{name} ({share:.2f})" for name, share in sorted(least.items()) if share < FULL]
    text += f"The frozen tables fill between {FULL} and {most:.3f} of the budget"
    text += (f", except for {', '.join(small)}" if small else "") + ".\n"
    for column in COLUMNS:
        at_column = {
            case["name"]: at(case, chosen[column], headline)
            for case in others
            if column in (chosen := columns(case)) and float(chosen[column]) == COLUMNS[column]
        }
        if not at_column:
            continue
        best = min(at_column, key=lambda name: statistics.fmean(at_column[name]))
        same = sorted(name for name in at_column if difference(at_column[name], at_column[best]) != WORSE)
        same.remove(best)
        worse = sorted(set(at_column) - set(same) - {best})
        text += (
            f"\nAt {column}, {best} has the lowest mean. Not distinguished from it: {', '.join(same) or 'none'}. "
            f"Worse: {', '.join(worse) or 'none'}.\n"
        )
    return text
