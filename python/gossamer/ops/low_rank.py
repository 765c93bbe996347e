"""A linear layer with a low-rank update: the update inside the layer's own product, forward and backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gossamer import _backend
from gossamer._autocast import autocast
from gossamer._checks import check_float, check_same_device, check_same_dtype, check_scale, check_shape, last_size
from gossamer.ops._philox import drop
from gossamer.ops._registration import register, register_autograd
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


def check_factor_dtype(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``a`` and ``b`` share one dtype, that of ``x`` or float32."""
    check_same_dtype(a=a, b=b)
    if a.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"a and b must have the dtype of x, {x.dtype}, or torch.float32, got {a.dtype}")


# What decodes a quantised weight: the attributes of NF4Weight, or the scales of the others as absmax.
_STATE = (
    "Tensor? code, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, str weight_format, "
    "int block_size, int nested_block_size"
)
_NO_STATE = (None, None, None, None, None, "float", 0, 0)
_FACTORS = "Tensor a, Tensor b, Tensor? bias, Tensor? seed, float scale, float dropout, str backend"


def _weight_parts(weight: QuantizedWeight) -> tuple:
    """The data of a quantised weight, and ``_STATE``."""
    state = weight.state if weight.format == "nf4" else [None, *weight.state]
    state += [None] * (5 - len(state))
    return weight.data, *state, weight.format, *(weight.block_sizes or (0, 0))


def _quantized(
    x,
    data,
    code,
    absmax,
    nested_absmax,
    nested_code,
    offset,
    weight_format,
    block_size,
    nested_block_size,
    a,
    b,
    bias,
    seed,
    scale,
    dropout,
    backend,
):
    state, block_sizes = (code, absmax, nested_absmax, nested_code, offset), (block_size, nested_block_size)
    return _backend.kernels(backend, "low_rank").low_rank_linear(
        x, data, state, weight_format, block_sizes, a, b, bias, seed, scale, dropout
    )


def _float(x, weight, *factors):
    return _quantized(x, weight, *_NO_STATE, *factors)


def _fake(x, *rest):
    a, b = rest[-7:-5]
    return x.new_empty(x.shape[0], b.shape[0]), x.new_empty(x.shape[0], a.shape[0])


# y (M, N), and s = drop(x)·aᵀ (M, r) for the gradient of b. A float weight has an operator of its own, because each
# argument takes host time in every call.
_low_rank_linear = register(
    f"low_rank_linear(Tensor x, Tensor weight, {_FACTORS}) -> (Tensor y, Tensor s)", _float, _fake
)
_low_rank_linear_quantized = register(
    f"low_rank_linear_quantized(Tensor x, Tensor data, {_STATE}, {_FACTORS}) -> (Tensor y, Tensor s)",
    _quantized,
    _fake,
)


def _gradients(
    dy,
    x,
    weight,
    code,
    absmax,
    nested_absmax,
    nested_code,
    offset,
    weight_format,
    block_size,
    nested_block_size,
    c,
    rank,
    a,
    b,
    s,
    seed,
    scale,
    dropout,
    factor_dtype,
    wanted,
    backend,
):
    state, block_sizes = (code, absmax, nested_absmax, nested_code, offset), (block_size, nested_block_size)
    found = _backend.kernels(backend, "low_rank").low_rank_linear_backward(
        dy, x, weight, state, weight_format, block_sizes, a, b, s, seed, scale, dropout, factor_dtype, wanted
    )
    return tuple(dy.new_empty(0) if gradient is None else gradient for gradient in found)


def _gradients_fake(dy, x, weight, *rest):
    c, rank = rest[8:10]
    factor_dtype, wanted = rest[-3:-1]
    m, n = dy.shape
    shapes = ((m, c), (n, c), (rank, c), (n, rank), (n,))
    dtypes = (dy.dtype, dy.dtype, factor_dtype, factor_dtype, dy.dtype)
    return tuple(
        dy.new_empty(shape, dtype=dtype) if want else dy.new_empty(0)
        for shape, dtype, want in zip(shapes, dtypes, wanted, strict=True)
    )


# The gradients of x, weight, a, b and bias, each empty unless wanted. What only unwanted ones need is None.
_low_rank_linear_backward = register(
    f"low_rank_linear_backward(Tensor dy, Tensor? x, Tensor? weight, {_STATE}, SymInt c, SymInt rank, Tensor? a, "
    "Tensor? b, Tensor? s, Tensor? seed, float scale, float dropout, ScalarType factor_dtype, bool[] wanted, "
    "str backend) -> (Tensor dx, Tensor dweight, Tensor da, Tensor db, Tensor dbias)",
    _gradients,
    _gradients_fake,
)


def _setup_context(ctx, inputs, output):
    x, weight, *state = inputs[:-7]
    a, b, bias, seed, ctx.scale, ctx.dropout, ctx.backend = inputs[-7:]
    *state, ctx.weight_format, ctx.block_size, ctx.nested_block_size = state or _NO_STATE
    factors = len(inputs) - 7
    want_x, want_weight = ctx.needs_input_grad[:2]
    want_a, want_b, want_bias = ctx.needs_input_grad[factors : factors + 3]
    ctx.wanted = [want_x, want_weight, want_a, want_b, bias is not None and want_bias]
    ctx.save_for_backward(
        x if want_weight or want_a else None,
        weight if want_x else None,
        *(state if want_x else _NO_STATE[:5]),
        a if want_x else None,
        b if want_x or want_a else None,
        output[1] if want_b else None,
        seed if want_x or want_a else None,
    )
    ctx.c, ctx.rank, ctx.factor_dtype, ctx.num_inputs = x.shape[1], a.shape[0], a.dtype, len(inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _):
    if dy is None:
        return (None,) * ctx.num_inputs
    saved = ctx.saved_tensors
    weight, factors = saved[:7], saved[7:]
    gradients = _low_rank_linear_backward(
        dy,
        *weight,
        ctx.weight_format,
        ctx.block_size,
        ctx.nested_block_size,
        ctx.c,
        ctx.rank,
        *factors,
        ctx.scale,
        ctx.dropout,
        ctx.factor_dtype,
        ctx.wanted,
        ctx.backend,
    )
    dx, dweight, da, db, dbias = (g if want else None for g, want in zip(gradients, ctx.wanted, strict=True))
    return dx, dweight, *[None] * (ctx.num_inputs - 9), da, db, dbias, None, None, None, None


for _name in ("low_rank_linear", "low_rank_linear_quantized"):
    register_autograd(_name, _backward, _setup_context)


def _base(x, weight, bias, backend):
    return _backend.kernels(backend, "low_rank").base_linear(x, weight, bias)


def _base_fake(x, weight, bias, backend):
    return x.new_empty(x.shape[0], weight.shape[0])


_base_linear = register("base_linear(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor", _base, _base_fake)


def _base_setup_context(ctx, inputs, output):
    x, weight, _, ctx.backend = inputs
    want_x, want_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if want_weight else None, weight if want_x else None)


def _base_backward(ctx, dy):
    x, weight = ctx.saved_tensors
    want_x, want_weight, want_bias = ctx.needs_input_grad[:3]
    dx = _base_linear(dy, weight.T, None, ctx.backend) if want_x else None
    dweight = _base_linear(dy.T, x.T, None, ctx.backend) if want_weight else None
    return dx, dweight, dy.sum(0) if want_bias else None, None


register_autograd("base_linear", _base_backward, _base_setup_context)


def base_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x·Wᵀ + bias`` as :func:`low_rank_linear` computes it: where rows are few, faster than torch on the CPU.

    Args:
        x: ``(M, C)`` float.
        weight: ``(N, C)``, the dtype of ``x``.
        bias: ``(N,)`` or None, the dtype of ``x``.

    Returns:
        ``(M, N)`` in the dtype of ``x``, under ``torch.autocast`` in its dtype; differentiable. It is no view, because
        autograd copies what is added in place to a view.

    Raises:
        TypeError: dtypes differ.
    """
    x, weight, bias = autocast(x, weight, bias)
    check_same_dtype(x=x, weight=weight, bias=bias)
    backend = _backend.resolve("low_rank", x)
    if backend != "native":
        return F.linear(x, weight, bias)
    return _base_linear(x, weight, bias, backend)


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
    into the layer's own product, and so is its part of the gradient of ``x``. The backward pass keeps ``x`` and
    ``drop(x)·Aᵀ`` ``(M, r)``; gradients that nobody wants are not computed.

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
        TypeError: an argument is no tensor, a dtype is not supported or dtypes differ, or the kind of ``weight`` or
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
        if len(weight.shape) != 2 or weight.shape[1] != c:
            raise ValueError(f"weight must have shape (N, C) = (any, {c}), got {tuple(weight.shape)}")
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
    # A view has a node of its own in the graph, which costs as much as ten microseconds each way.
    rows, factors = x if x.dim() == 2 else x.reshape(-1, c), (a, b, bias, seed, scale, dropout, backend)
    if quantized:
        y, _ = _low_rank_linear_quantized(rows, *_weight_parts(weight), *factors)
    else:
        y, _ = _low_rank_linear(rows, dense, *factors)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n)
