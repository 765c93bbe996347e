"""Products with quantised expert weights, dequantised inside the kernel: the operators under the public functions."""

from __future__ import annotations

import torch

from gossamer import _backend
from gossamer._activation import Activation
from gossamer.ops._registration import register, register_autograd
from gossamer.ops.dispatch import Dispatch, dx_rows
from gossamer.ops.gather_reduce import sum_slots
from gossamer.ops.quantized_expert_weight import FORMATS, QuantizedExpertWeight


def _columns(data: torch.Tensor, weight_format: str) -> int:
    return data.shape[2] * FORMATS[weight_format][1]


def _product(
    x, data, scale, weight_format, bias, slots, rows, offsets, x_div, y_grouped, transposed, backend
) -> torch.Tensor:
    return _backend.kernels(backend, "quantized_experts").quantized_grouped_matmul(
        x, data, scale, weight_format, bias, slots, offsets, x_div, y_grouped, transposed
    )


def _product_fake(
    x, data, scale, weight_format, bias, slots, rows, offsets, x_div, y_grouped, transposed, backend
) -> torch.Tensor:
    return x.new_empty(slots.shape[0], _columns(data, weight_format) if transposed else data.shape[1])


# As gossamer::grouped_matmul with the weight that data, scale and format describe, or its transpose.
_quantized_grouped_matmul = register(
    "quantized_grouped_matmul(Tensor x, Tensor data, Tensor scale, str format, Tensor? bias, Tensor slots, "
    "Tensor rows, Tensor offsets, int x_div, bool y_grouped, bool transposed, str backend) -> Tensor",
    _product,
    _product_fake,
)


def _setup_context(ctx, inputs, output):
    x, data, scale, ctx.format, _bias, slots, rows, offsets, *form = inputs
    ctx.x_shape = x.shape
    ctx.x_div, ctx.y_grouped, ctx.transposed, ctx.backend = form
    ctx.save_for_backward(data, scale, slots, rows, offsets)


def _backward(ctx, dy):
    data, scale, slots, rows, offsets = ctx.saved_tensors
    dx = dbias = None
    dy_div = 0 if ctx.y_grouped else 1
    if ctx.needs_input_grad[4]:
        # A product with one column of ones, as for a dense weight whose gradient nobody wants.
        ones = dy.new_ones(slots.shape[0], 1)
        dweight = torch.ops.gossamer.grouped_matmul_dweight.default
        dbias, _ = dweight(ones, dy, slots, offsets, 0, dy_div, False, False, ctx.backend)
        dbias = dbias.squeeze(-1)
    if ctx.needs_input_grad[0]:
        slots_of_dx, summed = dx_rows(slots, rows, ctx.x_shape, ctx.x_div)
        dx = _quantized_grouped_matmul(
            dy,
            data,
            scale,
            ctx.format,
            None,
            slots_of_dx,
            rows,
            offsets,
            dy_div,
            summed or ctx.x_div == 0,
            not ctx.transposed,
            ctx.backend,
        )
        if summed:
            dx = sum_slots(dx, rows, offsets, ctx.x_div, None, ctx.backend)
    return dx, None, None, None, dbias, *[None] * 7


register_autograd("quantized_grouped_matmul", _backward, _setup_context)


def quantized_grouped_matmul(
    x: torch.Tensor,
    weight: QuantizedExpertWeight,
    dispatch: Dispatch,
    bias: torch.Tensor | None,
    x_grouped: bool,
    y_grouped: bool,
    backend: str,
) -> torch.Tensor:
    """:func:`gossamer.grouped_matmul` with a quantised weight; arguments are checked already."""
    x_div = 0 if x_grouped else dispatch.top_k
    y = _quantized_grouped_matmul(
        x,
        weight.data,
        weight.scale,
        weight.format,
        bias,
        dispatch.row_slots if y_grouped else dispatch.slots,
        dispatch.rows,
        dispatch.offsets,
        x_div,
        y_grouped,
        False,
        backend,
    )
    return y if y_grouped else y.view(dispatch.num_tokens, dispatch.top_k, y.shape[1])


def _mlp(
    x,
    gate_up,
    gate_up_scale,
    gate_up_format,
    down,
    down_scale,
    down_format,
    gate_up_bias,
    down_bias,
    slots,
    rows,
    offsets,
    weights,
    activation,
    alpha,
    limit,
    interleaved,
    backend,
):
    return _backend.kernels(backend, "quantized_experts").quantized_expert_mlp(
        x,
        (gate_up, gate_up_scale, gate_up_format),
        (down, down_scale, down_format),
        gate_up_bias,
        down_bias,
        slots,
        rows,
        offsets,
        weights,
        Activation(activation, alpha, limit),
        interleaved,
    )


def _mlp_fake(x, *rest):
    return x.new_empty(x.shape)


# Inference alone: where a gradient is wanted, the layer is a composition of products.
_quantized_expert_mlp = register(
    "quantized_expert_mlp(Tensor x, Tensor gate_up, Tensor gate_up_scale, str gate_up_format, Tensor down, "
    "Tensor down_scale, str down_format, Tensor? gate_up_bias, Tensor? down_bias, Tensor slots, Tensor rows, "
    "Tensor offsets, Tensor weights, str activation, float alpha, float limit, bool interleaved, str backend) "
    "-> Tensor",
    _mlp,
    _mlp_fake,
)


def quantized_expert_mlp(
    x: torch.Tensor,
    gate_up: QuantizedExpertWeight,
    down: QuantizedExpertWeight,
    dispatch: Dispatch,
    weights: torch.Tensor,
    activation: Activation,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    interleaved: bool,
    backend: str,
) -> torch.Tensor:
    """:func:`gossamer.expert_mlp` with quantised weights and no gradient; arguments are checked already."""
    return _quantized_expert_mlp(
        x,
        gate_up.data,
        gate_up.scale,
        gate_up.format,
        down.data,
        down.scale,
        down.format,
        gate_up_bias,
        down_bias,
        dispatch.row_slots,
        dispatch.rows,
        dispatch.offsets,
        weights,
        activation.name,
        activation.alpha,
        activation.limit,
        interleaved,
        backend,
    )
