"""A linear layer with a low-rank update that is fused into the layer's product, forward and backward."""

from __future__ import annotations

import functools
import numbers
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F

from gossamer import _backend
from gossamer._autocast import autocast
from gossamer._checks import check_float, check_same_device, check_same_dtype, check_scale, check_shape, last_size
from gossamer._layout import with_leading_sizes
from gossamer.ops._philox import drop
from gossamer.ops._records import define, define_gradients
from gossamer.ops._weights import Weight, as_weight, round_rows
from gossamer.ops.quantized_expert_weight import QuantizedExpertWeight
from gossamer.ops.quantized_weight import Float8Weight, Int8Weight, NF4Weight, QuantizedWeight


def low_rank_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scale: float,
    bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`low_rank_linear` in plain torch, differentiable, in any floating dtype; ``seed`` as an int64 tensor."""
    dense = weight if isinstance(weight, torch.Tensor) else weight.dequantize(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    s = F.linear(drop(rows, dropout, seed), a.to(x.dtype))
    update = F.linear(s, b.to(x.dtype)).view(*x.shape[:-1], b.shape[0])
    return F.linear(x, dense, bias) + scale * update


def check_dropout(dropout: float, seed: int | torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """The seed of dropout as ``(1,)`` int64 on ``device``, drawn there when None; None without dropout."""
    if not isinstance(dropout, (float, numbers.Real, torch.SymFloat)):
        raise TypeError(f"dropout must be a number, got {dropout!r}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise ValueError(
                f"seed must be an int, or one int64 on {device}, got {tuple(seed.shape)} {seed.dtype} on {seed.device}"
            )
        return seed.reshape(1) if dropout else None
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise TypeError(f"seed must be an int, a tensor or None, got {type(seed).__name__}")
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit 64 bits, got {seed}")
    if not dropout:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def check_rank(rank: int, n: int, c: int) -> None:
    """A rank must lie between 1 and the smaller side of the matrix."""
    if not 1 <= rank <= min(n, c):
        raise ValueError(f"the rank of a and b must be in [1, min(N, C)] with N={n}, C={c}, got {rank}")


def check_factor_dtype(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, names: tuple[str, str] = ("a", "b")) -> None:
    """Check that ``a`` and ``b``, called ``names`` in messages, have one dtype: that of ``x`` or float32."""
    if b.dtype != a.dtype:
        raise TypeError(f"{names[1]} must have the dtype of {names[0]}, {a.dtype}, got {b.dtype}")
    if a.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{' and '.join(names)} must have the dtype of x, {x.dtype}, or torch.float32, got {a.dtype}")


class LowRank(NamedTuple):
    """Arguments of a linear layer with a low-rank update.

    Attributes:
        x: ``(M, C)`` float.
        weight: ``(N, C)`` with its update, whose factors have the dtype of ``x`` or float32.
        bias: ``(N,)`` or None.
        seed: of dropout, ``(1,)`` int64; None without dropout.
        dropout: in [0, 1).
    """

    x: torch.Tensor
    weight: Weight
    bias: torch.Tensor | None
    seed: torch.Tensor | None
    dropout: float


class LowRankBackward(NamedTuple):
    """Arguments of the backward pass.

    Attributes:
        dy: ``(M, N)``.
        s: ``drop(x)·aᵀ`` ``(M, r)``, for the gradient of b.
        forward: the tensors that the needed gradients read (x for weight and a; weight and a for x; b for x and a);
            else None.
        needs: names of the needed gradients, among :data:`GRADIENTS`.
        factor_dtype: of the gradients of a and b.
    """

    dy: torch.Tensor
    s: torch.Tensor | None
    forward: LowRank
    needs: list[str]
    factor_dtype: torch.dtype


# The differentiable arguments.
GRADIENTS = ("x", "weight.data", "weight.a", "weight.b", "bias")


@functools.cache
def _kernels(backend: str) -> ModuleType:
    if backend == "native":
        from gossamer.cpu_kernels import low_rank
    else:
        from gossamer.triton_kernels import low_rank
    return low_rank


def _forward(args: LowRank, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    return _kernels(backend).low_rank_linear(args)


def _forward_fake(args: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    x, rows = args.x, args.x.shape[0]
    return x.new_empty(rows, args.weight.b.shape[0]), x.new_empty(rows, args.weight.a.shape[0])


# y (M, N), and s = drop(x)·aᵀ (M, r) for the gradient of b.
_low_rank_linear = define(
    "low_rank_linear", LowRank, kernel=_forward, fake=_forward_fake, returns="(Tensor y, Tensor s)"
)


def _backward(args: LowRankBackward, backend: str) -> dict[str, torch.Tensor]:
    return _kernels(backend).low_rank_linear_backward(args)


def _backward_fake(args: LowRankBackward) -> dict[str, torch.Tensor]:
    dy, x, weight = args.dy, args.forward.x, args.forward.weight
    m, n = dy.shape
    shapes = {
        "x": lambda: (m, weight.a.shape[1]),
        "weight.data": lambda: (n, x.shape[1]),
        "weight.a": lambda: (weight.b.shape[1], x.shape[1]),
        "weight.b": lambda: (n, args.s.shape[1]),
        "bias": lambda: (n,),
    }
    dtypes = {"weight.a": args.factor_dtype, "weight.b": args.factor_dtype}
    return {name: dy.new_empty(shapes[name](), dtype=dtypes.get(name)) for name in args.needs}


_low_rank_linear_backward = define_gradients(
    "low_rank_linear_backward", LowRankBackward, GRADIENTS, kernel=_backward, fake=_backward_fake
)


def _save(ctx, args: LowRank, output: tuple[torch.Tensor, torch.Tensor]):
    needs, weight = ctx.needs, args.weight
    ctx.set_materialize_grads(False)
    ctx.factor_dtype = weight.a.dtype
    want_x, want_a = "x" in needs, "weight.a" in needs
    x = args.x if want_a or "weight.data" in needs else None
    b, seed = (weight.b, args.seed) if want_x or want_a else (None, None)
    kept = weight if want_x else Weight(None, b=b, factor=weight.factor)
    return LowRank(x, kept, None, seed, args.dropout), output[1] if "weight.b" in needs else None


def _differentiate(ctx, args: LowRank, tensors, dy: torch.Tensor | None, _):
    if dy is None:
        return {}
    needs = [name for name in GRADIENTS if name in ctx.needs]
    backward = LowRankBackward(dy, *tensors, args, needs, ctx.factor_dtype)
    return _low_rank_linear_backward(backward, ctx.backend)


_low_rank_linear.differentiate(_save, _differentiate)


class BaseLinear(NamedTuple):
    """Arguments of a linear layer.

    Attributes:
        x: ``(M, C)`` float.
        weight: ``(N, C)`` of any strides, or quantised; also a stack of one matrix.
        bias: ``(N,)`` or None.
    """

    x: torch.Tensor
    weight: Weight
    bias: torch.Tensor | None = None


def _base(args: BaseLinear, backend: str) -> torch.Tensor:
    return _kernels(backend).base_linear(args)


def _base_fake(args: BaseLinear) -> torch.Tensor:
    return args.x.new_empty(args.x.shape[0], args.weight.shape[-2])


_base_linear = define("base_linear", BaseLinear, kernel=_base, fake=_base_fake, returns="Tensor")


def _base_save(ctx, args: BaseLinear, output: torch.Tensor):
    x = args.x if "weight.data" in ctx.needs else None
    return (BaseLinear(x, args.weight if "x" in ctx.needs else Weight(None)),)


def _base_differentiate(ctx, args: BaseLinear, tensors, dy: torch.Tensor):
    found = {}
    if "x" in ctx.needs:
        found["x"] = _base_linear(BaseLinear(dy, Weight(_matrix(args.weight, dy.dtype).T)), ctx.backend)
    if "weight.data" in ctx.needs:
        found["weight.data"] = _base_linear(BaseLinear(dy.T, Weight(args.x.T)), ctx.backend)
    if "bias" in ctx.needs:
        found["bias"] = dy.sum(0)
    return found


_base_linear.differentiate(_base_save, _base_differentiate)


def _matrix(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """The values ``(N, C)`` of a weight or of a stack of one."""
    values = weight.dequantize(dtype)
    return values if values.dim() == 2 else values.squeeze(0)


def base_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight | QuantizedExpertWeight,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x·Wᵀ + bias`` as :func:`low_rank_linear` computes it: for few rows, faster than torch on the CPU.

    On the CPU codes are decoded within the product, so one row takes about the time of reading the codes once.

    Args:
        x: ``(M, C)`` float.
        weight: ``(N, C)``, the dtype of ``x``; or quantised, as for :func:`low_rank_linear` or as a
            :class:`gossamer.QuantizedExpertWeight` of one matrix, ``(1, N, C)``. Codes are frozen.
        bias: ``(N,)`` or None, the dtype of ``x``.

    Returns:
        ``(M, N)`` in the dtype of ``x``, under ``torch.autocast`` in its dtype; differentiable in ``x``, ``bias`` and a
        float ``weight``. It is not a view, because an in-place addition to a view makes autograd copy it.

    Raises:
        TypeError: dtypes differ.
        ValueError: the shape of a quantised ``weight`` does not fit ``x``, or it asks for a gradient.
    """
    if isinstance(weight, torch.Tensor):
        x, weight, bias = autocast(x, weight, bias)
        check_same_dtype(x=x, weight=weight, bias=bias)
        operand = Weight(weight)
    else:
        stacked = (1,) * (len(weight.shape) - 2)
        c = last_size("x", x, "(M, C)")
        operand = as_weight("weight", weight, (*stacked, None, c), "(1, N, C)" if stacked else "(N, C)")
        x, bias = autocast(x, bias)
        check_same_dtype(x=x, bias=bias)
        check_same_device(x=x, weight=operand.data, bias=bias)
    backend = _backend.resolve("low_rank", x)
    if operand.activations != "float" and (backend != "native" or x.dtype == torch.float64):
        rows = round_rows(x, operand)
        return F.linear(rows, _matrix(operand, rows.dtype), None if bias is None else bias.to(rows.dtype)).to(x.dtype)
    if backend != "native":
        return F.linear(x, _matrix(operand, x.dtype), bias)
    return _base_linear(BaseLinear(x, operand, bias), backend)


def low_rank_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scale: float,
    bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer with a low-rank update: ``y = x·Wᵀ + bias + scale·(drop(x)·Aᵀ)·Bᵀ``.

    This is LoRA (Hu et al., 2021); with a quantised ``weight``, QLoRA (Dettmers et al., 2023). The update is summed
    into the layer's own product, and likewise its part of the gradient of ``x``. Only ``x`` and ``drop(x)·Aᵀ`` ``(M,
    r)`` are saved for the backward pass, and only the needed gradients are computed.

    ``drop`` zeroes an element with probability ``dropout`` and divides the others by ``1 − dropout``. The mask is a
    function of the seed and the element's row and column by Philox4x32-10 (Salmon et al., 2011), the same on every
    device, computed again in the backward pass. Rows are those of ``x`` flattened to ``(M, C)``.

    Args:
        x: ``(..., C)`` float.
        weight: ``(N, C)``, the dtype of ``x``; or a frozen :class:`gossamer.NF4Weight`, :class:`gossamer.Int8Weight` or
            :class:`gossamer.Float8Weight` of that shape.
        a: ``(r, C)``, ``1 <= r <= min(N, C)``; the dtype of ``x``, or float32, which is rounded to it for the products
            while its gradient is not.
        b: ``(N, r)``, the dtype of ``a``.
        scale: the factor of the update, a number.
        bias: ``(N,)`` or None, the dtype of ``x``.
        dropout: in [0, 1); pass 0 outside training.
        seed: of the mask, an int or ``(1,)`` int64 on the device of ``x``, which a CUDA graph reads at each replay.
            None draws one from torch's generator of that device. Not used without dropout.

    Returns:
        ``(..., N)`` in the dtype of ``x``, accumulated in float32 (float64 for float64). Differentiable in ``x``,
        ``weight`` (unless quantised), ``a``, ``b`` and ``bias``. Under ``torch.autocast`` in its dtype.

    Raises:
        TypeError: an argument is not a tensor, a dtype is not supported or dtypes differ, or the kind of ``weight`` or
            ``seed`` is unknown.
        ValueError: shapes or devices do not fit, the rank is 0 or beyond the matrix, ``dropout`` is outside [0, 1), or
            ``scale`` is a tensor that requires a gradient, has several elements or lies on a GPU.
    """
    c = last_size("x", x, "(..., C)")
    scale = check_scale("scale", scale)
    quantized = isinstance(weight, (NF4Weight, Int8Weight, Float8Weight))
    if not quantized and not isinstance(weight, torch.Tensor):
        raise TypeError(
            "weight must be a torch.Tensor, NF4Weight, Int8Weight or Float8Weight, got " + type(weight).__name__
        )
    if quantized:
        operand = as_weight("weight", weight, (None, c), "(N, C)")
    else:
        check_shape("weight", weight, (None, c), "(N, C)")
    n = weight.shape[0]
    check_shape("a", a, (None, c), "(r, C)")
    rank = a.shape[0]
    check_shape("b", b, (n, rank), "(N, r)")
    check_rank(rank, n, c)
    if bias is not None:
        check_shape("bias", bias, (n,), "(N,)")
    dense = None if quantized else weight
    x, dense, a, b, bias = autocast(x, dense, a, b, bias)
    backend = _backend.resolve("low_rank", x)
    check_float("x", x, backend)
    check_same_dtype(x=x, weight=dense, bias=bias)
    check_factor_dtype(x, a, b)
    check_same_device(x=x, weight=weight.data if quantized else dense, a=a, b=b, bias=bias)
    seed = check_dropout(dropout, seed, x.device)
    if backend == "reference":
        return low_rank_linear_reference(
            x, weight if quantized else dense, a, b, scale=scale, bias=bias, dropout=dropout, seed=seed
        )
    operand = operand._replace(a=a, b=b, factor=scale) if quantized else Weight(dense, a=a, b=b, factor=scale)
    # A view would add a graph node, which costs up to ten microseconds forward and backward.
    rows = x if x.dim() == 2 else x.reshape(-1, c)
    y, _ = _low_rank_linear(LowRank(rows, operand, bias, seed, dropout), backend)
    return with_leading_sizes(y, x)
