"""The expert feed-forward layer as separate grouped products, for weights that its fused kernels do not take."""

from __future__ import annotations

import torch

from gossamer._activation import Activation
from gossamer.ops.activate import activate
from gossamer.ops.dispatch import Dispatch
from gossamer.ops.expert_mlp_lora import LowRankFactors
from gossamer.ops.gather_reduce import combine_slots
from gossamer.ops.grouped_matmul import grouped_matmul
from gossamer.ops.quantized_expert_weight import QuantizedExpertWeight


def _product(
    rows: torch.Tensor,
    weight: torch.Tensor | QuantizedExpertWeight,
    bias: torch.Tensor | None,
    factors: LowRankFactors | None,
    scale: float,
    dispatch: Dispatch,
    grouped: bool,
) -> torch.Tensor:
    y = grouped_matmul(rows, weight, dispatch, bias=bias, x_grouped=grouped, y_grouped=True)
    if factors is None:
        return y
    a, b = (f.to(rows.dtype) for f in factors)
    s = grouped_matmul(rows, a, dispatch, x_grouped=grouped, y_grouped=True)
    return torch.add(y, grouped_matmul(s, b, dispatch, x_grouped=True, y_grouped=True), alpha=scale)


def composed_expert_mlp(
    x: torch.Tensor,
    gate_up: torch.Tensor | QuantizedExpertWeight,
    down: torch.Tensor | QuantizedExpertWeight,
    dispatch: Dispatch,
    weights: torch.Tensor,
    activation: Activation,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    interleaved: bool,
    gate_up_lora: LowRankFactors | None,
    down_lora: LowRankFactors | None,
    scale: float,
) -> torch.Tensor:
    """:func:`gossamer.expert_mlp` with frozen quantised weights, as grouped products on the layer's dispatch."""
    hidden = _product(x, gate_up, gate_up_bias, gate_up_lora, scale, dispatch, False)
    act = activate(hidden, activation, interleaved=interleaved)
    out = _product(act, down, down_bias, down_lora, scale, dispatch, True)
    return combine_slots(out, dispatch, weights)
