"""Bytes allocated against time over a training step: forward, backward, and the optimizer's step."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from gossamer import _backend
from gossamer.bench.harness.flatten import synchronise

if TYPE_CHECKING:
    from gossamer.bench.harness.profile import Subject

STEP_PHASES = ("forward", "backward", "step")
# The numbers that torch's profiler gives to device types.
_DEVICE_TYPE = {"cpu": 0, "cuda": 1}


@dataclass(frozen=True)
class MemoryPhase:
    """One phase of the step: its times, and the bytes above the step's start at the phase's peak and at its end."""

    name: str
    start: float
    end: float
    peak: float
    at_end: float


@dataclass(frozen=True)
class MemoryTimeline:
    """The memory of a training step.

    Attributes:
        subject: name of the subject.
        seconds: times at which the bytes changed, counted from the step's start.
        bytes: bytes allocated from each of these times on, less those allocated when the step began.
        phases: forward, backward, and step.
    """

    subject: str
    seconds: tuple[float, ...]
    bytes: tuple[float, ...]
    phases: tuple[MemoryPhase, ...]

    @property
    def peak(self) -> float:
        """The most bytes above the start."""
        return max((phase.peak for phase in self.phases), default=0.0)


def _optimizer(subject: Subject) -> tuple[list[torch.Tensor], torch.optim.Optimizer | None]:
    """AdamW on copies of the parameters, with its state in place: a step must not change the user's weights."""
    copies = [torch.nn.Parameter(p.detach().clone()) for p in subject.parameters.values()]
    if not copies:
        return [], None
    optimizer = torch.optim.AdamW(copies)
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return copies, optimizer


def _step(subject: Subject, copies: list[torch.Tensor], optimizer: torch.optim.Optimizer | None, phase) -> None:
    with phase("forward"):
        y = subject.forward()
    with phase("backward"):
        grads = dict(zip(subject.leaves, subject.backward(y), strict=True))
        del y
    with phase("step"):
        for copy, name in zip(copies, subject.parameters, strict=True):
            copy.grad = grads.pop(name)
        grads.clear()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _own_memory(device: torch.device) -> Iterator[list[tuple[int, int]]]:
    """(nanoseconds, bytes) of memory that native kernels take outside torch's allocator; filled when the block ends."""
    events: list[tuple[int, int]] = []
    if device.type != "cpu" or _backend.native_unavailable():
        yield events
        return
    from gossamer.cpu_kernels.recorder import record

    with record() as recording:
        yield events
    events.extend(recording.memory)


def timeline(subject: Subject, device: torch.device) -> MemoryTimeline:
    """Run one training step of a warmed-up subject under the profiler's record of allocations.

    On CUDA it counts the bytes that torch's allocator hands out, on the CPU those that torch's and gossamer's
    allocators hand out. Memory that other libraries allocate themselves is not counted.
    """
    copies, optimizer = _optimizer(subject)
    clock: dict[str, int] = {}

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        with record_function(f"gossamer.memory|{name}"):
            clock[name] = time.monotonic_ns()
            yield
            synchronise(device)

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with (
        torch.enable_grad(),
        _own_memory(device) as own,
        torch_profile(activities=activities, profile_memory=True) as prof,
    ):
        _step(subject, copies, optimizer, phase)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "memory.json")
        prof.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    return _assemble(subject.name, events, own, clock, _DEVICE_TYPE[device.type])


def _assemble(
    name: str, events: list[dict], own: list[tuple[int, int]], clock: dict[str, int], device_type: int
) -> MemoryTimeline:
    """Build the timeline from a trace's events, in microseconds, and from our own, in nanoseconds of another clock."""
    spans = {
        e["name"].split("|")[1]: (e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("ph") == "X" and e.get("name", "").startswith("gossamer.memory|") and e.get("cat") == "user_annotation"
    }
    origin = spans["forward"][0]
    changes = [
        ((e["ts"] - origin) * 1e-6, float(e["args"]["Bytes"]))
        for e in events
        if e.get("name") == "[memory]" and e["args"].get("Device Type") == device_type
    ]
    last = (max(end for _, end in spans.values()) - origin) * 1e-6
    changes = [change for change in changes if 0 <= change[0] <= last]
    # The two clocks agree only to microseconds, and the last memory is freed just before the end.
    changes += [(min(max((at - clock["forward"]) * 1e-9, 0.0), last), float(count)) for at, count in own]
    changes.sort(key=lambda change: change[0])
    times, levels, level = [0.0], [0.0], 0.0
    for at, change in changes:
        level += change
        times.append(at)
        levels.append(level)
    phases = []
    for phase in STEP_PHASES:
        start, end = ((t - origin) * 1e-6 for t in spans[phase])
        inside = [b for t, b in zip(times, levels, strict=True) if start <= t <= end]
        before = [b for t, b in zip(times, levels, strict=True) if t < start] or [0.0]
        phases.append(MemoryPhase(phase, start, end, max([before[-1], *inside]), (inside or before)[-1]))
    return MemoryTimeline(name, tuple(times), tuple(levels), tuple(phases))
