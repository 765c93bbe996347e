"""Launchers of the native low-rank updates of many adapters."""

from __future__ import annotations

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import DTYPES, empty_huge, groups, matrix, unit_rows, vector, weights3


def _factor(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The factor in the dtype of the products, contiguous along one of its last two dimensions."""
    factor = factor.to(dtype)
    return factor if 1 in factor.stride()[1:] else factor.contiguous()


def _arguments(x, a, b, slots, offsets, scales, scale, ranks, s) -> tuple:
    """The arguments that forward and backward share."""
    return (
        groups(slots, offsets),
        matrix(x),
        weights3(a),
        weights3(b),
        (b.shape[1], a.shape[2], a.shape[1]),
        (vector(scales), scale),
        vector(ranks),
        0 if s is None else s.data_ptr(),
    )


def multi_low_rank(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    scales: torch.Tensor | None,
    scale: float,
    ranks: torch.Tensor | None,
    y: torch.Tensor,
    add: bool,
    save: bool,
) -> torch.Tensor:
    """Write ``scale[i]·x[m]·a[i]ᵀ·b[i]ᵀ`` to ``y[m]``, or add it to what is there.

    Args:
        x: ``(M, C)``.
        a: ``(A, r, C)`` of any strides, as ``b``; the dtype of ``x`` or float32.
        b: ``(A, N, r)``.
        slots: ``(M,)`` int32, the rows sorted by adapter, as ``offsets`` from a dispatch.
        offsets: ``(A+1,)`` int32.
        scales: ``(A,)`` float, or None where ``scale`` is every adapter's.
        scale: see ``scales``.
        ranks: ``(A,)`` int, or None where every adapter has rank r.
        y: ``(M, N)``, contiguous along N.
        add: else rows without adapter become zero.
        save: whether the backward pass will want ``x·aᵀ``.

    Returns:
        ``x·aᵀ`` ``(M, r)`` sorted by adapter, in float32 or float64, its rows without adapter unwritten; ``(0,)``
        unless ``save``.
    """
    x, a, b = unit_rows(x), _factor(a, x.dtype), _factor(b, x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    s = torch.empty((slots.shape[0], a.shape[1]) if save else (0,), dtype=wide)
    _C.multi_low_rank(
        *_arguments(x, a, b, slots, offsets, scales, scale, ranks, s if save else None),
        matrix(y),
        add,
        torch.get_num_threads(),
    )
    return s


def multi_low_rank_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    s: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    scales: torch.Tensor | None,
    scale: float,
    ranks: torch.Tensor | None,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`multi_low_rank` from ``dy (M, N)`` and ``s``, the ``x·aᵀ`` that it saved.

    Args:
        dy: ``(M, N)``.
        x: as in the forward pass, and so on up to ``ranks``.
        a: see above.
        b: see above.
        s: ``(M, r)``.
        slots: see above.
        offsets: see above.
        scales: see above.
        scale: see above.
        ranks: see above.
        needs: which of x, a and b want a gradient.

    Returns:
        The three gradients, shaped and typed like what they belong to; ``(0,)`` where not needed.
    """
    x, dy = unit_rows(x), unit_rows(dy)
    need_x, need_a, need_b = needs
    dx = torch.empty(x.shape if need_x else (0,), dtype=x.dtype)
    # Sums of float64 are written as such, and rounded at the end.
    factor_dtype, sums = a.dtype, torch.promote_types(a.dtype, x.dtype)
    da = empty_huge(a.shape if need_a else (0,), sums)
    db = empty_huge(b.shape if need_b else (0,), sums)
    ds = torch.empty(s.shape if need_x or need_a else (0,), dtype=s.dtype)
    a, b = _factor(a, x.dtype), _factor(b, x.dtype)
    _C.multi_low_rank_backward(
        *_arguments(x, a, b, slots, offsets, scales, scale, ranks, s),
        matrix(dy),
        ds.data_ptr() if need_x or need_a else 0,
        matrix(dx if need_x else None),
        da.data_ptr() if need_a else 0,
        db.data_ptr() if need_b else 0,
        DTYPES[sums],
        torch.get_num_threads(),
    )
    return dx, da.to(factor_dtype), db.to(factor_dtype)
