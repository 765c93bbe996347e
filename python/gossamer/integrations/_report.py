"""What :func:`gossamer.replace` reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SwitchedModule:
    """A module that gossamer now computes.

    Attributes:
        name: its path in the model.
        class_name: of the module.
        fused: whether the whole layer is one operator.
        detail: the fused activation or operator, or the reason for not fusing.
    """

    name: str
    class_name: str
    fused: bool
    detail: str


@dataclass(frozen=True)
class SkippedModule:
    """A module left unchanged, and the reason."""

    name: str
    class_name: str
    reason: str


@dataclass(frozen=True)
class Replacement:
    """What :func:`gossamer.replace` did.

    Attributes:
        switched: the modules that gossamer computes now.
        skipped: those left alone.
        kind: the name of these modules in the report.
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


@dataclass(frozen=True)
class QuantizedModule:
    """One module whose expert weights are quantised now.

    Attributes:
        name: its path in the model.
        class_name: of the module.
        format: of its weights.
        before: bytes of the weights before.
        after: bytes of codes and scales.
    """

    name: str
    class_name: str
    format: str
    before: int
    after: int


@dataclass(frozen=True)
class Quantization:
    """What :func:`gossamer.quantize_experts` or :func:`gossamer.load_quantized_experts` did.

    Attributes:
        modules: those with quantised weights now.
        skipped: those left alone.
        used: names of the tensors that were loaded.
    """

    modules: tuple[QuantizedModule, ...]
    skipped: tuple[SkippedModule, ...] = ()
    used: tuple[str, ...] = ()

    @property
    def before(self) -> int:
        """Bytes of all weights before."""
        return sum(m.before for m in self.modules)

    @property
    def after(self) -> int:
        """Bytes of all codes and scales."""
        return sum(m.after for m in self.modules)

    def __str__(self) -> str:
        total = len(self.modules) + len(self.skipped)
        lines = [f"{len(self.modules)} of {total} experts modules are quantised: {self.before} to {self.after} bytes"]
        lines += [
            f"  {m.name or '(the model itself)'}: {m.class_name}, {m.format}: {m.before} to {m.after} bytes"
            for m in self.modules
        ]
        lines += [f"  {m.name or '(the model itself)'}: {m.class_name}, left alone: {m.reason}" for m in self.skipped]
        return "\n".join(lines)


@dataclass(frozen=True)
class CompressedTable:
    """One embedding layer of a compressed model.

    Attributes:
        name: its path in the model.
        class_name: of the table that computes it now.
        before: bytes of its weight before.
        training: bytes that it holds in training, optimizer state included.
        served: bytes that it holds when served.
    """

    name: str
    class_name: str
    before: int
    training: int
    served: int


@dataclass(frozen=True)
class Compression:
    """What :func:`gossamer.compress_embeddings` did.

    Attributes:
        method: name of the method.
        tables: all layers that count in the budget, including unchanged ones.
        skipped: layers that do not count, with reasons.
        budget: the budget of all tables in bytes.
        note: what to do next, or nothing.
    """

    method: str
    tables: tuple[CompressedTable, ...]
    skipped: tuple[SkippedModule, ...] = ()
    budget: int = 0
    note: str = ""

    @property
    def before(self) -> int:
        """Bytes of all weights before."""
        return sum(table.before for table in self.tables)

    @property
    def training(self) -> int:
        """Bytes of all tables in training."""
        return sum(table.training for table in self.tables)

    @property
    def served(self) -> int:
        """Bytes of all tables when served."""
        return sum(table.served for table in self.tables)

    def __str__(self) -> str:
        lines = [
            f"{self.method}: {self.before} bytes to {self.served} when served ({self.served / self.before:.4f}), "
            f"{self.training} in training"
        ]
        if self.served < 0.99 * self.budget:
            lines.append(
                f"  {self.served / self.budget:.4f} of the budget of {self.budget} bytes: no larger tables of this "
                "method fit"
            )
        lines += [
            f"  {t.name or '(the model itself)'}: {t.class_name}, {t.before} to {t.served}, {t.training} in training"
            for t in self.tables
        ]
        lines += [f"  {m.name or '(the model itself)'}: {m.class_name}, left alone: {m.reason}" for m in self.skipped]
        if self.note:
            lines.append(f"  next: {self.note}")
        return "\n".join(lines)
