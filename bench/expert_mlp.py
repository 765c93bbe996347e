"""The expert layer's operator alone, its assignments already sorted."""

from __future__ import annotations

import torch

import gossamer
from gossamer.bench.case import OURS, Case, Family, Request, Variant
from gossamer.bench.experts import (
    DEFAULTS,
    QUICK,
    SHAPES,
    SYMBOLS,
    costs,
    dense_variant,
    make_gates,
    make_problem,
    make_sample,
)


def build(request: Request) -> Case:
    """:func:`gossamer.expert_mlp` beside a dense layer of as many FLOPs."""
    problem = make_problem(request)
    sample = make_sample(problem)
    dispatch = gossamer.dispatch(problem.ids, problem.num_experts)
    names = {"dx": "x", "dgate_up": "gate_up", "ddown": "down", "dweights": "weights"}
    leaves = {gradient: problem.leaf(name) for gradient, name in names.items()}

    def forward() -> torch.Tensor:
        return gossamer.expert_mlp(leaves["dx"], leaves["dgate_up"], leaves["ddown"], dispatch, leaves["dweights"])

    flops, moved = costs(problem, request.direction)
    return Case(
        "expert_mlp",
        request.shape,
        request.sizes,
        request.dtype,
        request.device,
        request.direction,
        (Variant("gossamer", OURS, forward, leaves, problem.dy), dense_variant(request)),
        {},
        flops,
        moved,
        make_gates(problem, sample, request),
        sample.words,
        f"{request.skew} routing",
    )


FAMILY = Family("expert_mlp", SHAPES, SYMBOLS, DEFAULTS, QUICK, build)


def bench_expert_mlp(measured):
    """Entry point of pytest-benchmark."""
    measured()
