"""The lookup of a dynamic embedding as autograd sees it."""

from __future__ import annotations

import torch

from gossamer import _backend
from gossamer.ops._bags import check_bags, check_offsets, check_weights_values
from gossamer.ops.gather_reduce_step import STEP_TAKEN
from gossamer.ops.sparse_update import sparse_update_


def check_lookup(values, ids, offsets, weights, mode: str) -> None:
    """Raise what a lookup would refuse, before an id gets a row."""
    backend = _backend.resolve("gather_reduce", values)
    check_bags(values, ids, offsets, weights, backend, mode=mode, padding_idx=None, include_last_offset=True)
    if ids.device.type != "cpu":
        return
    if offsets is not None:
        check_offsets(ids, offsets)
    if weights is not None:
        check_weights_values(weights, torch.ones((), dtype=torch.bool, device="cpu"))


class Lookup(torch.autograd.Function):
    """The lookup, whose backward pass takes the step on the rows that still belong to the ids."""

    @staticmethod
    def forward(ctx, handle, weights, layer, ids, rows, offsets):
        ctx.layer, ctx.moves, ctx.resizes, ctx.stepped = layer, layer._moves, layer._resizes, False
        ctx.save_for_backward(weights, ids, rows, offsets)
        return layer._reduce(rows, offsets, None if weights is None else weights.detach())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        weights, ids, rows, offsets = ctx.saved_tensors
        layer = ctx.layer
        with layer.table.lock:
            if layer._moves != ctx.moves:
                now = layer.table.rows(ids.reshape(-1)).view(rows.shape)
                if layer._resizes == ctx.resizes:
                    # Another id may have these rows by now.
                    rows = torch.where(now == rows, rows, -1)
                else:
                    # The table has grown, and every id has another row.
                    rows = torch.where(rows < 0, -1, now)
            dweights = None
            if weights is not None and ctx.needs_input_grad[1]:
                leaf = weights.detach().requires_grad_()
                with torch.enable_grad():
                    (dweights,) = torch.autograd.grad(layer._reduce(rows, offsets, leaf), leaf, dout)
            if ctx.needs_input_grad[0]:
                if ctx.stepped:
                    raise RuntimeError(STEP_TAKEN)
                ctx.stepped = True
                sparse_update_(
                    layer.table.values,
                    rows,
                    dout,
                    offsets,
                    weights,
                    optimizer=layer.optimizer,
                    state=layer.optimizer_state,
                    mode=layer.pooling or "sum",
                    bounds="drop",
                )
                layer.table.mark_rows(layer._changed, rows.reshape(-1), True)
        return torch.zeros_like(layer._handle), dweights, None, None, None, None
