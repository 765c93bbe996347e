"""Launchers of the expert feed-forward layer on Hopper GPUs.

The products are in ``gossamer._C``; sums over a token's rows and over an expert's, bound by memory, are Triton's.
"""

from __future__ import annotations

import torch

from gossamer import _C, _backend
from gossamer._activation import Activation
from gossamer.cuda_kernels._hopper import Operands, routing, with_depth
from gossamer.cuda_kernels.grouped_matmul import grouped_matmul_dweight, rows_times_weight
from gossamer.triton_kernels import expert_mlp_backward as triton_backward
from gossamer.triton_kernels.gather_reduce import sum_slots

__all__ = ["expert_mlp", "expert_mlp_backward"]


def _form(activation: Activation, interleaved: bool) -> tuple[int, bool, bool, float, float]:
    return activation.code, activation.gated, interleaved, activation.alpha, activation.limit


def up_projection(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    activation: Activation,
    interleaved: bool,
    save_preact: bool,
    x_div: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The activation ``(R, I)`` of rows ``x[slots[r] // x_div]``, and the pre-activation ``(R, 2I)`` or None."""
    num_rows, wide = slots.shape[0], gate_up.shape[1]
    inner = wide // activation.halves
    act = torch.empty(num_rows, inner, dtype=x.dtype, device=x.device)
    preact = torch.empty(num_rows, wide, dtype=x.dtype, device=x.device) if save_preact else None
    if act.numel() == 0:
        return act, preact
    x, gate_up = with_depth(x, gate_up)
    operands = Operands(x)
    _C.hopper_expert_up(
        operands.bfloat16,
        routing(slots, offsets),
        inner,
        x.shape[1],
        operands.rows(x, x_div),
        operands.weight(gate_up),
        operands.pointer(gate_up_bias),
        _form(activation, interleaved),
        act.data_ptr(),
        0 if preact is None else preact.data_ptr(),
        operands.where(),
    )
    return act, preact


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """``y (T, H)`` and the pre-activation ``(R, 2I)`` (empty unless ``save_preact``); see gossamer.expert_mlp.

    Raises:
        ValueError: no Hopper GPU, or neither float16 nor bfloat16.
    """
    _backend.check_served("expert_mlp", "cuda", x)
    num_rows, top_k = slots.shape[0], weights.shape[1]
    if x.numel() == 0:
        preact = x.new_empty((num_rows, gate_up.shape[1]) if save_preact else (0,))
        return torch.empty_like(x, memory_format=torch.contiguous_format), preact
    act, preact = up_projection(x, gate_up, gate_up_bias, slots, offsets, activation, interleaved, save_preact, top_k)
    out = rows_times_weight(act, down, down_bias, slots, offsets, 0, False, False)
    y = sum_slots(out, rows, offsets, top_k, weights)
    return y, x.new_empty(0) if preact is None else preact


def down_backward(
    dy: torch.Tensor,
    down: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
    preact: torch.Tensor,
    activation: Activation,
    interleaved: bool,
    wants: tuple[bool, bool, bool],
    overwrite: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """d(preact), the weighted activation and the routing-weight partial sums, each None where ``wants`` says no."""
    num_rows, inner, device = slots.shape[0], down.shape[2], dy.device
    want_dpreact, want_act, want_partial = wants
    preact = preact.contiguous()
    dpreact = (preact if overwrite else torch.empty_like(preact)) if want_dpreact else None
    act = torch.empty(num_rows, inner, dtype=dy.dtype, device=device) if want_act else None
    columns = _C.hopper_expert_down_backward_columns(inner)
    partial = torch.empty(columns, num_rows, dtype=torch.float32, device=device) if want_partial else None
    if inner == 0:
        return dpreact, act, partial
    dy, weight = with_depth(dy, down.transpose(1, 2))
    operands = Operands(dy)
    _C.hopper_expert_down_backward(
        operands.bfloat16,
        routing(slots, offsets),
        inner,
        dy.shape[1],
        operands.rows(dy, weights.shape[1]),
        operands.weight(weight),
        _form(activation, interleaved),
        preact.data_ptr(),
        *(0 if t is None else t.data_ptr() for t in (dpreact, act, partial)),
        operands.pointer(weights),
        weights.dtype == torch.float32,
        operands.where(),
    )
    return dpreact, act, partial


def _dweight(x, dy, slots, offsets, x_div, dy_div, transposed):
    return grouped_matmul_dweight(x, dy, slots, offsets, x_div, dy_div, transposed, False)[0]


_PRODUCTS = triton_backward.Products(down_backward, rows_times_weight, _dweight)


def expert_mlp_backward(dy: torch.Tensor, x: torch.Tensor, *rest: object) -> tuple[torch.Tensor, ...]:
    """As :func:`gossamer.triton_kernels.expert_mlp_backward.expert_mlp_backward`, with the products here.

    Raises:
        ValueError: no Hopper GPU, or neither float16 nor bfloat16.
    """
    _backend.check_served("expert_mlp", "cuda", x)
    return triton_backward.expert_mlp_backward(dy, x, *rest, products=_PRODUCTS)
