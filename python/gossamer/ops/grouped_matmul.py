"""Matrix products over ragged groups of rows, gathered and scattered inside the kernel."""

from __future__ import annotations

import itertools

import torch

from gossamer import _backend
from gossamer._autocast import autocast
from gossamer._checks import check_float, check_same_device, check_same_dtype, check_shape, check_tensor
from gossamer._layout import stored_transposed
from gossamer.ops._registration import register, register_autograd
from gossamer.ops._weights import as_weight
from gossamer.ops.dispatch import Dispatch, check_dispatch, dx_rows
from gossamer.ops.gather_reduce import sum_slots
from gossamer.ops.quantized_expert_weight import QuantizedExpertWeight
from gossamer.ops.quantized_experts import quantized_grouped_matmul


def grouped_matmul_reference(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedExpertWeight,
    dispatch: Dispatch,
    *,
    bias: torch.Tensor | None = None,
    x_grouped: bool = False,
    y_grouped: bool = False,
) -> torch.Tensor:
    """:func:`grouped_matmul` as a loop over experts in plain torch, differentiable, in any floating dtype."""
    if isinstance(weight, QuantizedExpertWeight):
        weight = weight.dequantize(x.dtype)
    offsets = dispatch.offsets.tolist()
    xs = x if x_grouped else x.index_select(0, dispatch.slots.long() // dispatch.top_k)
    parts = []
    for e in range(dispatch.num_experts):
        part = xs[offsets[e] : offsets[e + 1]] @ weight[e].T
        parts.append(part if bias is None else part + bias[e])
    rows = dispatch.buffer_rows if y_grouped else dispatch.num_rows
    parts.append(xs.new_zeros(rows - offsets[-1], weight.shape[1]))
    y = torch.cat(parts)
    if y_grouped:
        return y
    return y.index_select(0, dispatch.rows.long()).view(dispatch.num_tokens, dispatch.top_k, y.shape[1])


def _forward(x, weight, bias, slots, rows, offsets, x_div, y_grouped, backend):
    return _backend.kernels(backend, "grouped_matmul").grouped_matmul(
        x, weight, bias, slots, rows, offsets, x_div, y_grouped
    )


def _forward_fake(x, weight, bias, slots, rows, offsets, x_div, y_grouped, backend):
    return x.new_empty(slots.shape[0], weight.shape[1])


# Row r of the product reads row r of x when x_div is 0, else row slots[r] // x_div: K in token order, 1 in slot order.
_grouped_matmul = register(
    "grouped_matmul(Tensor x, Tensor weight, Tensor? bias, Tensor slots, Tensor rows, Tensor offsets, int x_div, "
    "bool y_grouped, str backend) -> Tensor",
    _forward,
    _forward_fake,
)


def _dweight(x, dy, slots, offsets, x_div, dy_div, transposed, with_bias, backend):
    return _backend.kernels(backend, "grouped_matmul").grouped_matmul_dweight(
        x, dy, slots, offsets, x_div, dy_div, transposed, with_bias
    )


def _dweight_fake(x, dy, slots, offsets, x_div, dy_div, transposed, with_bias, backend):
    e, n, c = offsets.shape[0] - 1, dy.shape[1], x.shape[1]
    dweight = x.new_empty(e, c, n).transpose(1, 2) if transposed else x.new_empty(e, n, c)
    return dweight, x.new_empty((e, n) if with_bias else (0,))


# dweight[e] = sum over rows r of e of dy[g(r)]ᵀ x[g'(r)] (E, N, C), stored (E, C, N) when transposed;
# dbias[e] = sum of dy[g(r)].
_grouped_matmul_dweight = register(
    "grouped_matmul_dweight(Tensor x, Tensor dy, Tensor slots, Tensor offsets, int x_div, int dy_div, bool transposed, "
    "bool with_bias, str backend) -> (Tensor dweight, Tensor dbias)",
    _dweight,
    _dweight_fake,
)


def _setup_context(ctx, inputs, output):
    x, weight, bias, slots, rows, offsets, ctx.x_div, ctx.y_grouped, ctx.backend = inputs
    ctx.with_bias = bias is not None
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, slots, rows, offsets)
    ctx.x_shape, ctx.transposed = x.shape, stored_transposed(weight)


def _backward(ctx, dy):
    x, weight, slots, rows, offsets = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dy_div = 0 if ctx.y_grouped else 1
    dx = dweight = dbias = None
    if needs_x:
        # dX is the same product with the weight transposed; rows that one x row fed are summed after it.
        slots_of_dx, summed = dx_rows(slots, rows, ctx.x_shape, ctx.x_div)
        grouped = summed or ctx.x_div == 0
        dx = _grouped_matmul(dy, weight.transpose(1, 2), None, slots_of_dx, rows, offsets, dy_div, grouped, ctx.backend)
        if summed:
            dx = sum_slots(dx, rows, offsets, ctx.x_div, None, ctx.backend)
    if needs_weight:
        dweight, dbias = _grouped_matmul_dweight(
            x, dy, slots, offsets, ctx.x_div, dy_div, ctx.transposed, needs_bias, ctx.backend
        )
    elif needs_bias:
        # A product with one column of ones: the bias gradient alone is rarely wanted, so it gets no kernel of its own.
        ones = dy.new_ones(slots.shape[0], 1)
        dbias, _ = _grouped_matmul_dweight(ones, dy, slots, offsets, 0, dy_div, False, False, ctx.backend)
        dbias = dbias.squeeze(-1)
    return dx, dweight, dbias if needs_bias else None, None, None, None, None, None, None


def grouped_matmul_dweight(
    x: torch.Tensor, dy: torch.Tensor, dispatch: Dispatch, *, with_bias: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight gradients of :func:`grouped_matmul` alone: ``dweight[e] = Σ_r dy[r]ᵀ·x[r]``, ``dbias[e] = Σ_r dy[r]``.

    Args:
        x: ``(R, C)``, sorted by expert; R is :attr:`Dispatch.buffer_rows`.
        dy: ``(R, N)``, sorted by expert; the dtype of ``x``.
        dispatch: from :func:`gossamer.dispatch`.
        with_bias: whether ``dbias`` is wanted.

    Returns:
        ``dweight (E, N, C)`` and ``dbias (E, N)`` or None; no gradient. Zero for experts without rows.

    Raises:
        TypeError: an argument is no tensor or no dispatch, or dtypes do not fit.
        ValueError: shapes or devices do not fit.
    """
    check_dispatch(dispatch)
    check_shape("x", x, (dispatch.buffer_rows, None), "(R, C)")
    check_shape("dy", dy, (dispatch.buffer_rows, None), "(R, N)")
    backend = _backend.resolve("grouped_matmul", x)
    check_float("x", x, backend)
    check_same_dtype(x=x, dy=dy)
    check_same_device(x=x, dy=dy, dispatch=dispatch.slots)
    x, dy = x.detach(), dy.detach()
    if backend == "reference":
        ends = dispatch.offsets.tolist()
        spans = [slice(*span) for span in itertools.pairwise(ends)]
        dbias = torch.stack([dy[span].sum(0) for span in spans]) if with_bias else None
        return torch.stack([dy[span].T @ x[span] for span in spans]), dbias
    slots, offsets = dispatch.row_slots, dispatch.offsets
    dweight, dbias = _grouped_matmul_dweight(x, dy, slots, offsets, 0, 0, False, with_bias, backend)
    return dweight, dbias if with_bias else None


register_autograd("grouped_matmul", _backward, _setup_context)


def grouped_matmul(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedExpertWeight,
    dispatch: Dispatch,
    *,
    bias: torch.Tensor | None = None,
    x_grouped: bool = False,
    y_grouped: bool = False,
) -> torch.Tensor:
    """Multiply each assignment's row by its expert's weight: ``y[r] = x[g(r)] · weight[e(r)]ᵀ + bias[e(r)]``.

    Args:
        x: ``(T, C)`` in token order, or ``(R, C)`` in expert-sorted order when ``x_grouped``; R is
            :attr:`Dispatch.buffer_rows`.
        weight: ``(E, N, C)`` as in ``nn.Linear``; transposed storage ``(E, C, N)`` is given as
            ``weight.transpose(1, 2)`` and is not copied. Same dtype as ``x``. Or a frozen
            :class:`gossamer.QuantizedExpertWeight` of that shape, dequantised inside the kernel.
        dispatch: from :func:`gossamer.dispatch`, with the same T and E.
        bias: ``(E, N)`` or None, same dtype as ``x``.
        x_grouped: whether ``x`` is already sorted by expert.
        y_grouped: whether the result stays sorted by expert.

    Returns:
        ``(T, K, N)`` in slot order, or ``(R, N)`` sorted when ``y_grouped``; rows of dropped slots are zero, and give
        zero gradient. Accumulated in float32 (float64 for float64). Under ``torch.autocast`` in its dtype. With a
        quantised weight it is differentiable in ``x`` and ``bias``.

    Raises:
        TypeError: an argument is no tensor or no dispatch, a dtype is not supported, or dtypes differ.
        ValueError: shapes or devices do not fit each other or the dispatch; a part of a quantised weight requires a
            gradient.
    """
    check_tensor("x", x)
    check_dispatch(dispatch)
    backend = _backend.resolve("grouped_matmul", x)
    e = dispatch.num_experts
    operand = as_weight("weight", weight, (e, None, None), "(E, N, C)")
    n, c = weight.shape[1:]
    x_rows, symbols = (dispatch.buffer_rows, "(R, C)") if x_grouped else (dispatch.num_tokens, "(T, C)")
    check_shape("x", x, (x_rows, c), symbols)
    if bias is not None:
        check_shape("bias", bias, (e, n), "(E, N)")
    quantized = isinstance(weight, QuantizedExpertWeight)
    x, dense, bias = autocast(x, None if quantized else weight, bias)
    check_float("x", x, backend)
    _backend.check_served("grouped_matmul", backend, x, quantized)
    check_same_dtype(x=x, weight=dense, bias=bias)
    check_same_device(x=x, weight=operand.data, bias=bias, dispatch=dispatch.slots)
    if backend == "reference":
        weight = weight if quantized else dense
        return grouped_matmul_reference(x, weight, dispatch, bias=bias, x_grouped=x_grouped, y_grouped=y_grouped)
    if quantized:
        return quantized_grouped_matmul(x, weight, dispatch, bias, x_grouped, y_grouped, backend)
    x_div = 0 if x_grouped else dispatch.top_k
    slots = dispatch.row_slots if y_grouped else dispatch.slots
    y = _grouped_matmul(x, dense, bias, slots, dispatch.rows, dispatch.offsets, x_div, y_grouped, backend)
    return y if y_grouped else y.view(dispatch.num_tokens, dispatch.top_k, n)
