"""A router's choice: the experts of each token and their weights, from its logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch

import gossamer
from gossamer.bench.families.experts import rule
from gossamer.bench.harness.case import DENSE, OURS, Case, Family, FloatGate, Outputs, Request, Variant
from gossamer.bench.harness.cost import Cost, nbytes

SHAPES = {
    "olmoe": (16384, 64, 8),
    "qwen3-30b-a3b": (16384, 128, 8),
    "deepseek-v3": (16384, 256, 8),
    "cpu-router": (4096, 256, 8),
    "cpu-small": (1024, 32, 4),
}
SYMBOLS = ("T", "E", "K")
DEFAULTS = {"cpu": ("cpu-router", "cpu-small"), "cuda": ("olmoe", "qwen3-30b-a3b", "deepseek-v3")}
QUICK = {"cpu": "cpu-router", "cuda": "qwen3-30b-a3b"}


def _plain(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = logits.softmax(dim=1).topk(top_k, dim=1)
    return ids, weights / weights.sum(dim=1, keepdim=True)


def _ours(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    routing = gossamer.nn.softmax_topk(logits, top_k, renormalize=True)
    return routing.expert_ids, routing.weights


def build(request: Request) -> Case:
    """Build :func:`gossamer.nn.softmax_topk` beside softmax, top-k and normalisation by torch."""
    tokens, experts, top_k = (request.sizes[s] for s in SYMBOLS)
    device, both = request.device, request.direction == "both"
    generator = torch.Generator(device).manual_seed(request.seed)
    # Quantiles of a normal distribution in random order, since equal logits might be chosen in either order.
    order = torch.rand(tokens, experts, generator=generator, device=device).argsort(dim=1)
    logits = torch.special.ndtri((order + 0.5) / experts)
    dy = torch.randn(tokens, top_k, generator=generator, device=device)

    def by_expert(outputs: Outputs) -> Outputs:
        """The weights, scattered to their experts, which identifies the experts and their order."""
        if both:
            return outputs
        weights = outputs["y1"]
        return {"y": weights.new_zeros(tokens, experts).scatter(1, outputs["y0"], weights)}

    def outputs(dtype: torch.dtype) -> Outputs:
        leaf = logits.detach().to(dtype).requires_grad_()
        ids, weights = _plain(leaf, top_k)
        if not both:
            return by_expert({"y0": ids, "y1": weights.detach()})
        return {"y": weights.detach(), "dlogits": torch.autograd.grad(weights, leaf, dy.to(dtype))[0]}

    def variant(name: str, role: str, gate: str | None, call) -> Variant:
        leaf = logits.detach().requires_grad_()
        # Gradients start only from the weights, and are at the experts' places.
        forward = (lambda: call(leaf, top_k)[1]) if both else (lambda: call(leaf, top_k))
        return Variant(name, role, forward, {"dlogits": leaf}, dy, layout=by_expert, gate=gate)

    chosen = dy.nbytes * 3.0
    return Case(
        "topk_routing",
        request.shape,
        request.sizes,
        request.dtype,
        device,
        request.direction,
        (variant("gossamer", OURS, "truth", _ours), variant("plain torch", DENSE, None, _plain)),
        {},
        0.0,
        logits.nbytes + chosen + (logits.nbytes + dy.nbytes + chosen if both else 0.0),
        {"truth": lambda: FloatGate(outputs(torch.float64), outputs(torch.float32))},
        "every output, whole",
    )


def cost(call: Mapping[str, object], result: object) -> Cost:
    """Bytes of the logits and of the chosen ids and weights."""
    return Cost(0.0, nbytes(call["logits"], call["bias"], *result))


def cost_backward(call: Mapping[str, object], result: object) -> Cost:
    """Bytes of the inputs and of the logits' gradient; logits themselves are read only for shares of all experts."""
    shares = not call["forward_sigmoid"] and not call["forward_renormalize"]
    logits = call["forward_logits"] if shares else None
    return Cost(0.0, nbytes(call["dweights"], call["weights"], call["ids"], logits, result))


def cost_mass(call: Mapping[str, object], result: object) -> Cost:
    """Bytes of the logits and of the slots."""
    return Cost(0.0, nbytes(call["logits"], *result))


def cost_mass_backward(call: Mapping[str, object], result: object) -> Cost:
    """Bytes of the inputs, including the logits, and of the logits' gradient."""
    return Cost(0.0, nbytes(call["dweights"], call["weights"], call["ids"], call["forward_logits"], result))


COSTS = {
    "gossamer::topk_routing": cost,
    "gossamer::topk_routing_backward": cost_backward,
    "gossamer::mass_routing": cost_mass,
    "gossamer::mass_routing_backward": cost_mass_backward,
}
DIMENSIONS = {"tokens": "T", "experts": "E", "top-k": "K"}
FAMILY = Family(
    "topk_routing",
    SHAPES,
    SYMBOLS,
    DEFAULTS,
    QUICK,
    build,
    dtypes=("fp32",),
    skews=("uniform",),
    dimensions=DIMENSIONS,
    rule=rule,
)


def bench_topk_routing(measured):
    """Entry point of pytest-benchmark."""
    measured()
