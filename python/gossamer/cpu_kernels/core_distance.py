"""The distance between the cores that torch's threads run on."""

from __future__ import annotations

import torch

from gossamer import _C


def core_distance() -> float:
    """Seconds that a cache line takes from one of torch's threads to its neighbour and back, the mean over pairs.

    Tens of nanoseconds where they share a cache, hundreds where they do not, twenty thousand where two threads share a
    core; 0 with one thread. Takes about two milliseconds at most.
    """
    return _C.core_distance(torch.get_num_threads())
