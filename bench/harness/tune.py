"""Searches for tiles within a time budget: candidates near the current choice, each checked before it is timed."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import triton

from gossamer._environment import environment
from gossamer.bench.harness.case import FloatGate, Request
from gossamer.bench.harness.timing import quantile
from gossamer.bench.harness.tune_targets import AOT_CASES, COUNT, Target, targets
from gossamer.triton_kernels import ahead_of_time, tile_tables
from gossamer.triton_kernels.common import AOT_LAYOUTS
from gossamer.triton_kernels.tile_tables import Device, Entry
from gossamer.triton_kernels.tiles import ITEM_BYTES, Problem, Tile, choose, fault, row_bucket

# A tile is recorded if it takes at most 1 − MARGIN of the current choice's time in each half of the rounds.
MARGIN = 0.03
# Shares of a launch's time for trying candidates and for timing the finalists.
SCREENING = 0.6
SCREENING_ROUNDS = 3
FINALISTS = 3
FINAL_ROUNDS = (10, 100)

Stopwatch = Callable[[Callable[[], object]], float]


@dataclass
class Outcome:
    """The result of the search for one launch.

    Attributes:
        name: name of the launch.
        problem: the sizes and dtypes by which the tile is chosen.
        default: the present choice.
        default_seconds: its median; infinite if the budget ended before it was timed.
        entry: the entry to write; None if no candidate is enough faster.
        tried: number of candidates that were tried.
        offered: number of all candidates.
        rejected: reason -> number of candidates rejected for it.
        failure: the reason why no search was possible; else empty.
    """

    name: str
    problem: Problem
    default: Tile
    default_seconds: float = math.inf
    entry: Entry | None = None
    tried: int = 0
    offered: int = 0
    rejected: collections.Counter = field(default_factory=collections.Counter)
    failure: str = ""


def stopwatch(device: torch.device) -> Stopwatch:
    """Seconds of one call: on CUDA between two events, with the L2 cache overwritten; elsewhere by the clock."""
    if device.type != "cuda":

        def elapsed(call: Callable[[], object]) -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return elapsed
    l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    flush = torch.empty(max(2 * l2, 64 << 20), dtype=torch.uint8, device=device)

    def between(call: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) * 1e-3

    return between


def candidates(problem: Problem, arch: int, shared: int) -> list[Tile]:
    """Tiles that may serve a problem, without the heuristic's own; those nearest to it come first."""
    near = choose(problem, arch)
    wide = ITEM_BYTES[problem.precision] == 4
    rows = [m for m in (16, 32, 64, 128, 256) if m <= max(16, row_bucket(problem.mean_rows))]
    if problem.kernel == "grouped_matmul_dweight":
        rows = [64, 128, 256]
    columns = [c // problem.halves for c in ((32, 64, 128) if wide else (64, 128, 256))]
    depths, stages = ((16, 32), (2, 3, 4)) if wide else ((32, 64, 128), (2, 3, 4, 5, 6, 7))
    found = [
        Tile(*values) for values in itertools.product(rows, columns, depths, (4, 8), stages, (4, 8, 16), (False, True))
    ]
    found = [tile for tile in found if tile != near and not fault(problem, tile, shared)]
    return sorted(found, key=lambda tile: (_distance(tile, near), dataclasses.astuple(tile)))


def _distance(tile: Tile, other: Tile) -> float:
    """Return the distance between two tiles, in doublings, stages and switches; each additional change weighs more."""
    sizes = ("block_m", "block_n", "block_k", "num_warps", "group_m")
    steps = [abs(math.log2(getattr(tile, name) / getattr(other, name))) for name in sizes]
    steps += [0.5 * abs(tile.num_stages - other.num_stages), float(tile.persistent != other.persistent)]
    return sum(steps) + sum(step > 0 for step in steps)


def unfit(problem: Problem, tile: Tile, device: Device) -> str | None:
    """The reason why a tile may not be recorded, from compiling it for every way to store weights, or None.

    Interpreted kernels are not compiled.
    """
    if triton.knobs.runtime.interpret:
        return None
    for layout in AOT_LAYOUTS:
        if layout == "pointers" and problem.form == "padded":
            continue
        found = ahead_of_time.compile_case(AOT_CASES[problem.kernel](device.arch, problem, tile, layout), device.arch)
        if found.shared > device.shared:
            return "passes the shared memory limit"
        if found.spills and layout == "usual":
            return "spills registers"
    return None


class Search:
    """The search for one launch's tile.

    Args:
        title: its name in progress and outcome.
        target: the launch.
        device: where it runs.
        default: the present choice.
        seconds: the stopwatch.
        deadline: when to stop, by ``time.monotonic``.
        progress: called with the title and the candidate being tried.
    """

    def __init__(
        self,
        title: str,
        target: Target,
        device: Device,
        default: Tile,
        seconds: Stopwatch,
        deadline: float,
        progress: Callable[[str, str], None],
    ) -> None:
        self._title, self._target, self._device, self._seconds = title, target, device, seconds
        self._start, self._deadline, self._progress = time.monotonic(), deadline, progress
        self.outcome = Outcome(title, target.problem, default)

    def run(self) -> Outcome:
        """Search until the time is up or all candidates were tried."""
        outcome, problem = self.outcome, self._target.problem
        gate = self._target.gate()
        if reason := self._refused(outcome.default, gate):
            outcome.failure = f"the present choice, {outcome.default}, {reason}"
            return outcome
        outcome.default_seconds = self._time(outcome.default)
        offered = candidates(problem, self._device.arch, self._device.shared)
        if (heuristic := choose(problem, self._device.arch)) != outcome.default:
            offered.insert(0, heuristic)
        offered = [tile for tile in offered if tile != outcome.default]
        outcome.offered = len(offered)
        screened = sorted(self._screen(offered, gate), key=lambda pair: pair[0])
        finalists = [tile for ratio, tile in screened[:FINALISTS] if ratio < 1 - MARGIN / 2]
        if finalists:
            self._final(finalists)
        return outcome

    def _screen(self, offered: list[Tile], gate: FloatGate) -> Iterator[tuple[float, Tile]]:
        """Each correct candidate tried while time lasts: its time over the current choice's, and its tile."""
        until = self._start + SCREENING * (self._deadline - self._start)
        for tile in offered:
            if time.monotonic() >= until:
                return
            self.outcome.tried += 1
            self._progress(self._title, f"tile {self.outcome.tried} of {self.outcome.offered}, {tile}")
            if reason := self._refused(tile, gate):
                self.outcome.rejected[reason.split(":")[0]] += 1
                continue
            pairs = [(self._time(tile), self._time(self.outcome.default)) for _ in range(SCREENING_ROUNDS)]
            yield min(ours for ours, _ in pairs) / min(theirs for _, theirs in pairs), tile

    def _refused(self, tile: Tile, gate: FloatGate) -> str | None:
        """The reason why a tile may not be timed (it does not compile or launch, or its results are wrong), or None."""
        try:
            verdict = gate(self._target.launch(tile))
        except (torch.AcceleratorError, torch.OutOfMemoryError):
            # The device can no longer be used.
            raise
        except Exception as error:
            # A tile that does not compile or launch is a result, not a failure of the search.
            if type(error).__name__ == "OutOfResources":
                return "passes the shared memory limit"
            return f"does not compile: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        return f"is wrong: {'; '.join(verdict.failures)}" if verdict.failures else None

    def _time(self, tile: Tile) -> float:
        return self._seconds(_Call(self._target.launch, tile))

    def _final(self, finalists: list[Tile]) -> None:
        """Time the finalists and the current choice in turns, and keep the fastest if it is enough faster."""
        tiles = [self.outcome.default, *finalists]
        samples: dict[Tile, list[float]] = {tile: [] for tile in tiles}
        least, most = FINAL_ROUNDS
        for round_ in range(most):
            if round_ >= least and time.monotonic() >= self._deadline:
                break
            self._progress(self._title, f"the fastest {len(finalists)} and the present choice, round {round_ + 1}")
            turn = round_ % len(tiles)
            for tile in tiles[turn:] + tiles[:turn]:
                samples[tile].append(self._time(tile))
        medians = {tile: quantile(taken, 0.5) for tile, taken in samples.items()}
        default = self.outcome.default
        self.outcome.default_seconds = medians[default]
        for best in sorted(finalists, key=medians.get):
            half = len(samples[best]) // 2
            halves = [(samples[best][s], samples[default][s]) for s in (slice(None, half), slice(half, None))]
            if any(quantile(ours, 0.5) > (1 - MARGIN) * quantile(theirs, 0.5) for ours, theirs in halves):
                return
            if reason := unfit(self._target.problem, best, self._device):
                self.outcome.rejected[reason] += 1
                continue
            problem = dataclasses.replace(self._target.problem, mean_rows=row_bucket(self._target.problem.mean_rows))
            self.outcome.entry = Entry(problem, best, 1e3 * medians[best], 1e3 * medians[default])
            return


@dataclass(frozen=True)
class _Call:
    """A launch with its tile, so that a stand-in stopwatch can tell which one it is given."""

    launch: Callable[[Tile], object]
    tile: Tile

    def __call__(self) -> object:
        """Launch."""
        return self.launch(self.tile)


def run(
    family: str,
    wanted: list[Request],
    device: Device,
    *,
    budget: float,
    seconds: Stopwatch,
    progress: Callable[[str, str], None] = lambda launch, detail: None,
) -> Iterator[Outcome]:
    """Search for the tiles of every launch of a family at the given shapes, and yield one outcome at a time.

    Args:
        family: a member of :data:`gossamer.bench.harness.tune_targets.FAMILIES`.
        wanted: shapes and dtypes, all on one device.
        device: the device. The current choice is that of the table that ships for it, else the heuristic's.
        budget: seconds for everything; the time that one launch leaves over is shared by the next ones.
        seconds: the stopwatch.
        progress: called with the launch being searched and the candidate being tried.
    """
    shipped = {e.problem.key: e.tile for source in tile_tables.shipped(device) for e in source.entries}
    end = time.monotonic() + budget
    left = len(wanted) * COUNT[family]
    done = set()
    for request in wanted:
        progress(f"{family} {request.shape} {request.dtype}", "preparing")
        for target in targets(family, request):
            now = time.monotonic()
            deadline = now + max(end - now, 0.0) / left
            left -= 1
            if target.problem.key in done:
                continue
            done.add(target.problem.key)
            default = choose(target.problem, device.arch, shipped)
            title = f"{request.shape} {request.dtype} {target.name}"
            if now >= end:
                yield Outcome(title, target.problem, default)
                continue
            yield Search(title, target, device, default, seconds, deadline, progress).run()


def merged(kept: list[Entry], outcomes: list[Outcome]) -> list[Entry]:
    """The entries of a table after a search: for each launch searched, the old entry is replaced or removed."""
    entries = {entry.problem.key: entry for entry in kept}
    for outcome in outcomes:
        if not outcome.failure:
            entries.pop(outcome.problem.key, None)
        if outcome.entry:
            entries[outcome.problem.key] = outcome.entry
    return list(entries.values())


def describe(outcome: Outcome) -> str:
    """The result for a launch, in one line."""
    if outcome.failure:
        return f"{outcome.name}: {outcome.failure}"
    if outcome.entry:
        times = (
            f"{outcome.entry.milliseconds:.4g} ms, {outcome.entry.default_milliseconds:.4g} ms with {outcome.default}"
        )
        found = f"{outcome.entry.tile}: {times}"
    elif math.isinf(outcome.default_seconds):
        return f"{outcome.name}: not reached within the budget"
    else:
        found = f"{outcome.default} stays: {1e3 * outcome.default_seconds:.4g} ms"
    rejected = "".join(f", {count} {reason}" for reason, count in outcome.rejected.items())
    return f"{outcome.name}: {found} ({outcome.tried} of {outcome.offered} tiles tried{rejected})"


def provenance(command: str) -> dict:
    """Return the provenance that a table records."""
    found = environment()
    return {name: found[name] for name in ("date", "versions", "commit")} | {"command": command}
