"""Launchers of the expert products with quantised weights."""

from __future__ import annotations

import torch

from gossamer._activation import Activation
from gossamer.triton_kernels.split_matmul import finish, split_expert_mlp, split_matmul


def quantized_grouped_matmul(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    weight_format: str,
    bias: torch.Tensor | None,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    x_div: int,
    y_grouped: bool,
    transposed: bool,
) -> torch.Tensor:
    """The grouped product with a quantised stack, or its transpose; dropped rows become zero."""
    stack = (data, scale, weight_format)
    y = split_matmul(
        x, stack, bias, slots, offsets, x_div, scatter=not y_grouped, zero_dropped=True, transposed=transposed
    )
    return y[0] if y.shape[0] == 1 else finish(y, offsets, x.dtype, None)


def quantized_expert_mlp(
    x: torch.Tensor,
    gate_up: tuple[torch.Tensor, torch.Tensor, str],
    down: tuple[torch.Tensor, torch.Tensor, str],
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    slots: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
    activation: Activation,
    interleaved: bool,
) -> torch.Tensor:
    """The expert layer with two quantised stacks; see gossamer.expert_mlp."""
    return split_expert_mlp(
        x, gate_up, down, gate_up_bias, down_bias, slots, rows, offsets, weights, activation, interleaved
    )
