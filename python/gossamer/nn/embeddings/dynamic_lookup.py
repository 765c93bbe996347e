"""The lookup of a dynamic embedding as autograd sees it."""

from __future__ import annotations

import torch

from gossamer.ops.gather_max import gather_maxima
from gossamer.ops.gather_reduce import gather_reduce
from gossamer.ops.gather_reduce_step import STEP_TAKEN
from gossamer.ops.sparse_update import step_bags_


def _counts(rows, offsets) -> torch.Tensor:
    """The number of present rows in each bag."""
    there = rows >= 0
    if offsets is None:
        return there.sum(1)
    up_to = torch.cat([there.new_zeros(1, dtype=torch.int64), there.cumsum(0)])
    return up_to[offsets[1:].long()] - up_to[offsets[:-1].long()]


def rows_now(layer, ids: torch.Tensor, rows: torch.Tensor, resizes: int) -> torch.Tensor:
    """The ``rows`` found earlier for ``ids``, updated: −1 where the row belongs to another id by now, new ones if the
    table has grown since. ``resizes`` is the number of times it had grown when the rows were found.
    """
    now = layer.table.rows(ids.reshape(-1)).view(rows.shape)
    if layer._resizes == resizes:
        # The rows may belong to other ids by now.
        return torch.where(now == rows, rows, -1)
    # The table has grown, and every id has another row.
    return torch.where(rows < 0, -1, now)


def learn(layer, rows, dout, offsets, weights, argmax, mode: str) -> None:
    """Take the optimizer's step on the rows that bags list; −1 means no row."""
    optimizer = (layer.optimizer, layer.optimizer_state)
    step_bags_(layer.table.values, rows, dout, offsets, weights, argmax, *optimizer, mode, bounds="drop")
    layer.table._mark_rows(layer._changed, rows.reshape(-1).contiguous(), True)


class Lookup(torch.autograd.Function):
    """The lookup, whose backward pass takes the step on the rows that still belong to the ids."""

    @staticmethod
    def forward(ctx, handle, weights, layer, ids, rows, offsets):
        ctx.layer, ctx.moves, ctx.resizes, ctx.stepped = layer, layer._moves, layer._resizes, False
        # The values that the backward pass needs are saved now, because other lookups may step these rows before it, or
        # the rows may be given to other ids.
        read = argmax = None
        if layer.pooling == "max":
            out, argmax = gather_maxima(layer.table.values, rows, offsets)
        else:
            out = layer._reduce(rows, offsets, None if weights is None else weights.detach())
            if weights is not None and ctx.needs_input_grad[1]:
                read = layer.table.values.index_select(0, rows.reshape(-1).clamp(min=0))
        ctx.save_for_backward(weights, ids, rows, offsets, read, argmax)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        weights, ids, rows, offsets, read, argmax = ctx.saved_tensors
        layer, mode = ctx.layer, ctx.layer.pooling or "sum"
        dweights = None
        if weights is not None and ctx.needs_input_grad[1]:
            leaf, places = weights.detach().requires_grad_(), torch.arange(rows.numel(), device=rows.device)
            places = torch.where(rows < 0, -1, places.view(rows.shape))
            with torch.enable_grad():
                again = gather_reduce(read, places, offsets, leaf, mode=mode, bounds="drop")
                (dweights,) = torch.autograd.grad(again, leaf, dout)
        with layer.table.lock:
            if layer._moves != ctx.moves:
                if mode == "mean":
                    # The forward pass also counted ids that have been removed since.
                    mode, dout = "sum", dout / _counts(rows, offsets).clamp(min=1).unsqueeze(1)
                rows = rows_now(layer, ids, rows, ctx.resizes)
            if ctx.needs_input_grad[0]:
                if ctx.stepped:
                    raise RuntimeError(STEP_TAKEN)
                ctx.stepped = True
                learn(layer, rows, dout, offsets, weights, argmax, mode)
        return torch.zeros_like(layer._handle), dweights, None, None, None, None
