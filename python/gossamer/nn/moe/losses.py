"""Balance terms of mixture-of-experts layers: pure functions of routings, and the bias update that needs no loss.

Counts carry no gradient; it flows through the probabilities alone. Coefficients are the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gossamer._checks import check_same_device, check_shape, check_tensor
from gossamer.nn.moe.routing import Routing, token_entropy
from gossamer.ops.dispatch import dispatch


def _layers(routing: Routing | Sequence[Routing], *, logits: bool = False) -> list[Routing]:
    """One routing or several as a list, all with probabilities, or with logits, and the same E."""
    layers = [routing] if isinstance(routing, Routing) else list(routing)
    if not layers:
        raise ValueError("routing must hold at least one Routing, got none")
    for layer in layers:
        if not isinstance(layer, Routing):
            raise TypeError(f"routing must be a Routing or a sequence of them, got {type(layer).__name__}")
        if layer.logits is None if logits else not layer.has_probabilities:
            raise ValueError("routing must have logits for a balance loss, got a routing by given ids")
        if layer.num_experts != layers[0].num_experts:
            raise ValueError(
                f"routing must have one number of experts, got {layers[0].num_experts} and {layer.num_experts}"
            )
    return layers


def _kept(mask: torch.Tensor | None, routing: Routing) -> torch.Tensor | None:
    """``mask`` as ``(T,)`` bool."""
    if mask is None:
        return None
    check_tensor("mask", mask)
    if mask.numel() != routing.num_tokens:
        raise ValueError(
            f"mask must have one value for each of T = {routing.num_tokens} tokens, got shape {tuple(mask.shape)}"
        )
    check_same_device(routing=routing.expert_ids, mask=mask)
    return mask.reshape(-1) != 0


def _rows(mask: torch.Tensor | None, routing: Routing) -> torch.Tensor | int:
    """Number of tokens kept, at least 1 so that sums over no tokens divide to zero."""
    return max(routing.num_tokens, 1) if mask is None else mask.sum().clamp(min=1)


def _counts(mask: torch.Tensor | None, routing: Routing) -> torch.Tensor:
    """``(E,)`` slots given to each expert by the tokens kept."""
    if mask is None:
        return routing.counts
    no_expert = routing.num_experts
    return dispatch(torch.where(mask.unsqueeze(1), routing.expert_ids, no_expert), no_expert).counts


def load_balance_loss(routing: Routing | Sequence[Routing], *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The load-balance loss of Switch Transformer and GShard, ``E · Σ_e f_e·P_e``, for top-K routing.

    ``f_e = c_e / T`` is the number of slots given to expert e per token, and ``P_e`` the mean over tokens of
    :attr:`Routing.probabilities`. Perfect balance gives K: divide by K for the form whose balanced value is 1. With
    K = 1 it is Switch's own. Several layers are averaged before the product, as if their tokens were one batch, which
    is how transformers' models compute it. The gradient in logit (t, j) of a softmax router is
    ``E/T · p_tj · (f_j − Σ_e p_te·f_e)``.

    Args:
        routing: of one layer, or a sequence of all layers' routings, with probabilities.
        mask: one value per token, in any shape of T elements such as ``(batch, sequence)``; tokens at 0 or False
            (padding) do not count. None counts all.

    Returns:
        A scalar of the logits' dtype; 0 where no token counts.

    Raises:
        TypeError: ``routing`` is something else.
        ValueError: no routing, one without logits, different numbers of experts, or a mask of another size or device.
    """
    layers = _layers(routing)
    counts, totals, rows = 0, 0, 0
    for layer in layers:
        kept = _kept(mask, layer)
        probabilities = layer.probabilities
        if kept is not None:
            probabilities = probabilities.masked_fill(~kept.unsqueeze(1), 0.0)
        counts = counts + _counts(kept, layer)
        totals = totals + probabilities.sum(dim=0)
        rows = rows + _rows(kept, layer)
    return layers[0].num_experts * (counts.to(totals.dtype) / rows * (totals / rows)).sum()


def router_z_loss(routing: Routing | Sequence[Routing], *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The router z-loss of ST-MoE, ``mean_t (log Σ_e exp l_te)²``, which keeps logits small.

    Its gradient in logit (t, j) is ``2·lse_t·p_tj / T``. Experts masked by −inf add nothing, and a token whose experts
    are all masked adds 0.

    Args:
        routing: of one layer, or a sequence of all layers' routings, with logits.
        mask: as in :func:`load_balance_loss`.

    Returns:
        A scalar of the logits' dtype; 0 where no token counts.

    Raises:
        TypeError: ``routing`` is something else.
        ValueError: no routing, one without logits, different numbers of experts, or a mask of another size or device.
    """
    total, rows = 0, 0
    for layer in _layers(routing, logits=True):
        kept = _kept(mask, layer)
        ignored = (layer.logits == -math.inf).all(dim=-1)
        if kept is not None:
            ignored = ignored | ~kept
        # Filled before the logarithm: behind it, its gradient at −inf would still be NaN.
        lse = layer.logits.masked_fill(ignored.unsqueeze(1), 0.0).logsumexp(dim=-1)
        total = total + lse.square().masked_fill(ignored, 0.0).sum()
        rows = rows + _rows(kept, layer)
    return total / rows


def sequence_balance_loss(routing: Routing, batch_size: int, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The sequence-wise balance loss of DeepSeek-V3, ``mean_b Σ_e f_be·P_be``.

    In sequence b of S tokens, ``f_be = E / (K·S) · c_be`` with ``c_be`` its slots given to expert e, and ``P_be`` the
    mean over its tokens of :attr:`Routing.probabilities` (sigmoid scores divided by their sum). Perfect balance gives
    1.

    Args:
        routing: of T = batch_size · S tokens, sequence after sequence, with probabilities.
        batch_size: number of sequences.
        mask: as in :func:`load_balance_loss`; S is then a sequence's number of tokens that count, and a sequence with
            none does not enter the mean.

    Returns:
        A scalar of the logits' dtype; 0 where no token counts.

    Raises:
        TypeError: ``routing`` is no Routing, or ``batch_size`` no int.
        ValueError: no logits, ``batch_size`` below 1 or not dividing T, or a mask of another size or device.
    """
    if not isinstance(routing, Routing):
        raise TypeError(f"routing must be a Routing, got {type(routing).__name__}")
    (routing,) = _layers(routing)
    if not isinstance(batch_size, (int, torch.SymInt)) or isinstance(batch_size, bool):
        raise TypeError(f"batch_size must be an int, got {type(batch_size).__name__}")
    num_tokens, num_experts, top_k = routing.num_tokens, routing.num_experts, routing.top_k
    if batch_size < 1 or num_tokens % batch_size:
        raise ValueError(f"batch_size must be at least 1 and divide T = {num_tokens}, got {batch_size}")
    kept = _kept(mask, routing)
    ids, probabilities = routing.expert_ids, routing.probabilities
    # One more expert takes the slots that do not count.
    no_slot = (ids < 0) | (ids > num_experts)
    if kept is None:
        lengths = torch.full((batch_size, 1), num_tokens // batch_size, device=ids.device)
    else:
        no_slot = no_slot | ~kept.unsqueeze(1)
        probabilities = probabilities.masked_fill(~kept.unsqueeze(1), 0.0)
        lengths = kept.view(batch_size, num_tokens // batch_size).sum(dim=1, keepdim=True)
    ids = ids.masked_fill(no_slot, num_experts).long().view(batch_size, num_tokens // batch_size * top_k)
    counts = torch.zeros((batch_size, num_experts + 1), dtype=torch.int64, device=ids.device)
    counts = counts.scatter_add(1, ids, torch.ones_like(ids))[:, :num_experts]
    sums = probabilities.view(batch_size, num_tokens // batch_size, num_experts).sum(dim=1)
    sequences = (lengths > 0).sum().clamp(min=1)
    lengths = lengths.clamp(min=1)
    fractions = (counts * num_experts).to(sums.dtype) / (lengths * top_k)
    return (fractions * (sums / lengths)).sum() / sequences


def routing_entropy_loss(routing: Routing | Sequence[Routing], *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The mean entropy of a token's probabilities, ``−(1/T) Σ_t Σ_e p_te·log p_te``, in nats.

    Dynamic routing (Huang et al., 2024) minimises it so that a router of a varying number of experts stays confident,
    instead of activating all of them. The gradient in logit (t, j) of a softmax router is ``−p_tj·(log p_tj + H_t)/T``
    with ``H_t`` the token's entropy. Several layers are averaged as if their tokens were one batch.

    Args:
        routing: of one layer, or a sequence of all layers' routings, with probabilities.
        mask: as in :func:`load_balance_loss`.

    Returns:
        A scalar of the probabilities' dtype; 0 where no token counts.

    Raises:
        TypeError: ``routing`` is something else.
        ValueError: no routing, one without probabilities, different numbers of experts, or a mask of another size or
            device.
    """
    total, rows = 0, 0
    for layer in _layers(routing):
        kept = _kept(mask, layer)
        entropy = token_entropy(layer.probabilities)
        if kept is not None:
            entropy = entropy.masked_fill(~kept, 0.0)
        total = total + entropy.sum()
        rows = rows + _rows(kept, layer)
    return total / rows


def router_losses(routing: Routing | Sequence[Routing], *, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """What routers themselves want minimised (:attr:`Routing.losses`) by name, without coefficients.

    Terms with one value a token are averaged over the tokens that count; the layers' terms of one name are added up.

    Args:
        routing: of one layer, or a sequence of all layers' routings, of any routers.
        mask: as in :func:`load_balance_loss`.

    Raises:
        TypeError: ``routing`` is something else.
        ValueError: a mask of another size or device.
    """
    layers = [routing] if isinstance(routing, Routing) else list(routing)
    totals: dict[str, torch.Tensor] = {}
    for layer in layers:
        if not isinstance(layer, Routing):
            raise TypeError(f"routing must be a Routing or a sequence of them, got {type(layer).__name__}")
        kept = _kept(mask, layer)
        for name, term in layer.losses.items():
            if term.dim():
                term = term if kept is None else term.masked_fill(~kept, 0.0)
                term = term.sum() / _rows(kept, layer)
            totals[name] = totals[name] + term if name in totals else term
    return totals


def update_expert_bias(bias: torch.Tensor, counts: torch.Tensor, rate: float) -> torch.Tensor:
    """Move a correction bias towards balance, in place: ``b_e += rate · sign(mean(c) − c_e)``.

    The balancing without an auxiliary loss of Wang et al. (2024) and DeepSeek-V3: call it after each training step with
    that step's counts, of the whole batch. Under data parallelism sum the counts over all ranks first, so that every
    rank moves its bias alike. The comparison is exact, in integers; there is no gradient. It may run between a forward
    pass and its backward pass.

    Args:
        bias: ``(E,)`` float32 or float64, such as ``SigmoidRouter.e_score_correction_bias``; overwritten.
        counts: ``(E,)`` int32 or int64, slots given to each expert, such as :attr:`Routing.counts`.
        rate: the step, at least 0; 1e-3 in DeepSeek-V3.

    Returns:
        ``bias``.

    Raises:
        TypeError: ``counts`` does not hold integers, or ``bias`` is narrower than float32, where such steps round away.
        ValueError: shapes or devices differ, or ``rate`` is negative or not finite.
    """
    check_shape("bias", bias, (None,), "(E,)")
    if bias.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"bias must be float32 or float64, got {bias.dtype}, in which small steps round away")
    check_shape("counts", counts, tuple(bias.shape), "(E,)")
    if counts.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"counts must be int32 or int64, got {counts.dtype}")
    check_same_device(bias=bias, counts=counts)
    if not 0 <= rate < math.inf:
        raise ValueError(f"rate must be at least 0 and finite, got {rate}")
    with torch.no_grad():
        counts = counts.long()
        direction = (counts.sum() - counts.numel() * counts).sign()
        return bias.add_(direction.to(bias.dtype), alpha=rate)
