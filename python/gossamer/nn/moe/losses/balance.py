"""Losses that are lowest where experts get equal shares of the tokens.

The family of Switch Transformer and GShard multiplies each expert's share of the work by its mean probability. Its
members differ in what they count and in a constant; here for T tokens with K of E experts each:

===========================  ==========================================  ==============
function                     formula                                     value balanced
===========================  ==========================================  ==============
:func:`load_balance_loss`    ``E · Σ_e (c_e/T) · P_e``, all slots        K
:func:`slot_balance_loss`    ``E · Σ_e (c_e/Σc) · P_e``, all slots       1
:func:`switch_balance_loss`  ``E · Σ_e (c_e/T) · P_e``, first choices    1
:func:`gshard_balance_loss`  ``(1/E) · Σ_e (c_e/T) · P_e``, first ones   1/E²
===========================  ==========================================  ==============
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from gossamer._checks import MAX_SIZE, check_floating, check_number, check_positive, check_same_device, check_shape
from gossamer.nn.moe.losses.totals import kept_tokens, layers_of, sum_over_ranks, totals_of
from gossamer.nn.moe.routing import Routing


def load_balance_loss(
    routing: Routing | Sequence[Routing],
    *,
    mask: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The load-balance loss of Switch Transformer and GShard, ``E · Σ_e f_e·P_e``, for top-K routing.

    ``f_e = c_e / T`` is the number of slots given to expert e per token, and ``P_e`` the mean over tokens of
    :attr:`Routing.probabilities`. Perfect balance gives K; :func:`slot_balance_loss` divides by it. With K = 1 it is
    the loss of Switch Transformer. Several layers are averaged before the product, as if their tokens were one batch,
    as in transformers' models. The gradient in logit (t, j) of a softmax router is ``E/T · p_tj · (f_j − Σ_e
    p_te·f_e)``.

    Args:
        routing: of one layer, or a sequence of all layers' routings, with probabilities.
        mask: one value per token, in any shape of T elements such as ``(batch, sequence)``; tokens at 0 or False
            (padding) do not count. None counts all.
        group: group of data-parallel ranks over which fractions and probabilities are computed; None for this rank
            only.

    Returns:
        A scalar of the logits' dtype; 0 where no token counts.

    Raises:
        TypeError: ``routing`` is something else, or ``group`` is not a process group.
        ValueError: no routing, one without logits, different numbers of experts, or a mask of another size or device.
    """
    totals = totals_of(routing, mask, group, "load_balance_loss")
    return totals.counts.numel() * (totals.fractions * totals.mean).sum()


def slot_balance_loss(
    routing: Routing | Sequence[Routing],
    *,
    mask: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The balance loss of MegaBlocks and Megatron-LM, ``E/(K·T) · Σ_e c_e·P_e``: balanced at 1 for any K.

    K·T is the number of slots that have an expert, so the loss also works for routings with a varying number of
    experts.

    Args:
        routing: as in :func:`load_balance_loss`; so are ``mask``, ``group``, the result and the errors.
        mask: tokens that count.
        group: of data-parallel ranks.
    """
    totals = totals_of(routing, mask, group, "slot_balance_loss")
    shares = totals.counts.to(totals.mean.dtype) / totals.counts.sum().clamp(min=1)
    return totals.counts.numel() * (shares * totals.mean).sum()


def switch_balance_loss(
    routing: Routing | Sequence[Routing],
    *,
    mask: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The balance loss of Switch Transformer, ``E · Σ_e f_e·P_e``, with f from first choices only: balanced at 1.

    A token's first choice is its expert of the largest weight. XMoE uses it for several experts per token.

    Args:
        routing: as in :func:`load_balance_loss`; so are ``mask``, ``group``, the result and the errors.
        mask: tokens that count.
        group: of data-parallel ranks.
    """
    totals = totals_of(routing, mask, group, "switch_balance_loss", first=True)
    return totals.counts.numel() * (totals.fractions * totals.mean).sum()


def gshard_balance_loss(
    routing: Routing | Sequence[Routing],
    *,
    mask: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The balance loss of GShard, the mean over experts of ``f_e·P_e`` with f of first choices: balanced at 1/E².

    Args:
        routing: as in :func:`load_balance_loss`; so are ``mask``, ``group``, the result and the errors.
        mask: tokens that count.
        group: of data-parallel ranks.
    """
    totals = totals_of(routing, mask, group, "gshard_balance_loss", first=True)
    return (totals.fractions * totals.mean).mean()


def _squared_variation(values: torch.Tensor) -> torch.Tensor:
    """``CV²``: the variance over the squared mean; 0 where all are 0."""
    return values.var(correction=0) / values.mean().square().clamp(min=torch.finfo(values.dtype).tiny)


def importance_loss(
    routing: Routing | Sequence[Routing],
    *,
    mask: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The importance loss of Shazeer et al. (2017), ``CV²(Σ_t p_t)``: 0 where all experts get the same probability.

    ``CV² = variance / mean²`` over the experts.

    Args:
        routing: as in :func:`load_balance_loss`; so are ``mask``, ``group``, the result and the errors.
        mask: tokens that count.
        group: of data-parallel ranks.
    """
    return _squared_variation(totals_of(routing, mask, group, "importance_loss").probabilities)


def load_loss(
    logits: torch.Tensor,
    noisy_logits: torch.Tensor,
    noise_std: torch.Tensor | float,
    top_k: int,
    *,
    mask: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The load loss of Shazeer et al. (2017): ``CV²`` of a smooth estimate of how many tokens each expert gets.

    It is for routers that take the K highest of ``noisy_logits = logits + noise_std · n`` with n standard normal. If
    only the noise of expert e were drawn again, e would be among the K with probability ``Φ((logits_te − h_te) /
    noise_std)``, where h is the K-th highest noisy logit of the other experts; the estimate is the sum over tokens.

    Args:
        logits: ``(T, E)`` floating, without noise.
        noisy_logits: ``(T, E)``, with the noise with which the experts were chosen.
        noise_std: positive, a number or a floating tensor that broadcasts to ``(T, E)``.
        top_k: K, below E.
        mask: as in :func:`load_balance_loss`.
        group: as in :func:`load_balance_loss`.

    Returns:
        A scalar; 0 where no token counts.

    Raises:
        TypeError: a tensor is not floating, or ``top_k`` is not an int.
        ValueError: shapes differ, or K is not from 1 to E − 1.
    """
    check_shape("logits", logits, (None, None), "(T, E)")
    check_shape("noisy_logits", noisy_logits, tuple(logits.shape), "(T, E)")
    check_floating("logits", logits)
    check_floating("noisy_logits", noisy_logits)
    check_same_device(logits=logits, noisy_logits=noisy_logits)
    check_positive(top_k=top_k)
    if not isinstance(noise_std, torch.Tensor):
        check_number("noise_std", noise_std)
    else:
        check_floating("noise_std", noise_std)
        check_same_device(logits=logits, noise_std=noise_std)
        wide, given = logits.shape, noise_std.shape
        pairs = zip(reversed(given), reversed(wide), strict=False)
        if len(given) > 2 or any(one not in (1, size) for one, size in pairs):
            raise ValueError(f"noise_std must broadcast to {tuple(wide)}, got {tuple(given)}")
    if top_k >= logits.shape[1]:
        raise ValueError(f"top_k must be below num_experts, got top_k={top_k}, num_experts={logits.shape[1]}")
    highest = noisy_logits.topk(top_k + 1, dim=1).values
    last, next_one = highest[:, top_k - 1 : top_k], highest[:, top_k:]
    bar = torch.where(noisy_logits > next_one, next_one, last)
    chances = torch.special.ndtr((logits - bar) / noise_std)
    kept = kept_tokens(mask, logits, "logits")
    if kept is not None:
        chances = chances.masked_fill(~kept.unsqueeze(1), 0.0)
    load = chances.sum(dim=0)
    return _squared_variation(sum_over_ranks(load, group, load))


def sequence_balance_loss(
    routing: Routing,
    batch_size: int,
    *,
    mask: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The sequence-wise balance loss of DeepSeek-V3, ``mean_b Σ_e f_be·P_be``.

    In sequence b of S tokens, ``f_be = E / (K·S) · c_be`` with ``c_be`` its slots given to expert e, and ``P_be`` the
    mean over its tokens of :attr:`Routing.probabilities` (sigmoid scores divided by their sum). Perfect balance gives
    1.

    Args:
        routing: of T = batch_size · S tokens, sequence after sequence, with probabilities.
        batch_size: number of sequences.
        mask: as in :func:`load_balance_loss`; S is then a sequence's number of tokens that count, and a sequence with
            none does not enter the mean.
        group: of data-parallel ranks, over whose sequences the mean is taken; None for this one's.

    Returns:
        A scalar of the logits' dtype; 0 where no token counts.

    Raises:
        TypeError: ``routing`` is not a Routing, ``batch_size`` is not an int, or ``group`` is not a process group.
        ValueError: no logits, ``batch_size`` below 1 or not dividing T, or a mask of another size or device.
    """
    if not isinstance(routing, Routing):
        raise TypeError(f"routing must be a Routing, got {type(routing).__name__}")
    (routing,) = layers_of(routing, "sequence_balance_loss")
    if not isinstance(batch_size, (int, torch.SymInt)) or isinstance(batch_size, bool):
        raise TypeError(f"batch_size must be an int, got {type(batch_size).__name__}")
    num_tokens, num_experts, top_k = routing.num_tokens, routing.num_experts, routing.top_k
    if batch_size < 1 or batch_size > MAX_SIZE or num_tokens % batch_size:
        raise ValueError(f"batch_size must be at least 1 and divide T = {num_tokens}, got {batch_size}")
    kept = kept_tokens(mask, routing.expert_ids)
    ids, probabilities = routing.expert_ids, routing.probabilities
    # An additional expert takes the slots that do not count.
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
    sequences = (lengths > 0).sum()
    lengths = lengths.clamp(min=1)
    fractions = (counts * num_experts).to(sums.dtype) / (lengths * top_k)
    total, sequences = (sum_over_ranks(part, group, sums) for part in ((fractions * (sums / lengths)).sum(), sequences))
    return total / sequences.clamp(min=1)
