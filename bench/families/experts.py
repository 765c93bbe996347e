"""Inputs of expert-layer benchmarks, and their float64 truth, complete or for a sample of tokens and experts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gossamer.bench.families.skew import expert_ids
from gossamer.bench.harness.case import DENSE, DTYPES, FloatGate, Request, Variant

SHAPES = {
    "olmoe": (16384, 2048, 1024, 64, 8),
    "qwen3-30b-a3b": (16384, 2048, 768, 128, 8),
    "mixtral": (8192, 4096, 14336, 8, 2),
    "fine-grained": (24576, 1536, 256, 128, 8),
    "cpu-small": (1024, 1024, 512, 32, 4),
    "cpu-fine": (4096, 512, 256, 64, 8),
    "cpu-decode": (16, 1024, 512, 64, 8),
}
SYMBOLS = ("T", "H", "I", "E", "K")
DIMENSIONS = {"tokens": "T", "hidden": "H", "intermediate": "I", "experts": "E", "top-k": "K"}
# Eager code loops over the experts on the host, so their number is not reduced.
WORK = ("T", "H", "I")
DEFAULTS = {
    "cpu": ("cpu-small", "cpu-fine", "cpu-decode"),
    "cuda": ("olmoe", "qwen3-30b-a3b", "mixtral", "fine-grained"),
}
QUICK = {"cpu": "cpu-small", "cuda": "olmoe"}

# Above this many multiply-adds the truth is computed only for a sample.
WHOLE = 2**30
SAMPLE_TOKENS = 128


def rule(sizes: Mapping[str, int]) -> str | None:
    """The reason why a shape of experts is invalid, or None."""
    if sizes["K"] > sizes["E"]:
        return f"K must be at most E, got K={sizes['K']} and E={sizes['E']}"
    return None


@dataclass(frozen=True)
class Problem:
    """An expert layer's inputs.

    If a router could choose the ids, the first E columns of ``x`` are its logits: distinct numbers, the K largest at
    the ids in slot order. A layer with its own router gets ``router``, E rows of the identity, and so chooses the same
    experts.

    Attributes:
        x: ``(T, H)``.
        gate_up: ``(E, 2I, H)``, the gate's rows first.
        down: ``(E, H, I)``.
        ids: ``(T, K)`` int64.
        weights: ``(T, K)``, the softmax over the chosen logits, in the dtype of ``x``.
        router: ``(E, H)``; None if x cannot hold the logits.
        dy: ``(T, H)``.
    """

    x: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    router: torch.Tensor | None
    dy: torch.Tensor

    @property
    def num_experts(self) -> int:
        """E."""
        return self.gate_up.shape[0]

    @property
    def top_k(self) -> int:
        """K."""
        return self.ids.shape[1]

    def leaf(self, name: str) -> torch.Tensor:
        """A view of an input for which a variant takes its own gradient."""
        return getattr(self, name).detach().requires_grad_()


def make_problem(request: Request) -> Problem:
    """Draw the inputs of a case."""
    t, h, i, e, k = (request.sizes[s] for s in SYMBOLS)
    device, dtype = request.device, DTYPES[request.dtype]
    generator = torch.Generator(device).manual_seed(request.seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        # One expert at a time, since the float32 draw of a whole weight would be the largest tensor.
        if len(shape) == 3:
            return torch.stack([normal(*shape[1:], scale=scale) for _ in range(shape[0])])
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    x = normal(t, h)
    ids = expert_ids(t, e, k, request.skew, request.seed).to(device)
    router, logits = None, torch.randn(t, k, generator=generator, device=device)
    grid = torch.linspace(3**0.5, -(3**0.5), e, device=device).to(dtype)
    if e <= h and grid.unique().numel() == e:
        others = torch.rand(t, e, generator=generator, device=device).scatter_(1, ids, 2.0)
        order = torch.cat([ids, others.argsort(dim=1)[:, : e - k]], dim=1)
        x[:, :e] = torch.empty(t, e, dtype=dtype, device=device).scatter_(1, order, grid.expand(t, e))
        router = torch.eye(e, h, dtype=dtype, device=device)
        logits = grid[:k].expand(t, k)
    weights = torch.softmax(logits.float(), dim=1).to(dtype)
    gate_up, down = normal(e, 2 * i, h, scale=h**-0.5), normal(e, h, i, scale=i**-0.5)
    return Problem(x, gate_up, down, ids, weights, router, normal(t, h))


@dataclass(frozen=True)
class Sample:
    """The tokens whose rows, and the experts whose weight gradients, are checked."""

    tokens: torch.Tensor
    experts: torch.Tensor
    words: str

    @property
    def picks(self) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """Output name -> its checked part."""
        tokens = {name: lambda v: v[self.tokens] for name in ("y", "dx", "dweights")}
        return tokens | {name: lambda v: v[self.experts] for name in ("dgate_up", "ddown")}


def make_sample(problem: Problem) -> Sample:
    """All tokens and experts of a small problem; in a large one, evenly spread tokens and the first and last expert."""
    (t, h), e, i = problem.x.shape, problem.num_experts, problem.down.shape[2]
    device = problem.x.device
    if t * problem.top_k * h * i <= WHOLE:
        return Sample(torch.arange(t, device=device), torch.arange(e, device=device), "every output, whole")
    tokens = torch.linspace(0, t - 1, min(t, SAMPLE_TOKENS), device=device).round().long().unique()
    experts = torch.tensor([0, e - 1], device=device).unique()
    words = (
        f"y, dx and dweights of {tokens.numel()} of {t} tokens; weight gradients of {experts.numel()} of {e} experts"
    )
    return Sample(tokens, experts, words)


def sampled_outputs(
    problem: Problem, sample: Sample, direction: str, dtype: torch.dtype, accumulate: torch.dtype, weights: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The sampled outputs by plain torch, one expert at a time, so that only one is cast at a time.

    Args:
        problem: the inputs.
        sample: the tokens and experts to compute.
        direction: ``"forward"`` or ``"both"``.
        dtype: dtype of the products.
        accumulate: dtype of the sums over a token's experts.
        weights: ``(T, K)`` routing weights to use.
    """
    both = direction == "both"
    t, h = problem.x.shape
    wanted = torch.zeros(t, dtype=torch.bool, device=problem.x.device)
    wanted[sample.tokens] = True
    sampled = set(sample.experts.tolist()) if both else set()
    y = torch.zeros(t, h, dtype=accumulate, device=problem.x.device)
    dx, dweights = torch.zeros_like(y), torch.zeros_like(weights, dtype=dtype)
    dgate_up, ddown = [], []
    for e in range(problem.num_experts):
        token, slot = (problem.ids == e).nonzero(as_tuple=True)
        if e not in sampled:
            mine = wanted[token]
            token, slot = token[mine], slot[mine]
        xe = problem.x[token].to(dtype).requires_grad_(both)
        we = weights[token, slot].to(dtype).requires_grad_(both)
        w1 = problem.gate_up[e].detach().to(dtype).requires_grad_(e in sampled)
        w2 = problem.down[e].detach().to(dtype).requires_grad_(e in sampled)
        gate, up = (xe @ w1.T).chunk(2, dim=1)
        out = ((F.silu(gate) * up) @ w2.T) * we.unsqueeze(1)
        y.index_add_(0, token, out.detach().to(accumulate))
        if both:
            leaves = [xe, we, *([w1, w2] if e in sampled else [])]
            gx, gw, *gweights = torch.autograd.grad(out, leaves, problem.dy[token].to(dtype))
            dx.index_add_(0, token, gx.to(accumulate))
            dweights[token, slot] = gw
            if gweights:
                dgate_up.append(gweights[0])
                ddown.append(gweights[1])
    found = {"y": y[sample.tokens].to(dtype)}
    if both:
        found |= {"dx": dx[sample.tokens].to(dtype), "dweights": dweights[sample.tokens].to(weights.dtype)}
        found |= {"dgate_up": torch.stack(dgate_up), "ddown": torch.stack(ddown)}
    return found


def make_gates(problem: Problem, sample: Sample, request: Request) -> dict[str, Callable[[], FloatGate]]:
    """Three gates against float64, each made when first requested.

    The baseline of ``"truth"`` is the plain computation with a token's experts summed in float32. That of ``"plain"``,
    for references and peers, sums them in the layer's own dtype, as eager code does. ``"own router"`` is for a layer
    that computes its routing weights itself, in float32; the gradients that continue into its router are not judged.
    """
    dtype = DTYPES[request.dtype]
    outputs = functools.partial(sampled_outputs, problem, sample, request.direction)
    truth = functools.cache(lambda: outputs(torch.float64, torch.float64, problem.weights.double()))

    def own_router() -> FloatGate:
        weights = torch.softmax(problem.x.float().gather(1, problem.ids), dim=1)
        judged = outputs(torch.float64, torch.float64, weights.double())
        judged = {name: value for name, value in judged.items() if name not in ("dx", "dweights")}
        return FloatGate(judged, outputs(dtype, dtype, weights), sample.picks)

    return {
        "truth": lambda: FloatGate(truth(), outputs(dtype, torch.float32, problem.weights), sample.picks),
        "plain": lambda: FloatGate(truth(), outputs(dtype, dtype, problem.weights), sample.picks),
        "own router": own_router,
    }


def dense_variant(request: Request) -> Variant:
    """A feed-forward layer with one set of weights on T·K rows: the FLOPs of the experts, in three plain products."""
    t, h, i, _, k = (request.sizes[s] for s in SYMBOLS)
    generator = torch.Generator(request.device).manual_seed(request.seed + 1)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=request.device) * scale).to(DTYPES[request.dtype])

    x = normal(t * k, h).requires_grad_()
    gate_up = normal(2 * i, h, scale=h**-0.5).requires_grad_()
    down = normal(h, i, scale=i**-0.5).requires_grad_()

    def forward() -> torch.Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down)

    leaves = {"dx": x, "dgate_up": gate_up, "ddown": down}
    return Variant("equal-FLOP dense", DENSE, forward, leaves, normal(t * k, h), gate=None)


def costs(problem: Problem, direction: str) -> tuple[float, float]:
    """FLOPs of the three products (nine with backward), and the bytes of reading inputs and writing outputs once."""
    (t, h), i = problem.x.shape, problem.down.shape[2]
    flops = 6.0 * t * problem.top_k * h * i
    token, expert = problem.x.nbytes, 3 * h * i * problem.x.element_size()
    touched = int(problem.ids.unique().numel())
    moved = 2.0 * token + touched * expert + problem.weights.nbytes + problem.ids.nbytes
    if direction == "forward":
        return flops, moved
    # Backward reads dy and writes dx, dweights and the gradient of every expert, touched or not.
    return 3 * flops, moved + 2.0 * token + problem.num_experts * expert + problem.weights.nbytes
