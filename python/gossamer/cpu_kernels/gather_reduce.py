"""Launchers of the native sums, means and maxima over lists of table rows, of one table and of many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer import _C
from gossamer._row_codes import scale_stride
from gossamer.cpu_kernels._native import DTYPES, empty_huge, matrix, unit_rows, vector

if TYPE_CHECKING:
    from gossamer.ops._bags import Bags
    from gossamer.ops.gather_max import GatherMax
    from gossamer.ops.gather_reduce import GatherDot, GatherReduce


def native_bags(bags: Bags) -> tuple[_C.Bags, tuple]:
    """The lists in the form that ``_C`` takes, and the tensors that must outlive the call."""
    index, offsets, weights, limit, mode, padding_idx, drop, features = bags
    flat = index.reshape(-1).contiguous()
    if weights is not None:
        weights = weights.reshape(-1).contiguous()
    num_lists, width = index.shape if offsets is None else (offsets.shape[0] - 1, 0)
    ids_below = -1 if limit is None else max(int(limit), 0)
    layout = 0 if features.layout is None else features.layout.data_ptr()
    # Passed by position: pybind11 takes a tenth of a microsecond longer for each argument passed by name.
    lists = _C.Bags(
        (flat.data_ptr(), 1, DTYPES[flat.dtype]),
        vector(offsets),
        vector(weights),
        width,
        flat.shape[0],
        num_lists,
        ids_below,
        mode,
        padding_idx,
        drop,
        layout,
        len(features.dim),
    )
    return lists, (flat, weights)


def native_table(table: torch.Tensor, bags: Bags) -> tuple[tuple[int, int, int, int], int, int]:
    """``(matrix, rows, columns)`` of a table with unit column stride; with features, ``columns`` is the most of any."""
    if bags.features.dim:
        # With features, kernels find the rows of the flat storage themselves.
        return (table.data_ptr(), 0, 1, DTYPES[table.dtype]), 0, max(bags.features.dim)
    return matrix(table), *table.shape


def native_scales(scale: torch.Tensor | None) -> tuple[int, int] | None:
    """``(pointer, stride)`` of the scales of rows, with stride 0 if all rows share one; None for None."""
    return None if scale is None else (scale.data_ptr(), scale_stride(scale))


def kernel_dtype(table: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels read or write for ``dtype``: that of the table or of its sums."""
    if dtype == table.dtype:
        return dtype
    return torch.float64 if table.dtype == torch.float64 else torch.float32


def as_kernel_dtype(table: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
    """``dout`` with contiguous rows, in a dtype that kernels take for this table."""
    return unit_rows(dout.to(kernel_dtype(table, dout.dtype)))


def gather_reduce(args: GatherReduce) -> torch.Tensor:
    """``out[b] = Σ weights · table[id]`` over the ids of each bag that contribute, or its mean.

    Raises:
        IndexError: an id of a bag is outside its table and is not to be dropped.
        ValueError: ``offsets`` do not ascend within ``[0, L]``, or a weight that counts is NaN; weights of bags with a
            limit are not checked.
    """
    table = unit_rows(args.table)
    lists, _alive = native_bags(args.bags)
    out = empty_huge(args.bags.result_shape(table), kernel_dtype(table, args.out_dtype))
    scales = None if args.scale is None else native_scales(args.scale)
    _C.gather_reduce(*native_table(table, args.bags), scales, lists, matrix(out), torch.get_num_threads())
    return out.to(args.out_dtype)


def gather_max(args: GatherMax) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima by column, ``(B, D)``, over the ids of each bag, zero for empty bags; errors as for :func:`gather_reduce`.

    The second result is each maximum's position within its bag, int32, −1 in empty bags; ``(0, D)`` unless needed.
    """
    table = unit_rows(args.table)
    lists, _alive = native_bags(args.bags)
    place, num_rows, dim = native_table(table, args.bags)
    shape = args.bags.result_shape(table)
    out = empty_huge(shape, kernel_dtype(table, args.out_dtype))
    argmax = torch.empty(shape if args.need_argmax else (0, dim), dtype=torch.int32)
    _C.gather_max(
        table=place,
        num_rows=num_rows,
        dim=dim,
        bags=lists,
        out=matrix(out),
        argmax=argmax.data_ptr() if args.need_argmax else 0,
        num_threads=torch.get_num_threads(),
    )
    return out.to(args.out_dtype), argmax


def gather_dot(args: GatherDot) -> torch.Tensor:
    """``out[p] = ⟨dout[bag of p], table[index[p]]⟩``, shaped like the ids; zero where the id is skipped.

    For a mean it is divided by the number of contributing ids of the bag. Errors as for :func:`gather_reduce`.
    """
    table = unit_rows(args.table)
    dout = as_kernel_dtype(table, args.dout)
    lists, _alive = native_bags(args.bags)
    place, num_rows, dim = native_table(table, args.bags)
    out = torch.zeros(args.bags.index.numel(), dtype=args.dtype)
    _C.gather_dot(
        dout=matrix(dout),
        table=place,
        num_rows=num_rows,
        dim=dim,
        scales=native_scales(args.scale),
        bags=lists,
        out=vector(out),
        num_threads=torch.get_num_threads(),
    )
    return out.view(args.bags.index.shape)
