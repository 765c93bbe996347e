"""Launchers of the native products with quantised expert weights."""

from __future__ import annotations

import torch

from gossamer import _C
from gossamer._activation import Activation
from gossamer.cpu_kernels._native import DTYPES, activation_form, groups, matrix, unit_rows
from gossamer.ops._weights import group_size
from gossamer.ops.quantized_expert_weight import FORMATS

# Codes of csrc/cpu/quantized_experts.h; formats that differ in their scales alone share one.
_FORMAT_CODES = {"fp8": 0, "fp8_block": 0, "int8": 1, "int4": 2, "mxfp4": 3}
_E8M0 = -1
# Past every column: one scale a row.
_WHOLE_ROW = 62

Stack = tuple[torch.Tensor, torch.Tensor, str]


def _weights(stack: Stack) -> tuple:
    """A quantised stack ``(data, scale, format)`` as ``gossamer._C`` takes it."""
    data, scale, weight_format = stack
    _, n, stored = data.shape
    by_row = weight_format in ("fp8", "int8")
    group = group_size(data, scale, weight_format)
    column_shift = _WHOLE_ROW if by_row else group.bit_length() - 1
    row_shift = column_shift if weight_format == "fp8_block" else 0
    scales = (scale.shape[1], 1 if by_row else scale.shape[2])
    code = _E8M0 if weight_format == "mxfp4" else DTYPES[scale.dtype]
    sizes = (n, stored * FORMATS[weight_format][1])
    return (
        _FORMAT_CODES[weight_format],
        data.data_ptr(),
        scale.data_ptr(),
        code,
        sizes,
        (row_shift, column_shift),
        scales,
    )


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
    """``y[r] = x[g(r)] · weight[e(r)]ᵀ + bias[e(r)]``, or ``· weight[e(r)]`` when ``transposed``.

    Args:
        x: ``(·, C)`` float, or ``(·, N)`` when ``transposed``; row ``r`` reads row ``r``, or ``slots[r] // x_div`` if
            ``x_div > 0``.
        data: of a quantised stack ``(E, N, C)``; see gossamer.QuantizedExpertWeight.
        scale: as ``data``.
        weight_format: as ``data``.
        bias: ``(E, N)`` or None.
        slots: ``(R,)`` int32, as ``offsets (E+1,)`` from a dispatch.
        offsets: ``(E+1,)`` int32.
        x_div: see ``x``.
        y_grouped: rows of the result in expert order, else in slot order.
        transposed: whether the product sums over N.

    Returns:
        ``(R, N)``, or ``(R, C)`` when ``transposed``; zero in dropped rows.
    """
    x = unit_rows(x)
    weights = _weights((data, scale, weight_format))
    y = torch.empty(slots.shape[0], weights[4][1] if transposed else weights[4][0], dtype=x.dtype)
    _C.quantized_grouped_matmul(
        groups(slots, offsets),
        matrix(x),
        x_div,
        weights,
        transposed,
        matrix(bias),
        y.data_ptr(),
        y_grouped,
        torch.get_num_threads(),
    )
    return y


def quantized_expert_mlp(
    x: torch.Tensor,
    gate_up: Stack,
    down: Stack,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    slots: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
    activation: Activation,
    interleaved: bool,
) -> torch.Tensor:
    """``y[t] = Σ_k weights[t,k]·(act(x[t]·W1ᵀ + b1)·W2ᵀ + b2)`` with quantised stacks W1 and W2.

    Arguments as those of gossamer.cpu_kernels.expert_mlp but for the stacks, ``(data, scale, format)`` each.
    """
    x = unit_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype)
    up, out = _weights(gate_up), _weights(down)
    absent = (0, 0, 0, 0)
    _C.quantized_expert_mlp(
        groups(slots, offsets),
        (x.shape[0], x.shape[1], out[4][1], weights.shape[1]),
        activation_form(activation, interleaved),
        matrix(x),
        absent,
        absent,
        matrix(gate_up_bias),
        matrix(down_bias),
        matrix(weights),
        0,
        y.data_ptr(),
        up,
        out,
        torch.get_num_threads(),
    )
    return y
