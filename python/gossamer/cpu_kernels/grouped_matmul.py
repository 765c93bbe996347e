"""Launchers of the native grouped products."""

from __future__ import annotations

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import empty_gradient, groups, matrix, unit_rows, weights3


def grouped_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    slots: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    x_div: int,
    y_grouped: bool,
) -> torch.Tensor:
    """``y[r] = x[g(r)] · weight[e(r)]ᵀ + bias[e(r)]``; ``g(r)`` is ``r``, or ``slots[r] // x_div`` if ``x_div > 0``.

    Args:
        x: ``(·, C)`` float.
        weight: ``(E, N, C)`` of any strides, the dtype of ``x``.
        bias: ``(E, N)`` or None.
        slots: ``(R,)`` int32, as ``rows`` and ``offsets (E+1,)`` from a dispatch.
        rows: ``(R,)`` int32.
        offsets: ``(E+1,)`` int32.
        x_div: 0, or the slots that share a row of ``x``.
        y_grouped: rows of the result in expert order, else in slot order.

    Returns:
        ``(R, N)``, zero in dropped rows.
    """
    x = unit_rows(x)
    _, n, c = weight.shape
    y = torch.empty(slots.shape[0], n, dtype=x.dtype)
    _C.grouped_matmul(
        groups(slots, offsets),
        n,
        c,
        matrix(x),
        x_div,
        weights3(weight),
        matrix(bias),
        y.data_ptr(),
        y_grouped,
        torch.get_num_threads(),
    )
    return y


def grouped_matmul_dweight(
    x: torch.Tensor,
    dy: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    x_div: int,
    dy_div: int,
    transposed: bool,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``dweight[e] = Σ dy[g(r)]ᵀ x[g'(r)]`` and ``dbias[e] = Σ dy[g(r)]`` over the rows of each expert.

    Args:
        x: ``(·, C)`` float; row ``r`` reads row ``r``, or ``slots[r] // x_div`` if ``x_div > 0``.
        dy: ``(·, N)``, read alike by ``dy_div``.
        slots: ``(R,)`` int32, as ``offsets (E+1,)`` from a dispatch.
        offsets: ``(E+1,)`` int32.
        x_div: see ``x``.
        dy_div: see ``dy``.
        transposed: whether the gradient's storage is ``(E, C, N)``.
        with_bias: whether ``dbias`` is wanted.

    Returns:
        ``dweight (E, N, C)``, zero for experts without rows, and ``dbias (E, N)``, or ``(0,)`` when not wanted.
    """
    x, dy = unit_rows(x), unit_rows(dy)
    e, n, c = offsets.shape[0] - 1, dy.shape[1], x.shape[1]
    dweight = empty_gradient((e, n, c), x.dtype, transposed)
    dbias = torch.empty((e, n) if with_bias else (0,), dtype=x.dtype)
    _C.grouped_matmul_dweight(
        groups(slots, offsets),
        n,
        c,
        matrix(x),
        x_div,
        matrix(dy),
        dy_div,
        dweight.data_ptr(),
        transposed,
        dbias.data_ptr() if with_bias else 0,
        torch.get_num_threads(),
    )
    return dweight, dbias
