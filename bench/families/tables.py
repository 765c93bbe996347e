"""Shared by benchmarks of embedding tables: the problem, and variants whose backward pass ends in a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gossamer.bench.harness.case import Outputs, Variant

LR = 0.1
# Rows of each table that the gate checks after a step.
SAMPLE = 4096


@dataclass(frozen=True)
class Problem:
    """The problem of every variant: T tables, and for each one B bags of J ids.

    Attributes:
        tables: ``(N, D)`` each.
        ids: ``(T, B, J)``.
        dy: ``(B, T·D)``, the gradient of the result.
        both: whether a step is taken.
    """

    tables: list[torch.Tensor]
    ids: torch.Tensor
    dy: torch.Tensor
    both: bool

    @property
    def offsets(self) -> torch.Tensor:
        """CSR offsets of the flat ids."""
        return torch.arange(0, self.ids.numel() + 1, self.ids.shape[2], device=self.ids.device)

    def sampled(self) -> list[torch.Tensor]:
        """The touched rows of each table, or some of them if they are many, including the most popular ones."""
        found = []
        for ids in self.ids:
            rows, counts = ids.unique(return_counts=True)
            found.append(rows[counts.sort(descending=True, stable=True).indices[:SAMPLE]])
        return found


@dataclass(frozen=True)
class Training(Variant):
    """A variant whose backward pass ends in a step; ``rows`` reads the sampled rows of its tables afterwards."""

    step: Callable[[torch.Tensor], object] | None = None
    rows: Callable[[], torch.Tensor] | None = None

    def backward(self, y: torch.Tensor) -> tuple[()]:
        """Take the tables' step from the result of :attr:`forward`; it leaves no gradient."""
        self.step(y)
        return ()

    def outputs(self, direction: str) -> Outputs:
        """The result and, after a step, the sampled rows."""
        found = self.call(direction)
        return found if direction == "forward" else found | {"rows": self.rows()}


def training(
    name: str,
    role: str,
    problem: Problem,
    forward: Callable[[], torch.Tensor],
    tables: list[torch.Tensor],
    gate: str | None = "truth",
    step: Callable[[torch.Tensor], object] | None = None,
) -> Training:
    """A variant with its tables, whose sampled rows are read when the gate asks.

    Without ``step``, the backward pass itself updates the tables.
    """
    sampled = problem.sampled() if problem.both else []

    def rows() -> torch.Tensor:
        return torch.cat([table.detach()[r] for table, r in zip(tables, sampled, strict=True)])

    return Training(name, role, forward, gate=gate, step=step or (lambda y: y.backward(problem.dy)), rows=rows)
