"""Cases of few rows, whose weights come from memory: as many copies of them are read in turn as no cache holds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

# Rows up to which a case is one of decoding, whose floor is the bytes of the weights.
FEW_ROWS = 32
# Several times a last-level cache.
PAST_CACHES = 192 << 20
# Below this a weight is read in less time than a call takes.
SMALLEST = 1 << 20

Weight = TypeVar("Weight")
Result = TypeVar("Result")


def passes(nbytes: int, rows: int) -> int:
    """How many weights of ``nbytes`` pass every cache; 1 where rows are many or the weights are small."""
    return int(-(-PAST_CACHES // nbytes)) if rows <= FEW_ROWS and nbytes >= SMALLEST else 1


def copies(weight: Weight, copy: Callable[[Weight], Weight], nbytes: int, count: int) -> list[Weight]:
    """``count`` weights of ``nbytes`` to read in turn, of which only as many are distinct as no cache holds."""
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
