"""Limits on the number of tokens that an expert serves."""

from __future__ import annotations

import sys

import torch

from gossamer._checks import check_index, check_number, check_positive, check_shape
from gossamer.nn.moe.routing import Routing
from gossamer.ops.dispatch import check_dispatch, dispatch

PRIORITIES = ("token", "choice", "probability")


def expert_capacity(num_tokens: int, top_k: int, num_experts: int, capacity_factor: float) -> int:
    """``C = int(capacity_factor · K·T/E)``, the slots that one expert serves; 0 means no limit."""
    return int(min(capacity_factor * (top_k * num_tokens / num_experts), sys.maxsize))


def check_capacity_factor(capacity_factor: float | None) -> None:
    """A capacity factor must be a positive, finite number, or None."""
    check_number("capacity_factor", capacity_factor, above=0, finite=True, optional=True)


def _places(routing: Routing, priority: str) -> torch.Tensor:
    """``(T, K)`` positions of a routing's slots among the slots of their expert, in token order."""
    tokens, top_k, e = routing.num_tokens, routing.top_k, routing.num_experts
    ids = routing.expert_ids.clamp(0, e)
    if priority == "token":
        rows, offsets = routing.dispatch.rows, routing.dispatch.offsets
        return rows.view(tokens, top_k) - offsets[ids]
    if priority == "probability":
        order = routing.weights.detach().amax(dim=1).argsort(descending=True, stable=True)
        ids = ids[order]
    made = dispatch(ids.T.reshape(-1, 1), e)
    places = (made.rows - made.offsets[ids.T.reshape(-1)]).view(top_k, tokens).T
    if priority == "probability":
        places = torch.zeros_like(places).index_copy(0, order, places)
    return places


def limit_capacity(
    routing: Routing, capacity_factor: float | None = None, *, capacity: int | None = None, priority: str = "token"
) -> Routing:
    """Drop the slots beyond their expert's capacity ``C = int(capacity_factor · K·T/E)``, as GShard and Switch do.

    An expert serves its first C slots; the others become "no expert". Weights of the remaining slots do not change, and
    a token whose slots are all dropped gets zeros. If ``capacity_factor`` gives C = 0, as with fewer tokens than
    experts, nothing is dropped. Nothing is read on the host. A token's result depends on the other tokens of its batch.

    Args:
        routing: a router's.
        capacity_factor: positive; 1 gives each expert room for its equal share.
        capacity: C itself, at least 1, instead of a factor.
        priority: the order of slots: ``"token"``, by token, within a token by slot; ``"choice"``, all tokens' first
            slots before any second slot, as in GShard and XMoE; ``"probability"``, like ``"choice"`` with tokens in
            descending order of their largest weight (batch-prioritised routing, Riquelme et al., 2021).

    Returns:
        A :class:`Routing` with E for the ids of dropped slots, sorted by expert.

    Raises:
        TypeError: ``routing`` is not a Routing, ``capacity_factor`` is not a number or ``capacity`` is not an int.
        ValueError: it is not positive and finite, both are given, or ``priority`` is unknown.
    """
    if not isinstance(routing, Routing):
        raise TypeError(f"routing must be a Routing, got {type(routing).__name__}")
    if priority not in PRIORITIES:
        raise ValueError(f"priority must be one of {PRIORITIES}, got {priority!r}")
    if capacity is not None:
        check_positive(capacity=capacity)
        if capacity_factor is not None:
            raise ValueError(f"capacity_factor must be None beside a capacity, got {capacity_factor}")
    elif capacity_factor is None:
        raise TypeError("capacity_factor must be a number, got NoneType")
    else:
        check_capacity_factor(capacity_factor)
    check_index("expert_ids", routing.expert_ids)
    check_shape("expert_ids", routing.expert_ids, (None, None), "(T, K)")
    routing = routing.dispatched()
    check_dispatch(routing.dispatch)
    e = routing.num_experts
    if capacity is None:
        capacity = expert_capacity(routing.num_tokens, routing.top_k, e, capacity_factor)
    if capacity == 0:
        return routing
    dropped = _places(routing, priority) >= min(capacity, routing.expert_ids.numel())
    return routing.with_experts(routing.expert_ids.masked_fill(dropped, e), routing.weights).dispatched()
