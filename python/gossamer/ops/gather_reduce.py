"""Sums, means and maxima of table rows over lists of ids: the combine of an expert layer, an embedding bag."""

from __future__ import annotations

import torch

from gossamer import _backend
from gossamer._checks import check_float, check_tensor
from gossamer._numerics import accumulation_dtype
from gossamer.ops._bags import (
    apply_bounds,
    bag_begins,
    bags_of,
    check_bags,
    check_bounds,
    check_ids,
    check_offsets,
    check_weights_values,
    live_ids,
    num_bags_of,
    raises,
)
from gossamer.ops._registration import register, register_autograd
from gossamer.ops.dispatch import Dispatch


def gather_reduce_reference(
    table: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    *,
    mode: str = "sum",
    limit: torch.Tensor | None = None,
    padding_idx: int = -1,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """:func:`gather_reduce` in plain torch, differentiable, accumulated in float32 (float64 for float64).

    ``index`` is ``(B, J)`` or has ``offsets``, which must have their last element here; ``padding_idx`` −1 stands for
    none, and ids outside the table or from ``limit`` on, a one-element tensor, contribute nothing.
    """
    flat = index.reshape(-1).long()
    num_bags = num_bags_of(index, offsets)
    bag = bags_of(index, offsets)
    live = live_ids(flat, table.shape[0], limit, padding_idx) & (bag < num_bags)
    kept = live.nonzero().squeeze(1)
    accumulate = accumulation_dtype(table.dtype)
    values = table.index_select(0, flat[kept]).to(accumulate)
    out_dtype = out_dtype or table.dtype
    if mode == "max":
        return _max_by_bag(values, bag[kept], num_bags).to(out_dtype)
    if weights is not None:
        values = values * weights.reshape(-1)[kept].to(accumulate).unsqueeze(1)
    out = torch.zeros(num_bags, table.shape[1], dtype=accumulate, device=table.device)
    out = out.index_add(0, bag[kept], values)
    if mode == "mean":
        out = out / _counts(bag[kept], num_bags, accumulate).unsqueeze(1)
    return out.to(out_dtype)


def _counts(bag: torch.Tensor, num_bags: int, dtype: torch.dtype) -> torch.Tensor:
    """Live ids of each bag, at least 1, so that empty bags divide zeros."""
    counts = torch.zeros(num_bags, dtype=dtype, device=bag.device)
    return counts.index_add(0, bag, counts.new_ones(bag.shape)).clamp(min=1)


def _max_by_bag(values: torch.Tensor, bag: torch.Tensor, num_bags: int) -> torch.Tensor:
    """Columnwise maxima of the values of each bag: those of the first position that has them, zeros for empty bags."""
    position = _argmax_by_bag(values.detach(), bag, num_bags)
    # A row more, of zeros, for where no id contributes: a result of the table for autograd even then.
    values = torch.cat([values, values.new_zeros(1, values.shape[1])])
    return values.gather(0, torch.where(position >= 0, position, values.shape[0] - 1))


def _argmax_by_bag(values: torch.Tensor, bag: torch.Tensor, num_bags: int) -> torch.Tensor:
    """For each bag and column the first of its rows in ``values`` with the largest value, NaN above all, or −1."""
    at = bag.unsqueeze(1).expand_as(values)
    nan = values.isnan()
    largest = values.new_full((num_bags, values.shape[1]), -torch.inf).scatter_reduce(0, at, values, "amax")
    best = torch.where(largest.gather(0, at).isnan(), nan, values == largest.gather(0, at))
    rows = torch.arange(values.shape[0], device=values.device).unsqueeze(1)
    none = values.shape[0]
    first = torch.full((num_bags, values.shape[1]), none, device=values.device)
    first = first.scatter_reduce(0, at, torch.where(best, rows, none), "amin")
    return torch.where(first < none, first, -1)


def gather_dot_reference(dout, table, index, offsets, limit, padding_idx, mean, dtype):
    """The gradient of weights: ``⟨dout[bag of p], table[index[p]]⟩``, over the bag's live ids for a mean."""
    wide = accumulation_dtype(table.dtype)
    flat = index.reshape(-1).long()
    num_bags = num_bags_of(index, offsets)
    bag = bags_of(index, offsets)
    kept = (live_ids(flat, table.shape[0], limit, padding_idx) & (bag < num_bags)).nonzero().squeeze(1)
    bag = bag[kept]
    dot = (dout[bag].to(wide) * table[flat[kept]].to(wide)).sum(1)
    if mean:
        dot = dot / _counts(bag, num_bags, wide)[bag]
    return (
        torch.zeros(flat.shape, dtype=dtype, device=table.device).index_copy(0, kept, dot.to(dtype)).view(index.shape)
    )


def gather_max_reference(table, index, offsets, padding_idx, need_argmax, out_dtype):
    """Columnwise maxima, and each one's position within its bag, int32, −1 in empty bags."""
    out = gather_reduce_reference(table, index, offsets, mode="max", padding_idx=padding_idx, out_dtype=out_dtype)
    if not need_argmax:
        return out, torch.empty(0, out.shape[1], dtype=torch.int32, device=table.device)
    flat = index.reshape(-1).long()
    num_bags = num_bags_of(index, offsets)
    bag = bags_of(index, offsets)
    kept = (live_ids(flat, table.shape[0], None, padding_idx) & (bag < num_bags)).nonzero().squeeze(1)
    first = _argmax_by_bag(table[flat[kept]], bag[kept], num_bags)
    if kept.numel() == 0:
        return out, first.int()
    position = kept[first.clamp(min=0)] - bag_begins(index, offsets).unsqueeze(1)
    return out, torch.where(first >= 0, position, -1).int()


def _forward(
    table,
    index,
    offsets,
    weights,
    limit,
    padding_idx,
    backend,
    mean=False,
    drop=False,
    sparse_grad=False,
    out_dtype=None,
):
    if backend == "reference":
        mode = "mean" if mean else "sum"
        lists = (index, offsets, weights)
        if raises(index, backend):
            check_values(*lists, table.shape[0], padding_idx, drop)
        return gather_reduce_reference(
            table, *lists, mode=mode, limit=limit, padding_idx=padding_idx, out_dtype=out_dtype
        )
    launcher = _backend.kernels(backend, "gather_reduce").gather_reduce
    return launcher(table, index, offsets, weights, limit, padding_idx, mean, drop, out_dtype)


def _forward_fake(
    table,
    index,
    offsets,
    weights,
    limit,
    padding_idx,
    backend,
    mean=False,
    drop=False,
    sparse_grad=False,
    out_dtype=None,
):
    return table.new_empty(num_bags_of(index, offsets), table.shape[1], dtype=out_dtype or table.dtype)


_PLAIN_SUM = (False, False, False)  # no mean, no bounds mode, no sparse gradient

# out[b] = sum or mean over the live ids of bag b of weights · table[id]. Ids from limit on are skipped; ids outside the
# table raise on the CPU unless `drop`, and are skipped elsewhere.
_gather_reduce = register(
    "gather_reduce(Tensor table, Tensor index, Tensor? offsets, Tensor? weights, Tensor? limit, int padding_idx, "
    "str backend, bool mean=False, bool drop=False, bool sparse_grad=False, ScalarType? out_dtype=None) -> Tensor",
    _forward,
    _forward_fake,
)


def _dot(dout, table, index, offsets, limit, padding_idx, dtype, backend, mean=False, drop=False):
    if backend == "reference":
        return gather_dot_reference(dout, table, index, offsets, limit, padding_idx, mean, dtype)
    launcher = _backend.kernels(backend, "gather_reduce").gather_dot
    return launcher(dout, table, index, offsets, limit, padding_idx, dtype, mean, drop)


def _dot_fake(dout, table, index, offsets, limit, padding_idx, dtype, backend, mean=False, drop=False):
    return dout.new_empty(index.shape, dtype=dtype)


# The gradient of weights: out[p] = <dout[bag of p], table[index[p]]>, over the bag's live ids for a mean; zero where
# the id is skipped.
_gather_dot = register(
    "gather_dot(Tensor dout, Tensor table, Tensor index, Tensor? offsets, Tensor? limit, int padding_idx, "
    "ScalarType dtype, str backend, bool mean=False, bool drop=False) -> Tensor",
    _dot,
    _dot_fake,
)


def _max(table, index, offsets, padding_idx, drop, need_argmax, out_dtype, backend):
    if backend == "reference":
        if raises(index, backend):
            check_values(index, offsets, None, table.shape[0], padding_idx, drop)
        return gather_max_reference(table, index, offsets, padding_idx, need_argmax, out_dtype)
    launcher = _backend.kernels(backend, "gather_max" if backend == "triton" else "gather_reduce").gather_max
    return launcher(table, index, offsets, padding_idx, drop, need_argmax, out_dtype)


def _max_fake(table, index, offsets, padding_idx, drop, need_argmax, out_dtype, backend):
    out = table.new_empty(num_bags_of(index, offsets), table.shape[1], dtype=out_dtype)
    return out, out.new_empty(out.shape if need_argmax else (0, out.shape[1]), dtype=torch.int32)


# Columnwise maxima over the live ids of each bag, and where each was found first: its position within the bag, -1 in
# empty bags. NaN counts as the largest.
_gather_max = register(
    "gather_max(Tensor table, Tensor index, Tensor? offsets, int padding_idx, bool drop, bool need_argmax, "
    "ScalarType out_dtype, str backend) -> (Tensor, Tensor)",
    _max,
    _max_fake,
)


def transpose_bags(index, offsets, weights, limit, padding_idx, mean, num_rows, dtype):
    """The lists of :func:`gather_reduce` sorted by id, stably.

    Returns:
        The sorted ids with ``num_rows`` for those that contribute nothing, last; the bag of each; and its factor in
        ``dtype``: its weight, for a mean over its bag's live ids; None for ones.
    """
    flat = index.reshape(-1).long()
    num_bags = num_bags_of(index, offsets)
    bag = bags_of(index, offsets)
    live = live_ids(flat, num_rows, limit, padding_idx) & (bag < num_bags)
    ids, order = torch.sort(torch.where(live, flat, num_rows), stable=True)
    factor = None if weights is None else weights.reshape(-1)[order]
    bags = bag[order]
    if mean:
        slot = torch.where(live, bag, num_bags)
        counts = _counts(slot, num_bags + 1, dtype)
        factor = 1 / counts[bags] if factor is None else factor.to(dtype) / counts[bags]
    return ids, bags, factor


def sum_sorted(dout, ids, bags, factor, num_rows, out_dtype, backend):
    """The gradient ``(num_rows, D)`` of a table from what :func:`transpose_bags` gives: each row's sum in order."""
    row_offsets = torch.searchsorted(ids, torch.arange(num_rows + 1, device=ids.device))
    return _gather_reduce(dout, bags, row_offsets, factor, None, -1, backend, *_PLAIN_SUM, out_dtype)


def summed_in(dtype: torch.dtype, dout: torch.Tensor) -> torch.Tensor:
    """A result's gradient as kernels sum it in ``dtype``: what they sum says in which, float64 or else float32."""
    return dout.to(dtype) if dtype == torch.float64 else dout


def _table_gradient(ctx, dout, index, offsets, weights, limit):
    dtype = accumulation_dtype(ctx.table_dtype)
    dout = summed_in(dtype, dout)
    ids, bags, factor = transpose_bags(index, offsets, weights, limit, ctx.padding_idx, ctx.mean, ctx.num_rows, dtype)
    out_dtype = None if dout.dtype == ctx.table_dtype else ctx.table_dtype
    if not ctx.sparse_grad:
        return sum_sorted(dout, ids, bags, factor, ctx.num_rows, out_dtype, ctx.backend)
    rows, counts = torch.unique_consecutive(ids[ids < ctx.num_rows], return_counts=True)
    row_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    values = _gather_reduce(dout, bags, row_offsets, factor, None, -1, ctx.backend, *_PLAIN_SUM, out_dtype)
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0), values, (ctx.num_rows, values.shape[1]), is_coalesced=True, check_invariants=False
    )


def _setup_context(ctx, inputs, output):
    table, index, offsets, weights, limit, ctx.padding_idx, ctx.backend, ctx.mean, ctx.drop, ctx.sparse_grad, _ = inputs
    needs_weights = weights is not None and ctx.needs_input_grad[3]
    ctx.num_rows, ctx.table_dtype = table.shape[0], table.dtype
    ctx.weights_dtype = None if weights is None else weights.dtype
    ctx.save_for_backward(table if needs_weights else None, index, offsets, weights, limit)


def _backward(ctx, dout):
    table, index, offsets, weights, limit = ctx.saved_tensors
    dtable = dweights = None
    if ctx.needs_input_grad[0]:
        dtable = _table_gradient(ctx, dout, index, offsets, weights, limit)
    if weights is not None and ctx.needs_input_grad[3]:
        dweights = _gather_dot(
            dout, table, index, offsets, limit, ctx.padding_idx, ctx.weights_dtype, ctx.backend, ctx.mean, ctx.drop
        )
    return dtable, None, None, dweights, None, None, None, None, None, None, None


register_autograd("gather_reduce", _backward, _setup_context)


def _max_setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    table, index, offsets = inputs[:3]
    ctx.num_rows, ctx.table_dtype = table.shape[0], table.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(index, offsets, output[1])


def _max_backward(ctx, dout, _):
    if dout is None:
        return (None,) * 8
    index, offsets, argmax = ctx.saved_tensors
    if argmax.shape[0] != dout.shape[0]:
        raise RuntimeError("gather_max was called without need_argmax, but its gradient is wanted")
    wide = dout.to(accumulation_dtype(ctx.table_dtype))
    dim = wide.shape[1]
    found = argmax >= 0
    rows = max_rows(argmax, index, offsets)
    # Empty bags add their zeros to a row of their own, which is cut off.
    at = torch.where(found, rows, ctx.num_rows) * dim + torch.arange(dim, device=wide.device)
    dtable = wide.new_zeros((ctx.num_rows + 1) * dim)
    dtable = dtable.index_put((at.reshape(-1),), wide.reshape(-1), accumulate=True)
    return dtable.view(ctx.num_rows + 1, dim)[: ctx.num_rows].to(ctx.table_dtype), *(None,) * 7


register_autograd("gather_max", _max_backward, _max_setup_context)


def max_rows(argmax: torch.Tensor, index: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """The table row behind each maximum of ``argmax (B, D)``, as gather_max gives it; anything where it is −1."""
    flat = index.reshape(-1).long()
    if flat.numel() == 0:
        return torch.zeros_like(argmax, dtype=torch.int64)
    return flat[(bag_begins(index, offsets).unsqueeze(1) + argmax.clamp(min=0)).clamp(max=flat.numel() - 1)]


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
    index = rows.view(-1, top_k)
    # Dropped slots have rows beyond the table where that has none for them.
    return _gather_reduce(table, index, None, weights, offsets[-1:], -1, backend, drop=True)


def combine_slots(table: torch.Tensor, dispatch: Dispatch, weights: torch.Tensor) -> torch.Tensor:
    """Sum the expert-sorted ``table (R, D)`` into rows of slots: ``y[t] = Σ_k weights[t,k]·table[row of slot (t,k)]``.

    ``weights (T', K')`` may cut the R slots of ``dispatch`` otherwise than its T and K do. Dropped slots add nothing.
    """
    backend = _backend.resolve("gather_reduce", table)
    top_k = weights.shape[1]
    if backend == "reference":
        index = dispatch.rows.view(-1, top_k)
        return gather_reduce_reference(table, index, weights=weights, limit=dispatch.offsets[-1:])
    return sum_slots(table, dispatch.rows, dispatch.offsets, top_k, weights, backend)


def sum_rows(
    table: torch.Tensor, index: torch.Tensor, offsets: torch.Tensor, out_dtype: torch.dtype, backend: str
) -> torch.Tensor:
    """Sums of the rows ``index`` of ``table (N, D)`` over the lists behind ``offsets``, as :func:`gather_reduce`'s."""
    return _gather_reduce(table, index, offsets, None, None, -1, backend, *_PLAIN_SUM, out_dtype)


def check_values(
    index: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    num_rows: int,
    padding_idx: int,
    drop: bool,
) -> None:
    """What the native kernels check of the values in the lists, for the reference on the CPU."""
    if offsets is not None:
        check_offsets(index, offsets)
    inside = bags_of(index, offsets) < num_bags_of(index, offsets)
    if not drop:
        check_ids(index, inside, num_rows)
    if weights is not None:
        check_weights_values(weights, inside & live_ids(index.reshape(-1), num_rows, None, padding_idx))


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
) -> torch.Tensor:
    """Reduce rows of a table over lists of ids: ``y[b] = Σ_j weights[b,j] · table[index[b,j]]``.

    A mean divides that sum by the number of ids in the bag that contribute, weighted or not; its gradients are exactly
    those of this formula. A maximum is taken column by column, NaN counting as the largest, and its gradient goes to
    the first id of the bag that has it.

    Args:
        table: ``(N, D)`` float.
        index: ``(B, J)`` int32 or int64, J ids a bag; ``(L,)`` with ``offsets``; or ``(L,)`` without, each id a bag of
            its own.
        offsets: ``(B+1,)`` int32 or int64, ascending: bag ``b`` holds ``index[offsets[b]:offsets[b+1]]``. With
            ``include_last_offset=False`` it is ``(B,)``, as in ``torch.nn.functional.embedding_bag``. None for
            ``(B, J)``.
        weights: like ``index``, float, or None for ones; any floating dtype. Not with ``mode="max"``.
        mode: ``"sum"``, ``"mean"`` or ``"max"``.
        padding_idx: an id that contributes nothing, is not counted by a mean, and gets no gradient; negative counts
            from the end.
        include_last_offset: whether ``offsets`` ends with L.
        bounds: what becomes of ids outside ``[0, N)``. ``"raise"``: an error on the CPU; on CUDA, where raising would
            stall the stream, they contribute nothing. ``"clamp"``: they are read as 0 or N−1, and trained as such.
            ``"drop"``: they contribute nothing, like ``padding_idx``. With the last two, offsets are brought into
            ``[0, L]`` and made to ascend.
        bounds_count: a one-element int64 tensor on the table's device, to which the number of ids out of bounds and of
            offsets repaired is added wherever nothing is raised.
        out_dtype: of the result; the table's by default. Sums are rounded to it once.
        sparse_grad: give the table's gradient as a coalesced sparse COO tensor. Its size depends on the ids, so the
            backward pass waits for the device, and cannot be compiled or captured. Not with ``mode="max"``.

    Returns:
        ``(B, D)``, accumulated in float32 (float64 for float64); empty bags are zero. Differentiable in ``table``
        (duplicates summed in position order) and ``weights``.

    Raises:
        TypeError: an argument is no tensor, or a dtype is not supported.
        ValueError: ranks, sizes, devices, modes or offsets do not fit; on the CPU, a weight that counts is NaN.
        IndexError: on the CPU, an id outside ``[0, N)`` with ``bounds="raise"``.
    """
    check_tensor("table", table)
    backend = _backend.resolve("gather_reduce", table)
    index, offsets, weights, padding = check_bags(
        table,
        index,
        offsets,
        weights,
        backend,
        mode=mode,
        padding_idx=padding_idx,
        include_last_offset=include_last_offset,
    )
    check_bounds(bounds, bounds_count, index.device)
    out_dtype = checked_out_dtype(out_dtype, table, backend)
    if sparse_grad and mode == "max":
        raise ValueError("sparse_grad cannot be given with mode='max'")
    n = table.shape[0]
    index, offsets = apply_bounds(index, offsets, n, bounds, bounds_count, backend)
    drop = bounds != "raise"
    if backend == "reference":
        if raises(index, backend):
            check_values(index, offsets, weights, n, padding, drop)
        if not sparse_grad:
            return gather_reduce_reference(
                table, index, offsets, weights, mode=mode, padding_idx=padding, out_dtype=out_dtype
            )
    if mode == "max":
        need_argmax = table.requires_grad and torch.is_grad_enabled()
        return _gather_max(table, index, offsets, padding, drop, need_argmax, out_dtype, backend)[0]
    return _gather_reduce(
        table, index, offsets, weights, None, padding, backend, mode == "mean", drop, sparse_grad, out_dtype
    )


def checked_out_dtype(out_dtype: torch.dtype | None, table: torch.Tensor, backend: str) -> torch.dtype:
    """``out_dtype``, or the table's for None; it must be one that the table's backend writes."""
    if out_dtype is None:
        return table.dtype
    if not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"out_dtype must be a torch.dtype, got {type(out_dtype).__name__}")
    check_float("out_dtype", torch.empty(0, dtype=out_dtype, device="meta"), backend)
    return out_dtype


def check_lookup(
    table: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    mode: str,
) -> None:
    """Raise what :func:`gather_reduce` with ``bounds="drop"`` would, for callers that change a table before reading."""
    backend = _backend.resolve("gather_reduce", table)
    check_bags(table, index, offsets, weights, backend, mode=mode, padding_idx=None, include_last_offset=True)
    if index.device.type != "cpu":
        return
    if offsets is not None:
        check_offsets(index, offsets)
    if weights is not None:
        check_weights_values(weights, torch.ones((), dtype=torch.bool, device="cpu"))


def gather_maxima(
    table: torch.Tensor, index: torch.Tensor, offsets: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`gather_reduce` with ``mode="max"`` and ``bounds="drop"`` outside autograd, and where the maxima lie.

    Returns:
        ``(B, D)``, and the position of each maximum within its bag, ``(B, D)`` int32, -1 in empty bags.
    """
    backend = _backend.resolve("gather_reduce", table)
    index, offsets = apply_bounds(index, offsets, table.shape[0], "drop", None, backend)
    return _gather_max(table, index, offsets, -1, True, True, table.dtype, backend)
