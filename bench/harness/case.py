"""The parts of a benchmark: a family of shapes, a case with its variants, and the gate that a variant must pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from gossamer.testing import assert_close, errors

if TYPE_CHECKING:
    from gossamer.bench.harness.peers import Peer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIRECTIONS = ("forward", "both")
SKEWS = ("uniform", "zipf", "one")
# Sizes for measuring host latency: with almost no work, the time of a call is the host's.
HOST_SIZE = 16

OURS, DENSE, REFERENCE, PEER = "ours", "dense", "reference", "peer"


Outputs = dict[str, torch.Tensor]


def _same(value):
    return value


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Attributes:
        name: its name in tables.
        role: ``"ours"``, ``"dense"``, ``"reference"`` or ``"peer"``.
        forward: computes the result ``y``, or several, from tensors it holds.
        leaves: name of a gradient -> the tensor whose gradient it is, such as ``{"dx": x}``.
        dy: the gradient of ``y`` that the backward pass starts from; None without a backward pass.
        layout: converts outputs from this variant's layout into the truth's.
        gate: the key of the case's gate that judges it; None for a variant that computes another problem of equal size.
        note: a remark for the table.
        package: the distribution that it comes from. Baselines count as gossamer's: if one is wrong, the run fails.
        bytes: the fewest bytes that its call can move, if it stores its weights in a format of its own; else None.
    """

    name: str
    role: str
    forward: Callable[[], torch.Tensor | tuple[torch.Tensor, ...]]
    leaves: Mapping[str, torch.Tensor] = field(default_factory=dict)
    dy: torch.Tensor | None = None
    layout: Callable[[Outputs], Outputs] = _same
    gate: str | None = "truth"
    note: str = ""
    package: str = "gossamer"
    bytes: float | None = None

    def call(self, direction: str) -> Outputs:
        """Run forward without recording a graph, or forward and backward; return the outputs by name."""
        if direction == "forward":
            with torch.no_grad():
                return _named(self.forward())
        y = self.forward()
        grads = self.backward(y)
        return {"y": y.detach(), **dict(zip(self.leaves, grads, strict=True))}

    def backward(self, y: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the gradients of the result of :attr:`forward`, in the order of ``leaves``."""
        return torch.autograd.grad(y, list(self.leaves.values()), self.dy)

    def bare(self, direction: str) -> Callable[[], object]:
        """Return the function to time: :meth:`call` without bookkeeping. Forward alone needs ``torch.no_grad``."""
        if direction == "forward":
            return self.forward
        return lambda: self.backward(self.forward())

    def outputs(self, direction: str) -> Outputs:
        """Return the outputs of :meth:`call` in the layout of the truth."""
        return self.layout(self.call(direction))


def _named(result: torch.Tensor | tuple[torch.Tensor, ...]) -> Outputs:
    if isinstance(result, torch.Tensor):
        return {"y": result}
    return {f"y{i}": value for i, value in enumerate(result)}


# An error above this multiple of the baseline's cannot be rounding noise.
WILD = 3


@dataclass(frozen=True)
class Verdict:
    """The finding of a gate.

    Attributes:
        error: the largest relative RMS error among the outputs.
        failures: a message for each wrong output.
        narrow: the wrong outputs whose errors are small enough to be chance.
    """

    error: float
    failures: tuple[str, ...]
    narrow: frozenset[str] = frozenset()


class Gate(Protocol):
    """Judges a variant's outputs before it may be timed."""

    def __call__(self, outputs: Outputs) -> Verdict:
        """Compare ``outputs``, in the truth's layout, with the truth."""


@dataclass(frozen=True)
class FloatGate:
    """The error rule of :mod:`gossamer.testing`: as near to float64 as the plain computation in the same dtype.

    Attributes:
        truth: outputs in float64.
        baseline: outputs of the plain computation in the case's dtype.
        picks: name -> the part of an output that truth and baseline hold; all of it if absent.
        multiple: errors up to this multiple of the baseline's pass too; for peers whose formulas round more often.
    """

    truth: Mapping[str, torch.Tensor]
    baseline: Mapping[str, torch.Tensor]
    picks: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    multiple: float = 1.0

    def __call__(self, outputs: Outputs) -> Verdict:
        """Judge every output of the truth; other outputs of the variant are ignored."""
        error, failures, narrow = 0.0, [], set()
        for name, truth in self.truth.items():
            part = self.picks.get(name, _same)(outputs[name])
            found = errors(part, truth)
            error = max(error, found[0])
            try:
                assert_close(part, truth, self.baseline[name], name)
            except AssertionError as failure:
                pairs = list(zip(found, errors(self.baseline[name], truth), strict=True))
                if all(value <= self.multiple * bound for value, bound in pairs):
                    continue
                failures.append(str(failure))
                if all(value <= WILD * bound for value, bound in pairs):
                    narrow.add(name)
        return Verdict(error, tuple(failures), frozenset(narrow))


@dataclass(frozen=True)
class ExactGate:
    """The gate of integer outputs, which must be equal."""

    truth: Mapping[str, torch.Tensor]

    def __call__(self, outputs: Outputs) -> Verdict:
        """Judge each output for equality."""
        failures = []
        for name, expected in self.truth.items():
            if not torch.equal(outputs[name].long(), expected.long()):
                wrong = int((outputs[name].long() != expected.long()).sum())
                failures.append(f"{name}: {wrong} of {expected.numel()} values differ")
        return Verdict(float(bool(failures)), tuple(failures))


@dataclass(frozen=True)
class Case:
    """One problem: a shape, dtype, device and direction, its variants, its costs and its gates.

    Attributes:
        family: name of the family.
        shape: name of the shape.
        sizes: symbol -> size.
        dtype: a key of :data:`DTYPES`.
        device: where it runs.
        direction: ``"forward"`` or ``"both"``, forward and backward.
        variants: ours first, then the dense baseline, references and peers.
        skipped: name of a variant -> why it was left out.
        flops: floating-point operations of one call; 0 if only bytes count.
        bytes: the fewest bytes that one call can move: each input read once, each output written once.
        gates: key -> a function that makes the gate, called once and only when a variant needs it.
        checked: the part of the outputs that the gates compare, in words.
        routing: the distribution of the work, in words.
    """

    family: str
    shape: str
    sizes: Mapping[str, int]
    dtype: str
    device: torch.device
    direction: str
    variants: tuple[Variant, ...]
    skipped: Mapping[str, str]
    flops: float
    bytes: float
    gates: Mapping[str, Callable[[], Gate]]
    checked: str
    routing: str = ""

    @property
    def title(self) -> str:
        """The name of the case, in one line."""
        sizes = " ".join(f"{symbol}={size}" for symbol, size in self.sizes.items())
        direction = "forward" if self.direction == "forward" else "forward+backward"
        parts = [self.family, self.shape, f"({sizes})", self.dtype, direction]
        return " ".join([*parts, f"on {self.device}"]) + (f", {self.routing}" if self.routing else "")


@dataclass(frozen=True)
class Request:
    """The choices from which a family builds a case.

    Attributes:
        shape: name of the shape.
        sizes: symbol -> size.
        dtype: a key of :data:`DTYPES`, or ``"int"``.
        device: where it runs.
        direction: a member of :data:`DIRECTIONS`.
        skew: the distribution of ids, one of the family's ``skews``.
        peers: names of the family's peers to measure in addition to ours and dense; None for all that are installed.
        seed: seed of the random numbers.
    """

    shape: str
    sizes: Mapping[str, int]
    dtype: str
    device: torch.device
    direction: str
    skew: str
    peers: tuple[str, ...] | None = None
    seed: int = 0


def _no_rule(sizes: Mapping[str, int]) -> None:
    return None


def exact_case(
    family: str,
    request: Request,
    ours: Callable[[], tuple[torch.Tensor, ...]],
    plain: Callable[[], tuple[torch.Tensor, ...]],
    plain_name: str,
    read: float,
) -> Case:
    """A case without floating point: its integers must equal those of its baseline, the same in plain torch.

    ``read`` is the bytes of the inputs.
    """
    expected = _named(plain())
    return Case(
        family,
        request.shape,
        request.sizes,
        request.dtype,
        request.device,
        request.direction,
        (Variant("gossamer", OURS, ours), Variant(plain_name, DENSE, plain)),
        {},
        0.0,
        read + sum(tensor.nbytes for tensor in expected.values()),
        {"truth": lambda: ExactGate(expected)},
        "every output, exactly",
        f"{request.skew} routing",
    )


@dataclass(frozen=True)
class Family:
    """The cases of one primitive or layer.

    Attributes:
        name: also the module's stem in this package.
        shapes: name -> sizes, in the order of ``symbols``.
        symbols: names of the sizes.
        defaults: device type -> shapes of a full run.
        quick: device type -> the shape of a quick run.
        build: makes a case.
        dtypes: the dtypes on offer; ``("int",)`` for a family that does not compute in floating point.
        directions: the directions on offer.
        skews: the distributions of ids on offer.
        dimensions: name of a dimension that a sweep can vary -> its symbol; a symbol can be named as well.
        work: symbols that are reduced to :data:`HOST_SIZE` when host latency is measured: those whose size is work for
            the kernels, not the length of a loop on the host. If empty, all symbols.
        peers: references and other people's systems, which ``build`` adds by
            :func:`gossamer.bench.harness.peers.gather`.
        rule: returns what is wrong with sizes that do not go together, or None.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    symbols: tuple[str, ...]
    defaults: Mapping[str, tuple[str, ...]]
    quick: Mapping[str, str]
    build: Callable[[Request], Case]
    dtypes: tuple[str, ...] = tuple(DTYPES)
    directions: tuple[str, ...] = DIRECTIONS
    skews: tuple[str, ...] = SKEWS
    dimensions: Mapping[str, str] = field(default_factory=dict)
    work: tuple[str, ...] = ()
    peers: tuple[Peer, ...] = ()
    rule: Callable[[Mapping[str, int]], str | None] = _no_rule

    def sizes(self, shape: str) -> dict[str, int]:
        """The sizes of a shape given by name or as ``"16,64,32,8,2"``.

        Raises:
            ValueError: the name is unknown, the text is not a positive number per symbol, or the sizes break the rule.
        """
        if shape in self.shapes:
            return dict(zip(self.symbols, self.shapes[shape], strict=True))
        numbers = shape.split(",")
        if len(numbers) != len(self.symbols) or not all(n.strip().isdecimal() and int(n) > 0 for n in numbers):
            raise ValueError(
                f"--shape must be one of {', '.join(self.shapes)}, or {','.join(self.symbols)} as positive integers, "
                f"got {shape!r}"
            )
        sizes = dict(zip(self.symbols, map(int, numbers), strict=True))
        if wrong := self.rule(sizes):
            raise ValueError(f"--shape {shape}: {wrong}")
        return sizes

    def host_sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The sizes at which host latency is measured on the CPU."""
        small = self.work or self.symbols
        return {symbol: min(size, HOST_SIZE) if symbol in small else size for symbol, size in sizes.items()}
