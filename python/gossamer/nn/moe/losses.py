"""Balance losses of mixture-of-experts layers, as pure functions of routings, and the bias update that needs no loss.

Counts carry no gradient; it flows only through the probabilities. The caller multiplies by coefficients.

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

Under data parallelism each rank sees a part of the batch. With ``group``, counts, sums of probabilities and numbers of
tokens are added over its ranks, so that every rank returns the loss of the whole batch. Averaging the gradients over
the ranks, as ``DistributedDataParallel`` does, gives the gradient of this loss. Every rank of the group must make the
call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from gossamer._checks import (
    MAX_SIZE,
    check_flag,
    check_floating,
    check_id_range,
    check_index,
    check_number,
    check_positive,
    check_same_device,
    check_shape,
    check_strided,
    check_tensor,
    check_written,
)
from gossamer.nn.moe.routing import Routing, check_probabilities, token_entropy
from gossamer.ops.dispatch import dispatch

CLUSTER_FORMS = ("within", "all", "gap")


def _listed(routing: Routing | Sequence[Routing]) -> list[Routing]:
    """One routing or several as a list."""
    if not isinstance(routing, (Routing, Sequence)):
        raise TypeError(f"routing must be a Routing or a sequence of them, got {type(routing).__name__}")
    layers = [routing] if isinstance(routing, Routing) else list(routing)
    for layer in layers:
        if not isinstance(layer, Routing):
            raise TypeError(f"routing must be a Routing or a sequence of them, got {type(layer).__name__}")
    return layers


def _layers(routing: Routing | Sequence[Routing], *, logits: bool = False) -> list[Routing]:
    """One routing or several as a list, all with probabilities, or with logits, and the same E."""
    layers = _listed(routing)
    if not layers:
        raise ValueError("routing must hold at least one Routing, got none")
    for layer in layers:
        if layer.logits is None if logits else not layer.has_probabilities:
            raise ValueError("routing must have logits for a balance loss, got a routing by given ids")
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
    check_strided("logits", routing.logits)
    if not routing.logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {routing.logits.dtype}")
    check_same_device(expert_ids=routing.expert_ids, logits=routing.logits)


def _kept(mask: torch.Tensor | None, tokens: torch.Tensor, name: str = "routing") -> torch.Tensor | None:
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


def _rows(mask: torch.Tensor | None, routing: Routing) -> torch.Tensor | int:
    """Number of tokens kept, at least 1 so that sums over no tokens divide to zero."""
    return max(routing.num_tokens, 1) if mask is None else mask.sum().clamp(min=1)


def _counts(mask: torch.Tensor | None, routing: Routing) -> torch.Tensor:
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


def _global(part: torch.Tensor | int, group: dist.ProcessGroup | None, like: torch.Tensor) -> torch.Tensor | int:
    """``part`` summed over the ranks of ``group``; unchanged without a group."""
    if group is None:
        return part
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    if not isinstance(part, torch.Tensor):
        part = torch.tensor(part, device=like.device)
    return _SumOverRanks.apply(part, group)


class _Totals(NamedTuple):
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
    best = routing.weights.detach().argmax(dim=1, keepdim=True)
    return routing.with_experts(routing.expert_ids.gather(1, best), routing.weights.gather(1, best), max_rows=None)


def _totals(
    routing: Routing | Sequence[Routing],
    mask: torch.Tensor | None,
    group: dist.ProcessGroup | None,
    *,
    first: bool = False,
) -> _Totals:
    counts, totals, rows = 0, 0, 0
    for layer in _layers(routing):
        kept = _kept(mask, layer.expert_ids)
        probabilities = layer.probabilities
        if kept is not None:
            probabilities = probabilities.masked_fill(~kept.unsqueeze(1), 0.0)
        counts = counts + _counts(kept, _first_choices(layer) if first else layer)
        totals = totals + probabilities.sum(dim=0)
        rows = rows + (layer.num_tokens if kept is None else kept.sum())
    counts, totals, rows = (_global(part, group, totals) for part in (counts.long(), totals, rows))
    return _Totals(counts, totals, rows.clamp(min=1) if isinstance(rows, torch.Tensor) else max(rows, 1))


def expert_counts(
    routing: Routing, *, mask: torch.Tensor | None = None, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """``(E,)`` int64: slots given to each expert by the tokens that count, as :func:`update_expert_bias` takes them.

    Args:
        routing: of any router.
        mask: as in :func:`load_balance_loss`.
        group: process group over whose ranks they are summed.

    Raises:
        TypeError: ``routing`` is not a Routing, or ``group`` is not a process group.
        ValueError: a mask of another size or device.
    """
    if not isinstance(routing, Routing):
        raise TypeError(f"routing must be a Routing, got {type(routing).__name__}")
    counts = _counts(_kept(mask, routing.expert_ids), routing).long()
    return _global(counts, group, counts)


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
    totals = _totals(routing, mask, group)
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
        routing: as in :func:`load_balance_loss`, like ``mask``, ``group``, what is returned and what is raised.
        mask: tokens that count.
        group: of data-parallel ranks.
    """
    totals = _totals(routing, mask, group)
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
        routing: as in :func:`load_balance_loss`, like ``mask``, ``group``, what is returned and what is raised.
        mask: tokens that count.
        group: of data-parallel ranks.
    """
    totals = _totals(routing, mask, group, first=True)
    return totals.counts.numel() * (totals.fractions * totals.mean).sum()


def gshard_balance_loss(
    routing: Routing | Sequence[Routing],
    *,
    mask: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The balance loss of GShard, the mean over experts of ``f_e·P_e`` with f of first choices: balanced at 1/E².

    Args:
        routing: as in :func:`load_balance_loss`, like ``mask``, ``group``, what is returned and what is raised.
        mask: tokens that count.
        group: of data-parallel ranks.
    """
    totals = _totals(routing, mask, group, first=True)
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
        routing: as in :func:`load_balance_loss`, like ``mask``, ``group``, what is returned and what is raised.
        mask: tokens that count.
        group: of data-parallel ranks.
    """
    return _squared_variation(_totals(routing, mask, group).probabilities)


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
        noise_std: positive, a number or a tensor that broadcasts to ``(T, E)``.
        top_k: K, below E.
        mask: as in :func:`load_balance_loss`.
        group: as in :func:`load_balance_loss`.

    Returns:
        A scalar; 0 where no token counts.

    Raises:
        TypeError: logits are not floating tensors, or ``top_k`` is not an int.
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
    kept = _kept(mask, logits, "logits")
    if kept is not None:
        chances = chances.masked_fill(~kept.unsqueeze(1), 0.0)
    load = chances.sum(dim=0)
    return _squared_variation(_global(load, group, load))


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
    total, rows = 0, 0
    for layer in _layers(routing, logits=True):
        kept = _kept(mask, layer.expert_ids)
        ignored = (layer.logits == -math.inf).all(dim=-1)
        if kept is not None:
            ignored = ignored | ~kept
        # Filled before the logarithm: if filled after it, the gradient at −inf would still be NaN.
        lse = layer.logits.masked_fill(ignored.unsqueeze(1), 0.0).logsumexp(dim=-1)
        total = total + lse.square().masked_fill(ignored, 0.0).sum()
        rows = rows + _rows(kept, layer)
    return _global(total, group, total) / _global(rows, group, total)


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
    (routing,) = _layers(routing)
    if not isinstance(batch_size, (int, torch.SymInt)) or isinstance(batch_size, bool):
        raise TypeError(f"batch_size must be an int, got {type(batch_size).__name__}")
    num_tokens, num_experts, top_k = routing.num_tokens, routing.num_experts, routing.top_k
    if batch_size < 1 or batch_size > MAX_SIZE or num_tokens % batch_size:
        raise ValueError(f"batch_size must be at least 1 and divide T = {num_tokens}, got {batch_size}")
    kept = _kept(mask, routing.expert_ids)
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
    total, sequences = (_global(part, group, sums) for part in ((fractions * (sums / lengths)).sum(), sequences))
    return total / sequences.clamp(min=1)


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
    total, rows = 0, 0
    for layer in _layers(routing):
        kept = _kept(mask, layer.expert_ids)
        entropy = token_entropy(layer.probabilities)
        if kept is not None:
            entropy = entropy.masked_fill(~kept, 0.0)
        total = total + entropy.sum()
        rows = rows + _rows(kept, layer)
    return _global(total, group, total) / _global(rows, group, total)


def cluster_variance_loss(
    routing: Routing | Sequence[Routing],
    num_clusters: int,
    *,
    survivors: torch.Tensor | None = None,
    variance_weight: float = 1.0,
    form: str = "within",
    mean: bool = True,
    mask: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The loss of MoEC (Xie et al., 2023), ``N · (Σ_e m_e·c_e + μ·V)``, for balance and low variance within clusters.

    For N experts in clusters of neighbours, ``c_e`` is the fraction of tokens whose first choice is e, plus 1e-6, and
    ``m_e`` the mean of its probabilities. V is the mean over clusters of the unbiased variance of m within each; it is
    small where a token's probability is flat over a cluster.

    Args:
        routing: as in :func:`load_balance_loss`.
        num_clusters: number of clusters; divides E.
        survivors: positions within a cluster of the experts that take part, such as ``ClusterRouter.survivors`` in
            training; None for all.
        variance_weight: μ.
        form: ``"within"``; ``"all"``, V over all experts at once; or ``"gap"``, V of ``"within"`` divided by
            ``exp(Δ)``, where Δ is the difference of the two largest mean probabilities of clusters.
        mean: whether m is a mean over tokens; else the sum, as in the released code, with which V grows as T².
        mask: as in :func:`load_balance_loss`, like ``group``.
        group: of data-parallel ranks.

    Raises:
        TypeError: ``routing`` is something else, ``num_clusters`` is not an int, or ``survivors`` does not hold ints.
        ValueError: as :func:`load_balance_loss`; ``num_clusters`` does not divide E, or ``form`` is unknown.
        IndexError: on the CPU, a survivor is not a position within a cluster.
    """
    check_positive(num_clusters=num_clusters)
    if form not in CLUSTER_FORMS:
        raise ValueError(f"form must be one of {CLUSTER_FORMS}, got {form!r}")
    check_number("variance_weight", variance_weight, finite=True)
    check_flag("mean", mean)
    totals = _totals(routing, mask, group, first=True)
    num_experts = totals.counts.numel()
    if num_experts % num_clusters:
        raise ValueError(
            f"num_clusters must divide num_experts, got num_clusters={num_clusters}, num_experts={num_experts}"
        )
    chosen = totals.fractions.view(num_clusters, -1)
    means = totals.mean.view(num_clusters, -1)
    if survivors is not None:
        _check_survivors(survivors, means)
        chosen, means = chosen[:, survivors], means[:, survivors]
    weights = means if mean else means * totals.rows
    over = weights.reshape(1, -1) if form == "all" else weights
    # The variance of a single expert would be NaN in torch.
    variance = over.var(dim=1).mean() if over.shape[1] > 1 else over.new_zeros(())
    if form == "gap" and num_clusters > 1:
        largest = means.mean(dim=1).topk(2).values
        variance = variance / (largest[0] - largest[1]).exp()
    return chosen.numel() * ((weights * (chosen + 1e-6)).sum() + variance_weight * variance)


def _check_survivors(survivors: torch.Tensor, means: torch.Tensor) -> None:
    """Positions within the clusters ``means (N, E/N)``."""
    check_index("survivors", survivors)
    check_shape("survivors", survivors, (None,), "(S,)")
    check_same_device(routing=means, survivors=survivors)
    check_id_range("survivors", survivors, means.shape[1], "E/N")


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
    for layer in _listed(routing):
        kept = _kept(mask, layer.expert_ids)
        for name, term in layer.losses.items():
            _check_term(f"routing.losses[{name!r}]", term, layer)
            if term.dim():
                term = term if kept is None else term.masked_fill(~kept, 0.0)
                term = term.sum() / _rows(kept, layer)
            totals[name] = totals[name] + term if name in totals else term
    return totals


def update_expert_bias(bias: torch.Tensor, counts: torch.Tensor, rate: float) -> torch.Tensor:
    """Move a correction bias towards balance, in place: ``b_e += rate · sign(mean(c) − c_e)``.

    This is the auxiliary-loss-free balancing of Wang et al. (2024) and DeepSeek-V3. Call it after each training step
    with the counts of that step's whole batch. :func:`expert_counts` excludes padding and sums over data-parallel
    ranks, so that all ranks move their bias equally. The comparison is exact, in integers; there is no gradient. It may
    run between a forward pass and its backward pass.

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
    check_written("bias", bias)
    check_shape("counts", counts, tuple(bias.shape), "(E,)")
    check_index("counts", counts)
    check_same_device(bias=bias, counts=counts)
    check_number("rate", rate, least=0, finite=True)
    with torch.no_grad():
        counts = counts.long()
        direction = (counts.sum() - counts.numel() * counts).sign()
        return bias.add_(direction.to(bias.dtype) * rate)
