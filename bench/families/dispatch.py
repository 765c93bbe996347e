"""Sorting assignments by expert."""

from __future__ import annotations

from collections.abc import Mapping

import torch

import gossamer
from gossamer.bench.families.experts import rule
from gossamer.bench.families.skew import EXPERT_SKEWS, expert_ids
from gossamer.bench.harness.case import Case, Family, Request, exact_case
from gossamer.bench.harness.cost import Cost, nbytes
from gossamer.ops.dispatch import dispatch_reference

SHAPES = {
    "olmoe": (16384, 64, 8),
    "qwen3-30b-a3b": (16384, 128, 8),
    "cpu-small": (1024, 32, 4),
    "cpu-fine": (4096, 64, 8),
    "cpu-decode": (16, 64, 8),
}
SYMBOLS = ("T", "E", "K")
DEFAULTS = {"cpu": ("cpu-small", "cpu-fine", "cpu-decode", "olmoe"), "cuda": ("olmoe", "qwen3-30b-a3b", "cpu-decode")}
QUICK = {"cpu": "cpu-fine", "cuda": "olmoe"}


def build(request: Request) -> Case:
    """Build :func:`gossamer.dispatch` beside a stable sort in plain torch."""
    t, e, k = (request.sizes[s] for s in SYMBOLS)
    ids = expert_ids(t, e, k, request.skew, request.seed).to(request.device)

    def ours() -> tuple[torch.Tensor, ...]:
        found = gossamer.dispatch(ids, e)
        return found.slots, found.rows, found.offsets

    def plain() -> tuple[torch.Tensor, ...]:
        return dispatch_reference(ids, e)

    return exact_case("dispatch", request, ours, plain, "torch stable sort", nbytes(ids))


def cost(call: Mapping[str, object], result: object) -> Cost:
    """The cost of a sort: no floating point, the ids read and the order written."""
    return Cost(0.0, nbytes(call["expert_ids"], *result))


COSTS = {"gossamer::dispatch": cost}
FAMILY = Family(
    "dispatch",
    SHAPES,
    SYMBOLS,
    DEFAULTS,
    QUICK,
    build,
    ("int",),
    ("forward",),
    EXPERT_SKEWS,
    {"tokens": "T", "experts": "E", "top-k": "K"},
    rule=rule,
)


def bench_dispatch(measured):
    """Entry point of pytest-benchmark."""
    measured()
