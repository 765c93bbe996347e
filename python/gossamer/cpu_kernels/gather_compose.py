"""Launchers of the native sums of composed vectors and of products, and of the terms of their gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer import _C
from gossamer._numerics import rows_dtype
from gossamer.cpu_kernels._native import DTYPES, empty_huge, matrix, pointer, unit_rows, vector
from gossamer.cpu_kernels.gather_reduce import kernel_dtype, native_bags
from gossamer.cpu_kernels.map_ids import native_maps

if TYPE_CHECKING:
    from gossamer.ops.composed_rows import Parts
    from gossamer.ops.gather_compose import GatherCompose
    from gossamer.ops.gather_compose_gradient import ComposeGradient, RowSums
    from gossamer.ops.gather_matmul import GatherMatmul, ProductGradient


def _native_codes(codes: torch.Tensor | None, bits: int) -> tuple[tuple[int, int, int, int], torch.Tensor | None]:
    if codes is None:
        return (0, 0, 0, 0), None
    codes = codes.contiguous()
    return (codes.data_ptr(), codes.shape[0], codes.shape[1] * codes.element_size(), bits), codes


def _native_parts(parts: Parts, columns: int) -> tuple[_C.Parts, tuple]:
    """The parts in the form that ``_C`` takes, and the tensors that must outlive the call."""
    bits = [*parts.bits, 0, 0]
    often, kept = _native_codes(parts.codes, bits[0])
    seldom, more = _native_codes(parts.rare, bits[1])
    made = _C.Parts(
        native_maps(parts.maps),
        parts.coded,
        often,
        seldom,
        parts.operation,
        parts.block or columns,
        parts.block > 0,
        parts.wrap,
    )
    return made, (kept, more)


def _table(table: torch.Tensor, parts: Parts) -> torch.Tensor:
    return table.contiguous() if parts.block else unit_rows(table)


def gather_compose(args: GatherCompose) -> torch.Tensor:
    """``out[b]``, the sum or mean over the ids of bag ``b`` of their composed vectors.

    Raises:
        IndexError: an id of a bag is unknown, or a code is beyond its part.
        ValueError: ``offsets`` do not ascend within ``[0, L]``, or a weight that counts is NaN.
    """
    table = _table(args.table, args.parts)
    lists, _alive = native_bags(args.bags)
    parts, _kept = _native_parts(args.parts, table.shape[1])
    out = empty_huge((args.bags.num_bags, args.parts.dim), kernel_dtype(table, args.out_dtype))
    _C.gather_compose(matrix(table), table.shape[0], args.parts.dim, lists, parts, matrix(out), torch.get_num_threads())
    return out.to(args.out_dtype)


def gather_matmul(args: GatherMatmul) -> torch.Tensor:
    """``out[b]``, the sum or mean over the ids of bag ``b`` of the products of their matrices.

    Raises:
        IndexError: as :func:`gather_compose`.
        ValueError: as :func:`gather_compose`.
    """
    left, right = args.left.contiguous(), args.right.contiguous()
    lists, _alive = native_bags(args.bags)
    parts, _kept = _native_parts(args.parts, left.shape[1])
    out = empty_huge((args.bags.num_bags, args.parts.dim), kernel_dtype(left, args.out_dtype))
    _C.gather_matmul(
        left=matrix(left),
        num_rows=left.shape[0],
        dim=args.parts.dim,
        inner=args.inner,
        width=args.sizes[2],
        right=matrix(right),
        second_rows=right.shape[0],
        bags=lists,
        parts=parts,
        out=matrix(out),
        num_threads=torch.get_num_threads(),
    )
    return out.to(args.out_dtype)


def product_gradient(args: ProductGradient) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of ``left`` and ``turned``."""
    left, turned, dout = args.left.contiguous(), args.turned.contiguous(), args.dout.contiguous()
    factor = None if args.factor is None else args.factor.contiguous()
    found = empty_huge(tuple(left.shape), left.dtype), empty_huge(tuple(turned.shape), left.dtype)
    _C.product_gradient(
        dtype=DTYPES[left.dtype],
        sizes=args.sizes,
        left=left.data_ptr(),
        num_left=left.shape[0],
        right=turned.data_ptr(),
        num_right=turned.shape[0],
        dout=dout.data_ptr(),
        factors=pointer(factor),
        positions=args.positions.data_ptr(),
        offsets=args.offsets.data_ptr(),
        rows=args.rows.data_ptr(),
        left_gradient=found[0].data_ptr(),
        right_gradient=found[1].data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    return found


def row_sums(args: RowSums) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient ``(M, C)`` of each row, and the rows' numbers ``(M,)`` int32, −1 where no position contributes.

    Raises:
        IndexError: as :func:`gather_compose`.
    """
    table, dout = unit_rows(args.table), unit_rows(args.dout)
    lists, _alive = native_bags(args.bags)
    parts, _kept = _native_parts(args.parts, table.shape[1])
    sums = empty_huge(tuple(table.shape), dout.dtype)
    rows = torch.empty(table.shape[0], dtype=torch.int32)
    _C.sum_row_gradients(
        table=matrix(table),
        num_rows=table.shape[0],
        dim=args.parts.dim,
        bags=lists,
        parts=parts,
        dout=matrix(dout),
        sums=sums.data_ptr(),
        rows=rows.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    return sums, rows


def compose_gradient(args: ComposeGradient) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The rows of each position (−1 if it contributes nothing), the gradients of factors, and those of weights.

    Raises:
        IndexError: as :func:`gather_compose`.
    """
    table, dout = _table(args.table, args.parts), unit_rows(args.dout)
    lists, _alive = native_bags(args.bags)
    parts, _kept = _native_parts(args.parts, table.shape[1])
    count, dim = args.bags.index.numel(), args.parts.dim
    dtype = rows_dtype(table.shape[0])
    # Positions outside all bags are not written.
    rows = empty_huge((count, args.parts.listed), dtype)
    if args.bags.offsets is not None:
        rows.fill_(-1)
    factors = empty_huge((count, args.parts.maps.count, dim), dout.dtype) if args.factors else None
    weights = torch.zeros(count, dtype=dout.dtype) if args.weights else None
    _C.compose_gradient(
        table=matrix(table),
        num_rows=table.shape[0],
        dim=dim,
        bags=lists,
        parts=parts,
        dout=matrix(dout),
        rows=(rows.data_ptr(), 1, DTYPES[dtype]),
        elements=args.parts.block > 0 and not args.parts.whole_blocks,
        part_gradients=0 if factors is None else factors.data_ptr(),
        weight_gradients=vector(weights),
        num_threads=torch.get_num_threads(),
    )
    return rows, factors, weights
