"""Columnwise maxima of table rows over lists of ids, and where in its list each was found."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import torch

from gossamer import _backend
from gossamer._numerics import accumulation_dtype
from gossamer.ops._bags import Bags, apply_bounds
from gossamer.ops._gather_reduce_reference import argmax_by_bag, check_lists, gather_reduce_reference
from gossamer.ops._records import define


class GatherMax(NamedTuple):
    """Arguments of columnwise maxima of table rows over bags.

    Attributes:
        table: ``(N, D)`` float.
        bags: the lists, of mode ``"max"``.
        out_dtype: of the result ``(B, D)``.
        need_argmax: whether to return the position of each maximum too, which the gradient needs.
    """

    table: torch.Tensor
    bags: Bags
    out_dtype: torch.dtype
    need_argmax: bool


@functools.cache
def _kernels(backend: str) -> ModuleType:
    if backend == "native":
        from gossamer.cpu_kernels import gather_reduce as gather_max
    else:
        from gossamer.triton_kernels import gather_max
    return gather_max


def gather_max_reference(args: GatherMax) -> tuple[torch.Tensor, torch.Tensor]:
    """Columnwise maxima, and each one's position within its bag, int32, −1 in empty bags."""
    table, bags = args.table, args.bags
    out = gather_reduce_reference(table, bags, args.out_dtype)
    if not args.need_argmax:
        return out, torch.empty(0, out.shape[1], dtype=torch.int32, device=table.device)
    kept = bags.live(table.shape[0]).nonzero().squeeze(1)
    first = argmax_by_bag(table[bags.index.reshape(-1)[kept].long()], bags.numbers()[kept], bags.num_bags)
    if kept.numel() == 0:
        return out, first.int()
    position = kept[first.clamp(min=0)] - bags.begins().unsqueeze(1)
    return out, torch.where(first >= 0, position, -1).int()


def forward(args: GatherMax, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima outside autograd."""
    if backend == "reference":
        check_lists(args)
        return gather_max_reference(args)
    return _kernels(backend).gather_max(args)


def forward_fake(args: GatherMax) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty tensors of the shapes that :func:`forward` returns."""
    out = args.table.new_empty(args.bags.result_shape(args.table), dtype=args.out_dtype)
    return out, out.new_empty(out.shape if args.need_argmax else (0, out.shape[1]), dtype=torch.int32)


# Columnwise maxima over the live ids of each bag, and where each was found first: its position within the bag, -1 in
# empty bags. NaN counts as the largest.
gather_max = define("gather_max", GatherMax, kernel=forward, fake=forward_fake, returns="(Tensor, Tensor)")


def _rows_of_maxima(argmax: torch.Tensor, bags: Bags) -> torch.Tensor:
    """The table row of each maximum in ``argmax (B, D)`` from gather_max; arbitrary where argmax is −1."""
    flat = bags.index.reshape(-1).long()
    if flat.numel() == 0:
        return torch.zeros_like(argmax, dtype=torch.int64)
    return flat[(bags.begins().unsqueeze(1) + argmax.clamp(min=0)).clamp(max=flat.numel() - 1)]


def _save(ctx, args: GatherMax, output):
    ctx.set_materialize_grads(False)
    ctx.shape, ctx.dtype = args.table.shape, args.table.dtype
    ctx.mark_non_differentiable(output[1])
    return GatherMax(None, args.bags, args.out_dtype, args.need_argmax), output[1]


def _differentiate(ctx, args: GatherMax, tensors, dout: torch.Tensor | None, _):
    if dout is None:
        return {}
    if not args.need_argmax:
        raise RuntimeError("gather_max was called without need_argmax, but its gradient is wanted")
    (argmax,) = tensors
    num_rows, dim = ctx.shape
    wide = dout.to(accumulation_dtype(ctx.dtype))
    # Empty bags add their zeros to an extra row, which is dropped.
    rows = torch.where(argmax >= 0, _rows_of_maxima(argmax, args.bags), num_rows)
    at = rows * dim + torch.arange(dim, device=wide.device)
    dtable = wide.new_zeros((num_rows + 1) * dim)
    dtable = dtable.index_put((at.reshape(-1),), wide.reshape(-1), accumulate=True)
    return {"table": dtable.view(num_rows + 1, dim)[:num_rows].to(ctx.dtype)}


gather_max.differentiate(_save, _differentiate)


def gather_maxima(
    table: torch.Tensor, index: torch.Tensor, offsets: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`gather_reduce` with ``mode="max"`` and ``bounds="drop"`` outside autograd, and the positions of the
    maxima.

    Returns:
        ``(B, D)``, and the position of each maximum within its bag, ``(B, D)`` int32, -1 in empty bags.
    """
    backend = _backend.resolve("gather_reduce", table)
    bags = apply_bounds(Bags(index, offsets, mode="max", drop=True), table.shape[0], "drop", None, backend)
    return gather_max(GatherMax(table, bags, table.dtype, True), backend)
