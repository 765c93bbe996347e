"""The lists of blocks of an expert layer's hidden activation, and the places of its rows, from a dispatch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

import gossamer
from gossamer import BlockTopology
from gossamer.bench.families.experts import rule as experts_rule
from gossamer.bench.families.skew import EXPERT_SKEWS, expert_ids
from gossamer.bench.harness.case import Case, Family, Request, exact_case
from gossamer.bench.harness.cost import Cost, nbytes
from gossamer.ops._expert_topology import FIELDS

BLOCK = 16
SHAPES = {
    "olmoe": (16384, 1024, 64, 8),
    "qwen3-30b-a3b": (16384, 768, 128, 8),
    "cpu-small": (1024, 512, 32, 4),
    "cpu-fine": (4096, 256, 64, 8),
}
SYMBOLS = ("T", "I", "E", "K")
DEFAULTS = {"cpu": ("cpu-small", "cpu-fine"), "cuda": ("olmoe", "qwen3-30b-a3b")}
QUICK = {"cpu": "cpu-small", "cuda": "olmoe"}


def rule(sizes: Mapping[str, int]) -> str | None:
    """The reason why a shape is invalid, or None."""
    if sizes["I"] % BLOCK:
        return f"I must be in blocks of {BLOCK}, got {sizes['I']}"
    return experts_rule(sizes)


def build(request: Request) -> Case:
    """Build the operator for the lists and the one for the places, beside the same in plain torch."""
    t, i, e, k = (request.sizes[s] for s in SYMBOLS)
    ids = expert_ids(t, e, k, request.skew, request.seed).to(request.device)
    dispatch = gossamer.dispatch(ids, e)

    def topology() -> tuple[torch.Tensor, ...]:
        found = BlockTopology.from_dispatch(dispatch, i, BLOCK, skip_padding=True)
        return *(getattr(found, name) for name in FIELDS), *found.padded_places(dispatch)

    def reference() -> tuple[torch.Tensor, ...]:
        with gossamer.backend("reference"):
            return topology()

    read = nbytes(dispatch.offsets, dispatch.slots)
    return exact_case("expert_topology", request, topology, reference, "torch's operators", read)


def cost(call: Mapping[str, object], result: object) -> Cost:
    """The cost of the lists: no floating point, the offsets read and every list written."""
    return Cost(0.0, nbytes(call["offsets"], *result))


def cost_places(call: Mapping[str, object], result: object) -> Cost:
    """The cost of the places: the slots read, and both maps written."""
    return Cost(0.0, nbytes(call["offsets"], call["padded_offsets"], call["slots"], *result))


COSTS = {"gossamer::expert_topology": cost, "gossamer::expert_places": cost_places}
FAMILY = Family(
    "expert_topology",
    SHAPES,
    SYMBOLS,
    DEFAULTS,
    QUICK,
    build,
    ("int",),
    ("forward",),
    EXPERT_SKEWS,
    {"tokens": "T", "intermediate": "I", "experts": "E", "top-k": "K"},
    rule=rule,
)


def bench_expert_topology(measured):
    """Entry point of pytest-benchmark."""
    measured()
