"""The distance between the cores that torch's threads run on."""

from __future__ import annotations

import torch

from gossamer import _C


def core_distance() -> float:
    """Seconds of a cache line's round trip between neighbouring threads of torch, the mean over pairs.

    It is tens of nanoseconds if the threads' cores share a cache, hundreds if not, twenty thousand if two threads share
    a core, and 0 with one thread. The measurement takes about two milliseconds at most.
    """
    return _C.core_distance(torch.get_num_threads())
