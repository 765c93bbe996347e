"""Studies: methods for the same task, each trained or built from several seeds, and the differences that these prove.

A study is a :class:`Study` in a file of ``bench/studies/``: its cases, what one run of a case measures, and how much
there is to do. This module does the rest: it runs and stores them, and tells a difference from the spread of seeds.
"""

from __future__ import annotations

import importlib
import pkgutil
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from gossamer._environment import environment
from gossamer.bench import studies
from gossamer.bench.harness.markdown import markdown_table

BETTER, WORSE, WITHIN, BASELINE = "better", "worse", "within the spread", "baseline"
# With fewer seeds of a case, nothing is said about a difference.
SEEDS = 3
FEW = f"under {SEEDS} seeds"


@dataclass(frozen=True)
class Metric:
    """A number that every run returns.

    Attributes:
        name: its key in the ``metrics`` of a run.
        label: its name in tables, with its unit.
        digits: digits after the decimal point.
    """

    name: str
    label: str
    digits: int = 3


@dataclass(frozen=True)
class Case:
    """One method of a study.

    Attributes:
        name: its name.
        group: its group; the cases of a group are drawn in one panel.
        note: what a reader must know to compare it with other cases; may be empty.
    """

    name: str
    group: str
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """The result of one run of a case.

    Attributes:
        parameters: number of parameters trained.
        metrics: metric by name.
        x: x values of its curve, such as the cost of training so far.
        y: y values of its curve.
        points: numbers at several settings of the case, such as budgets: setting -> name -> number.
    """

    parameters: int
    metrics: dict[str, float]
    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)
    points: dict[str, dict[str, float]] = field(default_factory=dict)


class Unfit(Exception):
    """A case cannot be built as the study needs it; the message says why."""


# Called while a run goes on, with the share of the work done and a note.
Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Study:
    """A comparison.

    Attributes:
        name: the NAME of ``gossamer bench study NAME``.
        title: title of the picture.
        question: the question it answers, in a sentence.
        baseline: the case that the others are compared with.
        headline: the metric that decides; less is better.
        metrics: all metrics, in the order of the table.
        x_label: label of the curves' x axis.
        y_label: label of the curves' y axis.
        cases: returns the cases; called when the study begins.
        settings: effort, ``"quick"`` or ``"full"`` -> the settings that :attr:`run` gets.
        seeds: effort -> number of seeds.
        run: ``run(case name, seed, settings, report)``. It raises :class:`Unfit` if the case cannot be built.
        load: for a study that needs data, ``load(settings, folder)`` returns the settings with the data of a folder. It
            raises ``ValueError`` if there is no folder, or if the folder does not hold the data.
    """

    name: str
    title: str
    question: str
    baseline: str
    headline: str
    metrics: tuple[Metric, ...]
    x_label: str
    y_label: str
    cases: Callable[[], Sequence[Case]]
    settings: Mapping[str, object]
    seeds: Mapping[str, int]
    run: Callable[[str, int, object, Report], Outcome]
    load: Callable[[object, Path | None], object] | None = None


def names() -> list[str]:
    """The names of all studies."""
    found = (importlib.import_module(f"{studies.__name__}.{m.name}") for m in pkgutil.iter_modules(studies.__path__))
    return sorted(module.STUDY.name for module in found if hasattr(module, "STUDY"))


def study(name: str) -> Study:
    """The study of that name.

    Raises:
        ValueError: no study has that name.
    """
    known = names()
    if name not in known:
        raise ValueError(f"the study must be one of {', '.join(known)}, got {name!r}")
    return importlib.import_module(f"{studies.__name__}.{name}").STUDY


def chosen_cases(chosen: Study, wanted: Iterable[str] | None) -> list[Case]:
    """All cases of a study, or those of the given names and the baseline.

    Raises:
        ValueError: a name is unknown.
    """
    cases = list(chosen.cases())
    if wanted is None:
        return cases
    wanted = list(wanted)
    known = [case.name for case in cases]
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"cases must be among {', '.join(known)}, got {', '.join(unknown)}")
    return [case for case in cases if case.name in wanted or case.name == chosen.baseline]


def loaded(chosen: Study, effort: str, folder: Path | None) -> object:
    """The settings of an effort, with the data of a folder if the study takes data.

    Raises:
        ValueError: the study needs a folder and none is given, or takes none and one is given, or the folder does not
            hold the data.
    """
    if chosen.load is not None:
        return chosen.load(chosen.settings[effort], folder)
    if folder is not None:
        raise ValueError(f"--data must not be given with study {chosen.name}, which makes its own")
    return chosen.settings[effort]


def at_budgets(chosen: Study, effort: str, budgets: str | None) -> Study:
    """The study with these budgets, shares separated by commas, in the settings of an effort.

    Raises:
        ValueError: a budget is not in (0, 1] or is given twice, or the study has no budgets.
    """
    if budgets is None:
        return chosen
    settings = chosen.settings[effort]
    if not hasattr(settings, "budgets"):
        raise ValueError(f"--budgets must not be given with study {chosen.name}, which has none")
    try:
        shares = tuple(float(share) for share in budgets.split(","))
    except ValueError:
        shares = ()
    if not shares or len(set(shares)) < len(shares) or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"--budgets must be different numbers in (0, 1], separated by commas, got {budgets!r}")
    return replace(chosen, settings={**chosen.settings, effort: replace(settings, budgets=shares)})


def run(
    chosen: Study,
    cases: Sequence[Case],
    *,
    effort: str = "full",
    seeds: int | None = None,
    settings: object | None = None,
    report: Callable[[str, float, str], None] = lambda case, done, note: None,
    so_far: Callable[[dict], None] = lambda record: None,
) -> dict:
    """Run all cases from the first seed, then all from the next, and return the record that is stored.

    Args:
        chosen: the study.
        cases: cases of the study, from :func:`chosen_cases`.
        effort: ``"quick"`` or ``"full"``.
        seeds: number of seeds; None for the study's own number.
        settings: settings from :func:`loaded`; None for those of the effort.
        report: called while a run goes on, with its case and seed, the share of all work done, and a note.
        so_far: called with the record after every run.
    """
    settings = loaded(chosen, effort, None) if settings is None else settings
    count = chosen.seeds[effort] if seeds is None else seeds
    record = {
        "study": chosen.name,
        "effort": effort,
        "title": chosen.title,
        "question": chosen.question,
        "baseline": chosen.baseline,
        "headline": chosen.headline,
        "metrics": [asdict(metric) for metric in chosen.metrics],
        "x_label": chosen.x_label,
        "y_label": chosen.y_label,
        "settings": asdict(chosen.settings[effort]),
        "environment": environment(),
        "cases": [asdict(case) | {"parameters": 0, "runs": []} for case in cases],
        "left_out": [],
        "interrupted": False,
    }
    total, done = count * len(cases), 0
    try:
        for seed in range(count):
            for case in list(record["cases"]):
                name = case["name"]

                def within(share: float, note: str, name: str = name, seed: int = seed, done: int = done) -> None:
                    report(f"{name}, seed {seed}", (done + share) / total, note)

                within(0.0, "")
                try:
                    outcome = chosen.run(name, seed, settings, within)
                except Unfit as error:
                    record["left_out"].append({"name": name, "reason": str(error)})
                    record["cases"].remove(case)
                else:
                    case["parameters"] = outcome.parameters
                    stored = {"seed": seed, "metrics": outcome.metrics, "x": outcome.x, "y": outcome.y}
                    case["runs"].append(stored | ({"points": outcome.points} if outcome.points else {}))
                    so_far(record)
                done += 1
    except KeyboardInterrupt:
        record["interrupted"] = True
    record["cases"] = [case for case in record["cases"] if case["runs"]]
    return record


def values(case: dict, metric: str) -> list[float]:
    """A metric of every run of a stored case."""
    return [run["metrics"][metric] for run in case["runs"]]


def verdict(record: dict, case: dict) -> str:
    """Whether the headline metric tells a case from the baseline.

    ``"better"`` or ``"worse"`` if the gap between the two cases' ranges of seeds is wider than either range, else
    ``"within the spread"``; :data:`FEW` if a case has fewer than :data:`SEEDS` seeds. If both cases have three seeds
    from the same normal distribution, this rule calls 1 pair in 130 different by chance; to ask only that ranges do not
    overlap would call 1 in 10 different.
    """
    base = next((c for c in record["cases"] if c["name"] == record["baseline"]), None)
    if base is None or case is base:
        return BASELINE if case is base else WITHIN
    return difference(values(case, record["headline"]), values(base, record["headline"]))


def difference(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The rule of :func:`verdict`, applied to the values of two cases' seeds; less is better."""
    if min(len(ours), len(theirs)) < SEEDS:
        return FEW
    within = max(max(ours) - min(ours), max(theirs) - min(theirs))
    if max(ours) + within < min(theirs):
        return BETTER
    return WORSE if min(ours) - within > max(theirs) else WITHIN


def spread(numbers: Sequence[float], digits: int) -> str:
    """The mean, and also the least and the greatest value if they differ."""
    mean = f"{statistics.fmean(numbers):.{digits}f}"
    low, high = f"{min(numbers):.{digits}f}", f"{max(numbers):.{digits}f}"
    return mean if low == high else f"{mean} ({low} to {high})"


def rows(record: dict) -> tuple[list[str], list[list[str]]]:
    """The head and lines of a stored study's table; each group begins with the best mean of the headline."""
    metrics = record["metrics"]
    head = ["", "against the baseline", *(metric["label"] for metric in metrics), "parameters"]
    groups = list(dict.fromkeys(case["group"] for case in record["cases"]))
    ordered = sorted(
        record["cases"],
        key=lambda case: (groups.index(case["group"]), statistics.fmean(values(case, record["headline"]))),
    )
    lines = [
        [
            case["name"] + (" *" if case["note"] else ""),
            verdict(record, case),
            *(spread(values(case, metric["name"]), metric["digits"]) for metric in metrics),
            f"{case['parameters']:,}",
        ]
        for case in ordered
    ]
    return head, lines


def notes(record: dict) -> list[str]:
    """The notes under the table: the rule, the cases' notes, and the cases left out, with the reasons."""
    counts = sorted({len(case["runs"]) for case in record["cases"]})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else "no"
    rule = "only if the gap between the ranges of their seeds is wider than either range"
    if counts and counts[0] < SEEDS:
        rule += f" and both have at least {SEEDS} seeds"
    lines = [
        f"{seeds} seeds per case. A case counts as better or worse than {record['baseline']} {rule}. "
        f"A {record['effort']} run, {environment_line(record)}."
    ]
    lines += [f"* {case['name']}: {case['note']}." for case in record["cases"] if case["note"]]
    lines += [f"{left['name']} was left out: {left['reason']}." for left in record["left_out"]]
    if record["interrupted"]:
        lines.append("The run was interrupted.")
    return lines


def environment_line(record: dict) -> str:
    """The machine and versions that it ran on, in one line."""
    where = record["environment"]
    threads = "1 thread" if where["threads"] == 1 else f"{where['threads']} threads"
    return f"{where.get('cpu') or 'unknown processor'}, {threads}, torch {where['versions']['torch']}"


def check_seeds(seeds: int | None) -> None:
    """``seeds`` must be at least 1, or None."""
    if seeds is not None and seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {seeds}")


def markdown(record: dict) -> str:
    """The table and the notes under it, for a document."""
    head, lines = rows(record)
    return markdown_table(head, lines, labels=2) + "\n" + "\n\n".join(notes(record)) + "\n"
