"""Launchers of the native expert feed-forward layer with low-rank updates."""

from __future__ import annotations

import functools

import torch

from gossamer._activation import Activation
from gossamer.cpu_kernels._native import weights3
from gossamer.cpu_kernels.expert_mlp import NO_UPDATE, expert_mlp, expert_mlp_backward


def _update(a: torch.Tensor | None, b: torch.Tensor | None, s: torch.Tensor | None) -> tuple:
    if a is None:
        return NO_UPDATE
    return weights3(a), weights3(b), a.shape[1], 0 if s is None else s.data_ptr()


def expert_mlp_lora(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    factors: tuple[torch.Tensor | None, ...],
    slots: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
    activation: Activation,
    interleaved: bool,
    scale: float,
    save: bool,
) -> tuple[torch.Tensor, ...]:
    """:func:`gossamer.cpu_kernels.expert_mlp.expert_mlp` with ``W1 + scale·B1·A1`` and ``W2 + scale·B2·A2``.

    Args:
        x: as there, and so on up to ``down_bias``.
        gate_up: see above.
        down: see above.
        gate_up_bias: see above.
        down_bias: see above.
        factors: ``A1 (E, r, H)``, ``B1 (E, 2I, r)``, ``A2 (E, r, I)``, ``B2 (E, H, r)``; either pair may be None.
        slots: as there, and so on up to ``interleaved``.
        rows: see above.
        offsets: see above.
        weights: see above.
        activation: see above.
        interleaved: see above.
        scale: the factor of both updates.
        save: whether the backward pass will come.

    Returns:
        ``y (T, H)``, the pre-activation ``(R, 2I)``, and in float32 or float64 ``x·A1ᵀ`` and ``act·A2ᵀ`` ``(R, r)``, in
        expert order; all but ``y`` unwritten in dropped rows, and ``(0,)`` where there is no update or not ``save``.
    """
    a1, b1, a2, b2 = (f if f is None else f.to(x.dtype) for f in factors)
    wide = torch.promote_types(x.dtype, torch.float32)
    s1, s2 = (
        torch.empty((slots.shape[0], a.shape[1]) if save and a is not None else (0,), dtype=wide) for a in (a1, a2)
    )
    updates = _update(a1, b1, s1 if save else None), _update(a2, b2, s2 if save else None), scale
    y, preact = expert_mlp(
        x,
        gate_up,
        down,
        gate_up_bias,
        down_bias,
        slots,
        rows,
        offsets,
        weights,
        activation,
        interleaved,
        save,
        updates=updates,
    )
    return y, preact, s1, s2


def expert_mlp_lora_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    factors: tuple[torch.Tensor | None, ...],
    slots: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
    preact: torch.Tensor,
    low: tuple[torch.Tensor, torch.Tensor],
    activation: Activation,
    interleaved: bool,
    scale: float,
    needs: list[bool],
    overwrite: bool,
) -> tuple[torch.Tensor, ...]:
    """Gradients of :func:`expert_mlp_lora` from ``dy (T, H)`` and what it saved.

    Args:
        dy: ``(T, H)``.
        x: as in the forward pass, and so on up to ``weights``.
        gate_up: see above.
        down: see above.
        gate_up_bias: see above.
        down_bias: see above.
        factors: see above.
        slots: see above.
        rows: see above.
        offsets: see above.
        weights: see above.
        preact: ``(R, 2I)``.
        low: ``x·A1ᵀ`` and ``act·A2ᵀ``, ``(R, r)``.
        activation: as in the forward pass.
        interleaved: as in the forward pass.
        scale: as in the forward pass.
        needs: which of x, gate_up, down, weights, gate_up_bias, down_bias, A1, B1, A2 and B2 want a gradient.
        overwrite: leave to write over ``preact``, which this kernel does not use.

    Returns:
        The ten gradients in that order, shaped and typed like what they belong to; ``(0,)`` where not needed.
    """
    # In the widest of the factors' dtypes and that of x; what is narrower is rounded at the end.
    factor_dtype = functools.reduce(torch.promote_types, (f.dtype for f in factors if f is not None), x.dtype)
    dfactors = [
        torch.empty(f.shape if need else (0,), dtype=factor_dtype) for f, need in zip(factors, needs[6:], strict=True)
    ]
    if x.numel() == 0:
        for gradient in dfactors:
            gradient.zero_()
    a1, b1, a2, b2 = (f if f is None else f.to(x.dtype) for f in factors)
    grads = expert_mlp_backward(
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
        activation,
        interleaved,
        needs[:6],
        overwrite,
        updates=(_update(a1, b1, low[0]), _update(a2, b2, low[1]), scale),
        dfactors=tuple(g.data_ptr() if need else 0 for g, need in zip(dfactors, needs[6:], strict=True)),
        factor_dtype=factor_dtype,
    )
    return *grads, *(g if f is None else g.to(f.dtype) for g, f in zip(dfactors, factors, strict=True))
