"""Studies: methods that do one job, trained or built several times each from other seeds, and what may be said of them.

A study is a :class:`Study` in a file of ``bench/studies/``: its cases, what one run of a case measures, and how much
there is to do. The rest is here: running, storing, telling a difference from the spread of seeds, and the picture.
"""

from __future__ import annotations

import importlib
import pkgutil
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gossamer._environment import environment
from gossamer.bench import studies
from gossamer.bench.harness.markdown import markdown_table

BETTER, WORSE, WITHIN, BASELINE = "better", "worse", "within the spread", "baseline"
# Fewer of a case say nothing about a difference.
SEEDS = 3


@dataclass(frozen=True)
class Metric:
    """A number that every run gives.

    Attributes:
        name: its key in a run's ``metrics``.
        label: with its unit.
        digits: after the point.
    """

    name: str
    label: str
    digits: int = 3


@dataclass(frozen=True)
class Case:
    """One method of a study.

    Attributes:
        name: what it is called.
        group: cases of one group are drawn in one panel.
        note: what a reader must know to compare it, or nothing.
    """

    name: str
    group: str
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one run of a case gives.

    Attributes:
        parameters: of what was trained.
        metrics: by name.
        x: of its curve, such as what training has cost so far.
        y: of its curve.
        points: numbers at several settings of the case, such as budgets, by setting and name.
    """

    parameters: int
    metrics: dict[str, float]
    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)
    points: dict[str, dict[str, float]] = field(default_factory=dict)


class Unfit(Exception):
    """A case cannot be built as the study needs it; the message says why."""


# What a run reports while it goes on: the share that is done, and a note.
Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Study:
    """A comparison.

    Attributes:
        name: of ``gossamer bench study NAME``.
        title: of the picture.
        question: what it asks, in a sentence.
        baseline: the case that the others are held against.
        headline: the metric that decides, of which less is better.
        metrics: all of them, in the order of the table.
        x_label: of the curves.
        y_label: of the curves.
        cases: what there is to compare, asked when the study begins.
        settings: by effort, ``"quick"`` and ``"full"``: what :attr:`run` is given.
        seeds: by effort, how many there are.
        run: ``run(case name, seed, settings, report)``. It raises :class:`Unfit` where the case cannot be made.
        load: ``load(settings, folder)``, the settings with the data of a folder, for a study that needs some. It raises
            ``ValueError`` where there is no folder or it does not hold them.
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
    """The studies that there are."""
    found = (importlib.import_module(f"{studies.__name__}.{m.name}") for m in pkgutil.iter_modules(studies.__path__))
    return sorted(module.STUDY.name for module in found if hasattr(module, "STUDY"))


def study(name: str) -> Study:
    """The study of that name.

    Raises:
        ValueError: there is none.
    """
    known = names()
    if name not in known:
        raise ValueError(f"the study must be one of {', '.join(known)}, got {name!r}")
    return importlib.import_module(f"{studies.__name__}.{name}").STUDY


def chosen_cases(chosen: Study, wanted: Iterable[str] | None) -> list[Case]:
    """The cases of a study, or those of the names given and the baseline.

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
    """The settings of an effort, with the data of a folder where the study takes some.

    Raises:
        ValueError: the study needs a folder and has none, or takes none and has one, or the folder does not fit.
    """
    if chosen.load is not None:
        return chosen.load(chosen.settings[effort], folder)
    if folder is not None:
        raise ValueError(f"--data must not be given with study {chosen.name}, which makes its own")
    return chosen.settings[effort]


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
    """Run every case from every seed, seed after seed, and return the record that is stored.

    Args:
        chosen: the study.
        cases: of it, from :func:`chosen_cases`.
        effort: ``"quick"`` or ``"full"``.
        seeds: how many; None for the study's own number.
        settings: from :func:`loaded`; None for those of the effort.
        report: called while a run goes on, with its case and seed, the share of all work that is done, and a note.
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
    """What the headline says of a case beside the baseline.

    ``"better"`` or ``"worse"`` where the nearest seeds of the two are further apart than either's seeds among
    themselves are, and there are at least :data:`SEEDS` of each; else ``"within the spread"``. Of three normal draws
    and three more of the same distribution, 1 pair in 130 is called different by chance; ranges without overlap would
    be 1 in 10.
    """
    base = next((c for c in record["cases"] if c["name"] == record["baseline"]), None)
    if base is None or case is base:
        return BASELINE if case is base else WITHIN
    return difference(values(case, record["headline"]), values(base, record["headline"]))


def difference(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The rule of :func:`verdict` on the seeds of two cases, of which less is better."""
    if min(len(ours), len(theirs)) < SEEDS:
        return WITHIN
    within = max(max(ours) - min(ours), max(theirs) - min(theirs))
    if max(ours) + within < min(theirs):
        return BETTER
    return WORSE if min(ours) - within > max(theirs) else WITHIN


def spread(numbers: Sequence[float], digits: int) -> str:
    """The mean, and the least and the greatest where there are several that differ."""
    mean = f"{statistics.fmean(numbers):.{digits}f}"
    low, high = f"{min(numbers):.{digits}f}", f"{max(numbers):.{digits}f}"
    return mean if low == high else f"{mean} ({low} to {high})"


def rows(record: dict) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a stored study's table: of each group the best first, by the mean of the headline."""
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
    """What stands under the table: the rule, the cases' notes, and what was left out and why."""
    counts = sorted({len(case["runs"]) for case in record["cases"]})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else "no"
    rule = "only where the nearest seeds of both are further apart than either's own"
    lines = [
        f"{seeds} seeds a case. A case is better or worse than {record['baseline']} {rule}. "
        f"A {record['effort']} run, {environment_line(record)}."
    ]
    lines += [f"* {case['name']}: {case['note']}." for case in record["cases"] if case["note"]]
    lines += [f"{left['name']} was left out: {left['reason']}." for left in record["left_out"]]
    if record["interrupted"]:
        lines.append("The run was interrupted.")
    return lines


def environment_line(record: dict) -> str:
    """On what it ran."""
    where = record["environment"]
    return f"{where.get('cpu') or 'unknown processor'}, {where['threads']} threads, torch {where['versions']['torch']}"


def check_seeds(seeds: int | None) -> None:
    """``seeds`` must be at least 1, or None."""
    if seeds is not None and seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {seeds}")


def markdown(record: dict) -> str:
    """The table and what stands under it, for a document."""
    head, lines = rows(record)
    return markdown_table(head, lines, labels=2) + "\n" + "\n\n".join(notes(record)) + "\n"
