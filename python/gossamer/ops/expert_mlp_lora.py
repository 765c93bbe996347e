"""Low-rank updates of an expert layer's two products."""

from __future__ import annotations

import torch

from gossamer._activation import Activation, activate
from gossamer.ops._autocast import autocast
from gossamer.ops._checks import check_same_device, check_shape
from gossamer.ops.dispatch import Dispatch
from gossamer.ops.gather_reduce import gather_reduce
from gossamer.ops.grouped_matmul import grouped_matmul
from gossamer.ops.low_rank import check_factor_dtype, check_rank

LowRankFactors = tuple[torch.Tensor, torch.Tensor]


def check_factors(
    name: str, factors: LowRankFactors | None, x: torch.Tensor, weight: torch.Tensor
) -> LowRankFactors | None:
    """Hold ``factors`` against ``weight (E, N, C)``: ``(a (E, r, C), b (E, N, r))``, in autocast's dtype if any."""
    if factors is None:
        return None
    if not isinstance(factors, (tuple, list)) or len(factors) != 2:
        raise TypeError(f"{name} must be a pair (a, b) of tensors, got {type(factors).__name__}")
    a, b = factors
    e, n, c = weight.shape
    check_shape(f"{name}[0]", a, (e, None, c), "(E, r, C)")
    rank = a.shape[1]
    check_shape(f"{name}[1]", b, (e, n, rank), "(E, N, r)")
    check_rank(rank, n, c)
    a, b = autocast(a, b)
    check_factor_dtype(x, a, b)
    check_same_device(**{"x": x, f"{name}[0]": a, f"{name}[1]": b})
    return a, b


def _product(
    rows: torch.Tensor,
    weight: torch.Tensor,
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


def expert_mlp_lora(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
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
    """:func:`gossamer.expert_mlp` with low-rank factors, as grouped products on the layer's dispatch."""
    hidden = _product(x, gate_up, gate_up_bias, gate_up_lora, scale, dispatch, False)
    act = activate(hidden, activation, interleaved)
    out = _product(act, down, down_bias, down_lora, scale, dispatch, True)
    live = dispatch.rows < dispatch.offsets[-1]
    slot_weights = torch.where(live.view(weights.shape), weights, 0)
    return gather_reduce(out, dispatch.rows.view(-1, dispatch.top_k), weights=slot_weights)
