"""Tables and plots of a profile, readable at 100 columns."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence

import rich.box
import rich.console
import rich.table
import rich.text

from gossamer.bench.harness.profile import ProfileResult
from gossamer.bench.harness.profile_events import KernelRow, bandwidth
from gossamer.bench.harness.profile_memory import MemoryTimeline
from gossamer.bench.harness.text import digits, named_table

WIDTH = 100
# Operators that take less than this share of the subject's call are added up in one row.
SMALL = 0.005
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 72
# Share of a memory plot's height above the curves, for the names of the phases.
LABEL_ROOM = 0.32
# Characters of an operator's name in one line.
MOST_NAME = 46


def _ms(seconds: float) -> str:
    return digits(1e3 * seconds)


def _scaled(value: float | None, unit: float) -> str:
    """The value in ``unit``: ``?`` if it is unknown, empty if it is zero."""
    if value is None:
        return "?"
    return "" if value == 0 else digits(value / unit) if value / unit >= 0.01 else "<0.01"


def _ceiling(row: KernelRow) -> str:
    if row.fraction is None:
        return ""
    return f"{100 * row.fraction:.0f}% {'GEMM' if row.bound == 'compute' else 'memory'}"


def _share(share: float) -> str:
    return f"{100 * share:.1f}%"


def _count(calls: float) -> str:
    return "" if calls == 0 else f"{calls:.0f}" if calls >= 10 or calls == int(calls) else f"{calls:.1f}"


def _cells(row: KernelRow, name: str) -> list[str]:
    outside = row.calls == 0
    return [
        name,
        _ms(row.seconds),
        _share(row.share),
        _count(row.calls),
        "" if outside else _scaled(row.bytes, 1e6),
        "" if outside else _scaled(row.flops, 1e9),
        _ceiling(row),
    ]


def _summary(result: ProfileResult) -> rich.table.Table:
    table = named_table("ms", *(s.name for s in result.subjects), most=MOST_NAME)
    for phase in result.subjects[0].profiled_seconds:
        table.add_row(phase, *(_ms(s.profiled_seconds.get(phase, 0.0)) for s in result.subjects))
    table.add_row("whole call, profiled", *(_ms(sum(s.profiled_seconds.values())) for s in result.subjects))
    table.add_row("whole call, not profiled (median)", *(_ms(s.seconds) for s in result.subjects))
    if all(s.launches is not None for s in result.subjects):
        table.add_row("kernels and copies launched", *(_count(s.launches) for s in result.subjects))
    return table


def _phase_rows(table: rich.table.Table, rows: Sequence[KernelRow]) -> None:
    shown = [r for r in rows if r.part_of is None and (r.share >= SMALL or r.name.startswith("gossamer::"))]
    for row in shown:
        parts = [r for r in rows if r.part_of == row.name]
        # An operator with a single kernel needs no row for the kernel.
        if len(parts) == 1:
            name = f"  {row.name}: {parts[0].name}"
            parts = []
        else:
            name = f"  {row.name}"
        table.add_row(*_cells(row, name))
        large = [part for part in parts if part.share >= SMALL / 5]
        for part in large:
            table.add_row(*_cells(part, f"    {part.name}"), style="dim")
        _others(table, "    ", [part for part in parts if part not in large], SMALL / 5)
    _others(table, "  ", [r for r in rows if r.part_of is None and r not in shown], SMALL)


def _others(table: rich.table.Table, indent: str, rows: Sequence[KernelRow], limit: float) -> None:
    if rows:
        seconds, share = sum(r.seconds for r in rows), sum(r.share for r in rows)
        word = "other" if len(rows) == 1 else "others"
        table.add_row(f"{indent}{len(rows)} {word} below {100 * limit:.1f}%", _ms(seconds), _share(share))


def _phase_table(result: ProfileResult, phase: str) -> rich.table.Table:
    table = named_table(phase, "ms", "share", "calls", "MB", "GFLOP", "of ceiling", most=MOST_NAME)
    for i, subject in enumerate(result.subjects):
        rows = [r for r in result.rows if r.subject == subject.name and r.phase == phase]
        total = sum(subject.profiled_seconds.values())
        seconds = subject.profiled_seconds[phase]
        table.add_row(subject.name, _ms(seconds), _share(seconds / total if total else 0.0), style="bold")
        _phase_rows(table, rows)
        if i + 1 < len(result.subjects):
            table.add_section()
    return table


def sparkline(timeline: MemoryTimeline, most: float, width: int = SPARK_WIDTH) -> str:
    """The step's bytes in ``width`` characters, each of which shows the most bytes in an equal part of its phase.

    Args:
        timeline: timeline of one subject.
        most: bytes that a full block character stands for.
        width: number of characters, including the bars between phases.
    """
    whole = sum(p.end - p.start for p in timeline.phases) or 1.0
    free = width - (len(timeline.phases) - 1)
    least = max(1, free // 8)
    spare = free - least * len(timeline.phases)
    pieces = []
    for phase in timeline.phases:
        length = least + int(spare * (phase.end - phase.start) / whole)
        pieces.append("".join(_spark(level, most) for level in _levels(timeline, phase.start, phase.end, length)))
    return "|".join(pieces)


def _spark(level: float, most: float) -> str:
    if most <= 0 or level <= 0:
        return SPARKS[0]
    return SPARKS[min(len(SPARKS) - 1, int(level / most * len(SPARKS)))]


def _levels(timeline: MemoryTimeline, start: float, end: float, count: int) -> list[float]:
    levels, at, level = [], 0, 0.0
    for i in range(count):
        until = start + (end - start) * (i + 1) / count
        most = level if i else None
        while at < len(timeline.seconds) and timeline.seconds[at] <= until:
            level = timeline.bytes[at]
            if timeline.seconds[at] >= start:
                most = level if most is None else max(most, level)
            at += 1
        levels.append(level if most is None else most)
    return levels


def _memory(result: ProfileResult) -> Iterator[object]:
    phases = [phase.name for phase in result.memory[0].phases]
    table = named_table("training step: MiB above its start, peak → end", *phases, most=MOST_NAME)
    for timeline in result.memory:
        cells = [f"{_mib(phase.peak)} → {_mib(phase.at_end)}" for phase in timeline.phases]
        table.add_row(timeline.subject, *cells)
    yield table
    most = max(timeline.peak for timeline in result.memory)
    width = max(len(timeline.subject) for timeline in result.memory)
    width = min(width, WIDTH - SPARK_WIDTH - 2)
    for timeline in result.memory:
        yield rich.text.Text(f"{timeline.subject[:width]:{width}}  {sparkline(timeline, most)}", no_wrap=True)
    yield rich.text.Text(f"{'':{width}}  {' | '.join(phases)}: time within each, a full block is {_mib(most)} MiB")


def _mib(value: float) -> str:
    return f"-{digits(-value / 2**20)}" if value < 0 else digits(value / 2**20) if value else "0"


def _notes(result: ProfileResult) -> Iterable[str]:
    gemm = ", ".join(f"{rate / 1e12:.3g} in {dtype}" for dtype, rate in result.ceilings.gemm.items())
    memory = f"memory {digits(bandwidth(result.ceilings) / 1e9)} GB/s"
    yield f"ceilings in this run: {f'TFLOP/s of a large product {gemm}; ' if gemm else ''}{memory}"
    calls = ", ".join(f"{s.calls} of {s.name}" for s in result.subjects)
    yield f"means of {calls} call{'s' if any(s.calls > 1 for s in result.subjects) else ''}; ? is unknown"


def render(result: ProfileResult) -> Iterator[object]:
    """The whole report, for a rich console."""
    yield rich.text.Text(result.title, style="bold")
    for note in _notes(result):
        yield rich.text.Text(note)
    yield ""
    yield _summary(result)
    for phase in result.subjects[0].profiled_seconds:
        yield ""
        yield _phase_table(result, phase)
    if result.memory:
        yield ""
        yield from _memory(result)


def text(result: ProfileResult, width: int = WIDTH) -> str:
    """The report as plain text."""
    out = io.StringIO()
    console = rich.console.Console(file=out, width=width, highlight=False, color_system=None)
    console.print(result)
    return out.getvalue().rstrip("\n")


def plot_memory(result: ProfileResult, path: str | os.PathLike) -> None:
    """Draw the training step's memory to a PNG or SVG file.

    Raises:
        ValueError: the profile has no memory timeline: it was of a forward pass alone.
    """
    if not result.memory:
        raise ValueError("a plot needs the memory of a training step, and this profile has none")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(result.memory), 1, figsize=(9, 2.6 * len(result.memory)), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, timeline in zip(axes[:, 0], result.memory, strict=True):
        end = timeline.phases[-1].end
        times, levels = [*timeline.seconds, end], [*timeline.bytes, timeline.bytes[-1]]
        axis.fill_between([1e3 * t for t in times], [b / 2**20 for b in levels], step="post", alpha=0.35)
        axis.step([1e3 * t for t in times], [b / 2**20 for b in levels], where="post", linewidth=1)
        for i, phase in enumerate(timeline.phases):
            axis.axvline(1e3 * phase.start, color="grey", linewidth=0.6)
            # A short phase leaves no room for a label beside another's, so each label has a line of its own above all
            # curves.
            right = phase.start < 0.85 * end
            axis.annotate(
                phase.name,
                (1e3 * phase.start, 0.985 - LABEL_ROOM * i / len(timeline.phases)),
                xytext=(3 if right else -3, 0),
                xycoords=axis.get_xaxis_transform(),
                textcoords="offset points",
                ha="left" if right else "right",
                va="top",
                fontsize=8,
                color="grey",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
        axis.set_title(f"{timeline.subject}: peak {timeline.peak / 2**20:.1f} MiB", fontsize=9, loc="left")
        axis.set_ylabel("MiB")
        axis.set_xlim(0, 1e3 * end)
    axes[-1, 0].set_xlabel("ms")
    most = max(timeline.peak for timeline in result.memory) / 2**20 or 1.0
    axes[0, 0].set_ylim(-0.03 * most, most / (1 - LABEL_ROOM))  # sets the range of all plots, which share the axis
    figure.savefig(path)
    pyplot.close(figure)
