"""Turns torch.profiler's events into rows: operators, their stages or kernels, and kernels outside any operator."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from gossamer.bench.harness.case import DTYPES
from gossamer.bench.harness.ceilings import Ceilings
from gossamer.bench.harness.cost import Called, Cost

OUTSIDE = {"cpu": "outside operators: Python, autograd", "cuda": "no kernel running"}
REST = "rest of the operator: allocation, launch"


class Phase:
    """The profiler's annotation of one phase of one subject's call."""

    PREFIX = "gossamer.profile"

    @classmethod
    def label(cls, subject: str, phase: str) -> str:
        """The annotation's name."""
        return f"{cls.PREFIX}|{subject}|{phase}"

    @classmethod
    def parse(cls, label: str) -> tuple[str, str] | None:
        """Subject and phase, or None for another annotation."""
        parts = label.split("|")
        return (parts[1], parts[2]) if len(parts) == 3 and parts[0] == cls.PREFIX else None


@dataclass(frozen=True)
class KernelRow:
    """The time of one operator, stage or kernel in one call of the subject.

    Attributes:
        subject: name of the subject.
        phase: ``"forward"`` or ``"backward"``.
        name: name of the operator, or of a stage or kernel within one.
        part_of: the operator that the stage or kernel is a part of; None for an operator.
        seconds: time on the device, or on the CPU wall-clock time. The mean over calls; for a stage that threads share,
            also over the threads.
        share: share of the subject's whole call.
        calls: calls of the operator or kernel, or pieces of a stage's work over all threads, in one call of the
            subject.
        bytes: the fewest bytes that it can move, each input read and each result written once; None if unknown.
        flops: floating-point operations; None if unknown.
        fraction: its rate over the nearer of the two ceilings, the product's FLOP/s or the bandwidth; None if neither
            rate is known.
        bound: the nearer ceiling, ``"compute"`` or ``"memory"``.
    """

    subject: str
    phase: str
    name: str
    part_of: str | None
    seconds: float
    share: float
    calls: float
    bytes: float | None
    flops: float | None
    fraction: float | None
    bound: str | None


class Event(Protocol):
    """The fields of ``torch.autograd.profiler_util.FunctionEvent`` that are used; times in microseconds."""

    name: str
    time_range: object
    cpu_time_total: float
    cpu_parent: Event | None
    kernels: Sequence[object]


@dataclass
class _Operator:
    seconds: float = 0.0
    calls: int = 0
    kernels: dict[str, tuple[float, int]] = field(default_factory=dict)


class _Spans:
    """When each phase began and ended."""

    def __init__(self, events: Iterable[Event]) -> None:
        found = ((e, Phase.parse(e.name)) for e in events if str(e.device_type).endswith("CPU"))
        spans = sorted(
            ((e.time_range.start, e.time_range.end, where) for e, where in found if where), key=lambda s: s[0]
        )
        self.spans = spans
        self._starts = [start for start, _, _ in spans]

    def at(self, time: float) -> tuple[str, str] | None:
        i = bisect.bisect_right(self._starts, time) - 1
        return self.spans[i][2] if i >= 0 and time <= self.spans[i][1] else None


def _outermost(event: Event, names: Iterable[str]) -> Event | None:
    """The outermost event with one of ``names`` among the event and those that enclose it."""
    found, at = None, event
    while at is not None:
        if at.name in names:
            found = at
        at = at.cpu_parent
    return found


def _operators(
    events: Sequence[Event], spans: _Spans, costs: Mapping[tuple[str, str], Mapping[str, Called]], on_device: bool
) -> dict[tuple[str, str], dict[str, _Operator]]:
    """Time by operator. Those inside an operator whose cost is known count as part of it."""
    found: dict[tuple[str, str], dict[str, _Operator]] = {where: {} for _, _, where in spans.spans}
    for event in events:
        if not str(event.device_type).endswith("CPU") or (where := spans.at(event.time_range.start)) is None:
            continue
        # An annotation spans the events within it, so its time on the device, if it has one, is that of its kernels.
        if Phase.parse(event.name):
            continue
        outer = _outermost(event, costs.get(where, {}))
        if outer is event:
            operator = found[where].setdefault(event.name, _Operator())
            operator.calls += 1
            if not on_device:
                operator.seconds += event.cpu_time_total * 1e-6
        if on_device and event.kernels:
            # A kernel that no operator launched, such as one of somebody's autograd.Function, gets a row under its own
            # name.
            name = outer.name if outer is not None else event.name
            operator = found[where].setdefault(name, _Operator())
            operator.calls += outer is None
            for kernel in event.kernels:
                seconds, count = operator.kernels.get(kernel.name, (0.0, 0))
                operator.kernels[kernel.name] = (seconds + kernel.duration * 1e-6, count + 1)
                operator.seconds += kernel.duration * 1e-6
    return found


def bandwidth(ceilings: Ceilings) -> float:
    """The largest bandwidth measured, in bytes per second."""
    return max(ceilings.copy, getattr(ceilings, "read", None) or 0.0)


def fraction(
    cost: Cost, seconds: float, dtype: torch.dtype | None, ceilings: Ceilings
) -> tuple[float | None, str | None]:
    """The larger of two fractions, FLOP/s of a large product's and bytes/s of the bandwidth, and its ceiling's name."""
    rates = []
    if seconds > 0:
        name = next((key for key, value in DTYPES.items() if value == dtype), None)
        if cost.flops and name in ceilings.gemm:
            rates.append((cost.flops / seconds / ceilings.gemm[name], "compute"))
        if cost.bytes:
            rates.append((cost.bytes / seconds / bandwidth(ceilings), "memory"))
    return max(rates, default=(None, None))


def kernel_rows(
    events: Sequence[Event],
    subjects: Sequence[str],
    calls: Mapping[str, int],
    costs: Mapping[tuple[str, str], Mapping[str, Called]],
    stages: Mapping[tuple[str, str], Mapping[str, Mapping[str, tuple[float, int]]]],
    ceilings: Ceilings,
    device: torch.device,
) -> tuple[list[KernelRow], dict[str, dict[str, float]]]:
    """Rows in the order of subjects, phases and time, and each subject's seconds by phase.

    Args:
        events: events of the profiler over ``calls`` calls of each subject, annotated by :class:`Phase`.
        subjects: names of the subjects.
        calls: number of profiled calls of each subject.
        costs: (subject, phase) -> operator -> its calls and costs in one call of the subject.
        stages: (subject, phase) -> native kernel -> stage -> seconds and pieces, over all profiled calls.
        ceilings: ceilings of the machine.
        device: device that the subjects ran on.
    """
    spans = _Spans(events)
    operators = _operators(events, spans, costs, device.type == "cuda")
    times: dict[str, dict[str, float]] = {}
    for start, end, (subject, phase) in spans.spans:
        mine = times.setdefault(subject, {})
        mine[phase] = mine.get(phase, 0.0) + (end - start) * 1e-6 / calls[subject]
    rows = []
    for subject in subjects:
        total = sum(times[subject].values())
        for phase, span in times[subject].items():
            make = _RowMaker(subject, phase, calls[subject], total, ceilings)
            found = operators[subject, phase]
            for name, operator in sorted(found.items(), key=lambda item: -item[1].seconds):
                if operator.seconds <= 0:
                    continue
                called = costs[subject, phase].get(name)
                # If the number of calls differs from the recorded call's, the costs would be attributed to the wrong
                # calls.
                agrees = called is not None and called.calls * calls[subject] == operator.calls
                cost = called.cost if agrees else Cost()
                dtype = called.dtype if called else None
                rows.append(make.row(name, None, operator.seconds, operator.calls, cost, dtype))
                native = stages.get((subject, phase), {}).get(name.removeprefix("gossamer::").rstrip("_"), {})
                rows += make.parts(name, operator, native, cost, dtype)
            covered = sum(operator.seconds for operator in found.values()) / calls[subject]
            rows.append(
                make.row(OUTSIDE[device.type], None, max(0.0, span - covered) * calls[subject], 0, Cost(), None)
            )
    return rows, times


def launches(rows: Sequence[KernelRow], subject: str, device: torch.device) -> float | None:
    """The number of kernels and copies that one call starts on a device; None on the CPU, where parts are stages."""
    if device.type == "cpu":
        return None
    return sum(row.calls for row in rows if row.subject == subject and row.part_of is not None)


@dataclass(frozen=True)
class _RowMaker:
    subject: str
    phase: str
    divisor: int
    total: float
    ceilings: Ceilings

    def row(
        self, name: str, part_of: str | None, seconds: float, count: float, cost: Cost, dtype: torch.dtype | None
    ) -> KernelRow:
        seconds, count = seconds / self.divisor, count / self.divisor
        share = seconds / self.total if self.total else 0.0
        reached, bound = fraction(cost, seconds, dtype, self.ceilings)
        return KernelRow(
            self.subject, self.phase, name, part_of, seconds, share, count, cost.bytes, cost.flops, reached, bound
        )

    def parts(
        self,
        name: str,
        operator: _Operator,
        native: Mapping[str, tuple[float, int]],
        cost: Cost,
        dtype: torch.dtype | None,
    ) -> list[KernelRow]:
        """Stages in the order of the kernel; kernels by time."""
        if native:
            found = []
            for stage, (seconds, pieces) in native.items():
                part = cost.parts.get(stage, Cost())
                found.append(self.row(part.label or stage, name, seconds, pieces, part, dtype))
            rest = max(0.0, operator.seconds - sum(seconds for seconds, _ in native.values()))
            return [*found, self.row(REST, name, rest, 0, Cost(), None)]
        ordered = sorted(operator.kernels.items(), key=lambda item: -item[1][0])
        found = []
        for kernel, (seconds, count) in ordered:
            part = cost.parts.get(kernel)
            if part is None:
                part = Cost(cost.flops, cost.bytes) if len(ordered) == 1 else Cost()
            found.append(self.row(part.label or kernel, name, seconds, count, part, dtype))
        return found
