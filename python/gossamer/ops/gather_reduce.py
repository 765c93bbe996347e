"""Sums, means and maxima of table rows over lists of ids: the combine of an expert layer, an embedding bag."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import torch

from gossamer import _backend
from gossamer._checks import check_float_dtype, check_tensor
from gossamer._numerics import accumulation_dtype
from gossamer._row_codes import CODE_DTYPES, decode
from gossamer.ops._bags import (
    Bags,
    apply_bounds,
    check_bags,
    check_offsets,
    check_values,
    check_weights_values,
    raises,
)
from gossamer.ops._groups import MAX_ROWS
from gossamer.ops._records import define
from gossamer.ops.dispatch import Dispatch, sort_ids


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


class GatherMax(NamedTuple):
    """Arguments of columnwise maxima: as in :class:`GatherReduce`, and whether to return the position of each
    maximum.
    """

    table: torch.Tensor
    bags: Bags
    out_dtype: torch.dtype
    need_argmax: bool


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


@functools.cache
def _max_kernels(backend: str) -> ModuleType:
    if backend == "native":
        return _kernels(backend)
    from gossamer.triton_kernels import gather_max

    return gather_max


def gather_reduce_reference(
    table: torch.Tensor, bags: Bags, out_dtype: torch.dtype | None = None, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """:func:`gather_reduce` in plain torch, differentiable, accumulated in float32 (float64 for float64).

    Ids outside the table contribute nothing.
    """
    out_dtype = out_dtype or table.dtype
    if bags.features.dim:
        tables = zip(bags.features.tables(table), bags.of_features(), strict=True)
        return torch.cat([gather_reduce_reference(part, own, out_dtype) for (_, part), own in tables], 1)
    numbers = bags.numbers()
    kept = bags.live(table.shape[0], numbers).nonzero().squeeze(1)
    bag = numbers[kept]
    accumulate = accumulation_dtype(table.dtype)
    rows = bags.index.reshape(-1)[kept].long()
    values = decode(table.index_select(0, rows), scale, rows, accumulate)
    if bags.mode == "max":
        return _max_by_bag(values, bag, bags.num_bags).to(out_dtype)
    if bags.weights is not None:
        values = values * bags.weights.reshape(-1)[kept].to(accumulate).unsqueeze(1)
    out = torch.zeros(bags.num_bags, table.shape[1], dtype=accumulate, device=table.device)
    out = out.index_add(0, bag, values)
    if bags.mode == "mean":
        out = out / _counts(bag, bags.num_bags, accumulate).unsqueeze(1)
    return out.to(out_dtype)


def _counts(bag: torch.Tensor, num_bags: int, dtype: torch.dtype) -> torch.Tensor:
    """The number of live ids of each bag, at least 1, so that empty bags divide zero by one."""
    counts = torch.zeros(num_bags, dtype=dtype, device=bag.device)
    return counts.index_add(0, bag, counts.new_ones(bag.shape)).clamp(min=1)


def _max_by_bag(values: torch.Tensor, bag: torch.Tensor, num_bags: int) -> torch.Tensor:
    """Columnwise maxima of each bag's values, taken at the first position of the maximum; zeros for empty bags."""
    position = _argmax_by_bag(values.detach(), bag, num_bags)
    # Bags without ids read an extra row of zeros, so that the result depends on the table for autograd even then.
    values = torch.cat([values, values.new_zeros(1, values.shape[1])])
    return values.gather(0, torch.where(position >= 0, position, values.shape[0] - 1))


def _argmax_by_bag(values: torch.Tensor, bag: torch.Tensor, num_bags: int) -> torch.Tensor:
    """For each bag and column the first row in ``values`` with the largest value, where NaN is the largest; or −1."""
    at = bag.unsqueeze(1).expand_as(values)
    nan = values.isnan()
    largest = values.new_full((num_bags, values.shape[1]), -torch.inf).scatter_reduce(0, at, values, "amax")
    best = torch.where(largest.gather(0, at).isnan(), nan, values == largest.gather(0, at))
    rows = torch.arange(values.shape[0], device=values.device).unsqueeze(1)
    none = values.shape[0]
    first = torch.full((num_bags, values.shape[1]), none, device=values.device)
    first = first.scatter_reduce(0, at, torch.where(best, rows, none), "amin")
    return torch.where(first < none, first, -1)


def gather_dot_reference(args: GatherDot) -> torch.Tensor:
    """``⟨dout[bag of p], table[index[p]]⟩``, over the bag's live ids for a mean, in plain torch, differentiable."""
    table, bags = args.table, args.bags
    if bags.features.dim:
        # Positions outside a feature's bags get zeros for that feature.
        return sum(
            gather_dot_reference(GatherDot(args.dout[:, f.column : f.column + f.dim], part, own, args.dtype))
            for (f, part), own in zip(bags.features.tables(table), bags.of_features(), strict=True)
        )
    wide = accumulation_dtype(table.dtype)
    flat = bags.index.reshape(-1).long()
    kept = bags.live(table.shape[0]).nonzero().squeeze(1)
    bag = bags.numbers()[kept]
    rows = decode(table[flat[kept]], args.scale, flat[kept], wide)
    dot = (args.dout[bag].to(wide) * rows).sum(1)
    if bags.mode == "mean":
        dot = dot / _counts(bag, bags.num_bags, wide)[bag]
    out = torch.zeros(flat.shape, dtype=args.dtype, device=table.device)
    return out.index_copy(0, kept, dot.to(args.dtype)).view(bags.index.shape)


def gather_max_reference(args: GatherMax) -> tuple[torch.Tensor, torch.Tensor]:
    """Columnwise maxima, and each one's position within its bag, int32, −1 in empty bags."""
    table, bags = args.table, args.bags
    out = gather_reduce_reference(table, bags, args.out_dtype)
    if not args.need_argmax:
        return out, torch.empty(0, out.shape[1], dtype=torch.int32, device=table.device)
    kept = bags.live(table.shape[0]).nonzero().squeeze(1)
    first = _argmax_by_bag(table[bags.index.reshape(-1)[kept].long()], bags.numbers()[kept], bags.num_bags)
    if kept.numel() == 0:
        return out, first.int()
    position = kept[first.clamp(min=0)] - bags.begins().unsqueeze(1)
    return out, torch.where(first >= 0, position, -1).int()


def _check(args: GatherReduce | GatherMax | GatherDot) -> None:
    """Check the values in the lists before the reference reads them."""
    if raises(args.bags.index, "reference"):
        check_values(args.bags, args.table.shape[0])


def forward(args: GatherReduce, backend: str) -> torch.Tensor:
    """Sums and means outside autograd."""
    if backend == "reference":
        _check(args)
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
        _check(args)
        return gather_dot_reference(args)
    return _kernels(backend).gather_dot(args)


def dot_fake(args: GatherDot) -> torch.Tensor:
    """An empty tensor of the shape that :func:`dot` returns."""
    return args.dout.new_empty(args.bags.index.shape, dtype=args.dtype)


# out[p] = <dout[bag of p], table[index[p]]>, over the bag's live ids for a mean; zero where the id is skipped.
gather_dot = define("gather_dot", GatherDot, kernel=dot, fake=dot_fake, returns="Tensor")


def forward_max(args: GatherMax, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima outside autograd."""
    if backend == "reference":
        _check(args)
        return gather_max_reference(args)
    return _max_kernels(backend).gather_max(args)


def forward_max_fake(args: GatherMax) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty tensors of the shapes that :func:`forward_max` returns."""
    out = args.table.new_empty(args.bags.result_shape(args.table), dtype=args.out_dtype)
    return out, out.new_empty(out.shape if args.need_argmax else (0, out.shape[1]), dtype=torch.int32)


# Columnwise maxima over the live ids of each bag, and where each was found first: its position within the bag, -1 in
# empty bags. NaN counts as the largest.
gather_max = define("gather_max", GatherMax, kernel=forward_max, fake=forward_max_fake, returns="(Tensor, Tensor)")


def transpose_bags(
    bags: Bags, num_rows: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The lists of :func:`gather_reduce` sorted by id, stably.

    Returns:
        The sorted ids with ``num_rows`` for those that contribute nothing, last; the bag of each; and its factor in
        ``dtype``: its weight, for a mean over its bag's live ids; None for ones.
    """
    numbers = bags.numbers()
    live = bags.live(num_rows, numbers)
    flat = bags.index.reshape(-1).long()
    ids, order = torch.sort(torch.where(live, flat, num_rows), stable=True)
    factor = None if bags.weights is None else bags.weights.reshape(-1)[order]
    bag = numbers[order]
    if bags.mode == "mean":
        slot = torch.where(live, numbers, bags.num_bags)
        counts = _counts(slot, bags.num_bags + 1, dtype)
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


def _save_max(ctx, args: GatherMax, output):
    ctx.set_materialize_grads(False)
    ctx.shape, ctx.dtype = args.table.shape, args.table.dtype
    ctx.mark_non_differentiable(output[1])
    return GatherMax(None, args.bags, args.out_dtype, args.need_argmax), output[1]


def _differentiate_max(ctx, args: GatherMax, tensors, dout: torch.Tensor | None, _):
    if dout is None:
        return {}
    if not args.need_argmax:
        raise RuntimeError("gather_max was called without need_argmax, but its gradient is wanted")
    (argmax,) = tensors
    num_rows, dim = ctx.shape
    wide = dout.to(accumulation_dtype(ctx.dtype))
    # Empty bags add their zeros to an extra row, which is dropped.
    rows = torch.where(argmax >= 0, _max_rows(argmax, args.bags), num_rows)
    at = rows * dim + torch.arange(dim, device=wide.device)
    dtable = wide.new_zeros((num_rows + 1) * dim)
    dtable = dtable.index_put((at.reshape(-1),), wide.reshape(-1), accumulate=True)
    return {"table": dtable.view(num_rows + 1, dim)[:num_rows].to(ctx.dtype)}


gather_max.differentiate(_save_max, _differentiate_max)


def _max_rows(argmax: torch.Tensor, bags: Bags) -> torch.Tensor:
    """The table row of each maximum in ``argmax (B, D)`` from gather_max; arbitrary where argmax is −1."""
    flat = bags.index.reshape(-1).long()
    if flat.numel() == 0:
        return torch.zeros_like(argmax, dtype=torch.int64)
    return flat[(bags.begins().unsqueeze(1) + argmax.clamp(min=0)).clamp(max=flat.numel() - 1)]


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
        _check(args)
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
        _check(args)
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


def gather_maxima(
    table: torch.Tensor, index: torch.Tensor, offsets: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`gather_reduce` with ``mode="max"`` and ``bounds="drop"`` outside autograd, and the positions of the
    maxima.

    Returns:
        ``(B, D)``, and the position of each maximum within its bag, ``(B, D)`` int32, -1 in empty bags.
    """
    backend = _backend.resolve("gather_reduce", table)
    bags = apply_bounds(Bags(index, offsets, mode="max", drop=True), table.shape[0], "drop", None, backend)
    return gather_max(GatherMax(table, bags, table.dtype, True), backend)
