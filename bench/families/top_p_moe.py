"""An expert layer whose tokens take experts until a probability is reached, beside one with a fixed number of experts.

Both route by the same given logits, so that they differ only in the number of experts per token: exactly K, or K (or
just below) on average.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

import gossamer
from gossamer.bench.families.experts import rule
from gossamer.bench.harness.case import DENSE, DTYPES, OURS, Case, Family, FloatGate, Outputs, Request, Variant
from gossamer.nn import Routing, softmax_top_p, softmax_topk

# Tokens, hidden and intermediate size, experts, mean experts per token.
SYMBOLS = ("T", "H", "I", "E", "K")
SHAPES = {
    "olmoe": (16384, 2048, 1024, 64, 8),
    "cpu": (4096, 512, 256, 64, 3),
    "small": (256, 128, 64, 8, 2),
}
DEFAULTS = {"cpu": ("cpu",), "cuda": ("olmoe",)}
QUICK = {"cpu": "cpu", "cuda": "olmoe"}
DIMENSIONS = {"tokens": "T", "experts": "E", "top-k": "K"}


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_()


def _mass(logits: torch.Tensor, mean: int) -> float:
    """The p, in thousandths, at which tokens take ``mean`` experts on average, or slightly fewer."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        taken = int((softmax_top_p(logits, middle).expert_ids < logits.shape[1]).sum())
        low, high = (low, middle) if taken > mean * logits.shape[0] else (middle, high)
    # A finer p would be at some token's running sum, where precisions may fall on either side.
    return math.floor(1000 * low) / 1000


def _by_loop(x: torch.Tensor, routing: Routing, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The layer's output, one expert after another."""
    y = torch.zeros_like(x)
    for expert in range(routing.num_experts):
        token, slot = torch.where(routing.expert_ids == expert)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=1)
        rows = F.linear(F.silu(gate) * up, down[expert])
        y = y.index_add(0, token, rows * routing.weights[token, slot].to(rows.dtype).unsqueeze(1))
    return y


def _ours(x: torch.Tensor, routing: Routing, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    routing = routing.dispatched()
    return gossamer.expert_mlp(x, gate_up, down, routing.dispatch, routing.weights)


def build(request: Request) -> Case:
    """Build :func:`gossamer.nn.softmax_top_p` with experts beside :func:`gossamer.nn.softmax_topk` with experts."""
    tokens, hidden, width, experts, top_k = (request.sizes[s] for s in SYMBOLS)
    device, dtype, both = request.device, DTYPES[request.dtype], request.direction == "both"
    generator = torch.Generator().manual_seed(request.seed)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(device)

    x = draw(tokens, hidden).to(dtype)
    logits = draw(tokens, experts, scale=1.5)
    gate_up = draw(experts, 2 * width, hidden, scale=hidden**-0.5).to(dtype)
    down = draw(experts, hidden, width, scale=width**-0.5).to(dtype)
    dy = draw(tokens, hidden).to(dtype)
    mass = _mass(logits, top_k)

    def varying(logits: torch.Tensor) -> Routing:
        # On a GPU, buffers have the size of this bound, which the mean does not exceed.
        routing = softmax_top_p(logits, mass)
        return routing.with_experts(routing.expert_ids, routing.weights, max_rows=top_k * tokens)

    def variant(name: str, role: str, route, compute, tensors, gate: str | None) -> Variant:
        leaves = dict(zip(("dx", "dlogits", "dgate_up", "ddown"), map(_leaf, tensors), strict=True))

        def forward() -> torch.Tensor:
            x, logits, gate_up, down = leaves.values()
            return compute(x, route(logits), gate_up, down)

        return Variant(name, role, forward, leaves, dy.to(tensors[0].dtype), gate=gate)

    inputs = [x, logits, gate_up, down]
    ours = variant("gossamer", OURS, varying, _ours, inputs, "truth")
    fixed = variant("fixed experts", DENSE, lambda l: softmax_topk(l, top_k), _ours, inputs, None)

    def gate() -> FloatGate:
        def outputs(dtype: torch.dtype) -> Outputs:
            wide = [tensor.to(torch.promote_types(dtype, tensor.dtype)) for tensor in inputs]
            wide = [wide[0].to(dtype), wide[1], wide[2].to(dtype), wide[3].to(dtype)]
            return variant("", OURS, lambda l: softmax_top_p(l, mass), _by_loop, wide, None).call(request.direction)

        return FloatGate(outputs(torch.float64), outputs(dtype))

    flops = 6.0 * tokens * top_k * hidden * width * (3 if both else 1)
    once = sum(tensor.nbytes for tensor in inputs) + dy.nbytes
    return Case(
        "top_p_moe",
        request.shape,
        request.sizes,
        request.dtype,
        device,
        request.direction,
        (ours, fixed),
        {},
        flops,
        once * (2 if both else 1),
        {"truth": gate},
        "every output",
        f"{request.skew} routing",
    )


FAMILY = Family(
    "top_p_moe",
    SHAPES,
    SYMBOLS,
    DEFAULTS,
    QUICK,
    build,
    skews=("uniform",),
    dimensions=DIMENSIONS,
    rule=rule,
)


def bench_top_p_moe(measured):
    """Entry point of pytest-benchmark."""
    measured()
