"""How far apart the cores are that run a benchmark's threads, and a way to bring them together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from gossamer import _backend

# Cores are near each other where a cache line takes at most so many times as long between them as it did at best.
NEAR = 2.5
# Seconds of a nap.
NAP = 0.02
# Naps that look for the least distance.
LOOKS = 25


class Cores:
    """The distance of the cores that run torch's threads, measured now and again.

    A host that moves its guests about, or a system that moves its threads, may have two threads on cores that share no
    cache for seconds at a time, and some calls then take half as long again while others do not notice. Busy threads
    stay where they are; those that wake up are given cores anew.

    Args:
        measure: the distance of now, in any unit; 0 where it is not known.

    Attributes:
        least: the least distance so far.
    """

    def __init__(self, measure: Callable[[], float] = lambda: 0.0) -> None:
        self._measure = measure
        self.least = math.inf

    @classmethod
    def of(cls, device: torch.device) -> Cores:
        """Those that calls on a device are timed on: what the host's threads cost each other is in no device's time."""
        if device.type != "cpu" or _backend.native_unavailable():
            return cls()
        from gossamer.cpu_kernels.core_distance import core_distance

        return cls(core_distance)

    def distance(self) -> float:
        """The distance of now."""
        found = self._measure()
        self.least = min(self.least, found)
        return found

    def near(self, distance: float) -> bool:
        """Whether that is a distance of cores that are near each other, as far as is known."""
        return distance <= NEAR * self.least

    def look(self) -> None:
        """Find the least distance, for a first idea of it: half a second of naps, unless it is not known at all."""
        if self.distance() > 0:
            for _ in range(LOOKS):
                time.sleep(NAP)
                self.distance()

    def gather(self, seconds: float) -> float:
        """Nap until the cores are near each other, for so many seconds at most; their distance then."""
        found, end = self.distance(), time.perf_counter() + seconds
        while not self.near(found) and time.perf_counter() < end:
            time.sleep(NAP)
            found = self.distance()
        return found
