"""The mixture-of-experts layer, routing given: sort the assignments, run the experts, sum back to tokens."""

from __future__ import annotations

import torch

import gossamer
from gossamer.bench.case import OURS, Case, Family, Request, Variant
from gossamer.bench.experts import (
    DEFAULTS,
    QUICK,
    SHAPES,
    SYMBOLS,
    Problem,
    costs,
    dense_variant,
    make_gates,
    make_problem,
    make_sample,
)
from gossamer.bench.peers import ADAPTERS, Unavailable

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
    variants, skipped = [gossamer_variant(problem), dense_variant(request)], {}
    for name, adapter in ADAPTERS.items():
        try:
            variants.append(adapter(name, problem))
        except Unavailable as reason:
            skipped[name] = str(reason)
    flops, moved = costs(problem, request.direction)
    return Case(
        "moe",
        request.shape,
        request.sizes,
        request.dtype,
        request.device,
        request.direction,
        tuple(variants),
        skipped,
        flops,
        moved,
        make_gates(problem, sample, request),
        sample.words,
        f"{request.skew} routing",
    )


FAMILY = Family("moe", SHAPES, SYMBOLS, DEFAULTS, QUICK, build)


def bench_moe(measured):
    """Entry point of pytest-benchmark."""
    measured()
