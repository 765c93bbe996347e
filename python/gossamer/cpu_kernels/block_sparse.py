"""Launchers of the native products with block-sparse matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gossamer import _C
from gossamer._layout import merged, unit_stride
from gossamer.cpu_kernels._native import empty_huge, matrix, unit_rows, vector


def _lists(
    offsets: torch.Tensor,
    indices: torch.Tensor,
    order: torch.Tensor | None = None,
    live: torch.Tensor | None = None,
    live_across: torch.Tensor | None = None,
) -> tuple[int, int, int, int, int, int]:
    """``(offsets, indices, order, number of lists, live rows, live columns)``; contiguous int32."""
    orders, lives, across = (0 if t is None else t.data_ptr() for t in (order, live, live_across))
    return offsets.data_ptr(), indices.data_ptr(), orders, offsets.shape[0] - 1, lives, across


def _in_parts(operand: torch.Tensor, dim: int) -> tuple[tuple[int, int, int, int], int, int]:
    """``((pointer, row stride, column stride, dtype code), size, stride)`` of parts along dimension ``dim``."""
    if operand.dim() == 2:
        return matrix(operand), max(1, operand.shape[dim]), 0
    return matrix(operand[0]), max(1, operand.shape[dim + 1]), operand.stride(0)


def _contiguous(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else vector.contiguous()


def sdd(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    topology: Sequence[torch.Tensor],
    block: tuple[int, int],
    bias_rows: bool,
    activation: int,
    a_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """``act(a·b + bias)`` at the blocks of a topology.

    Args:
        a: ``(rows, K)`` float; ``(T, K)`` with ``a_rows``.
        b: ``(K, cols)``, or ``(G, K, cols/G)``, whole blocks each.
        bias: ``(cols,)``, ``(rows,)`` when ``bias_rows``, or None.
        topology: as ``gossamer.ops._block_sparse_operators.topology_tensors`` gives it.
        block: ``(bm, bn)``.
        bias_rows: whether the bias runs along rows.
        activation: code of a :class:`gossamer.Activation`, −1 for none.
        a_rows: ``(rows,)`` int32, the row of ``a`` for each row, zeros where it is none; None for ``a`` as it is.

    Returns:
        ``(nnz, bm, bn)``, zero from the last block on.
    """
    row_offsets, column_indices, row_indices, column_offsets, *_, live_rows = topology
    a, b, bias = unit_stride(a) if a_rows is None else unit_rows(a), unit_stride(merged(b, 1)), _contiguous(bias)
    a_rows = _contiguous(a_rows)
    values = empty_huge((column_indices.shape[0], *block), a.dtype)
    _C.sampled_product(
        _lists(row_offsets, column_indices, live=live_rows),
        row_indices.data_ptr(),
        column_indices.shape[0],
        *block,
        matrix(a),
        0 if a_rows is None else a_rows.data_ptr(),
        a.shape[0],
        _in_parts(b, 1),
        a.shape[1],
        (column_offsets.shape[0] - 1) * block[1],
        (vector(bias), bias_rows, activation),
        values.data_ptr(),
        torch.get_num_threads(),
    )
    return values


def dsd(
    values: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    topology: Sequence[torch.Tensor],
    transposed: bool,
    by_columns: bool,
    parts: int,
    activation: int,
) -> torch.Tensor:
    """``act(s·b + bias)`` for the block-sparse ``s`` or its transpose.

    Args:
        values: ``(nnz, bm, bn)`` float.
        b: ``(depth, N)``, or ``(G, depth/G, N)``, whole blocks each.
        bias: ``(N,)``, ``(rows,)`` when ``by_columns``, or None.
        topology: as ``gossamer.ops._block_sparse_operators.topology_tensors`` gives it.
        transposed: whether the left operand is the transpose of ``s``.
        by_columns: whether the result, or each part of it, is stored column after column.
        parts: of the result, whole blocks each; 0 for a plain matrix.
        activation: code of a :class:`gossamer.Activation`, −1 for none.

    Returns:
        ``(rows, N)``, or ``(parts, rows/parts, N)``.
    """
    row_offsets, column_indices, _, column_offsets, row_indices_t, order_t, *_, live_rows = topology
    values, b, bias = values.contiguous(), unit_stride(merged(b, 0)), _contiguous(bias)
    _, bm, bn = values.shape
    if transposed:
        lists = _lists(column_offsets, row_indices_t, order_t, live_across=live_rows)
    else:
        lists = _lists(row_offsets, column_indices, live=live_rows)
    blocks = (values.data_ptr(), bn, bm, 1, bn) if transposed else (values.data_ptr(), bm, bn, bn, 1)
    inner = (row_offsets if transposed else column_offsets).shape[0] - 1
    rows, n = lists[3] * blocks[1], b.shape[-1]
    lead, height = ((parts,), rows // parts) if parts else ((), rows)
    y = empty_huge((*lead, n, height) if by_columns else (*lead, height, n), b.dtype)
    _C.block_product(
        lists,
        blocks,
        _in_parts(b, 0),
        inner * blocks[2],
        n,
        (vector(bias), by_columns, activation),
        y.data_ptr(),
        by_columns,
        max(1, height),
        torch.get_num_threads(),
    )
    return y.mT if by_columns else y
