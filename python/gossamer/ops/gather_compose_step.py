"""Lookups of composed vectors whose backward pass takes an optimizer step on the rows that composed them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from gossamer import _backend
from gossamer._checks import check_float, check_tensor
from gossamer.ops import gather_compose as lookup
from gossamer.ops._records import define
from gossamer.ops.composed_rows import Parts
from gossamer.ops.gather_compose_gradient import row_gradients, weight_gradients
from gossamer.ops.gather_reduce import checked_out_dtype
from gossamer.ops.gather_reduce_step import begin_step, check_handle
from gossamer.ops.sparse_update import SparseUpdate, Update, check_state, check_updatable, update_rows_
from gossamer.optim import Optimizer


class GatherComposeStep(NamedTuple):
    """Arguments of a lookup of composed vectors whose backward pass takes a step.

    Attributes:
        handle: floating, requiring a gradient, which makes the result differentiable.
        compose: the lookup.
        update: the step.
    """

    handle: torch.Tensor
    compose: lookup.GatherCompose
    update: Update


def _forward(args: GatherComposeStep, backend: str) -> torch.Tensor:
    return lookup.forward(args.compose, backend)


def _forward_fake(args: GatherComposeStep) -> torch.Tensor:
    return lookup.forward_fake(args.compose)


# gather_compose; the backward pass updates table, step and states.
_gather_compose_step = define(
    "gather_compose_step", GatherComposeStep, kernel=_forward, fake=_forward_fake, returns="Tensor"
)


def _save(ctx, args: GatherComposeStep, output: torch.Tensor):
    compose = args.compose
    ctx.table, ctx.update, ctx.taken = compose.table, args.update, False
    # The table is saved, and therefore checked for changes, only if the backward pass reads its values.
    reads = compose.parts.operation == "mul" or "compose.bags.weights" in ctx.needs
    update = args.update._replace(lr=None, step=None, state1=None, state2=None)
    return (args._replace(compose=compose._replace(table=compose.table if reads else None), update=update),)


def _differentiate(ctx, args: GatherComposeStep, tensors, dout: torch.Tensor):
    begin_step(ctx, "a lookup")
    compose = args.compose._replace(table=ctx.table)
    gradients = {"handle": torch.zeros_like(args.handle)}
    # These come before the step, because they need the rows that the forward pass read.
    if "compose.bags.weights" in ctx.needs:
        gradients["compose.bags.weights"] = weight_gradients(compose, dout, ctx.backend)
    bags, values = row_gradients(compose, dout, ctx.backend)
    update = SparseUpdate(ctx.table, bags, values, None, ctx.update, compose.parts.whole_blocks)
    update_rows_(update, ctx.backend)
    return gradients


_gather_compose_step.differentiate(_save, _differentiate)


def gather_compose_step(
    table: torch.Tensor,
    ids: torch.Tensor,
    parts: Parts,
    offsets: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    *,
    handle: torch.Tensor,
    optimizer: Optimizer,
    state: Mapping[str, torch.Tensor],
    mode: str = "sum",
    include_last_offset: bool = True,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """:func:`gather_compose` whose backward pass takes an optimizer step instead of computing the table's gradient.

    A row's gradient is the sum over all ids that use it; each touched row gets one step, as in
    :func:`gossamer.sparse_update_`. The remarks on the step in :func:`gossamer.gather_reduce_step` apply here too.

    Args:
        table: ``(M, C)`` float, not requiring a gradient.
        ids: as for :func:`gather_compose`.
        parts: as for :func:`gather_compose`.
        offsets: as for :func:`gather_compose`.
        weights: as for :func:`gather_compose`; their gradient is taken before the step.
        handle: as for :func:`gossamer.gather_reduce_step`.
        optimizer: one of :mod:`gossamer.optim`.
        state: the state created by ``optimizer.state(M, C, device)``.
        mode: as for :func:`gather_compose`.
        include_last_offset: as for :func:`gather_compose`.
        out_dtype: as for :func:`gather_compose`.

    Returns:
        ``(B, D)``, differentiable in ``handle`` and ``weights``.

    Raises:
        TypeError: as :func:`gather_compose` and :func:`gossamer.sparse_update_` do.
        ValueError: as they do.
        IndexError: as they do.
        RuntimeError: from the backward pass, when it runs a second time over one graph or with ``create_graph=True``.
    """
    check_tensor("table", table)
    backend = _backend.resolve("gather_compose", table)
    check_float("table", table, backend)
    bags = lookup.checked_compose(table, ids, parts, offsets, weights, mode, include_last_offset, backend)
    check_updatable("table", table)
    check_handle(handle, table)
    update = check_state(optimizer, state, table)
    compose = lookup.GatherCompose(table, bags, parts, checked_out_dtype(out_dtype, table, backend))
    return _gather_compose_step(GatherComposeStep(handle, compose, update), backend)
