"""Experts chosen by gates, of which many are exactly zero."""

from __future__ import annotations

import torch

from gossamer._checks import check_floating, check_number, check_positive
from gossamer.nn.moe.routing import Routing, route_where
from gossamer.ops.topk_routing import live_experts, select_experts
from gossamer.ops.tree_routing import PartGates, smooth_steps


def most_experts(num_experts: int, max_experts: int | None) -> int:
    """The maximum number of experts per token: ``max_experts``, which is checked, or E."""
    check_positive(num_experts=num_experts)
    if max_experts is None:
        return num_experts
    check_positive(max_experts=max_experts)
    if max_experts > num_experts:
        raise ValueError(
            f"max_experts must be at most num_experts, got max_experts={max_experts}, num_experts={num_experts}"
        )
    return max_experts


def route_gates(
    scores: torch.Tensor, gates: torch.Tensor, max_experts: int | None = None, **arguments: object
) -> Routing:
    """The experts with a positive gate in ``gates (T, E)``, or the ``max_experts`` highest of them.

    The gates were computed from ``scores (T, any)``, which must not be NaN on the CPU.
    """
    if max_experts is None or max_experts == gates.shape[1]:
        return route_where(live_experts(scores.detach(), gates.detach()), gates, **arguments)
    num_experts = gates.shape[1]
    ids = select_experts(scores.detach(), gates.detach(), max_experts)
    weights = gates.gather(1, ids)
    absent = weights <= 0
    return Routing(ids.masked_fill(absent, num_experts), weights.masked_fill(absent, 0.0), num_experts, **arguments)


def route_parts(scores: torch.Tensor, parts: PartGates, max_experts: int, **arguments: object) -> Routing:
    """The experts that a kernel has chosen by the gates of parts, or those of :func:`route_gates`."""
    if parts.expert_ids is None:
        return route_gates(scores, parts.gates, max_experts, **arguments)
    return Routing(parts.expert_ids, parts.weights, parts.gates.shape[1], **arguments)


def smooth_step(v: torch.Tensor, gamma: float) -> torch.Tensor:
    """``S(v)``, 0 up to −γ/2, 1 from γ/2 on, between them ``−2v³/γ³ + 3v/(2γ) + 1/2``; its derivative is continuous.

    NaN and −inf give 0, +inf gives 1. The ends are exact, so that a saturated value is saturated in every dtype.

    Args:
        v: floating, of any shape.
        gamma: the width of the rise, positive.

    Raises:
        TypeError: ``v`` is not floating, or ``gamma`` is not a number.
        ValueError: ``gamma`` is not positive and finite.
    """
    check_floating("v", v)
    check_gamma(gamma)
    return smooth_steps(v, gamma)[0]


def check_gamma(gamma: float) -> None:
    """The width of a smooth step must be a positive, finite number."""
    check_number("gamma", gamma, above=0, finite=True)
