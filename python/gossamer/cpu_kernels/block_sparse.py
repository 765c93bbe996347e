"""Launchers of the native products with block-sparse matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer import _C
from gossamer._layout import merged, unit_stride
from gossamer.cpu_kernels._native import empty_huge, matrix, pointer, unit_rows, vector

if TYPE_CHECKING:
    from gossamer.ops._block_sparse_operators import BlockProduct, SampledProduct


def _lists(
    offsets: torch.Tensor,
    indices: torch.Tensor,
    offsets_across: torch.Tensor,
    order: torch.Tensor | None = None,
    live: torch.Tensor | None = None,
    live_across: torch.Tensor | None = None,
) -> _C.BlockLists:
    """The lists of blocks that a product reads; contiguous int32."""
    return _C.BlockLists(
        offsets=offsets.data_ptr(),
        indices=indices.data_ptr(),
        order=pointer(order),
        count=offsets.shape[0] - 1,
        across=offsets_across.shape[0] - 1,
        nnz=indices.shape[0],
        live=pointer(live),
        live_across=pointer(live_across),
    )


def _in_parts(operand: torch.Tensor, dim: int) -> tuple[tuple[int, int, int, int], int, int]:
    """``((pointer, row stride, column stride, dtype code), size, stride)`` of parts along dimension ``dim``."""
    if operand.dim() == 2:
        return matrix(operand), max(1, operand.shape[dim]), 0
    return matrix(operand[0]), max(1, operand.shape[dim + 1]), operand.stride(0)


def _contiguous(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else vector.contiguous()


def sdd(args: SampledProduct) -> torch.Tensor:
    """``act(a·b + bias)`` at the blocks of a topology, ``(nnz, bm, bn)``; zero after the last block."""
    topology, a_rows, bias = args.topology, _contiguous(args.a_rows), _contiguous(args.bias)
    a = unit_stride(args.a) if a_rows is None else unit_rows(args.a)
    b = unit_stride(merged(args.b, 1))
    nnz = topology.column_indices.shape[0]
    values = empty_huge((nnz, args.bm, args.bn), a.dtype)
    product = _C.SampledProduct(
        lists=_lists(topology.row_offsets, topology.column_indices, topology.column_offsets, live=topology.live_rows),
        rows_of=topology.row_indices.data_ptr(),
        nnz=nnz,
        block=(args.bm, args.bn),
        a=matrix(a),
        a_rows=pointer(a_rows),
        num_a=a.shape[0],
        b=_in_parts(b, 1),
        depth=a.shape[1],
        cols=(topology.column_offsets.shape[0] - 1) * args.bn,
        bias=vector(bias),
        bias_by_rows=args.bias_rows,
        activation=args.activation,
        values=values.data_ptr(),
    )
    _C.sampled_product(product, torch.get_num_threads())
    return values


def dsd(args: BlockProduct) -> torch.Tensor:
    """``act(s·b + bias)`` for the block-sparse ``s`` or its transpose: ``(rows, N)``, or ``(parts, rows/parts, N)``."""
    topology, live = args.topology, args.topology.live_rows
    values, b, bias = args.values.contiguous(), unit_stride(merged(args.b, 0)), _contiguous(args.bias)
    _, bm, bn = values.shape
    offsets, offsets_across, strides = topology.row_offsets, topology.column_offsets, (bn, 1)
    if args.transposed:
        lists = _lists(offsets_across, topology.row_indices_t, offsets, topology.order_t, live_across=live)
        offsets, offsets_across, strides, bm, bn = offsets_across, offsets, (1, bn), bn, bm
    else:
        lists = _lists(offsets, topology.column_indices, offsets_across, live=live)
    rows, n = (offsets.shape[0] - 1) * bm, b.shape[-1]
    lead, height = ((args.parts,), rows // args.parts) if args.parts else ((), rows)
    y = empty_huge((*lead, n, height) if args.by_columns else (*lead, height, n), b.dtype)
    product = _C.BlockProduct(
        lists=lists,
        values=values.data_ptr(),
        block=(bm, bn),
        strides=strides,
        b=_in_parts(b, 0),
        depth=(offsets_across.shape[0] - 1) * bn,
        n=n,
        bias=vector(bias),
        bias_by_rows=args.by_columns,
        activation=args.activation,
        y=y.data_ptr(),
        y_by_columns=args.by_columns,
        y_part=max(1, height),
    )
    _C.block_product(product, torch.get_num_threads())
    return y.mT if args.by_columns else y
