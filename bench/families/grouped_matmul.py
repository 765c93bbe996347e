"""One product over ragged groups: an expert layer's up-projection of rows gathered from token order and left sorted."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

import gossamer
from gossamer.bench.families.expert_mlp import matrix_cost
from gossamer.bench.families.experts import (
    DEFAULTS,
    DIMENSIONS,
    QUICK,
    SHAPES,
    SYMBOLS,
    WHOLE,
    WORK,
    Problem,
    make_problem,
    rule,
)
from gossamer.bench.families.skew import EXPERT_SKEWS
from gossamer.bench.harness.case import DENSE, DTYPES, OURS, REFERENCE, Case, Family, FloatGate, Request, Variant
from gossamer.bench.harness.cost import Cost, arguments, nbytes
from gossamer.bench.harness.peers import Peer, attribute, gather
from gossamer.ops.grouped_matmul import GroupedDweight, GroupedMatmul

SAMPLE_EXPERTS = 2


def _sampled(
    problem: Problem, dispatch: gossamer.Dispatch, dy: torch.Tensor, experts: list[int], both: bool, dtype: torch.dtype
) -> dict[str, list[torch.Tensor]]:
    """The rows of y and the weight gradient of each expert of ``experts``, by plain torch."""
    offsets = dispatch.offsets.tolist()
    token = dispatch.slots.long() // dispatch.top_k
    found: dict[str, list[torch.Tensor]] = {"y": [], **({"dweight": []} if both else {})}
    for e in experts:
        rows = slice(offsets[e], offsets[e + 1])
        xe, we = problem.x[token[rows]].to(dtype), problem.gate_up[e].to(dtype)
        found["y"].append(xe @ we.T)
        if both:
            found["dweight"].append(dy[rows].to(dtype).T @ xe)
    return found


def _gate(
    problem: Problem, dispatch: gossamer.Dispatch, dy: torch.Tensor, request: Request, experts: list[int]
) -> FloatGate:
    offsets = dispatch.offsets.tolist()
    both, dtype = request.direction == "both", DTYPES[request.dtype]

    def outputs(precision: torch.dtype, accumulate: torch.dtype) -> dict[str, torch.Tensor]:
        found = _sampled(problem, dispatch, dy, experts, both, precision)
        result = {"y": torch.cat(found["y"])}
        if both:
            result["dweight"] = torch.stack(found["dweight"])
            if len(experts) == problem.num_experts:
                result["dx"] = _dx(problem, dispatch, dy, precision, accumulate)
        return result

    picks = {
        "y": lambda y: torch.cat([y[offsets[e] : offsets[e + 1]] for e in experts]),
        "dweight": lambda dweight: dweight[experts],
    }
    return FloatGate(outputs(torch.float64, torch.float64), outputs(dtype, torch.float32), picks)


def _dx(
    problem: Problem, dispatch: gossamer.Dispatch, dy: torch.Tensor, dtype: torch.dtype, accumulate: torch.dtype
) -> torch.Tensor:
    offsets = dispatch.offsets.tolist()
    token = dispatch.slots.long() // dispatch.top_k
    dx = torch.zeros(problem.x.shape, dtype=accumulate, device=problem.x.device)
    for e in range(problem.num_experts):
        rows = slice(offsets[e], offsets[e + 1])
        dx.index_add_(0, token[rows], (dy[rows].to(dtype) @ problem.gate_up[e].to(dtype)).to(accumulate))
    return dx.to(dtype)


def torch_grouped(name: str, role: str, problem: Problem, dispatch: gossamer.Dispatch, dy: torch.Tensor) -> Variant:
    """Torch's grouped product, on rows gathered beforehand."""
    product = attribute(F, "grouped_mm", "torch")
    x, weight = problem.leaf("x"), problem.leaf("gate_up")
    token = dispatch.slots.long() // dispatch.top_k

    def forward() -> torch.Tensor:
        return product(x[token], weight.transpose(1, 2), offs=dispatch.offsets[1:])

    return Variant(name, role, forward, {"dx": x, "dweight": weight}, dy)


PEERS = (Peer("torch grouped_mm", None, "torch", torch_grouped, REFERENCE),)


def build(request: Request) -> Case:
    """Build :func:`gossamer.grouped_matmul` beside one dense product of equal FLOPs and torch's grouped product."""
    problem = make_problem(request)
    e, k = problem.num_experts, problem.top_k
    (t, h), n = problem.x.shape, problem.gate_up.shape[1]
    dispatch = gossamer.dispatch(problem.ids, e)
    token = dispatch.slots.long() // k
    dy = torch.randn(
        t * k, n, generator=torch.Generator(request.device).manual_seed(request.seed + 2), device=request.device
    )
    dy = dy.to(problem.x.dtype)
    whole = t * k * h * n <= WHOLE
    experts = list(range(e)) if whole else sorted({0, e - 1})[:SAMPLE_EXPERTS]

    x, weight = problem.leaf("x"), problem.leaf("gate_up")
    ours = Variant(
        "gossamer",
        OURS,
        lambda: gossamer.grouped_matmul(x, weight, dispatch, y_grouped=True),
        {"dx": x, "dweight": weight},
        dy,
    )
    rows, shared = problem.x[token].requires_grad_(), problem.gate_up[0].detach().clone().requires_grad_()
    dense = Variant(
        "equal-FLOP dense", DENSE, lambda: F.linear(rows, shared), {"dx": rows, "dweight": shared}, dy, gate=None
    )
    peers, skipped = gather(PEERS, request, problem, dispatch, dy)
    flops, item = 2.0 * t * k * h * n, problem.x.element_size()
    weights = int(problem.ids.unique().numel()) * n * h * item
    moved = float(problem.x.nbytes + weights + t * k * n * item)
    if request.direction == "both":
        flops, moved = 3 * flops, moved + t * k * n * item + problem.x.nbytes + problem.gate_up.nbytes
    return Case(
        "grouped_matmul",
        request.shape,
        request.sizes,
        request.dtype,
        request.device,
        request.direction,
        (ours, dense, *peers),
        skipped,
        flops,
        moved,
        {"truth": lambda: _gate(problem, dispatch, dy, request, experts)},
        "every output, whole" if whole else f"y and the weight gradient of {len(experts)} of {e} experts",
        f"{request.skew} routing",
    )


def cost(call: Mapping[str, object], result: object) -> Cost:
    """The cost of one product: its rows, the weights of the experts that have rows, and the result."""
    args = arguments(GroupedMatmul, call)
    product = matrix_cost(args.weight, args.groups)
    moved = product.bytes + nbytes(args.x, args.weight.bias, args.groups.slots, args.groups.offsets, result)
    return Cost(product.flops, moved, {"_grouped_matmul_kernel": Cost(product.flops, moved)})


def cost_dweight(call: Mapping[str, object], result: object) -> Cost:
    """The cost of a weight gradient."""
    args = arguments(GroupedDweight, call)
    flops = 2.0 * int(args.groups.offsets[-1]) * args.x.shape[1] * args.dy.shape[1]
    moved = nbytes(args.x, args.dy, args.groups.slots, args.groups.offsets, *result)
    return Cost(flops, moved, {"_dweight_kernel": Cost(flops, moved)})


COSTS = {"gossamer::grouped_matmul": cost, "gossamer::grouped_matmul_dweight": cost_dweight}
FAMILY = Family(
    "grouped_matmul",
    SHAPES,
    SYMBOLS,
    DEFAULTS,
    QUICK,
    build,
    skews=EXPERT_SKEWS,
    dimensions=DIMENSIONS,
    work=WORK,
    peers=PEERS,
    rule=rule,
)


def bench_grouped_matmul(measured):
    """Entry point of pytest-benchmark."""
    measured()
