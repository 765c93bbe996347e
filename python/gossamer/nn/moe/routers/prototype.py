"""Expert prototyping: the best expert of each group."""

from __future__ import annotations

import math
from functools import partial

import torch

from gossamer._checks import check_positive
from gossamer.nn.moe.capacity import check_capacity_factor, limit_capacity
from gossamer.nn.moe.routers.linear import LinearRouter
from gossamer.nn.moe.routers.topk import softmax_topk
from gossamer.nn.moe.routing import Routing, as_logits, check_finite_logits, softmax_probabilities
from gossamer.ops.dispatch import MAX_ROWS


def _check_prototypes(num_experts: int, num_prototypes: int) -> None:
    check_positive(num_experts=num_experts, num_prototypes=num_prototypes)
    if num_experts % num_prototypes:
        raise ValueError(
            f"num_prototypes must divide num_experts, got num_prototypes={num_prototypes}, num_experts={num_experts}"
        )


def prototype_probabilities(logits: torch.Tensor, num_prototypes: int) -> torch.Tensor:
    """``(T, E)`` from ``logits (T, E)``: the softmax within each prototype over their number."""
    within = softmax_probabilities(logits.unflatten(-1, (num_prototypes, -1)))
    return within.flatten(-2) / num_prototypes


def softmax_prototypes(logits: torch.Tensor, num_prototypes: int, *, capacity_factor: float | None = None) -> Routing:
    """The most probable expert of each prototype, ``k`` top-1 (M6-T, Yang et al., 2021).

    The E experts form Z prototypes of ``F = E/Z`` neighbours. In prototype z, ``p^z = softmax(logits_z)`` over its F
    experts, the largest is chosen and is the weight, without normalisation: a token's Z weights add up to at most Z.
    The rules for ties, −inf, +inf and NaN are those of :func:`softmax_topk` in each prototype.

    Args:
        logits: ``(..., E)``, floating, converted to float32 (float64 stays); T is the product of the leading sizes.
        num_prototypes: Z; divides E.
        capacity_factor: γ: each expert serves its first ``⌈γ·T/F⌉`` tokens; other tokens have no expert in that
            prototype. None drops nothing.

    Returns:
        A :class:`Routing` with the expert of prototype z in slot z, whose probabilities are ``p^z / Z``.

    Raises:
        TypeError: ``logits`` is not a floating tensor, ``num_prototypes`` is not an int, or ``capacity_factor`` is not
            a number.
        ValueError: Z does not divide E, or ``capacity_factor`` is not positive and finite; on the CPU, a logit is NaN
            or +inf.
    """
    logits = as_logits(logits)
    num_tokens, num_experts = logits.shape
    _check_prototypes(num_experts, num_prototypes)
    check_capacity_factor(capacity_factor)
    check_finite_logits(logits)
    size = num_experts // num_prototypes
    best = softmax_topk(logits.reshape(-1, size), 1)
    first = torch.arange(0, num_experts, size, device=logits.device)
    ids = best.expert_ids.view(num_tokens, num_prototypes) + first
    weights = best.weights.view(num_tokens, num_prototypes)
    probabilities = partial(prototype_probabilities, num_prototypes=num_prototypes)
    routing = Routing(ids, weights, num_experts, logits, probabilities=probabilities)
    if capacity_factor is None or num_tokens == 0:
        return routing
    if num_tokens * num_prototypes > MAX_ROWS:
        raise ValueError(f"logits must choose at most {MAX_ROWS} slots, got T*Z = {num_tokens * num_prototypes}")
    # No more than all tokens, of a factor that would overflow too.
    capacity = math.ceil(min(capacity_factor * num_tokens / size, num_tokens))
    limited = limit_capacity(routing, capacity=capacity)
    return limited.replaced(weights=weights.masked_fill(limited.expert_ids >= num_experts, 0.0))


class PrototypeRouter(LinearRouter):
    """:func:`softmax_prototypes` over a linear map: M6-T.

    The paper finds that it needs no balance loss.

    Args:
        hidden_size: H.
        num_experts: E.
        num_prototypes: Z, which divides E; K = Z.
        capacity_factor: as in :func:`softmax_prototypes`; 1.25 in the paper.
        **options: ``bias``, ``upcast``, ``device``, ``dtype`` of :class:`LinearRouter`.

    Raises:
        TypeError: a size is not an int, or ``capacity_factor`` is not a number.
        ValueError: a size is below 1, Z does not divide E, or ``capacity_factor`` is not positive and finite.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_prototypes: int,
        *,
        capacity_factor: float | None = None,
        **options: object,
    ) -> None:
        _check_prototypes(num_experts, num_prototypes)
        check_capacity_factor(capacity_factor)
        super().__init__(hidden_size, num_experts, num_prototypes, **options)
        self.num_prototypes = num_prototypes
        self.capacity_factor = capacity_factor

    def route(self, logits: torch.Tensor) -> Routing:
        """:func:`softmax_prototypes` of ``logits (T, E)``."""
        return softmax_prototypes(logits, self.num_prototypes, capacity_factor=self.capacity_factor)
