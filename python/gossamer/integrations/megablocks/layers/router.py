"""MegaBlocks' router, and its z-loss."""

from __future__ import annotations

import torch
from torch import nn

from gossamer._checks import check_input
from gossamer.integrations.megablocks.layers import _records
from gossamer.integrations.megablocks.layers.arguments import Arguments


class LearnedRouter(_records.Recording):
    """The k experts of highest softmax probability, weighted by it; computed in the dtype of the hidden states.

    Args:
        args: options.

    Attributes:
        layer: ``nn.Linear(d, E)`` without bias.
    """

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        self.args = args
        self.layer = nn.Linear(args.hidden_size, args.moe_num_experts, bias=False, dtype=args.dtype, device=args.device)
        args.init_method(self.layer.weight)

    def jitter(self, x: torch.Tensor) -> torch.Tensor:
        """Factors uniform in ``1 ± moe_jitter_eps``, of the shape of ``x``."""
        eps = self.args.moe_jitter_eps
        return 1.0 - eps + 2.0 * eps * torch.rand(x.shape, dtype=x.dtype, device=x.device)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route hidden states ``x (..., d)``.

        Returns:
            ``scores (T, E)``, ``expert_weights (T, k)`` and ``expert_indices (T, k)`` int64.
        """
        check_input(x, self.args.hidden_size, self.layer.weight)
        if self.training and self.args.moe_jitter_eps is not None:
            x = x * self.jitter(x)
        logits = self.layer(x.reshape(-1, x.shape[-1]))
        if self.args.moe_zloss_weight:
            self._record = logits
        scores = logits.softmax(dim=-1)
        weights, indices = scores.topk(self.args.moe_top_k, dim=-1)
        if self.args.moe_normalize_expert_weights:
            p = self.args.moe_normalize_expert_weights
            weights = weights / torch.linalg.vector_norm(weights, p, dim=-1, keepdim=True)
        if self.args.uniform_expert_assignment:
            turns = torch.arange(indices.numel(), device=indices.device) % self.args.moe_num_experts
            indices = turns.view(indices.shape)
        return scores, weights, indices


def batched_router_zloss(args: Arguments, model: nn.Module | None = None) -> torch.Tensor:
    """``moe_zloss_weight · mean_t (log Σ_e exp l_te)²`` of each router that recorded its logits: one value per router.

    Args:
        args: options.
        model: the routers inside it; None for all in the process.

    Raises:
        ValueError: ``moe_zloss_weight`` is 0, so that nothing is recorded, or no router recorded logits.
    """
    if not args.moe_zloss_weight:
        raise ValueError("moe_zloss_weight must not be 0 for a router z-loss, got 0")
    logits = _records.records(LearnedRouter, model)
    if not logits:
        raise ValueError("batched_router_zloss needs routers that were called since the last clear_router_zloss")
    if args.moe_zloss_in_fp32:
        logits = [x.float() for x in logits]
    return args.moe_zloss_weight * torch.stack([x.logsumexp(dim=1).square().mean() for x in logits])


def clear_router_zloss(model: nn.Module | None = None) -> None:
    """Remove the logits recorded by the routers inside ``model``, or by all in the process."""
    _records.clear(LearnedRouter, model)
