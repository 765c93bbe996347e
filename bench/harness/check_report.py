"""Tables of a check, readable at 100 columns."""

from __future__ import annotations

import io
from collections.abc import Iterator

import rich.box
import rich.console
import rich.table
import rich.text

from gossamer.bench.harness.check import PARAMETER_GRADIENT, CheckReport, CheckRow
from gossamer.bench.harness.profile_report import WIDTH
from gossamer.bench.harness.report import how_busy
from gossamer.bench.harness.text import digits, named_table
from gossamer.bench.harness.timing import IDLE

# A model has hundreds of parameters: at most this many correct ones are shown, those with the largest errors first.
MOST_PARAMETERS = 16
# Width of a tensor's name in characters.
MOST_NAME = 40


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _relative(row: CheckRow) -> float:
    if row.error is None or not row.original_error:
        return 0.0
    return row.error / row.original_error


def _chosen(rows: tuple[CheckRow, ...]) -> tuple[list[CheckRow], int]:
    """The rows to show, in order, and the number of correct rows left out."""
    parameters = [row for row in rows if row.kind == PARAMETER_GRADIENT and row.ok]
    kept = {id(row) for row in sorted(parameters, key=_relative, reverse=True)[:MOST_PARAMETERS]}
    shown = [row for row in rows if row not in parameters or id(row) in kept]
    return shown, len(rows) - len(shown)


def _bits(same: bool) -> str:
    return "the same bits twice" if same else "different bits the second time"


def render(report: CheckReport) -> Iterator[object]:
    """The whole report, for a rich console."""
    yield rich.text.Text(report.title, style="bold")
    table = named_table("tensor", "of", "RMS error", "original's", "max error", "original's", "", most=MOST_NAME)
    shown, hidden = _chosen(report.rows)
    for row in shown:
        table.add_row(
            row.name,
            row.kind.replace("parameter ", "").replace("input ", ""),
            _error(row.error),
            _error(row.original_error),
            _error(row.worst),
            _error(row.original_worst),
            "right" if row.ok else "WRONG",
            style=None if row.ok else "bold red",
        )
    yield table
    if hidden:
        yield rich.text.Text(f"and {hidden} more parameters whose gradients are right")
    for row in report.rows:
        if not row.ok:
            yield rich.text.Text(f"  {row.name} ({row.kind}): {row.message}")
    if report.not_compared:
        names = ", ".join(report.not_compared[:6]) + (", ..." if len(report.not_compared) > 6 else "")
        yield rich.text.Text(f"not compared, since only one of the two has them: {names}")
    original = _bits(report.original_deterministic)
    yield rich.text.Text(f"replacement: {_bits(report.deterministic)}; original: {original}")
    if report.speed:
        yield ""
        speeds = named_table("ms (median)", "original", "replacement", "speed", most=MOST_NAME)
        for speed in report.speed:
            ratio = f"{speed.original / speed.replacement:.2f}x"
            speeds.add_row(speed.direction, digits(1e3 * speed.original), digits(1e3 * speed.replacement), ratio)
        yield speeds
        busy = max((speed.slowing for speed in report.speed if speed.slowing is not None), default=0.0)
        if busy > IDLE:
            yield rich.text.Text(how_busy(busy))
    wrong = sum(not row.ok for row in report.rows)
    yield ""
    if report.ok:
        yield rich.text.Text(
            "The replacement is right: every error is within the limits set by the original's own errors."
        )
    elif wrong:
        yield rich.text.Text(f"The replacement is WRONG in {wrong} of {len(report.rows)} tensors; it was not timed.")
    else:
        yield rich.text.Text("The replacement does not repeat its bits, although the original does; it was not timed.")


def text(report: CheckReport, width: int = WIDTH) -> str:
    """The report as plain text."""
    out = io.StringIO()
    rich.console.Console(file=out, width=width, highlight=False, color_system=None).print(report)
    return out.getvalue().rstrip("\n")
