"""XMoE: as many experts as it takes to reach a probability threshold, optionally with null experts."""

from __future__ import annotations

import torch

from gossamer._checks import check_lengths, last_size
from gossamer.nn.moe.routers.gates import most_experts
from gossamer.nn.moe.routers.linear import LinearRouter
from gossamer.nn.moe.routing import Routing, check_rows_per_token, check_share, row_bound, softmax_until


def softmax_threshold(
    logits: torch.Tensor, threshold: float, *, max_experts: int | None = None, null_experts: int = 0
) -> Routing:
    """The fewest experts whose softmax probabilities add up to at least ``threshold`` (XMoE, Yang et al., 2024).

    In descending order of ``p = softmax(logits)``, a rank is kept while the sum of those before it is below
    ``threshold``; the first always is. Weights are the probabilities themselves. The last ``null_experts`` logits
    belong to null experts, whose output is zero: they take probability and a slot, which then has no expert. A token
    that chooses only null experts costs nothing. The rules for ties, −inf, +inf and NaN are those of
    :func:`softmax_top_p`.

    Args:
        logits: ``(..., E + null_experts)``, floating, converted to float32 (float64 stays).
        threshold: above 0, at most 1.
        max_experts: maximum number of slots per token, including those of null experts; None for ``E + null_experts``.
        null_experts: number of null experts.

    Returns:
        A :class:`Routing` over E experts, a token's in descending order of probability. Its ``logits`` and
        ``probabilities`` are those of the E experts alone.

    Raises:
        TypeError: ``logits`` is not a floating tensor, ``threshold`` is not a number, or a size is not an int.
        ValueError: ``threshold`` is outside (0, 1], ``max_experts`` outside 1 to ``E + null_experts``, or E below 1; on
            the CPU, a logit is NaN or +inf.
    """
    check_share("threshold", threshold)
    check_lengths(null_experts=null_experts)
    all_experts = last_size("logits", logits, "(..., E + null_experts)")
    most_experts(all_experts, max_experts)
    if all_experts <= null_experts:
        raise ValueError(
            f"null_experts must leave at least one expert, got {null_experts} of {all_experts} logits a token"
        )
    return softmax_until(
        logits, threshold, exceed=False, num_experts=all_experts - null_experts, max_experts=max_experts
    )


class ThresholdRouter(LinearRouter):
    """:func:`softmax_threshold` over a linear map: XMoE, made for many small experts.

    XMoE bounds an expert's load, serving all first choices before any second choice: ``limit_capacity(routing,
    capacity=C, priority="choice")`` with ``C = max(4, ⌈factor · T/E⌉)``.

    Args:
        hidden_size: H.
        num_experts: E.
        threshold: above 0, at most 1; 0.9 in the paper.
        max_experts: maximum number of slots per token, including those of null experts; None for ``E + null_experts``.
        null_experts: number of additional experts that do nothing.
        rows_per_token: as in :class:`TopPRouter`.
        **options: ``bias``, ``upcast``, ``device``, ``dtype`` of :class:`LinearRouter`.

    Attributes:
        weight: ``(E + null_experts, H)``; ``bias`` has as many rows.

    Raises:
        TypeError: a size is not an int, or ``threshold`` or ``rows_per_token`` is not a number.
        ValueError: a size is out of range, or ``threshold`` is outside (0, 1].
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        threshold: float,
        max_experts: int | None = None,
        *,
        null_experts: int = 0,
        rows_per_token: float | None = None,
        **options: object,
    ) -> None:
        check_share("threshold", threshold)
        check_rows_per_token(rows_per_token)
        check_lengths(null_experts=null_experts)
        most_experts(num_experts, None)
        all_experts = num_experts + null_experts
        slots = most_experts(all_experts, max_experts)
        super().__init__(hidden_size, num_experts, min(slots, num_experts), num_logits=all_experts, **options)
        self.threshold = threshold
        self.max_experts = slots
        self.null_experts = null_experts
        self.rows_per_token = rows_per_token

    @classmethod
    def from_top_k(
        cls, hidden_size: int, num_experts: int, top_k: int | None = None, *, threshold: float = 0.9, **options: object
    ) -> ThresholdRouter:
        """With at most K slots per token."""
        return cls(hidden_size, num_experts, threshold, top_k, **options)

    def route(self, logits: torch.Tensor) -> Routing:
        """:func:`softmax_threshold` of ``logits (T, E + null_experts)``."""
        routing = softmax_threshold(
            logits, self.threshold, max_experts=self.max_experts, null_experts=self.null_experts
        )
        return row_bound(routing, self.rows_per_token)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"{super().extra_repr()}, threshold={self.threshold}, null_experts={self.null_experts}"
