"""Dynamic routing: the fewest experts whose probabilities add up to more than p."""

from __future__ import annotations

import torch

from gossamer._checks import last_size
from gossamer.nn.moe.routers.gates import most_experts
from gossamer.nn.moe.routers.linear import LinearRouter
from gossamer.nn.moe.routing import Routing, check_rows_per_token, check_share, row_bound, softmax_until


def softmax_top_p(logits: torch.Tensor, top_p: float, *, max_experts: int | None = None) -> Routing:
    """The fewest experts whose softmax probabilities add up to more than ``top_p`` (Huang et al., 2024).

    A token's experts are the ranks, in descending order of ``p = softmax(logits)``, up to and including the first at
    which the running sum exceeds ``top_p``; all experts if it never does. Weights are the probabilities themselves: ``w
    = p[ids]``. Their number has no gradient; :func:`routing_entropy_loss` keeps it small. The rules for ties, −inf,
    +inf and NaN are those of :func:`softmax_topk`, but masked experts take no slot: a token whose experts are all
    masked has none.

    Args:
        logits: ``(..., E)``, floating, converted to float32 (float64 stays); T is the product of the leading sizes.
        top_p: above 0, at most 1.
        max_experts: maximum number of experts per token; None for E.

    Returns:
        A :class:`Routing` with a token's experts in descending order of probability, then slots without an expert.

    Raises:
        TypeError: ``logits`` is not a floating tensor, ``top_p`` is not a number or ``max_experts`` is not an int.
        ValueError: ``top_p`` is outside (0, 1], or ``max_experts`` outside 1 to E; on the CPU, a logit is NaN or +inf.
    """
    check_share("top_p", top_p)
    num_experts = last_size("logits", logits, "(..., E)")
    most_experts(num_experts, max_experts)
    return softmax_until(logits, top_p, exceed=True, num_experts=num_experts, max_experts=max_experts)


class TopPRouter(LinearRouter):
    """:func:`softmax_top_p` over a linear map: a number of experts that varies with the router's confidence.

    Args:
        hidden_size: H.
        num_experts: E.
        top_p: above 0, at most 1; 0.4 in the paper.
        max_experts: maximum number of experts per token; None for E.
        rows_per_token: upper bound on the mean number of experts per token, which sets the size of buffers of expert
            layers on CUDA and in compiled code (``max_rows`` of :class:`Routing`); None for ``max_experts``.
        **options: ``bias``, ``upcast``, ``device``, ``dtype`` of :class:`LinearRouter`.

    Raises:
        TypeError: a size is not an int, or ``top_p`` or ``rows_per_token`` is not a number.
        ValueError: a size is below 1, ``top_p`` is outside (0, 1], or ``max_experts`` outside 1 to E.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_p: float,
        max_experts: int | None = None,
        *,
        rows_per_token: float | None = None,
        **options: object,
    ) -> None:
        check_share("top_p", top_p)
        check_rows_per_token(rows_per_token)
        super().__init__(hidden_size, num_experts, most_experts(num_experts, max_experts), **options)
        self.top_p = top_p
        self.rows_per_token = rows_per_token

    @classmethod
    def from_top_k(
        cls, hidden_size: int, num_experts: int, top_k: int | None = None, *, top_p: float = 0.4, **options: object
    ) -> TopPRouter:
        """With at most K experts per token."""
        return cls(hidden_size, num_experts, top_p, top_k, **options)

    def route(self, logits: torch.Tensor) -> Routing:
        """:func:`softmax_top_p` of ``logits (T, E)``."""
        return row_bound(softmax_top_p(logits, self.top_p, max_experts=self.top_k), self.rows_per_token)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"{super().extra_repr()}, top_p={self.top_p}"
