"""Launchers of the expert feed-forward layer."""

from __future__ import annotations

import torch

from gossamer._activation import Activation, activate


def _layer(x, gate_up, down, gate_up_bias, down_bias, weights, activation, interleaved):
    preact = x @ gate_up.T
    if gate_up_bias is not None:
        preact = preact + gate_up_bias
    out = activate(preact, activation, interleaved) @ down.T
    if down_bias is not None:
        out = out + down_bias
    return preact, out.to(weights.dtype) * weights.unsqueeze(1)


def expert_mlp(
    x, gate_up, down, gate_up_bias, down_bias, slots, rows, offsets, weights, activation, interleaved, save_preact
):
    """``y (T, H)`` and the pre-activation ``(R, 2I)`` in expert order, empty unless ``save_preact``."""
    bounds, top_k = offsets.tolist(), weights.shape[1]
    y = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    preact = torch.zeros((slots.shape[0], gate_up.shape[1]) if save_preact else (0,), dtype=x.dtype)
    flat = weights.reshape(-1)
    for e in range(gate_up.shape[0]):
        mine = slots[bounds[e] : bounds[e + 1]]
        hidden, out = _layer(
            x[mine // top_k],
            gate_up[e],
            down[e],
            None if gate_up_bias is None else gate_up_bias[e],
            None if down_bias is None else down_bias[e],
            flat[mine].to(y.dtype),
            activation,
            interleaved,
        )
        if save_preact:
            preact[bounds[e] : bounds[e + 1]] = hidden
        y.index_add_(0, mine // top_k, out)
    return y.to(x.dtype), preact


def expert_mlp_backward(
    dy,
    x,
    gate_up,
    down,
    gate_up_bias,
    down_bias,
    slots,
    rows,
    offsets,
    weights,
    preact,
    activation: Activation,
    interleaved: bool,
    needs: list[bool],
    overwrite: bool,
):
    """Gradients of x, gate_up, down, weights, gate_up_bias, down_bias; empty where not needed."""
    inputs = [x, gate_up, down, weights, gate_up_bias, down_bias]
    leaves = [None if t is None else t.detach().requires_grad_(n) for t, n in zip(inputs, needs, strict=True)]
    bounds, top_k = offsets.tolist(), weights.shape[1]
    with torch.enable_grad():
        x, gate_up, down, weights, gate_up_bias, down_bias = leaves
        y = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
        for e in range(gate_up.shape[0]):
            mine = slots[bounds[e] : bounds[e + 1]]
            _, out = _layer(
                x[mine // top_k],
                gate_up[e],
                down[e],
                None if gate_up_bias is None else gate_up_bias[e],
                None if down_bias is None else down_bias[e],
                weights.reshape(-1)[mine].to(y.dtype),
                activation,
                interleaved,
            )
            y = y.index_add(0, mine // top_k, out)
        wanted = [t for t, n in zip(leaves, needs, strict=True) if n]
        found = torch.autograd.grad(y, wanted, dy.to(y.dtype), materialize_grads=True)
    found = iter(found)
    return tuple(next(found) if n else inputs[0].new_empty(0) for n in needs)
