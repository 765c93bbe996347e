"""What :func:`gossamer.replace` reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SwitchedModule:
    """One module that gossamer computes now.

    Attributes:
        name: its path in the model.
        class_name: of the module.
        fused: whether the whole layer is one operator.
        detail: the fused activation or operator, or why the general way is taken.
    """

    name: str
    class_name: str
    fused: bool
    detail: str


@dataclass(frozen=True)
class SkippedModule:
    """One module left alone, and why."""

    name: str
    class_name: str
    reason: str


@dataclass(frozen=True)
class Replacement:
    """What :func:`gossamer.replace` did.

    Attributes:
        switched: the modules that gossamer computes now.
        skipped: those left alone.
        kind: what the modules are called.
    """

    switched: tuple[SwitchedModule, ...]
    skipped: tuple[SkippedModule, ...] = ()
    kind: str = "experts modules"

    def __str__(self) -> str:
        lines = [f"gossamer computes {len(self.switched)} of {len(self.switched) + len(self.skipped)} {self.kind}"]
        lines += [
            f"  {m.name or '(the model itself)'}: {m.class_name}, {'fused' if m.fused else 'general'}: {m.detail}"
            for m in self.switched
        ]
        lines += [f"  {m.name or '(the model itself)'}: {m.class_name}, left alone: {m.reason}" for m in self.skipped]
        return "\n".join(lines)

    def __add__(self, other: Replacement) -> Replacement:
        """Both reports as one."""
        return Replacement(
            self.switched + other.switched, self.skipped + other.skipped, f"{self.kind} and {other.kind}"
        )
