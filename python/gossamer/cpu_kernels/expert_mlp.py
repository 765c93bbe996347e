"""Launchers of the native expert feed-forward layer."""

from __future__ import annotations

import torch

from gossamer import _C
from gossamer._activation import Activation
from gossamer._layout import stored_transposed
from gossamer.cpu_kernels._native import (
    DTYPES,
    activation_form,
    empty_gradient,
    empty_huge,
    groups,
    matrix,
    unit_rows,
    weights3,
)

# No low-rank updates: for each product a and b as weights, the rank and x·aᵀ; then the scale.
NO_WEIGHT = (0, 0, 0, 0)
NO_UPDATE = (NO_WEIGHT, NO_WEIGHT, 0, 0)
NO_UPDATES = (NO_UPDATE, NO_UPDATE, 0.0)


def _arguments(
    x, gate_up, down, gate_up_bias, down_bias, slots, offsets, weights, preact, activation, interleaved
) -> tuple:
    """The arguments that forward and backward share."""
    return (
        groups(slots, offsets),
        (x.shape[0], x.shape[1], down.shape[2], weights.shape[1]),
        activation_form(activation, interleaved),
        matrix(x),
        weights3(gate_up),
        weights3(down),
        matrix(gate_up_bias),
        matrix(down_bias),
        matrix(weights),
        0 if preact is None else preact.data_ptr(),
    )


def expert_mlp(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    slots: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
    activation: Activation,
    interleaved: bool,
    save_preact: bool,
    updates: tuple = NO_UPDATES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``y[t] = Σ_k weights[t,k]·(act(x[t]·W1ᵀ + b1)·W2ᵀ + b2)``.

    Args:
        x: ``(T, H)``.
        gate_up: ``(E, 2I, H)``, or ``(E, I, H)`` when not gated; of any strides, as ``down``.
        down: ``(E, H, I)``.
        gate_up_bias: ``(E, 2I)`` or ``(E, I)``, or None.
        down_bias: ``(E, H)`` or None.
        slots: ``(R,)`` int32, as ``rows`` and ``offsets`` from a dispatch.
        rows: ``(R,)`` int32.
        offsets: ``(E+1,)`` int32.
        weights: ``(T, K)`` float.
        activation: which, with its constants.
        interleaved: whether gate and up alternate along 2I.
        save_preact: whether the backward pass will want the pre-activation.
        updates: low-rank updates as :mod:`gossamer.cpu_kernels.expert_mlp_lora` hands them over.

    Returns:
        ``y (T, H)``, and the pre-activation ``(R, 2I)`` in expert order, its dropped rows unwritten; ``(0,)`` unless
        ``save_preact``.
    """
    x = unit_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype)
    preact = empty_huge((slots.shape[0], gate_up.shape[1]) if save_preact else (0,), x.dtype)
    _C.expert_mlp(
        *_arguments(
            x,
            gate_up,
            down,
            gate_up_bias,
            down_bias,
            slots,
            offsets,
            weights,
            preact if save_preact else None,
            activation,
            interleaved,
        ),
        updates,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y, preact


def expert_mlp_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    slots: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
    preact: torch.Tensor,
    activation: Activation,
    interleaved: bool,
    needs: list[bool],
    overwrite: bool,
    updates: tuple = NO_UPDATES,
    dfactors: tuple[int, int, int, int] = NO_WEIGHT,
    factor_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of :func:`expert_mlp` from ``dy (T, H)`` and the pre-activation that it saved.

    Args:
        dy: ``(T, H)``.
        x: as in the forward pass, and so on up to ``weights``.
        gate_up: see above.
        down: see above.
        gate_up_bias: see above.
        down_bias: see above.
        slots: see above.
        rows: see above.
        offsets: see above.
        weights: see above.
        preact: ``(R, 2I)``.
        activation: as in the forward pass.
        interleaved: as in the forward pass.
        needs: which of x, gate_up, down, weights, gate_up_bias and down_bias want a gradient.
        overwrite: leave to write over ``preact``, which this kernel does not use.
        updates: as in the forward pass.
        dfactors: where the gradients of the updates' factors go, 0 where not needed.
        factor_dtype: of those gradients; that of ``x`` if None.

    Returns:
        The six gradients in that order, shaped and typed like what they belong to, laid out like the weights; ``(0,)``
        where not needed.
    """
    x, dy, preact = unit_rows(x), unit_rows(dy), preact.contiguous()
    need_x, need_gate_up, need_down, need_weights, need_gate_up_bias, need_down_bias = needs
    none = (0,)
    dx = torch.empty(x.shape if need_x else none, dtype=x.dtype)
    # Each its own tensor: results of an operator may not alias.
    dgate_up, ddown = torch.empty(none, dtype=x.dtype), torch.empty(none, dtype=x.dtype)
    if need_gate_up:
        dgate_up = empty_gradient(tuple(gate_up.shape), x.dtype, stored_transposed(gate_up))
    if need_down:
        ddown = empty_gradient(tuple(down.shape), x.dtype, stored_transposed(down))
    # Zeros, because dropped slots get no gradient.
    dweights = torch.zeros(weights.shape if need_weights else none, dtype=weights.dtype if need_weights else x.dtype)
    dgate_up_bias = torch.empty(gate_up_bias.shape if need_gate_up_bias else none, dtype=x.dtype)
    ddown_bias = torch.empty(down_bias.shape if need_down_bias else none, dtype=x.dtype)
    if x.numel():
        _C.expert_mlp_backward(
            *_arguments(
                x, gate_up, down, gate_up_bias, down_bias, slots, offsets, weights, preact, activation, interleaved
            ),
            updates,
            matrix(dy),
            dx.data_ptr() if need_x else 0,
            (dgate_up.data_ptr() if need_gate_up else 0, stored_transposed(gate_up)),
            (ddown.data_ptr() if need_down else 0, stored_transposed(down)),
            matrix(dweights if need_weights else None),
            dgate_up_bias.data_ptr() if need_gate_up_bias else 0,
            ddown_bias.data_ptr() if need_down_bias else 0,
            dfactors,
            DTYPES[factor_dtype or x.dtype],
            torch.get_num_threads(),
        )
    else:
        for gradient in (dgate_up, ddown, dgate_up_bias, ddown_bias):
            gradient.zero_()
    return dx, dgate_up, ddown, dweights, dgate_up_bias, ddown_bias
