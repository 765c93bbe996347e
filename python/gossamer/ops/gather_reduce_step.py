"""Lookups whose backward pass takes an optimizer's step on the touched rows, in place of making a table's gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gossamer import _backend
from gossamer._checks import check_same_device, check_tensor
from gossamer.ops import gather_reduce as one_table
from gossamer.ops import gather_reduce_tables as many_tables
from gossamer.ops._bags import apply_bounds, check_bags, check_bounds, num_bags_of
from gossamer.ops._registration import register, register_autograd
from gossamer.ops.sparse_update import _sparse_update_, check_state, check_updatable
from gossamer.optim import Optimizer

STEP_TAKEN = "the fused optimizer step of this lookup has been taken; its graph cannot run backward a second time"


def _forward(
    handle, table, index, offsets, weights, layout, lr, step, state1, state2, spec, padding_idx, mode, drop, out_dtype,
    algorithm, hyper, seed, backend,
):  # fmt: skip
    none = torch.empty(0, dtype=torch.int32, device=table.device)
    if spec:
        out = many_tables._forward(table, index, offsets, weights, layout, spec, drop, out_dtype, backend)
        return out, none
    if mode == "max":
        return one_table._max(table, index, offsets, padding_idx, drop, True, out_dtype, backend)
    lists = (index, offsets, weights, None, padding_idx)
    return one_table._forward(table, *lists, backend, mode == "mean", drop, False, out_dtype), none


def _forward_fake(
    handle, table, index, offsets, weights, layout, lr, step, state1, state2, spec, padding_idx, mode, drop, out_dtype,
    algorithm, hyper, seed, backend,
):  # fmt: skip
    none = torch.empty(0, dtype=torch.int32, device=table.device)
    if spec:
        out = many_tables._forward_fake(table, index, offsets, weights, layout, spec, drop, out_dtype, backend)
        return out, none
    out = table.new_empty(num_bags_of(index, offsets), table.shape[1], dtype=out_dtype)
    return out, torch.empty_like(out, dtype=torch.int32) if mode == "max" else none


# The lookup, and the maxima's positions where there are any. The backward pass updates table, step and states.
_gather_reduce_step = register(
    "gather_reduce_step(Tensor handle, Tensor table, Tensor index, Tensor? offsets, Tensor? weights, Tensor? layout, "
    "Tensor? lr, Tensor step, Tensor? state1, Tensor? state2, int[] spec, int padding_idx, str mode, bool drop, "
    "ScalarType out_dtype, int algorithm, float[] hyper, int seed, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)


def _setup_context(ctx, inputs, output):
    handle, table, index, offsets, weights, layout, *updated = inputs[:10]
    ctx.spec, ctx.padding_idx, ctx.mode, ctx.drop, _, ctx.algorithm, ctx.hyper, ctx.seed, ctx.backend = inputs[10:]
    needs_weights = weights is not None and ctx.needs_input_grad[4]
    ctx.weights_dtype = None if weights is None else weights.dtype
    ctx.mark_non_differentiable(output[1])
    argmax = output[1] if ctx.mode == "max" else None
    # The table is saved, with the check that nobody changed it, only where its values are wanted again. Otherwise steps
    # that other lookups take before this one's are welcome.
    saved = table if needs_weights else None
    ctx.save_for_backward(handle, saved, index, offsets, weights, layout, argmax)
    ctx.updated = (table, *updated)
    ctx.taken = False


def _backward(ctx, dout, _):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the backward pass of a lookup with a fused optimizer step cannot be differentiated (create_graph=True)"
        )
    if ctx.taken:
        raise RuntimeError(STEP_TAKEN)
    ctx.taken = True
    handle, saved, index, offsets, weights, layout, argmax = ctx.saved_tensors
    table, lr, step, state1, state2 = ctx.updated
    mean = ctx.mode == "mean"
    dweights = None
    if weights is not None and ctx.needs_input_grad[4]:
        # Before the step: it wants the rows that the forward pass read.
        if ctx.spec:
            lists = (index, offsets, layout, ctx.spec, ctx.drop)
            dweights = many_tables._gather_dot_tables(dout, saved, *lists, ctx.weights_dtype, ctx.backend)
        else:
            lists = (index, offsets, None, ctx.padding_idx)
            dweights = one_table._gather_dot(dout, saved, *lists, ctx.weights_dtype, ctx.backend, mean, ctx.drop)
    _sparse_update_(
        table,
        index,
        dout,
        offsets,
        weights,
        argmax,
        layout,
        lr,
        step,
        state1,
        state2,
        ctx.spec,
        ctx.padding_idx,
        mean,
        ctx.drop,
        ctx.algorithm,
        ctx.hyper,
        ctx.seed,
        ctx.backend,
    )
    return torch.zeros_like(handle), None, None, None, dweights, *(None,) * 14


register_autograd("gather_reduce_step", _backward, _setup_context)


def _check_handle(handle, table):
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
) -> torch.Tensor:
    """:func:`gather_reduce` whose backward pass calls :func:`sparse_update_` instead of making the table's gradient.

    The step happens when the gradient of the result is known, inside ``loss.backward()``; table and state are updated
    in place and the table gets no ``.grad``. Looking one table up twice before a backward pass takes two steps, one
    after the other. Nothing happens where no graph is recorded or the result takes no part in the loss; any other
    backward pass takes the step, also one that asks for the gradient of ``weights`` alone.

    Args:
        table: ``(N, D)`` float, not requiring a gradient.
        index: as for :func:`gather_reduce`, and so is every argument but the next three.
        offsets: see above.
        weights: see above; their gradient is taken before the step.
        handle: any floating tensor that requires a gradient, such as ``torch.zeros(0, requires_grad=True)``, on the
            table's device: it is what makes the result differentiable. Its gradient is zero.
        optimizer: one of :mod:`gossamer.optim`.
        state: what ``optimizer.state(N, D, device)`` made.
        mode: see above.
        padding_idx: see above.
        include_last_offset: see above.
        bounds: see above.
        bounds_count: see above.
        out_dtype: see above.

    Returns:
        ``(B, D)``, differentiable in ``handle`` and ``weights``.

    Raises:
        TypeError: as :func:`gather_reduce` and :func:`sparse_update_`.
        ValueError: likewise.
        IndexError: likewise.
        RuntimeError: from the backward pass, when it runs a second time over one graph or with ``create_graph=True``.
    """
    check_tensor("table", table)
    backend = _backend.resolve("sparse_update", table)
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
    check_updatable("table", table)
    _check_handle(handle, table)
    out_dtype = one_table.checked_out_dtype(out_dtype, table, backend)
    lr, step, state1, state2 = check_state(optimizer, state, table)
    index, offsets = apply_bounds(index, offsets, table.shape[0], bounds, bounds_count, backend)
    return _gather_reduce_step(
        handle,
        table,
        index,
        offsets,
        weights,
        None,
        lr,
        step,
        state1,
        state2,
        [],
        padding,
        mode,
        bounds != "raise",
        out_dtype,
        optimizer.algorithm,
        list(optimizer.hyper()),
        optimizer.seed,
        backend,
    )[0]


def gather_reduce_tables_step(
    storage: torch.Tensor,
    layout: many_tables.TableLayout,
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
        index: as for :func:`gather_reduce_tables`, and so are the other arguments but the next three.
        offsets: see above.
        weights: see above.
        handle: as for :func:`gather_reduce_step`.
        optimizer: one of :mod:`gossamer.optim`, for all tables.
        state: what ``layout.state(optimizer, device)`` made.
        bounds: see above.
        bounds_count: see above.
        out_dtype: see above.

    Returns:
        ``(B, ΣD_f)``, differentiable in ``handle`` and ``weights``.

    Raises:
        TypeError: as :func:`gather_reduce_step`.
        ValueError: likewise.
        IndexError: likewise.
        RuntimeError: likewise.
    """
    check_tensor("storage", storage)
    backend = _backend.resolve("sparse_update", storage)
    index, offsets = many_tables.check_tables(storage, layout, index, offsets, weights, backend, bounds, bounds_count)
    check_updatable("storage", storage)
    _check_handle(handle, storage)
    out_dtype = one_table.checked_out_dtype(out_dtype, storage, backend)
    lr, step, state1, state2 = check_state(optimizer, state, storage, layout)
    return _gather_reduce_step(
        handle,
        storage,
        index,
        offsets,
        weights,
        layout.on(storage.device),
        lr,
        step,
        state1,
        state2,
        layout.spec,
        -1,
        "sum",
        bounds != "raise",
        out_dtype,
        optimizer.algorithm,
        list(optimizer.hyper()),
        optimizer.seed,
        backend,
    )[0]
