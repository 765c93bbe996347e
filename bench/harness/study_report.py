"""Shows a study on the terminal: its progress, and its table with notes."""

from __future__ import annotations

import sys
from types import TracebackType

import rich.console
import rich.progress
import rich.table

from gossamer.bench.harness.report import say
from gossamer.bench.harness.study import notes, rows


class Bar:
    """A progress bar over all runs of a study, live on a terminal; elsewhere one line per run on standard error."""

    def __init__(self, console: rich.console.Console) -> None:
        shown = console if console.is_terminal else rich.console.Console(stderr=True)
        self._bar = None
        if shown.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description:<28}"),
                rich.progress.BarColumn(),
                rich.progress.TaskProgressColumn(),
                rich.progress.TimeRemainingColumn(),
                rich.progress.TextColumn("{task.fields[note]}"),
                console=shown,
            )
            self._task = self._bar.add_task("", total=1.0, note="")
        self._run = ""

    def __enter__(self) -> Bar:
        """Start the bar."""
        if self._bar:
            self._bar.start()
        return self

    def __call__(self, run: str, share: float, note: str) -> None:
        """Show the share done, the current run, and its note."""
        if self._bar:
            self._bar.update(self._task, completed=share, description=run, note=note)
        elif run != self._run:
            print(f"[{100 * share:3.0f}%] {run}", file=sys.stderr, flush=True)
        self._run = run

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar.stop()


def print_study(console: rich.console.Console, record: dict) -> None:
    """Print the question, the table, and the notes needed to read it."""
    say(console, record["question"])
    head, lines = rows(record)
    table = rich.table.Table(box=None, pad_edge=False)
    for number, title in enumerate(head):
        table.add_column(title, justify="left" if number < 2 else "right", overflow="fold")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    for line in notes(record):
        say(console, line)
