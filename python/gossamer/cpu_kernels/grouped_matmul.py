"""Launchers of the native grouped products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import (
    empty_gradient,
    empty_huge,
    groups,
    matrix,
    pointer,
    quantized_stack,
    unit_rows,
    weights3,
)

if TYPE_CHECKING:
    from gossamer.ops.grouped_matmul import GroupedDweight, GroupedMatmul


def grouped_matmul(args: GroupedMatmul) -> torch.Tensor:
    """``(R, N)``, or ``(R, C)`` if transposed; dropped rows are zero."""
    x, weight, (slots, inverse, offsets) = unit_rows(args.x), args.weight, args.groups
    if weight.format == "dense":
        data = weight.data.transpose(1, 2) if args.transposed else weight.data
        product, stored, (_, n, c) = _C.grouped_matmul, weights3(data), data.shape
    else:
        product, stored = _C.quantized_grouped_matmul, quantized_stack(weight)
        sizes = stored[4]
        n, c = sizes[::-1] if args.transposed else sizes
    y = empty_huge((slots.shape[0], n), x.dtype)
    # Passed by position: pybind11 takes a tenth of a microsecond longer for each argument passed by name.
    order = groups(slots, offsets, inverse.shape[0])
    rows, how = (order, n, c, matrix(x), args.x_div), (args.y_grouped, torch.get_num_threads())
    product(*rows, stored, args.transposed, matrix(weight.bias), y.data_ptr(), *how)
    return y


def grouped_matmul_dweight(args: GroupedDweight) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``dweight (E, N, C)``, zero for experts without rows, and ``dbias (E, N)`` or None."""
    x, dy, (slots, inverse, offsets) = unit_rows(args.x), unit_rows(args.dy), args.groups
    e, n, c = offsets.shape[0] - 1, dy.shape[1], x.shape[1]
    dweight = empty_gradient((e, n, c), x.dtype, args.transposed)
    dbias = torch.empty((e, n), dtype=x.dtype) if args.with_bias else None
    rows = groups(slots, offsets, inverse.shape[0]), n, c, matrix(x), args.x_div, matrix(dy), args.dy_div
    results = dweight.data_ptr(), args.transposed, pointer(dbias)
    _C.grouped_matmul_dweight(*rows, *results, torch.get_num_threads())
    return dweight, dbias
