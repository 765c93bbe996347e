"""What benchmarks of embedding tables share: the problem, and variants whose backward pass ends in a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gossamer.bench.harness.case import Outputs, Variant

LR = 0.1
# Rows of each table that the gate looks at after a step.
SAMPLE = 4096


@dataclass(frozen=True)
class Problem:
    """What every variant computes: T tables, and for each one B bags of J ids.

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
        """Touched rows of each table, some of them where there are many, the most popular ones among them."""
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
        """From the result of :attr:`forward`, the tables' step, which leaves no gradient."""
        self.step(y)
        return ()

    def outputs(self, direction: str) -> Outputs:
        """The result, and after a step the sampled rows."""
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

    Without ``step`` the tables are updated in the backward pass itself.
    """
    sampled = problem.sampled() if problem.both else []

    def rows() -> torch.Tensor:
        return torch.cat([table.detach()[r] for table, r in zip(tables, sampled, strict=True)])

    return Training(name, role, forward, gate=gate, step=step or (lambda y: y.backward(problem.dy)), rows=rows)
