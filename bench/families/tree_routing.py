"""Gates of experts by soft trees, the experts that they choose, and the gradient of both."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gossamer.bench.families.experts import rule
from gossamer.bench.harness.case import DENSE, OURS, Case, Family, FloatGate, Outputs, Request, Variant
from gossamer.bench.harness.cost import Cost, nbytes
from gossamer.nn import TreeRouter
from gossamer.ops.tree_routing import TreeRouting, tree_routing_reference

SHAPES = {
    "books": (16384, 64, 4),
    "experts-256": (16384, 256, 2),
    "cpu-trees": (4096, 64, 2),
    "cpu-small": (1024, 16, 2),
}
SYMBOLS = ("T", "E", "K")
DEFAULTS = {"cpu": ("cpu-trees", "cpu-small"), "cuda": ("books", "experts-256")}
QUICK = {"cpu": "cpu-trees", "cuda": "books"}
GAMMA = 1.0


def build(request: Request) -> Case:
    """The routing of :class:`gossamer.nn.TreeRouter` from its scores, K trees of E leaves, beside plain torch."""
    tokens, experts, trees = (request.sizes[s] for s in SYMBOLS)
    device, both = request.device, request.direction == "both"
    generator = torch.Generator(device).manual_seed(request.seed)
    scores = torch.randn(tokens, trees, 2 * experts - 1, generator=generator, device=device)
    # Splits on both sides of the point where they are decided.
    scores[..., : experts - 1] *= 0.4
    scores = scores.flatten(1)
    dy = torch.randn(tokens, experts, generator=generator, device=device)
    router = TreeRouter(1, experts, trees, GAMMA, device=device).eval()

    def plain(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gates, _ = tree_routing_reference(TreeRouting(scores, trees, experts, GAMMA, False, experts, False, False))
        return gates, torch.where(gates > 0, torch.arange(experts, device=device), experts)

    def ours(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        routing = router.route(scores)
        return routing.weights, routing.expert_ids

    def outputs(dtype: torch.dtype) -> Outputs:
        leaf = scores.to(dtype).requires_grad_()
        gates, _ = plain(leaf)
        if not both:
            return {"y0": gates.detach()}
        return {"y": gates.detach(), "dscores": torch.autograd.grad(gates, leaf, dy.to(dtype))[0]}

    def variant(name: str, role: str, gate: str | None, call) -> Variant:
        leaf = scores.detach().requires_grad_()
        # Gradients start only from the weights.
        forward = (lambda: call(leaf)[0]) if both else (lambda: call(leaf))
        return Variant(name, role, forward, {"dscores": leaf}, dy, gate=gate)

    chosen = 3.0 * dy.nbytes
    return Case(
        "tree_routing",
        request.shape,
        request.sizes,
        request.dtype,
        device,
        request.direction,
        (variant("gossamer", OURS, "truth", ours), variant("plain torch", DENSE, None, plain)),
        {},
        0.0,
        scores.nbytes + chosen + (2 * scores.nbytes + 2 * dy.nbytes if both else 0.0),
        {"truth": lambda: FloatGate(outputs(torch.float64), outputs(torch.float32))},
        "gates and gradients, whole",
    )


def cost(call: Mapping[str, object], result: object) -> Cost:
    """Bytes of the scores and of the results."""
    return Cost(0.0, nbytes(call["scores"], *result))


def cost_backward(call: Mapping[str, object], result: object) -> Cost:
    """Bytes of the inputs, including the scores, and of the scores' gradient."""
    names = ("dgates", "dweights", "dreach", "dsums", "gates", "norm", "ids", "forward_scores")
    return Cost(0.0, nbytes(*(call[name] for name in names), result))


COSTS = {
    "gossamer::tree_routing": cost,
    "gossamer::tree_routing_backward": cost_backward,
}
DIMENSIONS = {"tokens": "T", "experts": "E", "trees": "K"}
FAMILY = Family(
    "tree_routing",
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


def bench_tree_routing(measured):
    """Entry point of pytest-benchmark."""
    measured()
