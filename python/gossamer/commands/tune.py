"""``gossamer tune``: searches tiles for this GPU."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import typer


def tune(
    family: Annotated[str, typer.Option(help="expert_mlp or grouped_matmul.")] = "expert_mlp",
    shape: Annotated[
        list[str] | None,
        typer.Option(help="A named shape, or T,H,I,E,K; repeatable. By default four large layers."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    device: Annotated[str, typer.Option(help="auto or cuda.")] = "auto",
    budget: Annotated[float, typer.Option(help="Seconds for the whole search.")] = 600.0,
    output: Annotated[Path | None, typer.Option(help="Write to this file instead of the user's cache.")] = None,
) -> None:
    """Search tiles for Triton kernels on this GPU, and keep those that beat the current choice."""
    try:
        _tune(family, shape, dtype, device, budget, output)
    except (ValueError, OSError) as error:
        print(f"gossamer tune: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def _tune(family: str, shape: list[str] | None, dtype: str, device: str, budget: float, output: Path | None) -> None:
    import torch

    from gossamer import _backend

    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device must be auto or cuda, got {device!r}")
    kind = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    if reason := _backend.unavailable("triton", kind):
        if kind == "cpu":
            reason = "native CPU kernels choose their tiles from the cache sizes; tuning needs a CUDA device"
        raise ValueError(reason)

    from gossamer.bench.harness import runner, tune, tune_targets
    from gossamer.bench.harness.case import DTYPES, Request
    from gossamer.triton_kernels import tile_tables

    for option, value, allowed in (("--family", family, tune_targets.FAMILIES), ("--dtype", dtype, DTYPES)):
        if value not in allowed:
            raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")
    if not 0 < budget < float("inf"):
        raise ValueError(f"--budget must be a positive number of seconds, got {budget:g}")
    where = runner.resolve_device(device)
    chosen = runner.family(family)
    names = tuple(shape or chosen.defaults["cuda"])
    wanted = [Request(name, chosen.sizes(name), dtype, where, "both", "uniform") for name in names]

    card = tile_tables.cuda_device(where.index) if where.type == "cuda" else tile_tables.INTERPRETER
    path = output or tile_tables.cache_folder() / card.file_name
    tile_tables.check_writable(path)
    kept = tile_tables.read_if_valid(path, card)
    outcomes = []
    with _Progress(budget) as progress:
        found = tune.run(family, wanted, card, budget=budget, seconds=tune.stopwatch(where), progress=progress.describe)
        try:
            for outcome in found:
                outcomes.append(outcome)
        except KeyboardInterrupt:
            print("gossamer tune: stopped; what was found so far is kept", file=sys.stderr)
    for outcome in outcomes:
        print(tune.describe(outcome))
    entries = tune.merged(kept, outcomes)
    if entries == kept:
        print(f"nothing is written: no tile is {tune.MARGIN:.0%} faster than the present choice")
    else:
        command = ["gossamer", "tune", "--family", family, *(word for name in names for word in ("--shape", name))]
        command += ["--dtype", dtype, "--budget", f"{budget:g}"]
        tile_tables.write(path, tile_tables.as_json(card, entries, tune.provenance(shlex.join(command))))
        print(f"wrote {path}: {len(entries)} entries")
    if any(outcome.failure for outcome in outcomes):
        raise typer.Exit(1)


class _Progress:
    """A bar of the budget on a terminal; elsewhere one line per launch on standard error."""

    def __init__(self, budget: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(stderr=True)
        self._budget, self._start, self._last = budget, time.monotonic(), ""
        self._live = console.is_terminal
        columns = (BarColumn(24), TextColumn("{task.percentage:>3.0f}% of the budget  {task.description}"))
        self._bar = Progress(*columns, console=console, disable=not self._live, transient=True)
        self._task = self._bar.add_task("", total=budget)

    def __enter__(self) -> _Progress:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the bar."""
        self._bar.stop()

    def describe(self, launch: str, detail: str) -> None:
        """Show the launch being searched and the candidate being tried."""
        spent = min(time.monotonic() - self._start, self._budget)
        self._bar.update(self._task, completed=spent, description=f"{launch}: {detail}")
        if not self._live and launch != self._last:
            print(f"{launch} ({spent:.0f} of {self._budget:g} s)", file=sys.stderr, flush=True)
        self._last = launch
