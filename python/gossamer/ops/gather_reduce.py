"""Sums, means and maxima of table rows over lists of ids: the combine of an expert layer, an embedding bag."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import torch

from gossamer import _backend
from gossamer._checks import check_float_dtype, check_tensor
from gossamer._numerics import accumulation_dtype
from gossamer._row_codes import CODE_DTYPES
from gossamer.ops._bags import Bags, apply_bounds, check_bags, check_offsets, check_weights_values
from gossamer.ops._gather_reduce_reference import (
    check_lists,
    count_by_bag,
    gather_dot_reference,
    gather_reduce_reference,
)
from gossamer.ops._groups import MAX_ROWS
from gossamer.ops._records import define
from gossamer.ops.dispatch import Dispatch, sort_ids
from gossamer.ops.gather_max import GatherMax, gather_max


class GatherReduce(NamedTuple):
    """Arguments of sums and means of table rows over bags.

    Attributes:
        table: ``(N, D)`` float, or int8 or int16 with ``scale``; with features the flat storage of their tables.
        bags: the lists.
        out_dtype: of the result ``(B, D)``; with features ``(B, ΣD_f)``.
        sparse_grad: whether the table's gradient is sparse.
        scale: ``(N,)`` or ``(1,)`` float32 factors of rows of codes; or None.
    """

    table: torch.Tensor
    bags: Bags
    out_dtype: torch.dtype
    sparse_grad: bool = False
    scale: torch.Tensor | None = None


class GatherDot(NamedTuple):
    """Arguments of the products of rows with the table rows that their bags list: the gradient of weights.

    Attributes:
        dout: ``(B, D)`` float, such as the gradient of the result; with features ``(B, ΣD_f)``.
        table: as in :class:`GatherReduce`.
        bags: the lists, their weights left out.
        dtype: of the result, which is shaped like the ids.
        scale: as in :class:`GatherReduce`.
    """

    dout: torch.Tensor
    table: torch.Tensor
    bags: Bags
    dtype: torch.dtype
    scale: torch.Tensor | None = None


@functools.cache
def _kernels(backend: str) -> ModuleType:
    if backend == "native":
        from gossamer.cpu_kernels import gather_reduce
    else:
        from gossamer.triton_kernels import gather_reduce
    return gather_reduce


def forward(args: GatherReduce, backend: str) -> torch.Tensor:
    """Sums and means outside autograd."""
    if backend == "reference":
        check_lists(args)
        return gather_reduce_reference(args.table, args.bags, args.out_dtype, args.scale)
    return _kernels(backend).gather_reduce(args)


def forward_fake(args: GatherReduce) -> torch.Tensor:
    """An empty tensor of the shape that :func:`forward` returns."""
    return args.table.new_empty(args.bags.result_shape(args.table), dtype=args.out_dtype)


# out[b] = sum or mean over the live ids of bag b of weights · table[id].
_gather_reduce = define("gather_reduce", GatherReduce, kernel=forward, fake=forward_fake, returns="Tensor")


def dot(args: GatherDot, backend: str) -> torch.Tensor:
    """Products outside autograd."""
    if backend == "reference":
        check_lists(args)
        return gather_dot_reference(args)
    return _kernels(backend).gather_dot(args)


def dot_fake(args: GatherDot) -> torch.Tensor:
    """An empty tensor of the shape that :func:`dot` returns."""
    return args.dout.new_empty(args.bags.index.shape, dtype=args.dtype)


# out[p] = <dout[bag of p], table[index[p]]>, over the bag's live ids for a mean; zero where the id is skipped.
gather_dot = define("gather_dot", GatherDot, kernel=dot, fake=dot_fake, returns="Tensor")


def transpose_bags(
    bags: Bags, num_rows: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The lists of :func:`gather_reduce` sorted by id, stably.

    Returns:
        The sorted ids, where those that contribute nothing are ``num_rows`` and come last; the bag of each; and its
        factor in ``dtype``, which is its weight, for a mean divided by the number of its bag's live ids; None for ones.
    """
    numbers = bags.numbers()
    live = bags.live(num_rows, numbers)
    flat = bags.index.reshape(-1).long()
    ids, order = torch.sort(torch.where(live, flat, num_rows), stable=True)
    factor = None if bags.weights is None else bags.weights.reshape(-1)[order]
    bag = numbers[order]
    if bags.mode == "mean":
        slot = torch.where(live, numbers, bags.num_bags)
        counts = count_by_bag(slot, bags.num_bags + 1, dtype)
        factor = 1 / counts[bag] if factor is None else factor.to(dtype) / counts[bag]
    return ids, bag, factor


def table_gradient(
    bags: Bags, dout: torch.Tensor, shape: torch.Size, dtype: torch.dtype, backend: str, sparse: bool = False
) -> torch.Tensor:
    """The gradient of a table of ``shape`` and ``dtype`` that the bags reduced, from that of the result.

    Duplicates are summed in position order. It is dense, or a coalesced sparse COO tensor.
    """
    wide = accumulation_dtype(dtype)
    # Kernels accumulate in float64 only for float64 inputs.
    dout = dout.to(wide) if wide == torch.float64 else dout
    if bags.features.dim:
        total = torch.zeros(shape, dtype=wide, device=dout.device)
        for (feature, part), own in zip(bags.features.tables(total), bags.of_features(), strict=True):
            columns = dout[:, feature.column : feature.column + feature.dim]
            part += _sum_sorted(columns, transpose_bags(own, feature.rows, wide), feature.rows, wide, backend)
        return total.to(dtype)
    if not sparse and _counts_ids(bags, shape[0], backend):
        return _sum_counted(dout, bags, shape[0], dtype, backend)
    ids, bag, factor = transposed = transpose_bags(bags, shape[0], wide)
    if not sparse:
        return _sum_sorted(dout, transposed, shape[0], dtype, backend)
    rows, counts = torch.unique_consecutive(ids[ids < shape[0]], return_counts=True)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    values = _gather_reduce(GatherReduce(dout, Bags(bag, offsets, factor, _every_row(dout, factor)), dtype), backend)
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0), values, (shape[0], values.shape[1]), is_coalesced=True, check_invariants=False
    )


def _sum_sorted(dout, transposed, num_rows: int, dtype: torch.dtype, backend: str) -> torch.Tensor:
    """The gradient ``(num_rows, D)`` of a table from the result of :func:`transpose_bags`: each row's sum in order."""
    ids, bag, factor = transposed
    offsets = torch.searchsorted(ids, torch.arange(num_rows + 1, device=ids.device))
    return _gather_reduce(GatherReduce(dout, Bags(bag, offsets, factor, _every_row(dout, factor)), dtype), backend)


def _counts_ids(bags: Bags, num_rows: int, backend: str) -> bool:
    """Whether a counting sort by id can be used: on the CPU it takes a fraction of the time of torch's sort."""
    return (
        backend == "native"
        and bags.offsets is None
        and bags.mode == "sum"
        and 0 < num_rows <= MAX_ROWS
        and 0 < bags.index.numel() <= MAX_ROWS
    )


def _sum_counted(dout: torch.Tensor, bags: Bags, num_rows: int, dtype: torch.dtype, backend: str) -> torch.Tensor:
    """:func:`_sum_sorted` for sums over bags of one size, by a counting sort."""
    index, length = bags.index, bags.index.shape[1]
    if bags.drop or bags.limit is not None or bags.padding_idx >= 0:
        index = torch.where(bags.live(num_rows).view(index.shape), index, num_rows)
    positions, offsets = sort_ids(index, num_rows, backend)
    bag = positions.div(length, rounding_mode="floor") if length > 1 else positions
    factor = None if bags.weights is None else bags.weights.reshape(-1).index_select(0, positions)
    # Positions from the last offset on contribute nothing and are in no bag.
    return _gather_reduce(GatherReduce(dout, Bags(bag, offsets, factor, _every_row(dout, factor)), dtype), backend)


def _every_row(table: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor | None:
    """A limit that excludes no row, if there are weights: only bags with a limit may have NaN weights."""
    return None if weights is None else torch.full((1,), table.shape[0], device=table.device)


def _save(ctx, args: GatherReduce, output: torch.Tensor):
    ctx.shape, ctx.dtype = args.table.shape, args.table.dtype
    if "bags.weights" in ctx.needs:
        return (args,)
    return (GatherReduce(None, args.bags, args.out_dtype, args.sparse_grad),)


def _differentiate(ctx, args: GatherReduce, tensors, dout: torch.Tensor):
    gradients, bags = {}, args.bags
    if "table" in ctx.needs:
        gradients["table"] = table_gradient(bags, dout, ctx.shape, ctx.dtype, ctx.backend, args.sparse_grad)
    if "bags.weights" in ctx.needs:
        dot = GatherDot(dout, args.table, bags._replace(weights=None), bags.weights.dtype, args.scale)
        gradients["bags.weights"] = gather_dot(dot, ctx.backend)
    return gradients


_gather_reduce.differentiate(_save, _differentiate)


def _save_dot(ctx, args: GatherDot, output: torch.Tensor):
    ctx.shape, ctx.table_dtype, ctx.dtype = args.table.shape, args.table.dtype, args.dout.dtype
    dout = args.dout if "table" in ctx.needs else None
    return (args._replace(dout=dout, table=args.table if "dout" in ctx.needs else None),)


def _differentiate_dot(ctx, args: GatherDot, tensors, dweights: torch.Tensor):
    gradients = {}
    if "dout" in ctx.needs:
        gradients["dout"] = reduce_by_gradient(args.table, args.bags, dweights, ctx.dtype, ctx.backend, args.scale)
    if "table" in ctx.needs:
        weighted = args.bags._replace(weights=dweights)
        gradients["table"] = table_gradient(weighted, args.dout, ctx.shape, ctx.table_dtype, ctx.backend)
    return gradients


gather_dot.differentiate(_save_dot, _differentiate_dot)


def reduce_by_gradient(
    table: torch.Tensor,
    bags: Bags,
    weights: torch.Tensor,
    out_dtype: torch.dtype,
    backend: str,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sums or means of table rows over bags, weighted by a gradient, which may hold NaN."""
    limit = _every_row(table, weights) if bags.limit is None else bags.limit
    bags = bags._replace(weights=weights, limit=limit)
    return _gather_reduce(GatherReduce(table, bags, out_dtype, scale=scale), backend)


def sum_slots(
    table: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    top_k: int,
    weights: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """Sum the expert-sorted ``table (R, D)`` back to tokens ``(T, D)``: slot ``(t, k)`` reads row ``rows[t·K + k]``.

    ``rows`` and ``offsets`` are a :class:`Dispatch`'s; dropped rows are never read.
    """
    # Rows of dropped slots may be outside the table.
    bags = Bags(rows.view(-1, top_k), weights=weights, limit=offsets[-1:], drop=True)
    return _gather_reduce(GatherReduce(table, bags, table.dtype), backend)


def combine_slots(table: torch.Tensor, dispatch: Dispatch, weights: torch.Tensor) -> torch.Tensor:
    """Sum the expert-sorted ``table (R, D)`` into rows of slots: ``y[t] = Σ_k weights[t,k]·table[row of slot (t,k)]``.

    ``weights (T', K')`` may divide the R slots of ``dispatch`` differently from its T and K. Dropped slots add nothing.
    """
    backend = _backend.resolve("gather_reduce", table)
    top_k = weights.shape[1]
    if backend == "reference":
        limit = dispatch.offsets[-1:]
        return gather_reduce_reference(table, Bags(dispatch.rows.view(-1, top_k), weights=weights, limit=limit))
    return sum_slots(table, dispatch.rows, dispatch.offsets, top_k, weights, backend)


def sum_rows(
    table: torch.Tensor, index: torch.Tensor, offsets: torch.Tensor, out_dtype: torch.dtype, backend: str
) -> torch.Tensor:
    """Sums of the rows ``index`` of ``table (N, D)`` over the lists given by ``offsets``, as in
    :func:`gather_reduce`.
    """
    return _gather_reduce(GatherReduce(table, Bags(index, offsets), out_dtype), backend)


def gather_reduce(
    table: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    *,
    mode: str = "sum",
    padding_idx: int | None = None,
    include_last_offset: bool = True,
    bounds: str = "raise",
    bounds_count: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    sparse_grad: bool = False,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reduce rows of a table over lists of ids: ``y[b] = Σ_j weights[b,j] · table[index[b,j]]``.

    A mean divides that sum by the number of ids in the bag that contribute, weighted or not; its gradients are exactly
    those of this formula. A maximum is taken column by column, where NaN counts as the largest, and its gradient goes
    to the first id of the bag that attains it.

    Args:
        table: ``(N, D)`` float; or int8 or int16 codes, which are multiplied by ``scale`` as they are read.
        index: ``(B, J)`` int32 or int64, J ids per bag; ``(L,)`` with ``offsets``; or ``(L,)`` without, where each id
            is its own bag.
        offsets: ``(B+1,)`` int32 or int64, ascending: bag ``b`` holds ``index[offsets[b]:offsets[b+1]]``. With
            ``include_last_offset=False`` it is ``(B,)``, as in ``torch.nn.functional.embedding_bag``. None for
            ``(B, J)``.
        weights: like ``index``, float, or None for ones; any floating dtype. Not with ``mode="max"``.
        mode: ``"sum"``, ``"mean"`` or ``"max"``.
        padding_idx: an id that contributes nothing, does not count in a mean, and gets no gradient; a negative value
            counts from the end.
        include_last_offset: whether ``offsets`` ends with L.
        bounds: treatment of ids outside ``[0, N)``. ``"raise"``: an error on the CPU; on CUDA, where raising would
            stall the stream, they contribute nothing. ``"clamp"``: they are read as 0 or N−1, and trained as such.
            ``"drop"``: they contribute nothing, like ``padding_idx``. ``"clamp"`` and ``"drop"`` also bring offsets
            into ``[0, L]`` and make them ascend.
        bounds_count: a one-element int64 tensor on the table's device, to which the number of out-of-bounds ids and
            corrected offsets is added if no error is raised.
        out_dtype: dtype of the result; by default the table's, or float32 for codes. Sums are rounded to it once.
        sparse_grad: return the table's gradient as a coalesced sparse COO tensor. Its size depends on the ids, so the
            backward pass waits for the device, and cannot be compiled or captured. Not with ``mode="max"``.
        scale: ``(N,)`` or ``(1,)`` float32: row i stands for ``scale[i]·table[i]``. Not with ``mode="max"``.

    Returns:
        ``(B, D)``, accumulated in float32 (float64 for float64); empty bags are zero. Differentiable in ``table``
        (duplicates summed in position order) if it is floating, and in ``weights``.

    Raises:
        TypeError: an argument is not a tensor, or a dtype is not supported.
        ValueError: ranks, sizes, devices, modes or offsets do not fit; on the CPU, a weight that counts is NaN.
        IndexError: on the CPU, an id outside ``[0, N)`` with ``bounds="raise"``.
    """
    check_tensor("table", table)
    backend = _backend.resolve("gather_reduce", table)
    lists, how = (index, offsets, weights), (mode, padding_idx, include_last_offset, bounds, bounds_count)
    bags = check_bags(table, *lists, backend, *how, scale)
    out_dtype = checked_out_dtype(out_dtype, table, backend)
    if sparse_grad and mode == "max":
        raise ValueError("sparse_grad cannot be given with mode='max'")
    bags = apply_bounds(bags, table.shape[0], bounds, bounds_count, backend)
    return reduce_bags(table, bags, out_dtype, backend, sparse_grad, scale)


def dot_bags(table: torch.Tensor, bags: Bags, x: torch.Tensor, dtype: torch.dtype, backend: str) -> torch.Tensor:
    """:func:`gossamer.gather_dot` of checked arguments, differentiable."""
    args = GatherDot(x, table, bags, dtype)
    if backend == "reference":
        check_lists(args)
        return gather_dot_reference(args)
    return gather_dot(args, backend)


def reduce_bags(
    table: torch.Tensor,
    bags: Bags,
    out_dtype: torch.dtype,
    backend: str,
    sparse_grad: bool = False,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`gather_reduce` of checked arguments, differentiable."""
    args = GatherReduce(table, bags, out_dtype, sparse_grad, scale)
    if backend == "reference" and not sparse_grad:
        check_lists(args)
        return gather_reduce_reference(table, bags, out_dtype, scale)
    if bags.mode == "max":
        need_argmax = table.requires_grad and torch.is_grad_enabled()
        return gather_max(GatherMax(table, bags, out_dtype, need_argmax), backend)[0]
    return _gather_reduce(args, backend)


def checked_out_dtype(out_dtype: torch.dtype | None, table: torch.Tensor, backend: str) -> torch.dtype:
    """``out_dtype``, or the table's, float32 for codes, if None; the backend must support it."""
    if out_dtype is None:
        return torch.float32 if table.dtype in CODE_DTYPES else table.dtype
    if out_dtype == table.dtype and table.is_floating_point():
        return out_dtype
    if not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"out_dtype must be a torch.dtype, got {type(out_dtype).__name__}")
    check_float_dtype("out_dtype", out_dtype, table.device, backend)
    return out_dtype


def check_lookup(
    table: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    mode: str,
    name: str = "index",
) -> None:
    """Raise the errors of :func:`gather_reduce` with ``bounds="drop"``, for callers that change a table before reading
    it.

    ``name`` is what the caller's argument ``index`` is called.
    """
    backend = _backend.resolve("gather_reduce", table)
    check_bags(table, index, offsets, weights, backend, mode=mode, name=name)
    if index.device.type != "cpu":
        return
    if offsets is not None:
        check_offsets(index, offsets)
    if weights is not None:
        check_weights_values(weights, torch.ones((), dtype=torch.bool, device="cpu"))
