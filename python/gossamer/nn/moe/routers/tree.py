"""COMET: soft decision trees whose leaves are experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gossamer._checks import check_fits, check_floating, check_same_device, check_shape, check_widths
from gossamer.nn.moe.routers.gates import check_gamma, most_experts, route_parts
from gossamer.nn.moe.routers.linear import LinearRouter
from gossamer.nn.moe.routing import Routing, as_logits, check_rows_per_token, row_bound
from gossamer.ops.tree_routing import TreeRouting, tree_routing


def _check_trees(num_experts: int, num_trees: int, gamma: float) -> None:
    check_widths(num_experts=num_experts, num_trees=num_trees)
    if num_experts < 2:
        raise ValueError(f"num_experts must be at least 2, the leaves of a tree, got {num_experts}")
    check_gamma(gamma)


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
        ValueError: shapes or devices do not fit, there is no tree, a tree has one leaf, or ``gamma`` is not positive.
    """
    check_gamma(gamma)
    check_floating("splits", splits)
    check_floating("leaves", leaves)
    check_shape("splits", splits, (None, None, None), "(T, k, n − 1)")
    check_shape("leaves", leaves, (*splits.shape[:2], splits.shape[2] + 1), "(T, k, n)")
    check_same_device(splits=splits, leaves=leaves)
    parts, experts = leaves.shape[1:]
    if parts < 1 or experts < 2:
        raise ValueError(f"leaves must be of at least 1 tree with at least 2 leaves, got shape {tuple(leaves.shape)}")
    scores = torch.cat([splits, leaves], dim=2).flatten(1)
    args = TreeRouting(scores, parts, experts, gamma, coded=False, top_k=0, keep_reach=True, keep_sums=False)
    found = tree_routing(args, arrange)
    return found.gates, found.reach


class TreeRouter(LinearRouter):
    """:func:`tree_gates` over a linear map: the router of COMET.

    It starts with all experts and becomes sparse in training, through ``losses["tree_entropy"]`` of its routings (see
    :func:`router_losses`): ``−Σ_j Σ_l s_jl·log(s_jl + 1e-6)`` per token, which saturates the splits. For float32 scores
    one kernel computes gates, choice and entropy; the one for GPUs takes up to 1024 experts.

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
        check_fits("gamma", self.gamma, self.weight.dtype)
        with torch.no_grad():
            rows = self.weight.view(self.num_trees, 2 * self.num_experts - 1, self.hidden_size)
            rows[:, : self.num_experts - 1].uniform_(-self.gamma / 100, self.gamma / 100)
            rows[:, self.num_experts - 1 :].uniform_(-0.05, 0.05)
        nn.init.zeros_(self.bias)

    def route(self, scores: torch.Tensor, arrange: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Routing:
        """The routing for ``scores (T, k·(2n − 1))``, laid out as :attr:`weight`; ``arrange`` as in tree_gates."""
        scores = as_logits(scores)
        form = self.num_trees, self.num_experts, self.gamma
        args = TreeRouting(scores, *form, coded=False, top_k=self.top_k, keep_reach=False, keep_sums=self.training)
        parts = tree_routing(args, arrange)
        losses = {"tree_entropy": parts.sums[..., 0].sum(dim=1)} if self.training else None
        routing = route_parts(scores, parts, self.top_k, probabilities=parts.gates, losses=losses)
        return row_bound(routing, self.rows_per_token)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"{super().extra_repr()}, num_trees={self.num_trees}, gamma={self.gamma}"
