"""Launchers of the grouped products on Hopper GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer import _C, _backend
from gossamer.cuda_kernels._hopper import Operands, routing, with_depth
from gossamer.triton_kernels.common import unit_columns
from gossamer.triton_kernels.grouped_matmul_dweight import group_sums

if TYPE_CHECKING:
    from gossamer.ops._groups import Groups
    from gossamer.ops.grouped_matmul import GroupedDweight, GroupedMatmul


def rows_times_weight(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    groups: Groups,
    x_div: int,
    scatter: bool,
    zero_dropped: bool,
) -> torch.Tensor:
    """Launch the grouped product. ``scatter`` puts rows in slot order; ``zero_dropped`` zeroes dropped ones."""
    num_rows, n = groups.slots.shape[0], weight.shape[1]
    y = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, weight = with_depth(x, weight)
    operands = Operands(x)
    _C.hopper_grouped_matmul(
        bfloat16=operands.bfloat16,
        routing=routing(groups),
        n=n,
        c=x.shape[1],
        x=operands.rows(x, x_div),
        weight=operands.weight(weight),
        bias=operands.pointer(bias),
        y=y.data_ptr(),
        scatter=scatter,
        zero_dropped=zero_dropped,
        where=operands.where(),
    )
    return y


def grouped_matmul(args: GroupedMatmul) -> torch.Tensor:
    """``(R, N)``, or ``(R, C)`` if transposed; dropped rows are zero.

    Raises:
        ValueError: no Hopper GPU, neither float16 nor bfloat16, or a quantised weight.
    """
    weight = args.weight
    _backend.check_served("grouped_matmul", "cuda", args.x, weight.quantized)
    values = weight.data.transpose(1, 2) if args.transposed else weight.data
    return rows_times_weight(args.x, values, weight.bias, args.groups, args.x_div, not args.y_grouped, True)


def weight_gradient(
    x: torch.Tensor,
    dy: torch.Tensor,
    groups: Groups,
    x_div: int,
    dy_div: int,
    transposed: bool,
    finite: bool = False,
) -> torch.Tensor:
    """As :func:`gossamer.triton_kernels.grouped_matmul_dweight.weight_gradient`; rows past a group are never read."""
    num_rows, num_experts, n, c = groups.slots.shape[0], groups.offsets.shape[0] - 1, dy.shape[1], x.shape[1]
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
            bfloat16=operands.bfloat16,
            routing=routing(groups),
            a=operands.rows(first, first_div),
            b=operands.rows(second, second_div),
            out=stored.data_ptr(),
            expert_stride=stored.stride(0),
            outer_stride=stored.stride(1),
            where=operands.where(),
        )
    return stored.transpose(1, 2) if transposed else stored


def grouped_matmul_dweight(args: GroupedDweight) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight gradient, and the bias gradient or None.

    Raises:
        ValueError: no Hopper GPU, or neither float16 nor bfloat16.
    """
    _backend.check_served("grouped_matmul", "cuda", args.x)
    dweight = weight_gradient(args.x, args.dy, args.groups, args.x_div, args.dy_div, args.transposed)
    return dweight, group_sums(unit_columns(args.dy), args.groups, args.dy_div) if args.with_bias else None
