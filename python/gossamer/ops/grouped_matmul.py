"""Matrix products over ragged groups of rows, gathered and scattered inside the kernel."""

from __future__ import annotations

import functools
import itertools
from types import ModuleType
from typing import NamedTuple

import torch

from gossamer import _backend
from gossamer._autocast import autocast
from gossamer._checks import check_flag, check_float, check_same_device, check_same_dtype, check_shape, check_tensor
from gossamer._layout import stored_transposed
from gossamer.ops._groups import Groups
from gossamer.ops._records import define
from gossamer.ops._weights import Weight, as_weight, round_rows
from gossamer.ops.dispatch import Dispatch, check_dispatch, dx_rows
from gossamer.ops.gather_reduce import sum_slots
from gossamer.ops.quantized_expert_weight import QuantizedExpertWeight


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


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
        if weight.activations == "int8":
            rows, bias = round_rows(x, weight.operand()), None if bias is None else bias.to(_wide(x.dtype))
            wide = weight.dequantize(rows.dtype)
            form = {"x_grouped": x_grouped, "y_grouped": y_grouped}
            return grouped_matmul_reference(rows, wide, dispatch, bias=bias, **form).to(x.dtype)
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


class GroupedMatmul(NamedTuple):
    """Arguments of ``y[r] = x[g(r)] · weight[e(r)]ᵀ + bias[e(r)]``, where the bias is part of the weight.

    Attributes:
        x: ``(·, C)``, or ``(·, N)`` when ``transposed``.
        weight: ``(E, N, C)``.
        groups: rows by expert; rows after the last group become zero.
        x_div: row ``r`` reads row ``r`` of ``x`` when 0, else row ``slots[r] // x_div``: K in token order, 1 in slot
            order.
        y_grouped: rows of the result sorted by expert, else in slot order.
        transposed: whether the product is with ``weight[e(r)]`` itself, summed over N.
    """

    x: torch.Tensor
    weight: Weight
    groups: Groups
    x_div: int
    y_grouped: bool
    transposed: bool


class GroupedDweight(NamedTuple):
    """Arguments of ``dweight[e] = Σ dy[g(r)]ᵀ·x[g'(r)]`` and ``dbias[e] = Σ dy[g(r)]`` over the rows of each expert.

    Attributes:
        x: ``(·, C)``, read by ``x_div`` as in :class:`GroupedMatmul`.
        dy: ``(·, N)``, read by ``dy_div``.
        groups: rows by expert.
        x_div: see ``x``.
        dy_div: see ``dy``.
        transposed: whether ``dweight (E, N, C)`` is stored as ``(E, C, N)``.
        with_bias: whether ``dbias (E, N)`` is wanted.
    """

    x: torch.Tensor
    dy: torch.Tensor
    groups: Groups
    x_div: int
    dy_div: int
    transposed: bool
    with_bias: bool


@functools.cache
def _kernels(backend: str) -> ModuleType:
    if backend == "native":
        from gossamer.cpu_kernels import grouped_matmul
    elif backend == "triton":
        from gossamer.triton_kernels import grouped_matmul
    else:
        from gossamer.cuda_kernels import grouped_matmul
    return grouped_matmul


def _forward(args: GroupedMatmul, backend: str) -> torch.Tensor:
    return _kernels(backend).grouped_matmul(args)


def _forward_fake(args: GroupedMatmul) -> torch.Tensor:
    return args.x.new_empty(args.groups.slots.shape[0], args.weight.shape[2 if args.transposed else 1])


_grouped_matmul = define("grouped_matmul", GroupedMatmul, kernel=_forward, fake=_forward_fake, returns="Tensor")


def _dweight(args: GroupedDweight, backend: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    return _kernels(backend).grouped_matmul_dweight(args)


def _dweight_fake(args: GroupedDweight) -> tuple[torch.Tensor, torch.Tensor | None]:
    x, (e, n, c) = args.x, (args.groups.offsets.shape[0] - 1, args.dy.shape[1], args.x.shape[1])
    dweight = x.new_empty(e, c, n).transpose(1, 2) if args.transposed else x.new_empty(e, n, c)
    return dweight, x.new_empty(e, n) if args.with_bias else None


_grouped_matmul_dweight = define(
    "grouped_matmul_dweight",
    GroupedDweight,
    kernel=_dweight,
    fake=_dweight_fake,
    returns="(Tensor dweight, Tensor dbias)",
)


def _save(ctx, args: GroupedMatmul, output: torch.Tensor):
    weight = args.weight
    ctx.x_shape, ctx.stored_transposed = args.x.shape, stored_transposed(weight.data)
    if "x" not in ctx.needs:
        weight = weight._replace(data=None, scale=None)
    if weight.bias is not None:
        weight = weight._replace(bias=None)
    if "weight.data" in ctx.needs and weight is args.weight:
        return (args,)
    x = args.x if "weight.data" in ctx.needs else None
    return (GroupedMatmul(x, weight, args.groups, args.x_div, args.y_grouped, args.transposed),)


def _differentiate(ctx, args: GroupedMatmul, tensors, dy: torch.Tensor):
    groups, dy_div, gradients = args.groups, 0 if args.y_grouped else 1, {}
    if "x" in ctx.needs:
        # The same product with the weight transposed, followed by a sum over the rows that share a row of x.
        slots, summed = dx_rows(groups.slots, groups.rows, ctx.x_shape, args.x_div)
        grouped, of_dx = summed or args.x_div == 0, Groups(slots, groups.rows, groups.offsets)
        weight = args.weight._replace(activations="float")
        dx = _grouped_matmul(GroupedMatmul(dy, weight, of_dx, dy_div, grouped, not args.transposed), ctx.backend)
        if summed:
            dx = sum_slots(dx, groups.rows, groups.offsets, args.x_div, None, ctx.backend)
        gradients["x"] = dx
    with_bias = "weight.bias" in ctx.needs
    if "weight.data" in ctx.needs:
        product = GroupedDweight(args.x, dy, groups, args.x_div, dy_div, ctx.stored_transposed, with_bias)
        gradients["weight.data"], dbias = _grouped_matmul_dweight(product, ctx.backend)
        if with_bias:
            gradients["weight.bias"] = dbias
    elif with_bias:
        # Computed as a product with a column of ones: the bias gradient alone is rarely needed and has no kernel.
        ones = dy.new_ones(groups.slots.shape[0], 1)
        dbias, _ = _grouped_matmul_dweight(GroupedDweight(ones, dy, groups, 0, dy_div, False, False), ctx.backend)
        gradients["weight.bias"] = dbias.squeeze(-1)
    return gradients


_grouped_matmul.differentiate(_save, _differentiate)


def rows_by_weight(
    x: torch.Tensor, weight: Weight, dispatch: Dispatch, x_grouped: bool, y_grouped: bool, backend: str
) -> torch.Tensor:
    """``(R, N)`` of :func:`grouped_matmul` from checked arguments; rows in slot order unless ``y_grouped``."""
    if weight.activations != "float" and not _backend.rounds_rows(backend, "grouped_matmul", x):
        bias = None if weight.bias is None else weight.bias.to(_wide(x.dtype))
        exact = weight._replace(bias=bias, activations="float")
        return rows_by_weight(round_rows(x, weight), exact, dispatch, x_grouped, y_grouped, backend).to(x.dtype)
    x_div = 0 if x_grouped else dispatch.top_k
    groups = dispatch.groups if y_grouped else Groups(dispatch.slots, dispatch.rows, dispatch.offsets)
    return _grouped_matmul(GroupedMatmul(x, weight, groups, x_div, y_grouped, False), backend)


def grouped_matmul_dweight(
    x: torch.Tensor, dy: torch.Tensor, dispatch: Dispatch, *, with_bias: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Only the weight gradients of :func:`grouped_matmul`: ``dweight[e] = Σ_r dy[r]ᵀ·x[r]``, ``dbias[e] = Σ_r dy[r]``.

    Args:
        x: ``(R, C)``, sorted by expert; R is :attr:`Dispatch.buffer_rows`.
        dy: ``(R, N)``, sorted by expert; the dtype of ``x``.
        dispatch: from :func:`gossamer.dispatch`.
        with_bias: whether ``dbias`` is wanted.

    Returns:
        ``dweight (E, N, C)`` and ``dbias (E, N)`` or None; no gradient. Zero for experts without rows.

    Raises:
        TypeError: an argument is not a tensor or a dispatch, or dtypes do not fit.
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
    args = GroupedDweight(x, dy, dispatch.groups, 0, 0, False, with_bias)
    dweight, dbias = _grouped_matmul_dweight(args, backend)
    return dweight, dbias if with_bias else None


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
        TypeError: an argument is not a tensor or a dispatch, a dtype is not supported, or dtypes differ.
        ValueError: shapes or devices do not fit each other or the dispatch; a part of a quantised weight requires a
            gradient.
    """
    check_tensor("x", x)
    check_dispatch(dispatch)
    check_flag("x_grouped", x_grouped)
    check_flag("y_grouped", y_grouped)
    backend = _backend.resolve("grouped_matmul", x)
    e = dispatch.num_experts
    operand = as_weight("weight", weight, (e, None, None), "(E, N, C)").for_backend(backend)
    _, n, c = weight.shape
    x_rows, symbols = (dispatch.buffer_rows, "(R, C)") if x_grouped else (dispatch.num_tokens, "(T, C)")
    check_shape("x", x, (x_rows, c), symbols)
    if bias is not None:
        check_shape("bias", bias, (e, n), "(E, N)")
    quantized = operand.quantized
    x, values, bias = autocast(x, operand.values, bias)
    check_float("x", x, backend)
    _backend.check_served("grouped_matmul", backend, x, quantized)
    check_same_dtype(x=x, weight=values, bias=bias)
    check_same_device(x=x, weight=operand.data, bias=bias, dispatch=dispatch.slots)
    if backend == "reference":
        weight = weight if quantized else values
        return grouped_matmul_reference(x, weight, dispatch, bias=bias, x_grouped=x_grouped, y_grouped=y_grouped)
    y = rows_by_weight(x, operand.with_values(values, bias), dispatch, x_grouped, y_grouped, backend)
    return y if y_grouped else y.view(dispatch.num_tokens, dispatch.top_k, n)
