"""Launchers of the grouped products on Hopper GPUs: the copy engine or chunk copies fill, warpgroups multiply."""

from __future__ import annotations

import torch

from gossamer import _C, _backend
from gossamer.cuda_kernels._hopper import Operands, routing, with_depth
from gossamer.triton_kernels.grouped_matmul_dweight import group_sums


def rows_times_weight(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    x_div: int,
    scatter: bool,
    zero_dropped: bool,
) -> torch.Tensor:
    """Launch the grouped product; the result's rows are in slot order when ``scatter``, dropped ones zero if asked."""
    num_rows, n = slots.shape[0], weight.shape[1]
    y = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, weight = with_depth(x, weight)
    operands = Operands(x)
    _C.hopper_grouped_matmul(
        operands.bfloat16,
        routing(slots, offsets),
        n,
        x.shape[1],
        operands.rows(x, x_div),
        operands.weight(weight),
        operands.pointer(bias),
        y.data_ptr(),
        scatter,
        zero_dropped,
        operands.where(),
    )
    return y


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
    """``y[r] = x[g(r)] · weight[e(r)]ᵀ + bias[e(r)]``, ``(R, N)`` sorted, or in slot order unless ``y_grouped``.

    Row ``r`` reads row ``r`` of ``x`` when ``x_div`` is 0, else row ``slots[r] // x_div``. Dropped rows become zero.

    Raises:
        ValueError: no Hopper GPU, or neither float16 nor bfloat16.
    """
    _backend.check_served("grouped_matmul", "cuda", x)
    return rows_times_weight(x, weight, bias, slots, offsets, x_div, not y_grouped, True)


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
    """``dweight[e] = Σ dy[g(r)]ᵀ x[g'(r)]`` and ``dbias[e] = Σ dy[g(r)]``: ``(E, N, C)`` and ``(E, N)``.

    The first is stored ``(E, C, N)`` when ``transposed``; the second is empty unless ``with_bias``. Both operands read
    their rows as in :func:`grouped_matmul`, by ``x_div`` and ``dy_div``. Empty groups give zeros.

    Raises:
        ValueError: no Hopper GPU, or neither float16 nor bfloat16.
    """
    _backend.check_served("grouped_matmul", "cuda", x)
    num_rows, num_experts, n, c = slots.shape[0], offsets.shape[0] - 1, dy.shape[1], x.shape[1]
    shape = (num_experts, c, n) if transposed else (num_experts, n, c)
    stored = torch.empty(shape, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        stored.zero_()
    elif stored.numel():
        # The last dimension of the result is that of the second operand.
        first, second = (x, dy) if transposed else (dy, x)
        first_div, second_div = (x_div, dy_div) if transposed else (dy_div, x_div)
        operands = Operands(x)
        _C.hopper_grouped_matmul_dweight(
            operands.bfloat16,
            routing(slots, offsets),
            operands.rows(first, first_div),
            operands.rows(second, second_div),
            stored.data_ptr(),
            stored.stride(0),
            stored.stride(1),
            operands.where(),
        )
    dweight = stored.transpose(1, 2) if transposed else stored
    dbias = x.new_empty(0)
    if with_bias:
        dbias = group_sums(dy if dy.stride(-1) == 1 else dy.contiguous(), slots, offsets, dy_div)
    return dweight, dbias
