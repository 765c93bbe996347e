"""How far apart the cores are on which torch's threads run."""

from __future__ import annotations

import torch

from gossamer import _C


def core_distance() -> float:
    """Seconds that a cache line takes from one of torch's threads to the next and back, the mean over neighbours.

    Tens of nanoseconds where they share a cache, hundreds where they do not, twenty thousand where two threads share a
    core; 0 with one thread. Takes at most two milliseconds for each pair.
    """
    return _C.core_distance(torch.get_num_threads())
