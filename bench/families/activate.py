"""The activation of rows alone: one pass over memory per operand."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

import gossamer
from gossamer._activation import activate_reference, as_activation
from gossamer.bench.harness.case import DENSE, DTYPES, OURS, Case, Family, FloatGate, Request, Variant
from gossamer.bench.harness.cost import Cost, nbytes

SHAPES = {
    "olmoe": (32768, 1024),
    "mixtral": (16384, 14336),
    "cpu-rows": (32768, 256),
    "cpu-few": (64, 512),
}
SYMBOLS = ("R", "I")
DEFAULTS = {"cpu": ("cpu-rows", "cpu-few"), "cuda": ("olmoe", "mixtral")}
QUICK = {"cpu": "cpu-rows", "cuda": "olmoe"}


def _plain(preact: torch.Tensor) -> torch.Tensor:
    gate, up = preact.chunk(2, dim=1)
    return F.silu(gate) * up


def _outputs(preact: torch.Tensor, dy: torch.Tensor, both: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    leaf = preact.detach().to(dtype).requires_grad_()
    y = activate_reference(leaf, as_activation("swiglu"))
    found = {"y": y.detach()}
    return found | {"dpreact": torch.autograd.grad(y, leaf, dy.to(dtype))[0]} if both else found


def build(request: Request) -> Case:
    """Build :func:`gossamer.activate` beside the three operators of torch that make up a SwiGLU."""
    rows, inner = (request.sizes[s] for s in SYMBOLS)
    device, dtype, both = request.device, DTYPES[request.dtype], request.direction == "both"
    generator = torch.Generator(device).manual_seed(request.seed)
    preact = torch.randn(rows, 2 * inner, generator=generator, device=device).to(dtype)
    dy = torch.randn(rows, inner, generator=generator, device=device).to(dtype)

    def variant(name: str, role: str, gate: str | None, call) -> Variant:
        leaf = preact.detach().requires_grad_()
        return Variant(name, role, lambda: call(leaf), {"dpreact": leaf}, dy, gate=gate)

    # Forward reads the pre-activation and writes the activation; backward reads both and writes a pre-activation.
    moved = float(preact.nbytes + dy.nbytes)
    moved += 2.0 * preact.nbytes + dy.nbytes if both else 0.0
    return Case(
        "activate",
        request.shape,
        request.sizes,
        request.dtype,
        device,
        request.direction,
        (variant("gossamer", OURS, "truth", gossamer.activate), variant("plain torch", DENSE, None, _plain)),
        {},
        (14.0 if both else 5.0) * rows * inner,
        moved,
        {"truth": lambda: FloatGate(_outputs(preact, dy, both, torch.float64), _outputs(preact, dy, both, dtype))},
        "every output, whole",
    )


def cost(call: Mapping[str, object], result: object) -> Cost:
    """The cost of a forward pass; an exponential counts as one operation."""
    return Cost(5.0 * result.numel(), nbytes(call["preact"], result))


def cost_backward(call: Mapping[str, object], result: object) -> Cost:
    """The cost of a backward pass."""
    return Cost(9.0 * call["dact"].numel(), nbytes(call["dact"], call["preact"], result))


COSTS = {"gossamer::activate": cost, "gossamer::activate_backward": cost_backward}
DIMENSIONS = {"rows": "R", "columns": "I"}
FAMILY = Family("activate", SHAPES, SYMBOLS, DEFAULTS, QUICK, build, skews=("uniform",), dimensions=DIMENSIONS)


def bench_activate(measured):
    """Entry point of pytest-benchmark."""
    measured()
