"""The routed projections of a mixture of attention: queries of each token's experts, and their outputs summed.

The attention between them is torch's own and is left out. The dense baseline projects each token to as many queries and
back, with the same FLOPs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import gossamer
from gossamer.bench.harness.case import DENSE, DTYPES, OURS, Case, Family, FloatGate, Outputs, Request, Variant
from gossamer.nn.moe.mixture_of_attention import output_by_slot
from gossamer.testing import random_expert_ids

# Tokens, hidden size, columns of an expert's queries (heads times their size), experts, experts per token.
SYMBOLS = ("T", "H", "W", "E", "K")
SHAPES = {
    "jetmoe": (4096, 2048, 2048, 8, 2),
    "cpu": (2048, 1024, 1024, 8, 2),
    "small": (256, 128, 64, 8, 2),
}
DEFAULTS = {"cpu": ("cpu",), "cuda": ("jetmoe",)}
QUICK = {"cpu": "cpu", "cuda": "jetmoe"}
DIMENSIONS = {"tokens": "T", "experts": "E"}


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_()


def _variant(name: str, role: str, project, x, rows, query, output, dy, gate: str | None) -> Variant:
    """A way to compute queries from ``x`` and, in the same call, outputs from ``rows``."""
    leaves = {"dx": x, "drows": rows, "dquery": query, "doutput": output}
    return Variant(name, role, lambda: torch.cat(project(*leaves.values()), dim=1), leaves, dy, gate=gate)


def _by_loop(ids: torch.Tensor, weights: torch.Tensor):
    """The projections of each expert's tokens, one expert after another."""

    def project(x, rows, query, output):
        tokens, top_k = ids.shape
        queries = x.new_zeros(tokens, top_k, query.shape[1])
        y = x.new_zeros(tokens, top_k, output.shape[1])
        for expert in range(query.shape[0]):
            at = (ids == expert).nonzero(as_tuple=True)
            queries = queries.index_put(at, x[at[0]] @ query[expert].T)
            y = y.index_put(at, rows.view(tokens, top_k, -1)[at] @ output[expert].T)
        return queries.flatten(1), (y * weights.to(y.dtype).unsqueeze(2)).sum(1)

    return project


def build(request: Request) -> Case:
    """Build our grouped products beside two dense ones with the same FLOPs."""
    tokens, hidden, width, experts, top_k = (request.sizes[s] for s in SYMBOLS)
    device, dtype, both = request.device, DTYPES[request.dtype], request.direction == "both"
    generator = torch.Generator().manual_seed(request.seed)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    x, rows = draw(tokens, hidden), draw(tokens * top_k, width)
    query, output = draw(experts, width, hidden, scale=hidden**-0.5), draw(experts, hidden, width, scale=width**-0.5)
    ids = random_expert_ids(tokens, experts, top_k, seed=request.seed).to(device)
    weights = torch.rand(tokens, top_k, generator=generator).to(device)
    dy = draw(tokens, top_k * width + hidden)

    def grouped(x, rows, query, output):
        dispatch = gossamer.dispatch(ids, experts)
        queries = gossamer.grouped_matmul(x, query, dispatch)
        return queries.flatten(1), output_by_slot(rows, output, dispatch, weights)

    def dense(x, rows, query, output):
        return F.linear(x, query), F.linear(rows.view(tokens, -1), output)

    inputs = [x, rows, query, output]
    ours = _variant("gossamer", OURS, grouped, *map(_leaf, inputs), dy, "truth")
    wide = draw(top_k * width, hidden, scale=hidden**-0.5), draw(hidden, top_k * width, scale=width**-0.5)
    plain = _variant("dense projections", DENSE, dense, _leaf(x), _leaf(rows), *map(_leaf, wide), dy, None)

    def gate() -> FloatGate:
        def outputs(dtype: torch.dtype) -> Outputs:
            leaves = [_leaf(tensor.to(dtype)) for tensor in inputs]
            loop = _variant("", OURS, _by_loop(ids, weights), *leaves, dy.to(dtype), None)
            return loop.call(request.direction)

        return FloatGate(outputs(torch.float64), outputs(dtype))

    flops = 4.0 * tokens * top_k * hidden * width * (3 if both else 1)
    once = sum(tensor.nbytes for tensor in inputs) + dy.nbytes + ids.nbytes + weights.nbytes
    return Case(
        "mixture_of_attention",
        request.shape,
        request.sizes,
        request.dtype,
        device,
        request.direction,
        (ours, plain),
        {},
        flops,
        once * (2 if both else 1),
        {"truth": gate},
        "every output",
        f"{request.skew} routing",
    )


def rule(sizes: dict[str, int]) -> str | None:
    """The reason why sizes are invalid, or None: a token cannot have more experts than there are."""
    return f"K must be at most E, got K={sizes['K']}, E={sizes['E']}" if sizes["K"] > sizes["E"] else None


FAMILY = Family(
    "mixture_of_attention",
    SHAPES,
    SYMBOLS,
    DEFAULTS,
    QUICK,
    build,
    skews=("uniform",),
    dimensions=DIMENSIONS,
    work=("T",),
    rule=rule,
)


def bench_mixture_of_attention(measured):
    """Entry point of pytest-benchmark."""
    measured()
