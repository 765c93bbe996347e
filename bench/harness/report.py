"""Tables and sentences about benchmark results."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TextIO

import rich.box
import rich.console
import rich.markup
import rich.status
import rich.table
import torch

from gossamer.bench.harness.case import DENSE, OURS, REFERENCE
from gossamer.bench.harness.ceilings import Ceilings
from gossamer.bench.harness.compare import Change
from gossamer.bench.harness.record import CaseResult, Results, Row
from gossamer.bench.harness.sweep import position
from gossamer.bench.harness.text import digits, named_table
from gossamer.bench.harness.timing import IDLE, NEAR_ROUNDS, quantile

# Least width of a name; numbers are never cut.
LEAST_NAME = 10
# Width in columns if the output is not a terminal, where each row is to stay on one line.
UNLIMITED = 1 << 15


def make_console() -> rich.console.Console:
    """Return standard output, wide enough for the table unless it is a terminal."""
    console = rich.console.Console(highlight=False)
    if console.is_terminal:
        return console
    return rich.console.Console(highlight=False, width=UNLIMITED, file=UntilClosed(sys.stdout))


class UntilClosed:
    """A stream whose reader may close it: the run goes on, since the results still have to be written to files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream: TextIO | None = stream

    def _attempt(self, action: Callable[[TextIO], object]) -> None:
        if self._stream is None:
            return
        try:
            action(self._stream)
        except BrokenPipeError:
            self._stream = None
            # Python flushes standard output once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def write(self, text: str) -> int:
        """Write the text while there is a reader."""
        self._attempt(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush while there is a reader."""
        self._attempt(lambda stream: stream.flush())


def say(console: rich.console.Console, text: str, style: str | None = None) -> None:
    """Print sentences: wrapped on a terminal, one line each elsewhere."""
    console.print(text, style=style, markup=False, soft_wrap=not console.is_terminal)


class Progress:
    """A status line: live below the output of ``console`` on a terminal; else one line per case on standard error."""

    def __init__(self, console: rich.console.Console) -> None:
        # Two consoles on one terminal would overwrite each other.
        shown = console if console.is_terminal else rich.console.Console(stderr=True)
        self._width = shown.width - 4
        self._stage = ""
        self._status = rich.status.Status("", console=shown) if shown.is_terminal else None

    def __enter__(self) -> Progress:
        """Start the line."""
        if self._status:
            self._status.start()
        return self

    def stage(self, message: str) -> None:
        """Say which case begins."""
        self._stage = message
        self(message)
        if not self._status:
            print(message, file=sys.stderr, flush=True)

    def __call__(self, message: str) -> None:
        """Show the current step within a case."""
        if self._status:
            number = self._stage.split(" ")[0] if self._stage.startswith("[") and message != self._stage else ""
            self._status.update(rich.markup.escape(f"{number} {message}".strip()[: self._width]))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the line."""
        if self._status:
            self._status.stop()


def _milliseconds(row: Row) -> str:
    low, middle, high = (digits(1e3 * quantile(row.seconds, q)) for q in (0.2, 0.5, 0.8))
    return f"{middle} ({low}–{high})"


def _rate(result: CaseResult, row: Row) -> str:
    if not result.case.flops:
        return digits(result.case.bytes / row.median / 1e9)
    return digits(result.case.flops / row.median / 1e12)


def print_case(console: rich.console.Console, result: CaseResult, ceilings: Ceilings) -> None:
    """Print one case: the table, what was skipped, what was checked, and the sentence."""
    case, dense = result.case, result.row(DENSE)
    ratio = "×dense" if dense is None or "dense" in dense.name else "×baseline"
    rate = "TFLOP/s" if case.flops else "GB/s"
    columns = ("variant", "ms (p20–p80)", rate, "attainable", f"{ratio} (90%)", "host ms", "peak MiB", "error")
    # Weights of different sizes have different floors.
    sized = any(row.bytes for row in result.rows)
    columns = (*columns[:4], "GB/s", "of memory", *columns[4:]) if sized else columns
    # A narrow terminal shows fewer columns; files hold them all.
    shown = [i for i, column in enumerate(columns) if column not in _hidden(console.width)]
    table = named_table(*(columns[i] for i in shown), least=LEAST_NAME)
    for row in result.rows:
        error = "" if row.error is None else f"{row.error:.1e}"
        if not row.seconds:
            cells = (row.name, row.status, *[""] * (len(columns) - 3), error)
            table.add_row(*(cells[i] for i in shown))
            continue
        times = f"{row.times(dense):.2f}" if dense else ""
        if dense and row is not dense:
            low, high = row.times_interval(dense)
            times += f" ({low:.2f}–{high:.2f})"
        share = f"{100 * result.floor / row.median:.0f}%"
        host = "" if row.host_seconds is None else digits(1e3 * row.host_seconds)
        peak = "" if row.peak_bytes is None else digits(row.peak_bytes / 2**20)
        moved = (row.bytes or case.bytes) / row.median
        memory = (digits(moved / 1e9), f"{100 * moved / ceilings.bandwidth:.0f}%") if sized else ()
        cells = (row.name, _milliseconds(row), _rate(result, row), share, *memory, times, host, peak, error)
        table.add_row(*(cells[i] for i in shown))
    say(console, case.title, style="bold")
    console.print(table)
    for row in result.rows:
        if row.message:
            say(console, f"  {row.name}: {'' if row.seconds else row.status + ': '}{row.message}")
    for reason in dict.fromkeys(case.skipped.values()):
        names = ", ".join(name for name, why in case.skipped.items() if why == reason)
        say(console, f"  skipped {names}: {reason}")
    say(console, f"  {_ceilings(result, ceilings)}")
    say(console, f"  {_method(result)}")
    say(console, f"  checked against float64: {case.checked}")
    if sentence := compare(result):
        say(console, sentence)
    console.print()


def _ceilings(result: CaseResult, ceilings: Ceilings) -> str:
    """Describe the ceilings measured in this run, and the least time that they allow for the case."""
    case, gemm = result.case, ceilings.gemm.get(result.case.dtype)
    parts = [f"{gemm / 1e12:.3g} TFLOP/s for a large {case.dtype} product"] if gemm else []
    parts.append(f"{ceilings.copy / 1e9:.3g} GB/s for a copy")
    if ceilings.read:
        parts.append(f"{ceilings.read / 1e9:.3g} GB/s for a read")
    rate = f"{case.flops / result.floor / 1e12:.3g} TFLOP/s" if case.flops else f"{ceilings.bandwidth / 1e9:.3g} GB/s"
    return f"ceilings in this run: {', '.join(parts)}; attainable here: {rate}, {digits(1e3 * result.floor)} ms"


def _cores(result: CaseResult) -> str:
    if not result.core_distance:
        return ""
    words = f" whose cores are {1e9 * result.core_distance:.0f} ns apart"
    near = [close for row in result.rows for close in row.near]
    if all(near):
        return words
    return (
        f"{words}; in {100 * (1 - sum(near) / len(near)):.0f}% of the samples the system had moved them further apart; "
        f"ratios leave those rounds out if at least {NEAR_ROUNDS} others remain"
    )


def _method(result: CaseResult) -> str:
    """Describe how the samples were taken."""
    by: dict[str, list[str]] = {}
    for row in result.rows:
        if row.seconds:
            by.setdefault(row.timed_by, []).append(row.name)
    if result.case.device.type == "cpu":
        return f"timed by the wall clock on {torch.get_num_threads()} threads{_cores(result)}"
    return "timed by " + "; ".join(f"{method}: {', '.join(names)}" for method, names in by.items())


def _times(ours: Row, other: Row) -> str:
    """Compare our time with another in words: faster or slower only if the 90% interval of the ratio excludes 1."""
    ratio, (low, high) = ours.times(other), ours.times_interval(other)
    if low <= 1 <= high:
        return f"not measurably different from (×{low:.2f}–{high:.2f})"
    if ratio < 0.98:
        return f"{1 / ratio:.2f}x faster than"
    return f"{ratio:.2f}x slower than" if ratio > 1.02 else "as fast as"


def _times_of_dense(ours: Row, dense: Row) -> str:
    ratio, (low, high) = ours.times(dense), ours.times_interval(dense)
    unclear = f" ({low:.2f}–{high:.2f}: no measurable difference)" if low <= 1 <= high else ""
    return f"takes {ratio:.2f}x the time of {dense.name}{unclear}"


def compare(result: CaseResult) -> str:
    """One sentence that compares ours with each reference and with dense; empty if ours has no time."""
    ours, dense = result.row(OURS), result.row(DENSE)
    if ours is None:
        return ""
    parts = [f"{_times(ours, r)} {r.name}" for r in result.rows if r.role == REFERENCE and r.seconds]
    if dense:
        parts.append(_times_of_dense(ours, dense))
    if not parts:
        return ""
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{ours.name} {'' if listed.startswith('takes') else 'is '}{listed}."


def _span(ratios: list[float], form: str) -> str:
    low, high = min(ratios), max(ratios)
    return f"{form.format(low)}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {form.format(high)}"


def _hidden(width: int) -> tuple[str, ...]:
    """The columns that a console of this width hides."""
    return ("host ms", "peak MiB", "attainable")[: 3 if width < 85 else 2 if width < 105 else 0]


def print_sweep(console: rich.console.Console, record: dict) -> None:
    """Print median milliseconds against the dimension that the sweep varies, in one table per dtype and direction."""
    sweep, cases = record["sweep"], record["cases"]
    for dtype, direction in dict.fromkeys((case["dtype"], case["direction"]) for case in cases):
        mine = [case for case in cases if (case["dtype"], case["direction"]) == (dtype, direction)]
        names = list(dict.fromkeys(variant["name"] for case in mine for variant in case["variants"]))
        table = named_table(sweep["dimension"], *names, least=LEAST_NAME)
        for case in mine:
            medians = {v["name"]: digits(1e3 * v["median"]) for v in case["variants"] if v["seconds"]}
            table.add_row(str(position(sweep, case)), *(medians.get(name, "") for name in names))
        say(console, f"{mine[0]['family']} {dtype} {direction}: median ms against {sweep['dimension']}", style="bold")
        console.print(table)
        console.print()


def print_changes(
    console: rich.console.Console, changes: list[Change], differences: Iterable[str], earlier: str
) -> None:
    """Print the changes since an earlier run, and the conditions in which the two runs differed."""
    for line in differences:
        say(console, f"warning: measured under different conditions: {line}", style="yellow")
    if not changes:
        say(console, f"{earlier} has no row in common with this run.")
        return
    table = named_table("case", "variant", "ms then", "ms now", "change", "", least=LEAST_NAME)
    for c in changes:
        then, now = digits(1e3 * c.then[1]), digits(1e3 * c.now[1])
        table.add_row(c.case, c.variant, then, now, f"{100 * (c.ratio - 1):+.1f}%", c.verdict)
    say(console, f"against {earlier}", style="bold")
    console.print(table)
    console.print()


def how_busy(slowing: float) -> str:
    """The sentence on how idle the machine was."""
    found = f"Calls took {100 * slowing:.1f}% longer in the median than in their shortest samples"
    if slowing <= IDLE:
        return f"{found}."
    return f"{found}: the machine was not idle, and other runs may find ratios that differ by more than a tenth."


def summary(results: Results) -> str:
    """The last sentence: ours compared with each baseline over all cases, or the failures."""
    if not results.correct:
        bad = [f"{row.name} ({result.case.title})" for result in results.cases for row in result.rows if row.faulty]
        return f"Wrong or failed: {'; '.join(bad)}."
    speedups: dict[str, list[float]] = {}
    dense_name, dense_ratios = "", []
    for result in results.cases:
        ours, dense = result.row(OURS), result.row(DENSE)
        if dense:
            dense_name = dense.name
            dense_ratios.append(ours.times(dense))
        for row in result.rows:
            if row.role == REFERENCE and row.seconds:
                speedups.setdefault(row.name, []).append(row.times(ours))
    parts = [f"takes {_span(dense_ratios, '{:.2f}x')} the time of {dense_name}"] if dense_ratios else []
    speeds = [f"{_span(ratios, '{:.2f}x')} the speed of {name}" for name, ratios in speedups.items()]
    if speeds:
        parts.append(f"runs at {' and '.join(speeds)}")
    cases = f"{len(results.cases)} case{'s' if len(results.cases) > 1 else ''}"
    sentences = [f"Over {cases}, gossamer {' and '.join(parts)}."] if parts else []
    if (busy := results.slowing) is not None:
        sentences.append(how_busy(busy))
    if results.interrupted:
        sentences.append("The run was interrupted; these are the cases that had finished.")
    if results.left_out:
        sentences.append(f"Left out: {'; '.join(results.left_out)}.")
    return " ".join(sentences)
