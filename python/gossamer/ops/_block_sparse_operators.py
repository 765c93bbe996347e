"""The two operators of :mod:`gossamer.ops.block_sparse`; the backward pass of each uses both."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import torch

from gossamer._layout import side_by_side, stored_by_columns
from gossamer._numerics import accumulation_dtype
from gossamer.ops._records import define
from gossamer.ops.block_topology import BlockTopology
from gossamer.ops.gather_reduce import sum_rows


class BlockLists(NamedTuple):
    """The block lists of a topology whose row-by-row list is in the order of the values; see BlockTopology."""

    row_offsets: torch.Tensor
    column_indices: torch.Tensor
    row_indices: torch.Tensor
    column_offsets: torch.Tensor
    row_indices_t: torch.Tensor
    order_t: torch.Tensor
    row_schedule: torch.Tensor
    column_schedule: torch.Tensor
    live_rows: torch.Tensor | None


class SampledProduct(NamedTuple):
    """Arguments of ``act(a·b + bias)`` at the blocks of a topology; entries after the last block are zero.

    Attributes:
        a: ``(rows, K)`` float; ``(T, K)`` with ``a_rows``.
        b: ``(K, cols)``, or G parts side by side, ``(G, K, cols/G)``, each of whole blocks.
        bias: ``(cols,)``, ``(rows,)`` when ``bias_rows``, or None.
        topology: where the blocks are.
        bm: rows of a block.
        bn: columns of a block.
        bias_rows: whether the bias runs along rows.
        activation: name of an ungated :class:`gossamer.Activation`, or None.
        a_rows: ``(rows,)`` int32, the row of ``a`` for each row of the result, zeros if it is out of range; None to use
            ``a`` unchanged. Only native kernels gather rows, and there is no gradient.
    """

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None
    topology: BlockLists
    bm: int
    bn: int
    bias_rows: bool = False
    activation: str | None = None
    a_rows: torch.Tensor | None = None


class BlockProduct(NamedTuple):
    """Arguments of ``act(s·b + bias)`` for a block-sparse ``s`` or its transpose.

    Attributes:
        values: ``(nnz, bm, bn)`` float.
        b: ``(depth, N)``, or G stacked parts, ``(G, depth/G, N)``, each of whole blocks.
        bias: ``(N,)``, ``(rows,)`` when ``by_columns``, or None.
        topology: where the blocks are.
        transposed: whether the left operand is the transpose of ``s``.
        by_columns: whether the result, or each part of it, is stored column after column.
        parts: number of parts of the result, ``(parts, rows/parts, N)``, each of whole blocks; 0 for a plain matrix
            ``(rows, N)``.
        activation: name of an ungated :class:`gossamer.Activation`, or None.
    """

    values: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None
    topology: BlockLists
    transposed: bool = False
    by_columns: bool = False
    parts: int = 0
    activation: str | None = None


def topology_lists(topology: BlockTopology) -> BlockLists:
    """The lists of a topology whose ``order`` is None."""
    t = topology
    rows, columns = (t.row_offsets, t.column_indices, t.row_indices), (t.column_offsets, t.row_indices_t, t.order_t)
    return BlockLists(*rows, *columns, t.row_schedule, t.column_schedule, t.live_rows)


@functools.cache
def _kernels(backend: str) -> ModuleType:
    if backend == "native":
        from gossamer.cpu_kernels import block_sparse
    else:
        from gossamer.triton_kernels import block_sparse
    return block_sparse


def _sdd_kernel(args: SampledProduct, backend: str) -> torch.Tensor:
    return _kernels(backend).sdd(args)


def _sdd_fake(args: SampledProduct) -> torch.Tensor:
    return args.a.new_empty(args.topology.column_indices.shape[0], args.bm, args.bn)


sdd_operator = define("block_sparse_sdd", SampledProduct, kernel=_sdd_kernel, fake=_sdd_fake, returns="Tensor")


def _dsd_kernel(args: BlockProduct, backend: str) -> torch.Tensor:
    return _kernels(backend).dsd(args)


def _dsd_fake(args: BlockProduct) -> torch.Tensor:
    topology, (_, bm, bn) = args.topology, args.values.shape
    offsets, height = (topology.column_offsets, bn) if args.transposed else (topology.row_offsets, bm)
    rows, n = (offsets.shape[0] - 1) * height, args.b.shape[-1]
    lead, rows = ((args.parts,), rows // args.parts) if args.parts else ((), rows)
    return args.b.new_empty(*lead, n, rows).mT if args.by_columns else args.b.new_empty(*lead, rows, n)


dsd_operator = define("block_sparse_dsd", BlockProduct, kernel=_dsd_kernel, fake=_dsd_fake, returns="Tensor")


def _no_gradient_through(activation: str | None) -> None:
    if activation is not None:
        raise RuntimeError("a product that applied its activation inside the kernel has no gradient")


def _parts(operand: torch.Tensor) -> int:
    return operand.shape[0] if operand.dim() == 3 else 0


def _sdd_save(ctx, args: SampledProduct, output: torch.Tensor):
    needs = ctx.needs
    if needs:
        _no_gradient_through(args.activation)
        if args.a_rows is not None:
            raise RuntimeError("a product that gathered its rows inside the kernel has no gradient")
    ctx.a_by_columns, ctx.b_by_columns = stored_by_columns(args.a), stored_by_columns(args.b)
    ctx.b_parts = _parts(args.b)
    a, b = args.a if "b" in needs else None, args.b if "a" in needs else None
    return (SampledProduct(a, b, None, args.topology, args.bm, args.bn, args.bias_rows),)


def _sum_blocks(values: torch.Tensor, topology: BlockLists, along_rows: bool, backend: str) -> torch.Tensor:
    """Sum a block-sparse matrix over its columns, or over its rows: within each block, then over each list."""
    sums = values.sum(2 if along_rows else 1, dtype=accumulation_dtype(values.dtype))
    if along_rows:
        order = torch.arange(topology.column_indices.shape[0], dtype=torch.int32, device=values.device)
        offsets = topology.row_offsets
    else:
        offsets, order = topology.column_offsets, topology.order_t
    return sum_rows(sums, order, offsets, values.dtype, backend).view(-1)


def _sdd_differentiate(ctx, args: SampledProduct, tensors, dvalues: torch.Tensor):
    found, topology = {}, args.topology
    if "a" in ctx.needs:
        product = BlockProduct(dvalues, args.b.mT, None, topology, by_columns=ctx.a_by_columns)
        found["a"] = dsd_operator(product, ctx.backend)
    if "b" in ctx.needs:
        product = BlockProduct(dvalues, args.a, None, topology, True, not ctx.b_by_columns, ctx.b_parts)
        found["b"] = dsd_operator(product, ctx.backend).mT
    if "bias" in ctx.needs:
        found["bias"] = _sum_blocks(dvalues, topology, args.bias_rows, ctx.backend)
    return found


sdd_operator.differentiate(_sdd_save, _sdd_differentiate)


def _dsd_save(ctx, args: BlockProduct, output: torch.Tensor):
    needs = ctx.needs
    if needs:
        _no_gradient_through(args.activation)
    ctx.block, ctx.b_by_columns, ctx.b_parts = args.values.shape[1:], stored_by_columns(args.b), _parts(args.b)
    values, b = args.values if "b" in needs else None, args.b if "values" in needs else None
    return (BlockProduct(values, b, None, args.topology, args.transposed, args.by_columns),)


def _dsd_differentiate(ctx, args: BlockProduct, tensors, dy: torch.Tensor):
    found, topology = {}, args.topology
    if dy.dim() == 3:
        dy = side_by_side(dy, 0)
    if "values" in ctx.needs:
        # The gradient of sᵀ is the transpose of the gradient of s, so its blocks are in the stored order.
        if args.transposed:
            operands = (side_by_side(args.b, 0) if ctx.b_parts else args.b, dy.t())
        else:
            operands = (dy, args.b.mT)
        found["values"] = sdd_operator(SampledProduct(*operands, None, topology, *ctx.block), ctx.backend)
    if "b" in ctx.needs:
        form = (not args.transposed, ctx.b_by_columns, ctx.b_parts)
        found["b"] = dsd_operator(BlockProduct(args.values, dy, None, topology, *form), ctx.backend)
    if "bias" in ctx.needs:
        found["bias"] = dy.sum(1 if args.by_columns else 0)
    return found


dsd_operator.differentiate(_dsd_save, _dsd_differentiate)
