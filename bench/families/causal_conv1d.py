"""The depthwise causal convolution before a state update: one pass over memory per operand."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

import gossamer
from gossamer.bench.harness.case import DENSE, DTYPES, OURS, Case, Family, FloatGate, Outputs, Request, Variant
from gossamer.bench.harness.cost import Cost, nbytes

SHAPES = {
    # Queries, keys and values of a gated delta rule layer of Qwen3-Next.
    "qwen3-next": (1, 8192, 8192, 4),
    "cpu-layer": (1, 4096, 2048, 4),
    "cpu-short": (1, 64, 2048, 4),
}
SYMBOLS = ("B", "T", "C", "W")
DEFAULTS = {"cpu": ("cpu-layer", "cpu-short"), "cuda": ("qwen3-next",)}
QUICK = {"cpu": "cpu-layer", "cuda": "qwen3-next"}
DIMENSIONS = {"positions": "T", "channels": "C", "taps": "W"}


def rule(sizes: Mapping[str, int]) -> str | None:
    """The reason why sizes are invalid, or None."""
    return None if 2 <= sizes["W"] <= 8 else f"W must be from 2 to 8, got {sizes['W']}"


def _plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The convolution as models compute it without kernels; torch's takes channels first."""
    taps = weight.shape[1]
    y = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=taps - 1, groups=weight.shape[0])
    return F.silu(y[..., : x.shape[1]]).transpose(1, 2)


def _ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return gossamer.causal_conv1d(x, weight, bias, activation="silu")[0]


def build(request: Request) -> Case:
    """Build :func:`gossamer.causal_conv1d` with SiLU beside torch's convolution and activation."""
    b, t, c, taps = (request.sizes[s] for s in SYMBOLS)
    device, dtype, both = request.device, DTYPES[request.dtype], request.direction == "both"
    generator = torch.Generator(device).manual_seed(request.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    inputs = {"dx": normal(b, t, c), "dweight": normal(c, taps), "dbias": normal(c)}
    dy = normal(b, t, c)

    def outputs(wide: torch.dtype) -> Outputs:
        leaves = [value.detach().to(wide).requires_grad_() for value in inputs.values()]
        y = _plain(*leaves)
        if not both:
            return {"y": y.detach()}
        return {"y": y.detach(), **dict(zip(inputs, torch.autograd.grad(y, leaves, dy.to(wide)), strict=True))}

    def variant(name: str, role: str, call, gate: str | None) -> Variant:
        leaves = {key: value.detach().clone().requires_grad_() for key, value in inputs.items()}
        tensors = tuple(leaves.values())
        return Variant(name, role, lambda: call(*tensors), leaves, dy, gate=gate)

    # Forward reads the input and writes the output; backward reads the input and a gradient, and writes another.
    filters = nbytes(inputs["dweight"], inputs["dbias"])
    moved = 2.0 * dy.nbytes + filters + (3.0 * dy.nbytes + 2 * filters if both else 0.0)
    return Case(
        "causal_conv1d",
        request.shape,
        request.sizes,
        request.dtype,
        device,
        request.direction,
        (variant("gossamer", OURS, _ours, "truth"), variant("torch conv1d and silu", DENSE, _plain, None)),
        {},
        (8.0 * taps + 14.0 if both else 2.0 * taps + 5.0) * b * t * c,
        moved,
        {"truth": lambda: FloatGate(outputs(torch.float64), outputs(dtype))},
        "every output, whole",
    )


def cost(call: Mapping[str, object], result: tuple[torch.Tensor, torch.Tensor]) -> Cost:
    """The cost of a forward pass; an exponential counts as one operation."""
    flops = (2.0 * call["weight"].shape[1] + (5.0 if call["silu"] else 0.0)) * call["x"].numel()
    return Cost(flops, nbytes(call["x"], call["weight"], call["bias"], call["initial_state"], *result))


def cost_backward(call: Mapping[str, object], result: tuple[torch.Tensor, ...]) -> Cost:
    """The cost of a backward pass: the sums again, and those for the gradients of inputs and taps."""
    taps = call["forward_weight"].shape[1]
    flops = (6.0 * taps + (9.0 if call["forward_silu"] else 0.0)) * call["dy"].numel()
    given = (call[name] for name in ("dy", "dfinal_state", "forward_x", "forward_weight", "forward_bias"))
    return Cost(flops, nbytes(*given, *result))


def cost_step(call: Mapping[str, object], result: torch.Tensor) -> Cost:
    """The cost of one position, for which the state is read and written."""
    flops = (2.0 * call["weight"].shape[1] + (5.0 if call["silu"] else 0.0)) * call["x"].numel()
    return Cost(flops, nbytes(call["x"], call["state"], call["state"], call["weight"], call["bias"], result))


COSTS = {
    "gossamer::causal_conv1d": cost,
    "gossamer::causal_conv1d_backward": cost_backward,
    "gossamer::causal_conv1d_step": cost_step,
}
FAMILY = Family(
    "causal_conv1d",
    SHAPES,
    SYMBOLS,
    DEFAULTS,
    QUICK,
    build,
    skews=("uniform",),
    dimensions=DIMENSIONS,
    work=("T", "C"),
    rule=rule,
)


def bench_causal_conv1d(measured):
    """Entry point of pytest-benchmark."""
    measured()
