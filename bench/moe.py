"""The mixture-of-experts layer, routing given: sort the assignments, run the experts, sum back to tokens."""

from __future__ import annotations

import torch

import gossamer
from gossamer.bench.case import OURS, Case, Family, Request, Variant
from gossamer.bench.expert_peers import PEERS
from gossamer.bench.experts import (
    DEFAULTS,
    DIMENSIONS,
    QUICK,
    SHAPES,
    SYMBOLS,
    WORK,
    Problem,
    costs,
    dense_variant,
    make_gates,
    make_problem,
    make_sample,
    rule,
)
from gossamer.bench.peers import gather
from gossamer.bench.skew import EXPERT_SKEWS

# What nsight.py looks for kernels in.
PRIMITIVES = ("dispatch", "expert_mlp")
LEAVES = {"dx": "x", "dgate_up": "gate_up", "ddown": "down", "dweights": "weights"}


def gossamer_variant(problem: Problem) -> Variant:
    """Gossamer's layer: :func:`gossamer.dispatch` and :func:`gossamer.expert_mlp`."""
    x, gate_up, down, weights = (problem.leaf(name) for name in LEAVES.values())

    def forward() -> torch.Tensor:
        dispatch = gossamer.dispatch(problem.ids, problem.num_experts)
        return gossamer.expert_mlp(x, gate_up, down, dispatch, weights)

    return Variant("gossamer", OURS, forward, dict(zip(LEAVES, (x, gate_up, down, weights), strict=True)), problem.dy)


def build(request: Request) -> Case:
    """The layer with every reference and peer that is installed."""
    problem = make_problem(request)
    sample = make_sample(problem)
    peers, skipped = gather(PEERS, request, problem)
    flops, moved = costs(problem, request.direction)
    return Case(
        "moe",
        request.shape,
        request.sizes,
        request.dtype,
        request.device,
        request.direction,
        (gossamer_variant(problem), dense_variant(request), *peers),
        skipped,
        flops,
        moved,
        make_gates(problem, sample, request),
        sample.words,
        f"{request.skew} routing",
    )


FAMILY = Family(
    "moe",
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


def bench_moe(measured):
    """Entry point of pytest-benchmark."""
    measured()
