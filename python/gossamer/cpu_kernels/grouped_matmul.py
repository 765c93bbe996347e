"""Launchers of the native grouped products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import empty_gradient, groups, matrix, quantized_stack, unit_rows, weights3

if TYPE_CHECKING:
    from gossamer.ops.grouped_matmul import GroupedDweight, GroupedMatmul


def grouped_matmul(args: GroupedMatmul) -> torch.Tensor:
    """``(R, N)``, or ``(R, C)`` when transposed; zero in dropped rows."""
    x, weight, (slots, _, offsets) = unit_rows(args.x), args.weight, args.groups
    _, n, c = weight.shape
    if args.transposed:
        n, c = c, n
    if weight.quantized:
        product, stored = _C.quantized_grouped_matmul, quantized_stack(weight)
    else:
        product = _C.grouped_matmul
        stored = weights3(weight.data.transpose(1, 2) if args.transposed else weight.data)
    y = torch.empty(slots.shape[0], n, dtype=x.dtype)
    product(
        groups=groups(slots, offsets),
        n=n,
        c=c,
        x=matrix(x),
        x_div=args.x_div,
        weight=stored,
        transposed=args.transposed,
        bias=matrix(weight.bias),
        y=y.data_ptr(),
        y_grouped=args.y_grouped,
        num_threads=torch.get_num_threads(),
    )
    return y


def grouped_matmul_dweight(args: GroupedDweight) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``dweight (E, N, C)``, zero for experts without rows, and ``dbias (E, N)`` or None."""
    x, dy, (slots, _, offsets) = unit_rows(args.x), unit_rows(args.dy), args.groups
    e, n, c = offsets.shape[0] - 1, dy.shape[1], x.shape[1]
    dweight = empty_gradient((e, n, c), x.dtype, args.transposed)
    dbias = torch.empty((e, n), dtype=x.dtype) if args.with_bias else None
    _C.grouped_matmul_dweight(
        groups=groups(slots, offsets),
        n=n,
        c=c,
        x=matrix(x),
        x_div=args.x_div,
        dy=matrix(dy),
        dy_div=args.dy_div,
        dweight=dweight.data_ptr(),
        transposed=args.transposed,
        dbias=0 if dbias is None else dbias.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    return dweight, dbias
