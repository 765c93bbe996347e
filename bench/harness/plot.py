"""Figures of a stored run: the roofline, speed against dense, and cost against size for a sweep."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from gossamer.bench.harness.case import DENSE, DIRECTIONS, OURS
from gossamer.bench.harness.sweep import SKEW, position

# Colours that are readable on white and on black. Ink and grid are placeholders that a page replaces to fit its colour
# scheme.
OURS_COLOR, DENSE_COLOR = "#2f81f7", "#8b949e"
OTHERS = ("#e3873c", "#2da44e", "#a371f7", "#d6568f", "#b58a1b", "#1b9aaa", "#c4432b", "#6e7bd9")
INK, GRID = "#24292f", "#d9dee4"
MARKERS = dict(zip(DIRECTIONS, ("o", "s"), strict=True))
WORDS = dict(zip(DIRECTIONS, ("forward", "forward+backward"), strict=True))


@contextmanager
def style() -> Iterator[None]:
    settings = {
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "legend.frameon": False,
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "gossamer",
        **dict.fromkeys(
            ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK
        ),
    }
    with matplotlib.rc_context(settings):
        yield


def colors(record: dict) -> dict[str, str]:
    """A colour for each variant of a run: one for ours, one for dense, and one after the other for the rest."""
    found: dict[str, str] = {}
    others = iter(OTHERS * 4)
    for case in record["cases"]:
        for variant in case["variants"]:
            if variant["name"] not in found:
                own = {OURS: OURS_COLOR, DENSE: DENSE_COLOR}
                found[variant["name"]] = own.get(variant["role"]) or next(others, DENSE_COLOR)
    return found


def _timed(case: dict) -> list[dict]:
    return [variant for variant in case["variants"] if variant["seconds"]]


def _legend(figure: Figure, axes: list[Axes], more: dict[str, Line2D] | None = None) -> None:
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    entries |= more or {}
    # Width in inches of the longest label at 10 points, and of the line beside it.
    width = 0.6 + 0.09 * max(map(len, entries), default=0)
    columns = max(1, min(len(entries), int(figure.get_figwidth() / width)))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)


def _log(axis: Axes, *names: str) -> None:
    """Logarithmic axes with plain numbers."""
    for name in names:
        getattr(axis, f"set_{name}scale")("log")
        which = getattr(axis, f"{name}axis")
        which.set_major_formatter(FuncFormatter(_plain))
        low, high = sorted(getattr(axis, f"get_{name}lim")())
        # Over a short range, powers of ten give too few ticks.
        which.set_minor_formatter(FuncFormatter(_plain) if high < 10 * low else NullFormatter())


def _plain(value: float, _: object = None) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def roofline(record: dict) -> Figure | None:
    """FLOP/s against FLOPs per byte, below the ceilings of the run; None if no case counts FLOPs."""
    cases = [case for case in record["cases"] if case["flops"] and _timed(case)]
    dtypes = list(dict.fromkeys(case["dtype"] for case in cases))
    if not dtypes:
        return None
    palette, bandwidth = colors(record), record["ceilings"]["bandwidth"]
    with style():
        figure = Figure(figsize=(max(8.4, 4.2 * len(dtypes)), 4.6), layout="constrained")
        axes = list(figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0])
        for axis, dtype in zip(axes, dtypes, strict=True):
            mine = [case for case in cases if case["dtype"] == dtype]
            peak = record["ceilings"]["gemm"][dtype]
            at = [case["flops"] / case["bytes"] for case in mine]
            left, right = min(*at, peak / bandwidth) / 4, max(*at, peak / bandwidth) * 4
            line = [left, peak / bandwidth, right]
            axis.plot(line, [min(peak, bandwidth * x) / 1e9 for x in line], color=INK, linewidth=1.2)
            axis.annotate(
                f"{_plain(peak / 1e9)} GFLOP/s",
                (right, peak / 1e9),
                xytext=(0, 4),
                textcoords="offset points",
                ha="right",
            )
            axis.annotate(
                f"{_plain(bandwidth / 1e9)} GB/s",
                (left, bandwidth * left / 1e9),
                xytext=(6, 0),
                textcoords="offset points",
                va="top",
            )
            for case, x in zip(mine, at, strict=True):
                for variant in _timed(case):
                    axis.plot(
                        [x],
                        [variant["flops_per_second"] / 1e9],
                        MARKERS[case["direction"]],
                        color=palette[variant["name"]],
                        markersize=8 if variant["role"] == OURS else 6,
                        alpha=0.9,
                    )
            axis.set(xlabel="FLOPs per byte (fewest bytes)", title=dtype)
            _log(axis, "x", "y")
        axes[0].set_ylabel("GFLOP/s")
        shown = dict.fromkeys(variant["name"] for case in cases for variant in _timed(case))
        key = {name: Line2D([], [], color=palette[name], linewidth=5) for name in shown}
        for direction in dict.fromkeys(case["direction"] for case in cases):
            key[WORDS[direction]] = Line2D([], [], color=INK, marker=MARKERS[direction], linestyle="")
        _legend(figure, [], key)
    return figure


def against_dense(record: dict) -> Figure | None:
    """Speed of each variant over the dense baseline's, bars grouped by case; None for a sweep or without a baseline."""
    if record["sweep"]:
        return None
    groups = []
    for case in record["cases"]:
        dense = next((v for v in _timed(case) if v["role"] == DENSE), None)
        others = [v for v in _timed(case) if v["role"] != DENSE]
        if dense and others:
            groups.append((f"{case['shape']}\n{case['dtype']} {WORDS[case['direction']]}", others))
    if not groups:
        return None
    palette = colors(record)
    with style():
        bars = sum(len(others) for _, others in groups)
        figure = Figure(figsize=(8.4, 1.2 + 0.26 * bars + 0.24 * len(groups)), layout="constrained")
        axis = figure.subplots()
        y, ticks = 0.0, []
        for label, others in groups:
            top = y
            for variant in others:
                speed = 1 / variant["ratio_to_dense"]
                axis.barh(y, speed, height=0.85, color=palette[variant["name"]], label=variant["name"])
                axis.annotate(f"{speed:.2f}", (speed, y), xytext=(4, 0), textcoords="offset points", va="center")
                y += 1
            ticks.append(((top + y - 1) / 2, label))
            y += 0.9
        axis.axvline(1, color=DENSE_COLOR, linewidth=2, label="dense baseline", zorder=3)
        axis.set_yticks([place for place, _ in ticks], [label for _, label in ticks])
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", visible=False)
        axis.set_ylim(y - 0.9, -1)
        axis.margins(x=0.1)
        axis.set_xlabel("speed over the dense baseline's (higher is faster)")
        _legend(figure, [axis])
    return figure


def scaling(record: dict) -> Figure | None:
    """Time against the size that the sweep varies, one panel per dtype and direction; None for a run without a
    sweep.
    """
    sweep = record["sweep"]
    if not sweep:
        return None
    panels: dict[tuple[str, str], list[dict]] = {}
    for case in record["cases"]:
        if _timed(case):
            panels.setdefault((case["dtype"], case["direction"]), []).append(case)
    if not panels:
        return None
    palette, numeric = colors(record), sweep["symbol"] != SKEW
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with style():
        figure = Figure(figsize=(8.4, 0.7 + 3.3 * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        for axis, ((dtype, direction), cases) in zip(axes, panels.items(), strict=False):
            for name in dict.fromkeys(v["name"] for case in cases for v in _timed(case)):
                points = [(position(sweep, c), v) for c in cases for v in _timed(c) if v["name"] == name]
                at = [x if numeric else sweep["values"].index(x) for x, _ in points]
                low, middle, high = ([1e3 * v[q] for _, v in points] for q in ("p20", "median", "p80"))
                if numeric:
                    axis.fill_between(at, low, high, color=palette[name], alpha=0.18, linewidth=0)
                else:
                    axis.vlines(at, low, high, color=palette[name], linewidth=2, alpha=0.6)
                axis.plot(at, middle, "o-" if numeric else "o:", color=palette[name], markersize=5, label=name)
            if numeric:
                axis.set_xscale("log", base=2)
                axis.set_xticks(sweep["values"], list(map(str, sweep["values"])))
                axis.xaxis.set_minor_locator(NullLocator())
            else:
                axis.set_xticks(range(len(sweep["values"])), sweep["values"])
                axis.margins(x=0.15)
            axis.set(xlabel=sweep["dimension"], ylabel="ms", title=f"{dtype} {WORDS[direction]}")
            _log(axis, "y")
        _legend(figure, axes[: len(panels)])
    return figure


FIGURES = {"roofline": roofline, "against-dense": against_dense, "scaling": scaling}


def save(record: dict, folder: Path) -> list[Path]:
    """Write each figure that the run has as PNG and SVG."""
    written = []
    for name, draw in FIGURES.items():
        with style():
            figure = draw(record)
            for kind in ("png", "svg") if figure else ():
                written.append(folder / f"{name}.{kind}")
                figure.savefig(written[-1], dpi=150, facecolor="white")
    return written


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element for a page: ink and grid take the page's colours, and ids begin with ``name``."""
    stream = io.StringIO()
    with style():
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
