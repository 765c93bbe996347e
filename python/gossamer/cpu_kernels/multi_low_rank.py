"""Launchers of the native low-rank updates of many adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import DTYPES, empty_huge, groups, matrix, pointer, unit_rows, vector, weights3

if TYPE_CHECKING:
    from gossamer.ops.multi_low_rank import MultiLowRank, MultiLowRankBackward


def _factor(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The factor in the dtype of the products, contiguous along one of its last two dimensions."""
    factor = factor.to(dtype)
    return factor if 1 in factor.stride()[1:] else factor.contiguous()


def _update(args: MultiLowRank, x: torch.Tensor, factors: list[torch.Tensor], s: torch.Tensor | None):
    """The arguments that forward and backward share, with ``x`` and ``factors`` in the form that kernels take."""
    a, b = factors
    return _C.MultiLowRank(
        adapters=groups(args.slots, args.offsets, args.x.shape[0]),
        x=matrix(x),
        a=weights3(a),
        b=weights3(b),
        sizes=(b.shape[1], a.shape[2], a.shape[1]),
        scales=vector(args.scales),
        scale=args.scale,
        ranks=vector(args.ranks),
        s=pointer(s),
    )


def multi_low_rank(args: MultiLowRank, y: torch.Tensor, *, add: bool) -> torch.Tensor:
    """Write ``scale[i]·x[m]·a[i]ᵀ·b[i]ᵀ`` to ``y[m]``, or add it to ``y[m]``.

    Args:
        args: the record.
        y: ``(M, N)``, contiguous along N.
        add: whether to add to ``y``; else rows without an adapter become zero.

    Returns:
        ``x·aᵀ`` ``(M, r)`` sorted by adapter, in float32 or float64; rows without an adapter are not written. ``(0,)``
        unless ``args.save``.
    """
    x = unit_rows(args.x)
    factors = [_factor(factor, x.dtype) for factor in (args.a, args.b)]
    shape = (args.slots.shape[0], args.a.shape[1]) if args.save else (0,)
    s = torch.empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))
    update = _update(args, x, factors, s if args.save else None)
    _C.multi_low_rank(update, y=matrix(y), add=add, num_threads=torch.get_num_threads())
    return s


def multi_low_rank_backward(args: MultiLowRankBackward) -> dict[str, torch.Tensor]:
    """The gradients named in ``args.needs``, with the shapes and dtypes of their arguments."""
    forward, s, needs = args.forward, args.s, args.needs
    x, dy = unit_rows(forward.x), unit_rows(args.dy)
    factors = [_factor(factor, x.dtype) for factor in (forward.a, forward.b)]
    # float64 sums are written unrounded, and rounded at the end.
    sums = torch.promote_types(forward.a.dtype, x.dtype)
    dx = torch.empty(x.shape, dtype=x.dtype) if "x" in needs else None
    da, db = (empty_huge(getattr(forward, name).shape, sums) if name in needs else None for name in ("a", "b"))
    ds = None if dx is None and da is None else torch.empty_like(s)
    _C.multi_low_rank_backward(
        _update(forward, x, factors, s),
        dy=matrix(dy),
        ds=pointer(ds),
        dx=matrix(dx),
        da=pointer(da),
        db=pointer(db),
        factor_dtype=DTYPES[sums],
        num_threads=torch.get_num_threads(),
    )
    found = {"x": dx} if dx is not None else {}
    return found | {n: g.to(forward.a.dtype) for n, g in (("a", da), ("b", db)) if g is not None}
