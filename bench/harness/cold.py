"""Cases with few rows, whose weights must come from memory: calls take turns with copies, more than any cache holds."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from gossamer import QuantizedExpertWeight, _backend
from gossamer._panels import PANELS, ROWS, fits_panels

# A case with at most this many rows counts as decoding, whose floor is the bytes of the weights.
FEW_ROWS = 32
# Several times a last-level cache.
PAST_CACHES = 192 << 20
# A weight smaller than this is read in less time than a call takes.
SMALLEST = 1 << 20

Weight = TypeVar("Weight")
Result = TypeVar("Result")


def passes(nbytes: int, rows: int) -> int:
    """The number of weights of ``nbytes`` that exceed every cache; 1 if rows are many or the weights are small."""
    return int(-(-PAST_CACHES // nbytes)) if rows <= FEW_ROWS and nbytes >= SMALLEST else 1


def copies(weight: Weight, copy: Callable[[Weight], Weight], nbytes: int, count: int) -> list[Weight]:
    """``count`` weights of ``nbytes`` to read in turn, only as many of them distinct as exceed every cache."""
    distinct = min(count, passes(nbytes, 1))
    found = [weight, *(copy(weight) for _ in range(distinct - 1))]
    return list(itertools.islice(itertools.cycle(found), count))


def in_turn(call: Callable[[Weight], Result], weights: Sequence[Weight]) -> Callable[[], Result]:
    """A function that calls ``call`` with each weight and returns the first result."""

    def forward() -> Result:
        first = call(weights[0])
        for weight in weights[1:]:
            call(weight)
        return first

    return forward


def cloned(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Copies of tensors."""
    return tuple(t.clone() for t in tensors)


def as_held(weight: QuantizedExpertWeight) -> QuantizedExpertWeight:
    """A weight as layers hold it for products without gradients."""
    reads = _backend.reads_panels(weight.data) and fits_panels(weight.data.shape)
    return weight.to_layout(PANELS) if reads else weight


def held_copy(weight: QuantizedExpertWeight) -> QuantizedExpertWeight:
    """A copy of what :func:`as_held` returns, in memory like its own."""
    rows = weight.to_layout(ROWS)
    return as_held(dataclasses.replace(rows, data=rows.data.clone(), scale=rows.scale.clone()))
