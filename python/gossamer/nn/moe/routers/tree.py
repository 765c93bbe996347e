"""COMET: soft decision trees whose leaves are experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gossamer._checks import check_floating, check_positive, check_same_device, check_shape
from gossamer.nn.moe.routers.linear import LinearRouter
from gossamer.nn.moe.routing import (
    Routing,
    as_logits,
    check_gamma,
    check_rows_per_token,
    finite_logits,
    most_experts,
    route_gates,
    row_bound,
    smooth_step,
)


def _check_trees(num_experts: int, num_trees: int, gamma: float) -> None:
    check_positive(num_experts=num_experts, num_trees=num_trees)
    if num_experts < 2:
        raise ValueError(f"num_experts must be at least 2, the leaves of a tree, got {num_experts}")
    check_gamma(gamma)


def _reach(splits: torch.Tensor) -> torch.Tensor:
    """The share ``(T, k, n)`` that reaches each leaf, from the shares ``(T, k, n − 1)`` that go left at each split.

    Nodes are numbered as in a heap: the children of i are 2i + 1 and 2i + 2. Leaves are ordered from left to right, so
    leaves of the last level come before those of the level above it.
    """
    level, shallow = torch.ones_like(splits[..., :1]), splits[..., :0]
    begin, count = 0, splits.shape[-1]
    while begin < count:
        inner = min(level.shape[-1], count - begin)
        parents, left = level[..., :inner], splits[..., begin : begin + inner]
        shallow = level[..., inner:]
        begin += level.shape[-1]
        level = torch.stack([parents * left, parents * (1 - left)], dim=-1).flatten(-2)
    return torch.cat([level, shallow], dim=-1)


def tree_gates(
    splits: torch.Tensor,
    leaves: torch.Tensor,
    gamma: float,
    arrange: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gates of k soft trees over n experts (COMET, Ibrahim et al., 2023), and the share that reaches each leaf.

    A split of value v sends a share ``S(v)`` of its input left and the rest right, where S is :func:`smooth_step`. The
    share that reaches leaf l of tree j is the product s_jl along its path, and the leaf has a score a_jl. The gates are
    one softmax over all leaves, ``g_jl ∝ exp(a_jl + log(s_jl + 1e-8))``, 0 where s_jl is 0, summed over the trees. If
    all splits are saturated, each tree chooses one leaf, so at most k gates are positive.

    Args:
        splits: ``(T, k, n − 1)`` floating, nodes as in a heap.
        leaves: ``(T, k, n)`` floating, from left to right.
        gamma: width of the smooth step, positive.
        arrange: maps the gates of each tree ``(T, k, n)`` to experts before they are summed; None for leaf l to expert
            l.

    Returns:
        Gates ``(T, n)`` that add up to one, and s ``(T, k, n)``.

    Raises:
        TypeError: a tensor is not floating, or ``gamma`` is not a number.
        ValueError: shapes or devices do not fit, or ``gamma`` is not positive.
    """
    check_gamma(gamma)
    check_floating("splits", splits)
    check_floating("leaves", leaves)
    check_shape("splits", splits, (None, None, None), "(T, k, n − 1)")
    check_shape("leaves", leaves, (*splits.shape[:2], splits.shape[2] + 1), "(T, k, n)")
    check_same_device(splits=splits, leaves=leaves)
    reach = _reach(smooth_step(splits, gamma))
    scores = finite_logits(leaves)
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill((reach == 0) | (scores == lowest), -torch.inf)
    # exp(a + log(s + 1e-8)) is exp(a)·(s + 1e-8).
    top = scores.detach().flatten(1).amax(dim=1).clamp(min=lowest).view(-1, 1, 1)
    shares = (scores - top).exp() * (reach + 1e-8)
    if arrange is not None:
        shares = arrange(shares)
    total = shares.sum(dim=(1, 2)).clamp(min=torch.finfo(scores.dtype).tiny)
    return shares.sum(dim=1) / total.unsqueeze(1), reach


class TreeRouter(LinearRouter):
    """:func:`tree_gates` over a linear map: the router of COMET.

    It starts with all experts and becomes sparse in training, through ``losses["tree_entropy"]`` of its routings (see
    :func:`router_losses`): ``−Σ_j Σ_l s_jl·log(s_jl + 1e-6)`` per token, which saturates the splits.

    Args:
        hidden_size: H.
        num_experts: E = n, the leaves of each tree; at least 2.
        num_trees: k.
        gamma: width of the smooth step.
        max_experts: maximum number of experts per token, the highest gates; None for E, which a tree needs until it is
            saturated.
        rows_per_token: as in :class:`TopPRouter`.
        **options: ``upcast``, ``device``, ``dtype`` of :class:`LinearRouter`.

    Attributes:
        num_parts: k, the number of parts whose sum gives the gates.
        weight: ``(k·(2n − 1), H)``: tree after tree, of each the n − 1 splits, initially uniform in ±γ/100, and the n
            leaves, in ±0.05. ``bias``, initially 0, has as many rows.

    Raises:
        TypeError: a size is not an int, or ``gamma`` is not a number.
        ValueError: a size is below 1, a tree has one leaf, or ``gamma`` is not positive and finite.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_trees: int,
        gamma: float,
        max_experts: int | None = None,
        *,
        rows_per_token: float | None = None,
        **options: object,
    ) -> None:
        _check_trees(num_experts, num_trees, gamma)
        check_rows_per_token(rows_per_token)
        self.num_trees = self.num_parts = num_trees
        self.gamma = gamma
        self.rows_per_token = rows_per_token
        rows = num_trees * (2 * num_experts - 1)
        super().__init__(
            hidden_size, num_experts, most_experts(num_experts, max_experts), bias=True, num_logits=rows, **options
        )

    @classmethod
    def from_top_k(
        cls, hidden_size: int, num_experts: int, top_k: int | None = None, *, gamma: float = 1.0, **options: object
    ) -> TreeRouter:
        """With K trees."""
        return cls(hidden_size, num_experts, top_k, gamma, **options)

    def reset_parameters(self) -> None:
        """Redraw the weight."""
        with torch.no_grad():
            rows = self.weight.view(self.num_trees, 2 * self.num_experts - 1, self.hidden_size)
            rows[:, : self.num_experts - 1].uniform_(-self.gamma / 100, self.gamma / 100)
            rows[:, self.num_experts - 1 :].uniform_(-0.05, 0.05)
        nn.init.zeros_(self.bias)

    def route(self, scores: torch.Tensor, arrange: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Routing:
        """The routing for ``scores (T, k·(2n − 1))``, laid out as :attr:`weight`; ``arrange`` as in tree_gates."""
        scores = as_logits(scores)
        splits, leaves = scores.view(-1, self.num_trees, 2 * self.num_experts - 1).split(
            [self.num_experts - 1, self.num_experts], dim=2
        )
        gates, reach = tree_gates(splits, leaves, self.gamma, arrange)
        losses = {"tree_entropy": -(reach * (reach + 1e-6).log()).sum(dim=(1, 2))} if self.training else None
        return row_bound(
            route_gates(scores, gates, self.top_k, probabilities=gates, losses=losses), self.rows_per_token
        )

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"{super().extra_repr()}, num_trees={self.num_trees}, gamma={self.gamma}"
