"""Records profiles of native kernels: time by stage, and memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from gossamer import _C


@dataclass
class Recording:
    """A recording, filled when its block ends.

    Attributes:
        stages: kernel -> stage -> seconds (the mean over a call's threads) and pieces of work, both summed over calls.
        memory: (nanoseconds of ``time.monotonic_ns``, bytes taken or, negative, given back) for memory that torch's
            allocators do not hand out: scratch, and large results from kept blocks.
    """

    stages: dict[str, dict[str, tuple[float, int]]] = field(default_factory=dict)
    memory: list[tuple[int, int]] = field(default_factory=list)


@contextlib.contextmanager
def record() -> Iterator[Recording]:
    """Record inside a ``with`` block, for the whole process; blocks do not nest."""
    recording = Recording()
    _C.start_recording()
    try:
        yield recording
    finally:
        stages, recording.memory = _C.stop_recording()
        for kernel, stage, nanoseconds, pieces in stages:
            recording.stages.setdefault(kernel, {})[stage] = (nanoseconds * 1e-9, pieces)
