"""Measures the distance between the cores that run a benchmark's threads, and waits until they are near each other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from gossamer import _backend

# Cores count as near if a cache line travels between them in at most this multiple of the best time seen.
NEAR = 2.5
# Seconds of one sleep.
NAP = 0.02
# Sleeps while searching for the least distance.
LOOKS = 25


class Cores:
    """The distance of the cores that run torch's threads, measured repeatedly.

    A hypervisor that moves its guests, or a scheduler that moves threads, can leave two threads on cores that share no
    cache for seconds at a time. Calls whose threads share data then take half as long again; other calls are
    unaffected. Busy threads stay where they are, and threads that wake up are placed again.

    Args:
        measure: returns the current distance in any unit; 0 if unknown.

    Attributes:
        least: the least distance so far.
    """

    def __init__(self, measure: Callable[[], float] = lambda: 0.0) -> None:
        self._measure = measure
        self.least = math.inf

    @classmethod
    def of(cls, device: torch.device) -> Cores:
        """Return the cores for timing on a device; on a GPU the host's threads do not matter."""
        if device.type != "cpu" or _backend.native_unavailable():
            return cls()
        from gossamer.cpu_kernels.core_distance import core_distance

        return cls(core_distance)

    def distance(self) -> float:
        """Return the current distance."""
        found = self._measure()
        self.least = min(self.least, found)
        return found

    def near(self, distance: float) -> bool:
        """Return whether a distance is near the least one seen."""
        return distance <= NEAR * self.least

    def look(self) -> None:
        """Search for the least distance for half a second, unless distances are unknown."""
        if self.distance() > 0:
            for _ in range(LOOKS):
                time.sleep(NAP)
                self.distance()

    def gather(self, seconds: float) -> float:
        """Sleep until the cores are near each other or ``seconds`` pass; return their distance."""
        found, end = self.distance(), time.perf_counter() + seconds
        while not self.near(found) and time.perf_counter() < end:
            time.sleep(NAP)
            found = self.distance()
        return found
