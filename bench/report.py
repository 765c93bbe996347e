"""Tables and sentences about benchmark results."""

from __future__ import annotations

import sys
from types import TracebackType

import rich.box
import rich.console
import rich.markup
import rich.status
import rich.table

from gossamer.bench.case import DENSE, OURS, REFERENCE
from gossamer.bench.ceilings import Ceilings
from gossamer.bench.harness import CaseResult, Results, Row
from gossamer.bench.timing import quantile


def make_console() -> rich.console.Console:
    """Standard output, wide enough for the table where it is no terminal."""
    console = rich.console.Console(highlight=False)
    return console if console.is_terminal else rich.console.Console(highlight=False, width=120)


def _say(console: rich.console.Console, text: str, style: str | None = None) -> None:
    """Print words: wrapped on a terminal, else a line each however long."""
    console.print(text, style=style, markup=False, soft_wrap=not console.is_terminal)


class Progress:
    """A status line: live on a terminal, under what ``console`` prints; else one line a case on standard error."""

    def __init__(self, console: rich.console.Console) -> None:
        # Two consoles on one terminal would write over each other.
        shown = console if console.is_terminal else rich.console.Console(stderr=True)
        self._width = shown.width - 4
        self._status = rich.status.Status("", console=shown) if shown.is_terminal else None
        self._last = ""

    def __enter__(self) -> Progress:
        """Start the line."""
        if self._status:
            self._status.start()
        return self

    def __call__(self, message: str) -> None:
        """Say what is going on."""
        if self._status:
            self._status.update(rich.markup.escape(message[: self._width]))
        elif message.startswith(("measuring", "preparing")) and message != self._last:
            print(message, file=sys.stderr, flush=True)
            self._last = message

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the line."""
        if self._status:
            self._status.stop()


def _milliseconds(row: Row) -> str:
    low, middle, high = (_digits(1e3 * quantile(row.seconds, q)) for q in (0.2, 0.5, 0.8))
    return f"{middle} ({low}–{high})"


def _digits(value: float) -> str:
    """Three significant digits, and no exponent."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def _mebibytes(count: int | None) -> str:
    return "" if count is None else _digits(count / 2**20)


def _rate(result: CaseResult, row: Row) -> str:
    if not result.case.flops:
        return _digits(result.case.bytes / row.median / 1e9)
    return _digits(result.case.flops / row.median / 1e12)


def print_case(console: rich.console.Console, result: CaseResult, ceilings: Ceilings) -> None:
    """Print one case: the table, what was skipped, what was checked, and the sentence."""
    case, dense = result.case, result.row(DENSE)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("variant")
    ratio = "×dense" if dense is None or "dense" in dense.name else "×baseline"
    rate = "TFLOP/s" if case.flops else "GB/s"
    for column in ("ms (p20–p80)", rate, "ceiling", ratio, "peak MiB", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result.rows:
        error = "" if row.error is None else f"{row.error:.1e}"
        if not row.seconds:
            table.add_row(row.name, row.status, "", "", "", "", error)
            continue
        times = f"{row.median / dense.median:.2f}" if dense else ""
        share = f"{100 * result.floor / row.median:.0f}%"
        table.add_row(row.name, _milliseconds(row), _rate(result, row), share, times, _mebibytes(row.peak_bytes), error)
    _say(console, case.title, style="bold")
    console.print(table)
    for row in result.rows:
        if row.message:
            _say(console, f"  {row.name}: {'' if row.seconds else row.status + ': '}{row.message}")
    for reason in dict.fromkeys(case.skipped.values()):
        names = ", ".join(name for name, why in case.skipped.items() if why == reason)
        _say(console, f"  skipped {names}: {reason}")
    gemm = ceilings.gemm.get(case.dtype)
    product = f"{gemm / 1e12:.3g} TFLOP/s for a large {case.dtype} product, " if gemm else ""
    _say(console, f"  ceilings in this run: {product}{ceilings.copy / 1e9:.0f} GB/s for a copy")
    _say(console, f"  checked against float64: {case.checked}")
    if sentence := compare(result):
        _say(console, sentence)
    console.print()


def _times(ratio: float) -> str:
    """``ratio`` is ours over theirs."""
    if ratio < 0.98:
        return f"{1 / ratio:.2f}x faster than"
    return f"{ratio:.2f}x slower than" if ratio > 1.02 else "as fast as"


def compare(result: CaseResult) -> str:
    """One sentence: ours against each reference, and against dense; empty where ours has no time."""
    ours, dense = result.row(OURS), result.row(DENSE)
    if ours is None:
        return ""
    parts = [f"{_times(ours.median / r.median)} {r.name}" for r in result.rows if r.role == REFERENCE and r.seconds]
    if dense:
        parts.append(f"takes {ours.median / dense.median:.2f}x the time of {dense.name}")
    if not parts:
        return ""
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{ours.name} {'' if listed.startswith('takes') else 'is '}{listed}."


def _span(ratios: list[float], form: str) -> str:
    low, high = min(ratios), max(ratios)
    return f"{form.format(low)}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {form.format(high)}"


def print_summary(console: rich.console.Console, results: Results) -> None:
    """Print the last sentence: ours against each baseline over all cases, or what is wrong."""
    if not results.correct:
        bad = [
            f"{row.name} ({result.case.title})"
            for result in results.cases
            for row in result.rows
            if row.status == "wrong" or (row.status == "failed" and row.role == OURS)
        ]
        _say(console, f"Wrong or failed: {'; '.join(bad)}.")
        return
    speedups: dict[str, list[float]] = {}
    dense_name, dense_ratios = "", []
    for result in results.cases:
        ours, dense = result.row(OURS), result.row(DENSE)
        if dense:
            dense_name = dense.name
            dense_ratios.append(ours.median / dense.median)
        for row in result.rows:
            if row.role == REFERENCE and row.seconds:
                speedups.setdefault(row.name, []).append(row.median / ours.median)
    parts = [f"takes {_span(dense_ratios, '{:.2f}x')} the time of {dense_name}"] if dense_ratios else []
    speeds = [f"{_span(ratios, '{:.2f}x')} the speed of {name}" for name, ratios in speedups.items()]
    if speeds:
        parts.append(f"runs at {' and '.join(speeds)}")
    cases = f"{len(results.cases)} case{'s' if len(results.cases) > 1 else ''}"
    if parts:
        _say(console, f"Over {cases}, gossamer {' and '.join(parts)}.")
