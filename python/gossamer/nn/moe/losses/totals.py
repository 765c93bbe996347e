"""Totals that losses are computed from: over the tokens that count, all layers, and the ranks of a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from gossamer._checks import check_floating, check_same_device, check_shape, check_strided, check_tensor
from gossamer.nn.moe.routing import Routing, check_probabilities
from gossamer.ops.dispatch import dispatch


def listed(routing: Routing | Sequence[Routing]) -> list[Routing]:
    """One routing or several as a list."""
    if not isinstance(routing, (Routing, Sequence)):
        raise TypeError(f"routing must be a Routing or a sequence of them, got {type(routing).__name__}")
    layers = [routing] if isinstance(routing, Routing) else list(routing)
    for layer in layers:
        if not isinstance(layer, Routing):
            raise TypeError(f"routing must be a Routing or a sequence of them, got {type(layer).__name__}")
    return layers


def layers_of(routing: Routing | Sequence[Routing], loss: str, *, logits: bool = False) -> list[Routing]:
    """One routing or several as a list, checked to have probabilities or logits and the same E; ``loss`` names the
    function in messages.
    """
    layers = listed(routing)
    if not layers:
        raise ValueError("routing must hold at least one Routing, got none")
    for layer in layers:
        if logits and layer.logits is None:
            raise ValueError(
                f"{loss} needs the router's logits, which this routing does not have: only routers that choose by "
                "logits give them"
            )
        if not logits and not layer.has_probabilities:
            raise ValueError(
                f"{loss} needs the router's probabilities, which this routing does not have: routers that choose by "
                "given ids have none"
            )
        if layer.logits is not None:
            _check_logits(layer)
        if logits and isinstance(layer._probabilities, torch.Tensor):
            # Other losses read the property, which makes this check.
            check_probabilities(layer, layer._probabilities)
        if layer.num_experts != layers[0].num_experts:
            raise ValueError(
                f"routing must have one number of experts, got {layers[0].num_experts} and {layer.num_experts}"
            )
    return layers


def _check_logits(routing: Routing) -> None:
    """The logits of a routing made by hand."""
    check_shape("logits", routing.logits, (routing.num_tokens, routing.num_experts), "(T, E)")
    check_floating("logits", routing.logits)
    check_same_device(expert_ids=routing.expert_ids, logits=routing.logits)


def kept_tokens(mask: torch.Tensor | None, tokens: torch.Tensor, name: str = "routing") -> torch.Tensor | None:
    """``mask`` as ``(T,)`` bool for ``tokens (T, ·)``, checked for the argument ``name``."""
    if mask is None:
        return None
    check_tensor("mask", mask)
    check_strided("mask", mask)
    if mask.numel() != tokens.shape[0]:
        raise ValueError(
            f"mask must have one value for each of T = {tokens.shape[0]} tokens, got shape {tuple(mask.shape)}"
        )
    check_same_device(**{name: tokens, "mask": mask})
    return mask.reshape(-1) != 0


def num_kept(mask: torch.Tensor | None, routing: Routing) -> torch.Tensor | int:
    """Number of tokens kept, at least 1 so that sums over no tokens divide to zero."""
    return max(routing.num_tokens, 1) if mask is None else mask.sum().clamp(min=1)


def slot_counts(mask: torch.Tensor | None, routing: Routing) -> torch.Tensor:
    """``(E,)`` slots given to each expert by the tokens kept."""
    if mask is None:
        return routing.counts
    no_expert = routing.num_experts
    return dispatch(torch.where(mask.unsqueeze(1), routing.expert_ids, no_expert), no_expert).counts


class _SumOverRanks(torch.autograd.Function):
    """The sum over the ranks of a group; gradients are summed too, since each rank's result contains every part."""

    @staticmethod
    def forward(ctx, part, group):
        ctx.group = group
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def sum_over_ranks(part: torch.Tensor | int, group: dist.ProcessGroup | None, like: torch.Tensor) -> torch.Tensor | int:
    """``part`` summed over the ranks of ``group``; unchanged without a group."""
    if group is None:
        return part
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    if not isinstance(part, torch.Tensor):
        part = torch.tensor(part, device=like.device)
    return _SumOverRanks.apply(part, group)


class Totals(NamedTuple):
    """Totals over the tokens that count, in all layers and ranks: slots and probabilities per expert, and tokens."""

    counts: torch.Tensor
    probabilities: torch.Tensor
    rows: torch.Tensor | int

    @property
    def mean(self) -> torch.Tensor:
        """``(E,)``, P."""
        return self.probabilities / self.rows

    @property
    def fractions(self) -> torch.Tensor:
        """``(E,)`` slots of each expert per token."""
        return self.counts.to(self.probabilities.dtype) / self.rows


def _first_choices(routing: Routing) -> Routing:
    """The routing reduced to each token's slot of the largest weight."""
    check_same_device(expert_ids=routing.expert_ids, weights=routing.weights)
    best = routing.weights.detach().argmax(dim=1, keepdim=True)
    return routing.with_experts(routing.expert_ids.gather(1, best), routing.weights.gather(1, best), max_rows=None)


def totals_of(
    routing: Routing | Sequence[Routing],
    mask: torch.Tensor | None,
    group: dist.ProcessGroup | None,
    loss: str,
    *,
    first: bool = False,
) -> Totals:
    """The totals of one routing or several, after the checks of :func:`layers_of`.

    With ``first``, each token counts for its first choice only.
    """
    counts, totals, rows = 0, 0, 0
    for layer in layers_of(routing, loss):
        kept = kept_tokens(mask, layer.expert_ids)
        probabilities = layer.probabilities
        if kept is not None:
            probabilities = probabilities.masked_fill(~kept.unsqueeze(1), 0.0)
        counts = counts + slot_counts(kept, _first_choices(layer) if first else layer)
        totals = totals + probabilities.sum(dim=0)
        rows = rows + (layer.num_tokens if kept is None else kept.sum())
    counts, totals, rows = (sum_over_ranks(part, group, totals) for part in (counts.long(), totals, rows))
    return Totals(counts, totals, rows.clamp(min=1) if isinstance(rows, torch.Tensor) else max(rows, 1))
