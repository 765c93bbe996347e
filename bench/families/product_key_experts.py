"""A feed-forward layer of a million single-neuron experts: retrieval, the layer, and its training step with Adam.

The plain layer gathers the rows of the chosen experts and multiplies them by einsum. Its gradients of both tables are
dense, and torch's fused Adam steps every row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gossamer import optim
from gossamer.bench.families.tables import SAMPLE, Training
from gossamer.bench.harness.case import DENSE, OURS, Case, Family, FloatGate, Outputs, Request
from gossamer.nn import ProductKeyExperts

# Tokens, hidden size, experts, heads, experts per head.
SYMBOLS = ("T", "D", "N", "h", "K")
SHAPES = {
    "peer": (1024, 256, 1024**2, 8, 16),
    "peer-64k": (1024, 256, 256**2, 8, 16),
    "small": (256, 64, 4096, 4, 8),
}
DEFAULTS = {"cpu": ("peer",), "cuda": ("peer",)}
QUICK = {"cpu": "peer-64k", "cuda": "peer"}
DIMENSIONS = {"tokens": "T", "experts": "N"}
KEY_DIM = 128
# A large epsilon; without it, Adam's first step would be the sign even of gradients that are only rounding errors.
LR, EPS = 0.1, 1.0
# Scores closer than this, relative to their spread, may be ranked in either order in float32.
CLOSE = 1e-4
# Tokens whose expected results are computed at once.
TOKENS = 128


@dataclass(frozen=True)
class Problem:
    """The problem that every variant computes. All variants read and step the same two tables and their moments; with
    copies, a million experts would take 6 GB more.

    Attributes:
        layer: our layer, with an optimizer if a step is taken.
        x: ``(T, D)``.
        dy: ``(T, D)``, zero for tokens whose choice is too close to call.
        ids: ``(T, h·K)``, the experts chosen in float64.
        safe: tokens whose choice is not too close to call.
        both: whether a step is taken.
        touched: the distinct ``ids``.
        initial: their rows of both tables, before any step.
    """

    layer: ProductKeyExperts
    x: torch.Tensor
    dy: torch.Tensor
    ids: torch.Tensor
    safe: torch.Tensor
    both: bool
    touched: torch.Tensor
    initial: tuple[torch.Tensor, torch.Tensor]

    @property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both tables, outside autograd."""
        return self.layer.input_weight.detach(), self.layer.output_weight.detach()

    @property
    def moments(self) -> list[dict[str, torch.Tensor]]:
        """Adam's state of each table by name, without the count of steps."""
        layer = self.layer
        return [
            {kind: getattr(layer, f"optimizer_{table}_{kind}") for kind in layer.optimizer.state_kinds()}
            for table in layer.tables
        ]

    def restore(self) -> None:
        """Undo all steps. Only touched rows change: Adam leaves rows alone whose gradients were always zero."""
        for table, rows in zip(self.tables, self.initial, strict=True):
            table[self.touched] = rows
        for moments in self.moments if self.both else ():
            for moment in moments.values():
                moment[self.touched] = 0

    def sampled(self) -> torch.Tensor:
        """The rows that safe tokens touch, or some of them if they are many."""
        return self.ids[self.safe].unique()[:SAMPLE]


@dataclass(frozen=True)
class Step(Training):
    """A variant whose step is checked from the initial tables."""

    restore: Callable[[], None] = lambda: None

    def outputs(self, direction: str) -> Outputs:
        """The result and, after a step from the initial tables, the sampled rows."""
        self.restore()
        return super().outputs(direction)


def plain_route(layer: ProductKeyExperts, x: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and scores ``(T, h, top_k)`` by two of torch's top-k and one over their sums, in the dtype of ``x``."""
    norm = layer.query_norm
    numbers = [t.to(x.dtype) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
    queries = F.batch_norm(F.linear(x, layer.query.weight.to(x.dtype)), *numbers, False, 0.0, norm.eps)
    halves = queries.view(x.shape[0], layer.num_heads, 2, -1).unbind(2)
    keys = layer.keys[0].to(x.dtype)
    (best1, at1), (best2, at2) = ((q @ c.T).topk(top_k) for q, c in zip(halves, keys, strict=True))
    scores, pair = (best1.unsqueeze(3) + best2.unsqueeze(2)).flatten(2).topk(top_k)
    ids = at1.gather(2, pair // top_k) * keys.shape[1] + at2.gather(2, pair % top_k)
    return ids, scores


def plain_layer(x: torch.Tensor, scores: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """``Σ softmax(scores) · gelu(⟨u, x⟩) · v`` of the chosen experts' rows ``u`` and ``v``, ``(T, h, K, D)`` each."""
    hidden = F.gelu(torch.einsum("td,thkd->thk", x, inputs))
    return torch.einsum("thk,thkd->td", scores.softmax(-1) * hidden, outputs)


def _ours(problem: Problem) -> Step:
    return _step("gossamer", OURS, problem, lambda: problem.layer(problem.x), [], None)


def _plain(problem: Problem) -> Step:
    layer = problem.layer
    tables = [torch.nn.Parameter(table, requires_grad=problem.both) for table in problem.tables]
    optimizer = None
    if problem.both:
        optimizer = torch.optim.Adam(tables, LR, eps=EPS, fused=True)
        for table, moments in zip(tables, problem.moments, strict=True):
            optimizer.state[table] = {"step": torch.zeros((), dtype=torch.float32, device=table.device), **moments}

    def forward() -> torch.Tensor:
        ids, scores = plain_route(layer, problem.x, layer.top_k)
        return plain_layer(problem.x, scores, *(F.embedding(ids, table) for table in tables))

    return _step("torch, gather and einsum", DENSE, problem, forward, tables, optimizer)


def _step(
    name: str,
    role: str,
    problem: Problem,
    forward: Callable[[], torch.Tensor],
    tables: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
) -> Step:
    sampled = problem.sampled() if problem.both else None
    trained = [parameter for parameter in problem.layer.parameters() if parameter.requires_grad] + tables

    def step(y: torch.Tensor) -> None:
        y.backward(problem.dy)
        if optimizer is not None:
            optimizer.step()
        for parameter in trained:
            parameter.grad = None

    def rows() -> torch.Tensor:
        return torch.cat([table[sampled] for table in problem.tables])

    return Step(name, role, forward, gate="truth", step=step, rows=rows, restore=problem.restore)


def _expected(problem: Problem, dtype: torch.dtype) -> Outputs:
    """The result of safe tokens, and the sampled rows after a step, by plain torch over only the touched rows.

    Some tokens at a time, since the rows that all of them gather would take as much memory in float64 as the tables do.
    """
    layer, x = problem.layer, problem.x.to(dtype)
    _, scores = plain_route(layer, x, layer.top_k)
    # Both dtypes use the order of experts from float64.
    ids = problem.ids.view(x.shape[0], layer.num_heads, layer.top_k)
    places = torch.searchsorted(problem.touched, ids)
    sampled = problem.sampled()
    sums = [x.new_zeros(sampled.numel(), x.shape[1]) for _ in problem.initial]
    y = torch.empty_like(x)
    for some in torch.arange(x.shape[0], device=x.device).split(TOKENS):
        rows = [table[places[some]].to(dtype).requires_grad_(problem.both) for table in problem.initial]
        part = plain_layer(x[some], scores[some], *rows)
        y[some] = part.detach()
        if problem.both and sampled.numel():
            at = torch.searchsorted(sampled, ids[some]).clamp(max=sampled.numel() - 1)
            wanted = sampled[at] == ids[some]
            for total, gradient in zip(sums, torch.autograd.grad(part, rows, problem.dy[some].to(dtype)), strict=True):
                total.index_add_(0, at[wanted], gradient[wanted])
    found = {"y": y[problem.safe]}
    if problem.both:
        at = torch.searchsorted(problem.touched, sampled)
        initial = [table[at].to(dtype) for table in problem.initial]
        found["rows"] = torch.cat([t - LR * g / (g.abs() + EPS) for t, g in zip(initial, sums, strict=True)])
    return found


def build(request: Request) -> Case:
    """Build our layer beside plain torch's; forward and backward end in a step of both tables."""
    tokens, dim, experts, heads, top_k = (request.sizes[s] for s in SYMBOLS)
    device, both = request.device, request.direction == "both"
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(request.seed)
        options = {"num_heads": heads, "top_k": top_k, "key_dim": min(KEY_DIM, 2 * dim)}
        optimizer = optim.Adam(LR, eps=EPS) if both else None
        layer = ProductKeyExperts(dim, experts, **options, optimizer=optimizer, device=device)
        x = torch.randn(tokens, dim, device=device)
        dy = torch.randn(tokens, dim, device=device)
    layer.eval()
    side = math.isqrt(experts)
    with torch.no_grad():
        ids, scores = plain_route(layer, x.double(), min(top_k + 1, side))
    gap = scores[..., top_k - 1] - scores[..., -1] if scores.shape[2] > top_k else scores.new_ones(scores.shape[:2])
    safe = (gap > CLOSE * scores.std()).all(1)
    ids = ids[..., :top_k].flatten(1)
    touched = ids.unique()
    initial = layer.input_weight.detach()[touched], layer.output_weight.detach()[touched]
    problem = Problem(layer, x, dy * safe.unsqueeze(1), ids, safe, both, touched, initial)

    def gate() -> FloatGate:
        truth, baseline = (_expected(problem, dtype) for dtype in (torch.float64, torch.float32))
        return FloatGate(truth, baseline, {"y": lambda y: y[safe]})

    key_dim, chosen = layer.key_dim, tokens * heads * top_k
    retrieval = 2.0 * tokens * heads * key_dim * (dim + side)
    products = 2.0 * chosen * dim
    size = x.element_size()
    once = x.nbytes + dy.nbytes + layer.query.weight.nbytes + layer.keys.nbytes
    # Touched rows of both tables are read; a step reads and writes them with both moments.
    moved = once + 2.0 * touched.numel() * dim * size * (6 if both else 1)
    # The backward pass multiplies queries by their weights twice, and each chosen expert twice instead of all keys.
    backward = 4.0 * tokens * heads * key_dim * dim + 4 * products + 4.0 * chosen * key_dim
    return Case(
        "product_key_experts",
        request.shape,
        request.sizes,
        request.dtype,
        device,
        request.direction,
        (_ours(problem), _plain(problem)),
        {},
        retrieval + 2 * products + (backward if both else 0),
        moved,
        {"truth": gate},
        f"{int(safe.sum())} of {tokens} tokens, those without a near tie" + (", and their rows" if both else ""),
        f"{touched.numel()} distinct experts of {ids.numel()}",
    )


def rule(sizes: dict[str, int]) -> str | None:
    """The reason why ProductKeyExperts would refuse these sizes, or None."""
    side = math.isqrt(sizes["N"])
    if side * side != sizes["N"]:
        return f"N must be a square, got {sizes['N']}"
    return f"K must be at most the square root of N, got {sizes['K']}" if sizes["K"] > side else None


FAMILY = Family(
    "product_key_experts",
    SHAPES,
    SYMBOLS,
    DEFAULTS,
    QUICK,
    build,
    dtypes=("fp32",),
    skews=("uniform",),
    dimensions=DIMENSIONS,
    work=("T",),
    rule=rule,
)


def bench_product_key_experts(measured):
    """Entry point of pytest-benchmark."""
    measured()
