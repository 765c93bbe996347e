"""Weighted sums of table rows over lists of ids: the combine of an expert layer, the forward of an embedding bag."""

from __future__ import annotations

import torch

from gossamer import _backend
from gossamer.ops._checks import check_float, check_index, check_same_device, check_shape, check_tensor
from gossamer.ops._registration import register

MODES = ("sum",)


def _bags(index: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """The bag of each flat position of ``index``; for CSR, B for positions outside every bag."""
    positions = torch.arange(index.numel(), device=index.device)
    if offsets is None:
        return positions // max(index.shape[1], 1)
    bag = torch.searchsorted(offsets.contiguous(), positions, right=True) - 1
    return torch.where(bag < 0, offsets.numel() - 1, bag)


def _live(flat: torch.Tensor, num_rows: int, limit: torch.Tensor | None, padding_idx: int) -> torch.Tensor:
    """Which flat ids contribute: inside the table, below ``limit``, and not the padding row."""
    live = (flat >= 0) & (flat < num_rows) & (flat != padding_idx)
    return live if limit is None else live & (flat < limit)


def gather_reduce_reference(
    table: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    *,
    limit: torch.Tensor | None = None,
    padding_idx: int = -1,
) -> torch.Tensor:
    """:func:`gather_reduce` in plain torch, differentiable, accumulated in float32 (float64 for float64).

    ``offsets`` must have its last element here, ``padding_idx`` −1 stands for none, and ids from ``limit`` on, a
    one-element tensor, contribute nothing.
    """
    flat = index.reshape(-1).long()
    num_bags = index.shape[0] if offsets is None else offsets.numel() - 1
    live = _live(flat, table.shape[0], limit, padding_idx)
    bag = _bags(index, offsets)
    live = live & (bag < num_bags)
    kept = live.nonzero().squeeze(1)
    accumulate = torch.float64 if table.dtype == torch.float64 else torch.float32
    values = table.index_select(0, flat[kept]).to(accumulate)
    if weights is not None:
        values = values * weights.reshape(-1)[kept].to(accumulate).unsqueeze(1)
    out = torch.zeros(num_bags, table.shape[1], dtype=accumulate, device=table.device)
    return out.index_add(0, bag[kept], values).to(table.dtype)


def check_bounds(index: torch.Tensor, num_rows: int) -> None:
    """Every id must lie in ``[0, num_rows)``; reads values, so it is for the CPU."""
    bad = ((index < 0) | (index >= num_rows)).reshape(-1).nonzero()
    if bad.numel():
        position = int(bad[0])
        value = int(index.reshape(-1)[position])
        raise IndexError(f"index must be in [0, N) with N={num_rows}, got {value} at flat position {position}")


def _forward(table, index, offsets, weights, limit, padding_idx, backend):
    return _backend.kernels(backend, "gather_reduce").gather_reduce(table, index, offsets, weights, limit, padding_idx)


def _forward_fake(table, index, offsets, weights, limit, padding_idx, backend):
    num_bags = index.shape[0] if offsets is None else offsets.shape[0] - 1
    return table.new_empty(num_bags, table.shape[1])


# out[b] = sum over the live ids of bag b of weights · table[id]. Ids outside the table or from limit on are skipped.
_gather_reduce = register(
    "gather_reduce(Tensor table, Tensor index, Tensor? offsets, Tensor? weights, Tensor? limit, int padding_idx, "
    "str backend) -> Tensor",
    _forward,
    _forward_fake,
)


def _dot(dout, table, index, offsets, limit, padding_idx, dtype, backend):
    return _backend.kernels(backend, "gather_reduce").gather_dot(dout, table, index, offsets, limit, padding_idx, dtype)


def _dot_fake(dout, table, index, offsets, limit, padding_idx, dtype, backend):
    return dout.new_empty(index.shape, dtype=dtype)


# The gradient of weights: out[p] = <dout[bag of p], table[index[p]]>, zero where the id is skipped.
_gather_dot = register(
    "gather_dot(Tensor dout, Tensor table, Tensor index, Tensor? offsets, Tensor? limit, int padding_idx, "
    "ScalarType dtype, str backend) -> Tensor",
    _dot,
    _dot_fake,
)


def _transpose(index, offsets, weights, limit, padding_idx, num_rows):
    """The lists of :func:`gather_reduce` turned around: for each table row the bags that read it, in position order."""
    flat = index.reshape(-1).long()
    num_bags = index.shape[0] if offsets is None else offsets.numel() - 1
    bag = _bags(index, offsets)
    live = _live(flat, num_rows, limit, padding_idx) & (bag < num_bags)
    ids, order = torch.sort(torch.where(live, flat, num_rows), stable=True)
    row_offsets = torch.searchsorted(ids, torch.arange(num_rows + 1, device=ids.device))
    turned = None if weights is None else weights.reshape(-1)[order]
    return bag[order], row_offsets, turned


def _setup_context(ctx, inputs, output):
    table, index, offsets, weights, limit, ctx.padding_idx, ctx.backend = inputs
    needs_weights = weights is not None and ctx.needs_input_grad[3]
    ctx.num_rows = table.shape[0]
    ctx.weights_dtype = None if weights is None else weights.dtype
    ctx.save_for_backward(table if needs_weights else None, index, offsets, weights, limit)


def _backward(ctx, dout):
    table, index, offsets, weights, limit = ctx.saved_tensors
    dtable = dweights = None
    if ctx.needs_input_grad[0]:
        bags, row_offsets, turned = _transpose(index, offsets, weights, limit, ctx.padding_idx, ctx.num_rows)
        dtable = _gather_reduce(dout, bags, row_offsets, turned, None, -1, ctx.backend)
    if weights is not None and ctx.needs_input_grad[3]:
        dweights = _gather_dot(dout, table, index, offsets, limit, ctx.padding_idx, ctx.weights_dtype, ctx.backend)
    return dtable, None, None, dweights, None, None, None


torch.library.register_autograd("gossamer::gather_reduce", _backward, setup_context=_setup_context)


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
    return _gather_reduce(table, rows.view(-1, top_k), None, weights, offsets[-1:], -1, backend)


def gather_reduce(
    table: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    *,
    mode: str = "sum",
    padding_idx: int | None = None,
    include_last_offset: bool = True,
) -> torch.Tensor:
    """Reduce rows of a table over lists of ids: ``y[b] = Σ_j weights[b,j] · table[index[b,j]]``.

    Args:
        table: ``(N, D)`` float.
        index: ``(B, J)`` int32 or int64, J ids a bag; or ``(L,)`` with ``offsets``.
        offsets: ``(B+1,)`` int32 or int64, ascending: bag ``b`` holds ``index[offsets[b]:offsets[b+1]]``. With
            ``include_last_offset=False`` it is ``(B,)``, as in ``torch.nn.functional.embedding_bag``. None for
            ``(B, J)``.
        weights: like ``index``, float, or None for ones; any floating dtype.
        mode: ``"sum"``.
        padding_idx: an id that contributes nothing and gets no gradient; negative counts from the end.
        include_last_offset: whether ``offsets`` ends with L.

    Returns:
        ``(B, D)`` in the table's dtype, accumulated in float32 (float64 for float64); empty bags are zero.
        Differentiable in ``table`` (dense gradient, duplicates summed in position order) and ``weights``.

    Raises:
        TypeError: an argument is no tensor, or a dtype is not supported.
        ValueError: ranks, sizes, devices or the mode do not fit.
        IndexError: on the CPU, an id outside ``[0, N)``; on CUDA such an id contributes nothing.
    """
    check_tensor("table", table)
    backend = _backend.resolve("gather_reduce", table)
    check_float("table", table, backend)
    check_shape("table", table, (None, None), "(N, D)")
    check_index("index", index)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if offsets is None:
        check_shape("index", index, (None, None), "(B, J) when offsets is None")
    else:
        check_shape("index", index, (None,), "(L,) when offsets is given")
        check_index("offsets", offsets)
        check_shape("offsets", offsets, (None,), "(B+1,)")
        if not include_last_offset:
            offsets = torch.cat([offsets, offsets.new_full((1,), index.shape[0])])
        if offsets.shape[0] < 1:
            raise ValueError("offsets must have shape (B+1,) with at least one element, got (0,)")
    if weights is not None:
        check_tensor("weights", weights)
        check_float("weights", weights, backend)
        check_shape("weights", weights, tuple(index.shape), "that of index")
    check_same_device(table=table, index=index, offsets=offsets, weights=weights)
    n = table.shape[0]
    if padding_idx is not None and not -n <= padding_idx < n:
        raise ValueError(f"padding_idx must be in [-N, N) with N={n}, got {padding_idx}")
    padding = -1 if padding_idx is None else padding_idx % n
    if backend == "reference":
        if table.device.type == "cpu":
            check_bounds(index, n)
        return gather_reduce_reference(table, index, offsets, weights, padding_idx=padding)
    return _gather_reduce(table, index, offsets, weights, None, padding, backend)
