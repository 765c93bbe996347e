"""Experts whose gate and up have separate inputs, computed as products on a dispatch."""

from __future__ import annotations

import torch

from gossamer._activation import Activation
from gossamer.ops.activate import activate
from gossamer.ops.dispatch import Dispatch
from gossamer.ops.gather_reduce import combine_slots
from gossamer.ops.grouped_matmul import grouped_matmul
from gossamer.ops.quantized_expert_weight import QuantizedExpertWeight

Stack = torch.Tensor | QuantizedExpertWeight


def split_mlp(
    x: torch.Tensor,
    ups: tuple[Stack, ...],
    down: Stack,
    dispatch: Dispatch,
    weights: torch.Tensor,
    *,
    activation: Activation,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    x_grouped: bool = False,
) -> torch.Tensor:
    """:func:`gossamer.expert_mlp` for experts whose gate and up each read a part of the columns of ``x``.

    The backward pass keeps the pre-activation, the activation and the experts' outputs, ``(R, 2I)``, ``(R, I)`` and
    ``(R, O)``, where expert_mlp keeps only the first.

    Args:
        x: ``(T, halves·L)``, the gate's L columns first; ``(R, halves·L)`` by expert when ``x_grouped``.
        ups: one stack ``(E, I, L)`` for each half of the pre-activation, the gate's first.
        down: ``(E, O, I)``.
        dispatch: of the tokens.
        weights: ``(T, K)``.
        activation: of the experts.
        up_bias: ``(E, halves·I)`` or None.
        down_bias: ``(E, O)`` or None.
        x_grouped: whether ``x`` is sorted by expert.
    """
    halves = len(ups)
    biases = (None,) * halves if up_bias is None else up_bias.chunk(halves, 1)
    rows = [
        grouped_matmul(part, stack, dispatch, bias=bias, x_grouped=x_grouped, y_grouped=True)
        for part, stack, bias in zip(x.chunk(halves, 1), ups, biases, strict=True)
    ]
    act = activate(rows[0] if halves == 1 else torch.cat(rows, 1), activation)
    out = grouped_matmul(act, down, dispatch, bias=down_bias, x_grouped=True, y_grouped=True)
    return combine_slots(out, dispatch, weights)
