"""Losses of what a router computes rather than of the experts it chooses: z-loss, entropy, and its own loss terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from gossamer._checks import check_floating, check_same_device, check_shape
from gossamer.nn.moe.losses.totals import kept_tokens, layers_of, listed, num_kept, sum_over_ranks
from gossamer.nn.moe.routing import Routing, token_entropy


def _token_mean(
    layers: Sequence[Routing],
    mask: torch.Tensor | None,
    group: dist.ProcessGroup | None,
    values: Callable[[Routing, torch.Tensor | None], torch.Tensor],
) -> torch.Tensor:
    """The mean of ``values(layer, kept) (T,)``, 0 at tokens that do not count, over the others of all layers and
    ranks.
    """
    total, rows = 0, 0
    for layer in layers:
        kept = kept_tokens(mask, layer.expert_ids)
        total = total + values(layer, kept).sum()
        rows = rows + num_kept(kept, layer)
    return sum_over_ranks(total, group, total) / sum_over_ranks(rows, group, total)


def _squared_logsumexp(layer: Routing, kept: torch.Tensor | None) -> torch.Tensor:
    """``(T,)``, 0 at tokens that do not count or whose experts are all masked."""
    ignored = (layer.logits == -math.inf).all(dim=-1)
    if kept is not None:
        ignored = ignored | ~kept
    # Filled before the logarithm: if filled after it, the gradient at −inf would still be NaN.
    lse = layer.logits.masked_fill(ignored.unsqueeze(1), 0.0).logsumexp(dim=-1)
    return lse.square().masked_fill(ignored, 0.0)


def _entropy(layer: Routing, kept: torch.Tensor | None) -> torch.Tensor:
    """``(T,)``, 0 at tokens that do not count."""
    entropy = token_entropy(layer.probabilities)
    return entropy if kept is None else entropy.masked_fill(~kept, 0.0)


def router_z_loss(
    routing: Routing | Sequence[Routing],
    *,
    mask: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The router z-loss of ST-MoE, ``mean_t (log Σ_e exp l_te)²``, which keeps logits small.

    Its gradient in logit (t, j) is ``2·lse_t·p_tj / T``. Experts masked by −inf add nothing, and a token whose experts
    are all masked adds 0.

    Args:
        routing: of one layer, or a sequence of all layers' routings, with logits.
        mask: as in :func:`load_balance_loss`, like ``group``.
        group: of data-parallel ranks.

    Returns:
        A scalar of the logits' dtype; 0 where no token counts.

    Raises:
        TypeError: ``routing`` is something else.
        ValueError: no routing, one without logits, different numbers of experts, or a mask of another size or device.
    """
    return _token_mean(layers_of(routing, "router_z_loss", logits=True), mask, group, _squared_logsumexp)


def routing_entropy_loss(
    routing: Routing | Sequence[Routing],
    *,
    mask: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The mean entropy of a token's probabilities, ``−(1/T) Σ_t Σ_e p_te·log p_te``, in nats.

    Dynamic routing (Huang et al., 2024) minimises it so that a router of a varying number of experts stays confident,
    instead of activating all of them. The gradient in logit (t, j) of a softmax router is ``−p_tj·(log p_tj + H_t)/T``
    with ``H_t`` the token's entropy. Several layers are averaged as if their tokens were one batch.

    Args:
        routing: of one layer, or a sequence of all layers' routings, with probabilities.
        mask: as in :func:`load_balance_loss`, like ``group``.
        group: of data-parallel ranks.

    Returns:
        A scalar of the probabilities' dtype; 0 where no token counts.

    Raises:
        TypeError: ``routing`` is something else.
        ValueError: no routing, one without probabilities, different numbers of experts, or a mask of another size or
            device.
    """
    return _token_mean(layers_of(routing, "routing_entropy_loss"), mask, group, _entropy)


def _check_term(name: str, term: torch.Tensor, routing: Routing) -> None:
    """A loss of a routing made by hand: one number, or one for each token."""
    check_floating(name, term)
    if term.dim():
        check_shape(name, term, (routing.num_tokens,), "(T,)")
    check_same_device(**{"routing.expert_ids": routing.expert_ids, name: term})


def router_losses(routing: Routing | Sequence[Routing], *, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The routers' own loss terms (:attr:`Routing.losses`) by name, without coefficients.

    Terms with one value a token are averaged over the tokens that count; the layers' terms of one name are added up.

    Args:
        routing: of one layer, or a sequence of all layers' routings, of any routers.
        mask: as in :func:`load_balance_loss`.

    Raises:
        TypeError: ``routing`` is something else.
        ValueError: a mask or a term of another size or device.
    """
    totals: dict[str, torch.Tensor] = {}
    for layer in listed(routing):
        kept = kept_tokens(mask, layer.expert_ids)
        for name, term in layer.losses.items():
            _check_term(f"routing.losses[{name!r}]", term, layer)
            if term.dim():
                term = term if kept is None else term.masked_fill(~kept, 0.0)
                term = term.sum() / num_kept(kept, layer)
            totals[name] = totals[name] + term if name in totals else term
    return totals
