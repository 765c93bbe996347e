"""The role of a schedule, and the schedules that pruning uses."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gossamer._checks import check_number, check_positive, check_sizes


class Schedule:
    """A share in [0, 1] for each training step, such as the share of blocks that are stored or regrown.

    A schedule keeps no state: :meth:`density` is a pure function of the step, so training that resumes at a step
    continues as if it had never stopped.
    """

    def density(self, step: int) -> float:
        """The share at ``step``, counted from 0."""
        raise NotImplementedError(f"{type(self).__name__} must define density(step)")


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """``value`` at every step.

    Raises:
        TypeError: ``value`` is not a number.
        ValueError: it is outside [0, 1].
    """

    value: float

    def __post_init__(self) -> None:
        """Check the share."""
        check_number("value", self.value, least=0, most=1)

    def density(self, step: int) -> float:
        """``value``."""
        return self.value


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """From ``first`` to ``last`` along half a cosine: ``last + (first − last)/2·(1 + cos(π·min(step/until, 1)))``.

    Raises:
        TypeError: a share is not a number, or ``until`` is not an int.
        ValueError: a share is outside [0, 1], or ``until`` below 1.
    """

    first: float
    last: float
    until: int

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_number("first", self.first, least=0, most=1)
        check_number("last", self.last, least=0, most=1)
        check_positive(until=self.until)

    def density(self, step: int) -> float:
        """The share at ``step``."""
        check_sizes(step=step)
        along = (1 + math.cos(math.pi * min(step / self.until, 1.0))) / 2
        return self.last + (self.first - self.last) * along
