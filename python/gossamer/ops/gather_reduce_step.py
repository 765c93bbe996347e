"""Lookups whose backward pass takes an optimizer step on the touched rows instead of making the table's gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from gossamer import _backend
from gossamer._checks import check_same_device, check_tensor
from gossamer.ops import gather_max as maxima
from gossamer.ops import gather_reduce as lookup
from gossamer.ops._bags import Bags, apply_bounds, check_bags
from gossamer.ops._records import define
from gossamer.ops.gather_reduce_tables import TableLayout, check_tables
from gossamer.ops.sparse_update import SparseUpdate, Update, check_state, check_updatable, update_rows_
from gossamer.optim import Optimizer

STEP_TAKEN = "the fused optimizer step of this lookup has been taken; its graph cannot run backward a second time"


def begin_step(ctx, what: str) -> None:
    """Check in the backward pass of ``what`` that its single step can be taken, and record it in ``ctx.taken``.

    Raises:
        RuntimeError: a graph of the backward pass is recorded, or the step was taken before.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"the backward pass of {what} with a fused optimizer step cannot be differentiated (create_graph=True)"
        )
    if ctx.taken:
        raise RuntimeError(STEP_TAKEN)
    ctx.taken = True


class GatherReduceStep(NamedTuple):
    """Arguments of a lookup whose backward pass takes a step.

    Attributes:
        handle: floating, requiring a gradient, which makes the result differentiable.
        table: as in :class:`gossamer.ops.gather_reduce.GatherReduce`.
        bags: the lists.
        out_dtype: of the result.
        update: the step.
    """

    handle: torch.Tensor
    table: torch.Tensor
    bags: Bags
    out_dtype: torch.dtype
    update: Update


def _forward(args: GatherReduceStep, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    if args.bags.mode == "max":
        return maxima.forward(maxima.GatherMax(args.table, args.bags, args.out_dtype, need_argmax=True), backend)
    none = torch.empty(0, dtype=torch.int32, device=args.table.device)
    gather = lookup.GatherReduce(args.table, args.bags, args.out_dtype, scale=args.update.scale)
    return lookup.forward(gather, backend), none


def _forward_fake(args: GatherReduceStep) -> tuple[torch.Tensor, torch.Tensor]:
    if args.bags.mode == "max":
        return maxima.forward_fake(maxima.GatherMax(args.table, args.bags, args.out_dtype, need_argmax=True))
    none = torch.empty(0, dtype=torch.int32, device=args.table.device)
    return lookup.forward_fake(lookup.GatherReduce(args.table, args.bags, args.out_dtype)), none


# The lookup, and the positions of maxima, if any. The backward pass updates table, step and states.
_gather_reduce_step = define(
    "gather_reduce_step", GatherReduceStep, kernel=_forward, fake=_forward_fake, returns="(Tensor, Tensor)"
)


def _save(ctx, args: GatherReduceStep, output):
    ctx.mark_non_differentiable(output[1])
    ctx.table, ctx.update, ctx.taken = args.table, args.update, False
    # The table is saved, and therefore checked for changes, only if the backward pass reads its values. Otherwise other
    # lookups of the same graph may take their steps first.
    table, scale = (args.table, args.update.scale) if "bags.weights" in ctx.needs else (None, None)
    update = args.update._replace(lr=None, step=None, state1=None, state2=None, scale=scale)
    return args._replace(table=table, update=update), output[1] if args.bags.mode == "max" else None


def _differentiate(ctx, args: GatherReduceStep, tensors, dout: torch.Tensor, _):
    begin_step(ctx, "a lookup")
    (argmax,) = tensors
    gradients = {"handle": torch.zeros_like(args.handle)}
    if "bags.weights" in ctx.needs:
        # This comes before the step, because it needs the rows that the forward pass read.
        bags = args.bags._replace(weights=None)
        dot = lookup.GatherDot(dout, args.table, bags, args.bags.weights.dtype, args.update.scale)
        gradients["bags.weights"] = lookup.gather_dot(dot, ctx.backend)
    update_rows_(SparseUpdate(ctx.table, args.bags, dout, argmax, ctx.update), ctx.backend)
    return gradients


_gather_reduce_step.differentiate(_save, _differentiate)


def check_handle(handle: torch.Tensor, table: torch.Tensor) -> None:
    """Check that ``handle`` is floating and on the device of the table."""
    check_tensor("handle", handle)
    if not handle.is_floating_point():
        raise TypeError(f"handle must be floating, got {handle.dtype}")
    check_same_device(table=table, handle=handle)


def gather_reduce_step(
    table: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    *,
    handle: torch.Tensor,
    optimizer: Optimizer,
    state: Mapping[str, torch.Tensor],
    mode: str = "sum",
    padding_idx: int | None = None,
    include_last_offset: bool = True,
    bounds: str = "raise",
    bounds_count: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    scale: torch.Tensor | None = None,
    scale_lr: float = 0.0,
) -> torch.Tensor:
    """:func:`gather_reduce` whose backward pass calls :func:`sparse_update_` instead of making the table's gradient.

    The step happens when the gradient of the result is known, inside ``loss.backward()``; table and state are updated
    in place and the table gets no ``.grad``. Looking one table up twice before a backward pass takes two steps, one
    after the other. Nothing happens if no graph is recorded or the loss does not depend on the result. Any other
    backward pass takes the step, also one that only computes the gradient of ``weights``.

    Args:
        table: ``(N, D)`` float, or int8 or int16 with ``scale``; not requiring a gradient.
        index: as for :func:`gather_reduce`.
        offsets: as for :func:`gather_reduce`.
        weights: as for :func:`gather_reduce`; their gradient is taken before the step.
        handle: any floating tensor that requires a gradient, such as ``torch.zeros(0, requires_grad=True)``, on the
            table's device, which makes the result differentiable. Its gradient is zero.
        optimizer: one of :mod:`gossamer.optim`.
        state: the state created by ``optimizer.state(N, D, device)``.
        mode: as for :func:`gather_reduce`.
        padding_idx: as for :func:`gather_reduce`.
        include_last_offset: as for :func:`gather_reduce`.
        bounds: as for :func:`gather_reduce`.
        bounds_count: as for :func:`gather_reduce`.
        out_dtype: as for :func:`gather_reduce`.
        scale: as for :func:`gather_reduce`.
        scale_lr: as for :func:`sparse_update_`.

    Returns:
        ``(B, D)``, differentiable in ``handle`` and ``weights``.

    Raises:
        TypeError: as :func:`gather_reduce` and :func:`sparse_update_` do.
        ValueError: as they do.
        IndexError: as they do.
        RuntimeError: from the backward pass, when it runs a second time over one graph or with ``create_graph=True``.
    """
    check_tensor("table", table)
    backend = _backend.resolve("sparse_update", table)
    lists, how = (index, offsets, weights), (mode, padding_idx, include_last_offset, bounds, bounds_count)
    bags = check_bags(table, *lists, backend, *how, scale)
    check_updatable("table", table)
    check_handle(handle, table)
    out_dtype = lookup.checked_out_dtype(out_dtype, table, backend)
    update = check_state(optimizer, state, table, scale=scale, scale_lr=scale_lr)
    bags = apply_bounds(bags, table.shape[0], bounds, bounds_count, backend)
    return _gather_reduce_step(GatherReduceStep(handle, table, bags, out_dtype, update), backend)[0]


def gather_reduce_tables_step(
    storage: torch.Tensor,
    layout: TableLayout,
    index: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    handle: torch.Tensor,
    optimizer: Optimizer,
    state: Mapping[str, torch.Tensor],
    bounds: str = "raise",
    bounds_count: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """:func:`gather_reduce_tables` whose backward pass calls :func:`sparse_update_tables_`.

    Otherwise as :func:`gather_reduce_step`.

    Args:
        storage: ``(E,)`` float, contiguous, not requiring a gradient.
        layout: the tables and features.
        index: as for :func:`gather_reduce_tables`.
        offsets: as for :func:`gather_reduce_tables`.
        weights: as for :func:`gather_reduce_tables`.
        handle: as for :func:`gather_reduce_step`.
        optimizer: one of :mod:`gossamer.optim`, for all tables.
        state: the state created by ``layout.state(optimizer, device)``.
        bounds: as for :func:`gather_reduce_tables`.
        bounds_count: as for :func:`gather_reduce_tables`.
        out_dtype: as for :func:`gather_reduce_tables`.

    Returns:
        ``(B, ΣD_f)``, differentiable in ``handle`` and ``weights``.

    Raises:
        TypeError: as :func:`gather_reduce_step` does.
        ValueError: as it does.
        IndexError: as it does.
        RuntimeError: as it does.
    """
    check_tensor("storage", storage)
    backend = _backend.resolve("sparse_update", storage)
    bags = check_tables(storage, layout, index, offsets, weights, backend, bounds, bounds_count)
    check_updatable("storage", storage)
    check_handle(handle, storage)
    out_dtype = lookup.checked_out_dtype(out_dtype, storage, backend)
    update = check_state(optimizer, state, storage, layout)
    return _gather_reduce_step(GatherReduceStep(handle, storage, bags, out_dtype, update), backend)[0]
