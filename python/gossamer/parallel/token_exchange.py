"""Tokens that travel to the experts of other processes and come back as weighted sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from gossamer.ops.gather_reduce import gather_reduce
from gossamer.parallel.exchange import RowExchange


@dataclass(frozen=True)
class Level:
    """One hop of tokens: the ranks among which a block of experts is divided.

    Attributes:
        group: of the ranks; rank r has the r-th part.
        size: P.
        rank: of this process.
        label: of the traffic.
        capacity: rows per pair of ranks for the static exchange, or None for the exact one.
    """

    group: dist.ProcessGroup
    size: int
    rank: int
    label: str
    capacity: int | None = None


class _SumRows(torch.autograd.Function):
    """``y[b] = Σ rows[lists[b]]``; ``transposed`` lists, for each row, the sums that contain it.

    With the tokens of a plan's rows it copies tokens to the rows that travel, one per (token, rank) pair; with the
    positions of a token's rows it adds up the returned rows, in rank order.
    """

    @staticmethod
    def forward(ctx, rows, lists, transposed):
        ctx.save_for_backward(transposed)
        return gather_reduce(rows, lists, bounds="drop")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gather_reduce(gradient, ctx.saved_tensors[0], bounds="drop"), None, None


class _PickSlots(torch.autograd.Function):
    """``weights.flatten()[slots]``, 0 for slots past the end; no slot occurs twice, so gradients need no sum."""

    @staticmethod
    def forward(ctx, weights, slots):
        ctx.save_for_backward(slots)
        ctx.shape = weights.shape
        return F.pad(weights.flatten(), (0, 1))[slots]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (slots,) = ctx.saved_tensors
        own = gradient.new_zeros(ctx.shape.numel() + 1)
        own[slots.flatten()] = gradient.flatten()
        return own[:-1].view(ctx.shape), None


@dataclass(frozen=True)
class Plan:
    """The rows of T tokens that travel to each of P ranks, and the slots of each row.

    Attributes:
        index: ``(N,)`` the token of each row, rank by rank, in token order within a rank; T where a row has none.
        places: ``(T, P)`` the row of each (token, rank) pair; N if there is none.
        slots: ``(N, S)`` flat slots of the routing that belong to a row; T·K for none.
        sizes: ``(P,)`` int64 rows for each rank.
        live: ``(P,)`` int64 slots with an expert that each rank gets.
        dropped: pairs beyond the capacity, a scalar tensor; None without one.
    """

    index: torch.Tensor
    places: torch.Tensor
    slots: torch.Tensor
    sizes: torch.Tensor
    live: torch.Tensor
    dropped: torch.Tensor | None


def plan_rows(
    owners: torch.Tensor, num_ranks: int, num_slots: int, capacity: int | None = None, stays: int | None = None
) -> Plan:
    """The rows of tokens whose slots belong to ``owners (T, K)``, ranks below ``num_ranks``; others have no expert.

    A token has one row for each rank that holds any of its experts. With a ``capacity`` there are exactly that many
    rows for each rank, filled with the first tokens, and nothing is read on the host.

    Args:
        owners: ``(T, K)`` int64.
        num_ranks: P.
        num_slots: S, the maximum number of slots of a token on one rank.
        capacity: number of rows for each rank, or None for the exact number.
        stays: a rank that gets no rows; its live slots are counted.
    """
    num_tokens, top_k = owners.shape
    device = owners.device
    hit = torch.zeros((num_tokens, num_ranks + 1), dtype=torch.bool, device=device)
    hit = hit.scatter_(1, owners.clamp(max=num_ranks), True)[:, :num_ranks].T
    if stays is not None:
        hit[stays] = False
    place = hit.long()
    if capacity is None:
        ranks, index = hit.nonzero(as_tuple=True)
        place = place.flatten().cumsum(0).view(num_ranks, num_tokens) - 1
        num_rows, dropped = index.numel(), None
        sizes = hit.sum(1)
    else:
        place = place.cumsum(1) - 1
        dropped = (hit & (place >= capacity)).sum()
        hit = hit & (place < capacity)
        order = torch.arange(num_ranks, device=device)
        sizes = torch.full_like(order, capacity) if stays is None else (order != stays).long() * capacity
        num_rows = capacity * (num_ranks - (stays is not None))
        place = place + (sizes.cumsum(0) - sizes).unsqueeze(1)
        index = torch.full((num_rows + 1,), num_tokens, dtype=torch.int64, device=device)
        tokens = torch.arange(num_tokens, device=device).expand(num_ranks, num_tokens)
        index = index.scatter_(0, place.masked_fill(~hit, num_rows).flatten(), tokens.flatten())[:-1]
        ranks = order.repeat_interleave(sizes, output_size=num_rows)
    places = place.masked_fill(~hit, num_rows).T.contiguous()
    own = F.pad(owners, (0, 0, 0, 1), value=num_ranks)[index] == ranks.unsqueeze(1)
    slots = index.unsqueeze(1) * top_k + torch.arange(top_k, device=device)
    slots = slots.masked_fill(~own, num_tokens * top_k)
    if num_slots < top_k:
        # Slots with an expert are below T·K, so they come first, in their order.
        slots = slots.sort(dim=1).values[:, :num_slots]
    kept = own.sum(1)
    live = torch.zeros(num_ranks, dtype=torch.int64, device=device).scatter_add_(0, ranks, kept)
    if stays is not None:
        live[stays] = (owners == stays).sum()
    return Plan(index, places, slots, sizes, live, dropped)


def _merge_repeated(ids: torch.Tensor, weights: torch.Tensor, absent: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct ids of each token, with the sums of their weights."""
    first = (ids.unsqueeze(2) == ids.unsqueeze(1)).int().argmax(2)
    weights = torch.zeros_like(weights).scatter_add(1, first, weights)
    repeated = first != torch.arange(ids.shape[1], device=ids.device)
    return ids.masked_fill(repeated, absent), weights.masked_fill(repeated, 0.0)


def fit_slots(ids: torch.Tensor, weights: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights ``(T, S)`` in at most ``num_experts`` slots, as a dispatch requires."""
    if ids.shape[1] <= num_experts:
        return ids, weights
    ids, weights = _merge_repeated(ids, weights, num_experts)
    order = (ids >= num_experts).int().argsort(dim=1, stable=True)[:, :num_experts]
    return ids.gather(1, order), weights.gather(1, order)


Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def exchange_tokens(
    tokens: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    num_experts: int,
    levels: Sequence[Level],
    compute: Compute,
    *,
    beside: Callable[[], Any] | None = None,
    overflow: torch.Tensor | None = None,
    overlap: bool = False,
) -> tuple[torch.Tensor, Any]:
    """``y[t] = Σ_k weights[t,k] · expert_{ids[t,k]}(tokens[t])``, the experts divided among the ranks of ``levels``.

    A token is sent once to each rank that has experts of it, with the ids and weights of its slots there, and comes
    back as the weighted sum over those experts; the ranks' sums are added in rank order. With several levels, such as
    node and device, it is sent once to each node, and within the node once to each device.

    Args:
        tokens: ``(T, H)``.
        ids: ``(T, K)``; ids of ``num_experts`` and above mean no expert.
        weights: ``(T, K)`` floating.
        num_experts: E; rank r of P of the first level has those from ``r·⌈E/P⌉`` on.
        levels: outermost first.
        compute: a function of rows ``(M, H)``, ids ``(M, S)`` int32 of this process's experts (``⌈E/P⌉`` and above mean
            no expert), weights ``(M, S)``, and an upper bound on the slots that have an expert.
        beside: called while rows travel.
        overflow: a scalar int64, to which rows beyond a capacity are added.
        overlap: whether tokens of local experts stay, and are computed while others travel; for the last level.
            ``compute`` is then called twice, first with all tokens.

    Returns:
        ``(T, H)``, and the result of ``beside``.
    """
    level, share = levels[0], -(-num_experts // levels[0].size)
    top_k = ids.shape[1]
    num_slots = min(top_k, share)
    ids = ids.long()
    if num_slots < top_k:
        ids, weights = _merge_repeated(ids, weights, num_experts)
    absent = (ids < 0) | (ids >= num_experts)
    owners = torch.div(ids, share, rounding_mode="floor").masked_fill(absent, level.size)
    stays = level.rank if overlap and len(levels) == 1 else None
    plan = plan_rows(owners, level.size, num_slots, level.capacity, stays)
    local = (ids % share).masked_fill(absent, share).int()
    rows = _SumRows.apply(tokens, plan.index, plan.places)
    factors = _PickSlots.apply(weights, plan.slots)
    parts = rows, factors, F.pad(local.flatten(), (0, 1), value=share)[plan.slots]
    label = f"{level.label} tokens"
    if level.capacity is None:
        exchange = RowExchange.of(plan.sizes, level.group, *parts, label=label, note=plan.live)
        live = list(exchange.received_notes)
    else:
        exchange = RowExchange.static(level.capacity, level.group, to_self=stays is None)
        live = [size * num_slots for size in exchange.received_sizes]
        if stays is not None:
            live[stays] = ids.numel()
        if overflow is not None:
            overflow += plan.dropped
    pending = exchange.start(*parts, label=label)
    y = other = None
    if stays is not None:
        elsewhere = owners != stays
        y = compute(tokens, local.masked_fill(elsewhere, share), weights.masked_fill(elsewhere, 0.0), live.pop(stays))
    elif beside is not None:
        other = beside()
    rows, factors, local = pending.wait()
    if len(levels) > 1:
        rows, _ = exchange_tokens(rows, local, factors, share, levels[1:], compute, overflow=overflow, overlap=overlap)
    else:
        rows = compute(rows, local.contiguous(), factors.contiguous(), sum(live))
    pending = exchange.reversed.start(rows, label=f"{level.label} outputs")
    if stays is not None and beside is not None:
        other = beside()
    collected = _SumRows.apply(pending.wait(), plan.places, plan.index)
    return (collected if y is None else y + collected), other
