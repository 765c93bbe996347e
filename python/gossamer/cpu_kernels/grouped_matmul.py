"""Launchers of the grouped products: one matmul per expert over gathered rows."""

from __future__ import annotations

import torch


def _gathered(source, slots, divisor, begin, end):
    if divisor == 0:
        return source[begin:end]
    return source.index_select(0, slots[begin:end] if divisor == 1 else slots[begin:end] // divisor)


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
    """``y[r] = x[g(r)] · weight[e(r)]ᵀ + bias[e(r)]``, zero for dropped rows; ``g(r)`` is ``r`` or ``slots[r] // x_div``."""
    bounds = offsets.tolist()
    y = torch.empty(slots.shape[0], weight.shape[1], dtype=x.dtype)
    for e in range(weight.shape[0]):
        begin, end = bounds[e], bounds[e + 1]
        if begin < end:
            part = _gathered(x, slots, x_div, begin, end) @ weight[e].T
            y[begin:end] = part if bias is None else part + bias[e]
    y[bounds[-1] :] = 0
    return y if y_grouped else y.index_select(0, rows)


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
    """``dweight[e] = Σ dy[g(r)]ᵀ x[g'(r)]`` over the rows of each expert, and ``dbias[e] = Σ dy[g(r)]``."""
    bounds = offsets.tolist()
    e, n, c = len(bounds) - 1, dy.shape[1], x.shape[1]
    dweight = x.new_zeros(e, c, n).transpose(1, 2) if transposed else x.new_zeros(e, n, c)
    dbias = x.new_zeros((e, n) if with_bias else (0,))
    for i in range(e):
        begin, end = bounds[i], bounds[i + 1]
        if begin < end:
            dys = _gathered(dy, slots, dy_div, begin, end)
            dweight[i] = dys.T @ _gathered(x, slots, x_div, begin, end)
            if with_bias:
                dbias[i] = dys.sum(0)
    return dweight, dbias
