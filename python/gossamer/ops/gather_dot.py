"""Products of rows with the table rows that they list: the hidden layer of experts that are single neurons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from gossamer import _backend
from gossamer._checks import check_float, check_same_device, check_shape, check_tensor, last_size
from gossamer._numerics import accumulation_dtype
from gossamer.ops import gather_reduce as lookup
from gossamer.ops._bags import Bags, apply_bounds, check_bags
from gossamer.ops._records import define
from gossamer.ops.gather_reduce_step import begin_step, check_handle
from gossamer.ops.sparse_update import SparseUpdate, Update, check_state, check_updatable, update_rows_
from gossamer.optim import Optimizer


class GatherDotStep(NamedTuple):
    """Arguments of products whose backward pass takes a step.

    Attributes:
        handle: floating, requiring a gradient, which makes the result differentiable.
        dot: the products.
        update: the step.
    """

    handle: torch.Tensor
    dot: lookup.GatherDot
    update: Update


def _forward(args: GatherDotStep, backend: str) -> torch.Tensor:
    return lookup.dot(args.dot, backend)


def _forward_fake(args: GatherDotStep) -> torch.Tensor:
    return lookup.dot_fake(args.dot)


# gather_dot; the backward pass updates table, step and states.
_gather_dot_step = define("gather_dot_step", GatherDotStep, kernel=_forward, fake=_forward_fake, returns="Tensor")


def _save(ctx, args: GatherDotStep, output: torch.Tensor):
    ctx.table, ctx.update, ctx.taken = args.dot.table, args.update, False
    # The table is saved, and therefore checked for changes, only if the backward pass reads its values.
    table = args.dot.table if "dot.dout" in ctx.needs else None
    update = args.update._replace(lr=None, step=None, state1=None, state2=None)
    return (args._replace(dot=args.dot._replace(table=table), update=update),)


def _differentiate(ctx, args: GatherDotStep, tensors, dweights: torch.Tensor):
    begin_step(ctx, "products")
    dot = args.dot
    gradients = {"handle": torch.zeros_like(args.handle)}
    if "dot.dout" in ctx.needs:
        # Before the step, because it needs the rows that the forward pass read.
        gradients["dot.dout"] = lookup.reduce_by_gradient(dot.table, dot.bags, dweights, dot.dout.dtype, ctx.backend)
    weighted = dot.bags._replace(weights=dweights)
    update_rows_(SparseUpdate(ctx.table, weighted, dot.dout, None, ctx.update), ctx.backend)
    return gradients


_gather_dot_step.differentiate(_save, _differentiate)


def _checked(table, index, x, offsets, backend: str, padding_idx, include_last_offset, bounds, bounds_count) -> Bags:
    lists, how = (index, offsets, None), ("sum", padding_idx, include_last_offset, bounds, bounds_count)
    bags = check_bags(table, *lists, backend, *how)
    check_shape("x", x, (bags.num_bags, table.shape[1]), "(B, D)")
    last_size("x", x, "(B, D)")
    if not x.is_floating_point() or (x.dtype == torch.float64) != (table.dtype == torch.float64):
        raise TypeError(f"x must be floating, and float64 for a float64 table alone, got {x.dtype}")
    check_float("x", x, backend)
    check_same_device(table=table, x=x)
    return apply_bounds(bags, table.shape[0], bounds, bounds_count, backend)


def gather_dot(
    table: torch.Tensor,
    index: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor | None = None,
    *,
    padding_idx: int | None = None,
    include_last_offset: bool = True,
    bounds: str = "raise",
    bounds_count: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply each row with the table rows that its bag lists: ``z[b,j] = ⟨x[b], table[index[b,j]]⟩``.

    It is the transpose of :func:`gather_reduce`: the gradient of its weights, and the hidden layer of single-neuron
    experts (He, "Mixture of a Million Experts", 2024).

    Args:
        table: ``(N, D)`` float.
        index: ``(B, J)`` int32 or int64, or ``(L,)`` with ``offsets``, as for :func:`gather_reduce`.
        x: ``(B, D)``, of any floating dtype (float64 for a float64 table alone).
        offsets: as for :func:`gather_reduce`.
        padding_idx: as for :func:`gather_reduce`.
        include_last_offset: as for :func:`gather_reduce`.
        bounds: as for :func:`gather_reduce`.
        bounds_count: as for :func:`gather_reduce`.

    Returns:
        Products in the shape of ``index``, in float32 (float64 for float64); zero where an id contributes nothing.
        Differentiable in ``table`` (duplicates summed in position order) and ``x``.

    Raises:
        TypeError: an argument is not a tensor, or a dtype is not supported.
        ValueError: ranks, sizes, devices, modes or offsets do not fit.
        IndexError: on the CPU, an id outside ``[0, N)`` with ``bounds="raise"``.
    """
    check_tensor("table", table)
    backend = _backend.resolve("gather_reduce", table)
    bags = _checked(table, index, x, offsets, backend, padding_idx, include_last_offset, bounds, bounds_count)
    return lookup.dot_bags(table, bags, x, accumulation_dtype(table.dtype), backend).view(index.shape)


def gather_dot_step(
    table: torch.Tensor,
    index: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor | None = None,
    *,
    handle: torch.Tensor,
    optimizer: Optimizer,
    state: Mapping[str, torch.Tensor],
    padding_idx: int | None = None,
    include_last_offset: bool = True,
    bounds: str = "raise",
    bounds_count: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`gather_dot` whose backward pass takes an optimizer step instead of computing the table's gradient.

    A row's gradient is ``G = Σ dz[b,j]·x[b]`` over its occurrences; the step is that of :func:`sparse_update_`, taken
    once the gradient of ``x`` is known. The remarks on the step in :func:`gather_reduce_step` apply here too.

    Args:
        table: ``(N, D)`` float, not requiring a gradient.
        index: as for :func:`gather_dot`.
        x: as for :func:`gather_dot`.
        offsets: as for :func:`gather_dot`.
        handle: as for :func:`gather_reduce_step`.
        optimizer: one of :mod:`gossamer.optim`.
        state: the state created by ``optimizer.state(N, D, device)``.
        padding_idx: as for :func:`gather_dot`.
        include_last_offset: as for :func:`gather_dot`.
        bounds: as for :func:`gather_dot`.
        bounds_count: as for :func:`gather_dot`.

    Returns:
        As :func:`gather_dot`, differentiable in ``handle`` and ``x``.

    Raises:
        TypeError: as :func:`gather_dot` and :func:`sparse_update_` do.
        ValueError: as they do; on the CPU, from the backward pass where the gradient of a product is NaN.
        IndexError: as they do.
        RuntimeError: from the backward pass, when it runs a second time over one graph or with ``create_graph=True``.
    """
    check_tensor("table", table)
    backend = _backend.resolve("sparse_update", table)
    bags = _checked(table, index, x, offsets, backend, padding_idx, include_last_offset, bounds, bounds_count)
    check_updatable("table", table)
    check_handle(handle, table)
    update = check_state(optimizer, state, table)
    dot = lookup.GatherDot(x, table, bags, accumulation_dtype(table.dtype))
    return _gather_dot_step(GatherDotStep(handle, dot, update), backend).view(index.shape)
