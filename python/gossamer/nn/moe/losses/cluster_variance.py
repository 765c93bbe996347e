"""The loss of MoEC: balance, and low variance within clusters of experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from gossamer._checks import (
    check_flag,
    check_id_range,
    check_index,
    check_number,
    check_positive,
    check_same_device,
    check_shape,
)
from gossamer.nn.moe.losses.totals import totals_of
from gossamer.nn.moe.routing import Routing

CLUSTER_FORMS = ("within", "all", "gap")


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
    totals = totals_of(routing, mask, group, "cluster_variance_loss", first=True)
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
