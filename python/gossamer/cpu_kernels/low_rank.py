"""Launchers of the native linear layer with a low-rank update."""

from __future__ import annotations

import math

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import matrix, unit_rows, vector
from gossamer.cpu_kernels.grouped_matmul import grouped_matmul_dweight
from gossamer.cpu_kernels.quantized_weight import dequantize

# Seed and least kept word of a dropout mask; None without dropout.
Mask = tuple[int, int] | None


# Rows from which torch's product measured faster than ours: along a weight's rows, its columns, and for its gradient.
_FROM_ROWS = {
    ("avx2", torch.float32): {"rows": 2048, "columns": 96, "gradient": 1},
    ("avx512_bf16", torch.bfloat16): {"rows": 256, "columns": math.inf, "gradient": 1},
    ("amx", torch.bfloat16): {"rows": 512, "columns": 1, "gradient": 1},
    ("amx", torch.float16): {"rows": 192, "columns": 1, "gradient": 1},
    # Of Intel, whose own library torch multiplies float32 with.
    ("amx", torch.float32): {"rows": 192, "columns": 1, "gradient": math.inf},
}


def _by_torch(dtype: torch.dtype, rows: int, product: str) -> bool:
    """Whether a product, along a weight's ``"rows"``, its ``"columns"`` or for its ``"gradient"``, is torch's."""
    isa = _C.isa()
    if (isa, dtype) in _FROM_ROWS:
        return rows >= _FROM_ROWS[isa, dtype][product]
    # Kernels of another instruction set convert bfloat16, which torch need not on a processor that multiplies it.
    return isa == "generic" or (dtype == torch.bfloat16 and _C.multiplies_bfloat16())


def _mask(seed: torch.Tensor | None, dropout: float) -> tuple[Mask, float]:
    """The mask, and what kept elements are multiplied with."""
    if seed is None:
        return None, 1.0
    return (int(seed) & (2**64 - 1), int(dropout * 2**32)), 1.0 / (1.0 - dropout)


def _dense(
    weight: torch.Tensor,
    state: tuple[torch.Tensor | None, ...],
    weight_format: str,
    block_sizes: tuple[int, int],
    n: int,
    c: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    if weight_format == "float":
        return weight
    return dequantize(weight, state, weight_format, block_sizes, n, c, dtype)


def _rank_product(
    big: torch.Tensor,
    small: torch.Tensor,
    out: torch.Tensor,
    factor: float,
    mask: Mask = None,
    transposed: bool = False,
) -> torch.Tensor:
    """``out (R, r) = factor · drop(big (R, D)) · small (D, r)``; one stride of each is 1."""
    if big.shape[1] == 0:
        return out.zero_()
    _C.rank_product(
        *big.shape,
        small.shape[1],
        matrix(big),
        matrix(small),
        matrix(out),
        factor,
        mask,
        transposed,
        torch.get_num_threads(),
    )
    return out


def _matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    left: torch.Tensor | None = None,
    right: torch.Tensor | None = None,
    factor: float = 1.0,
    mask: Mask = None,
    a: torch.Tensor | None = None,
    left_factor: float = 1.0,
) -> torch.Tensor:
    """``x · weightᵀ + bias + factor · drop(left · right)``, the last term where it is given.

    With ``a (r, D)``, ``left (M, r)`` is a result, ``left_factor · x · aᵀ``.
    """
    # An empty sum is torch's as well: an empty x has no address.
    by_torch = x.shape[1] == 0 or _by_torch(x.dtype, x.shape[0], "rows" if weight.stride(-1) == 1 else "columns")
    if by_torch:
        if a is not None:
            _rank_product(x, a.T, left, left_factor)
            a = None
        y = torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)
        if left is None:
            return y
    else:
        y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    _C.low_rank_matmul(
        x.shape[0],
        *weight.shape,
        0 if left is None else left.shape[1],
        matrix(None if by_torch else x),
        matrix(weight),
        vector(bias),
        matrix(a),
        matrix(left),
        matrix(right),
        matrix(y),
        factor,
        left_factor,
        mask,
        torch.get_num_threads(),
    )
    return y


def base_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x·Wᵀ + bias``, by whichever of torch's product and ours is the faster.

    Args:
        x: ``(M, C)`` float.
        weight: ``(N, C)`` of any strides, the dtype of ``x``.
        bias: ``(N,)`` or None.
    """
    return _matmul(unit_rows(x), weight, bias)


def low_rank_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    state: tuple[torch.Tensor | None, ...],
    weight_format: str,
    block_sizes: tuple[int, int],
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``y = x·Wᵀ + bias + scale·s·bᵀ`` with ``s = drop(x)·aᵀ``.

    Args:
        x: ``(M, C)`` float.
        weight: ``(N, C)`` of any strides, the dtype of ``x``; or the data of a quantised weight.
        state: code, absmax or scale, nested_absmax, nested_code and offset, which decode that; each may be None.
        weight_format: ``"float"``, ``"nf4"``, ``"int8"`` or ``"fp8"``.
        block_sizes: elements to a scale, and scales to a nested one.
        a: ``(r, C)``, the dtype of ``x`` or float32.
        b: ``(N, r)``, the dtype of ``a``.
        bias: ``(N,)`` or None.
        seed: ``(1,)`` int64, or None without dropout.
        scale: of the update.
        dropout: in [0, 1).

    Returns:
        ``y (M, N)`` and ``s (M, r)``.
    """
    x = unit_rows(x)
    a, b = (t.to(x.dtype).contiguous() for t in (a, b))
    mask, keep = _mask(seed, dropout)
    s = torch.empty(x.shape[0], a.shape[0], dtype=x.dtype)
    dense = _dense(weight, state, weight_format, block_sizes, b.shape[0], x.shape[1], x.dtype)
    if mask is not None:
        _rank_product(x, a.T, s, keep, mask)
        return _matmul(x, dense, bias, s, b.T, scale), s
    return _matmul(x, dense, bias, s, b.T, scale, a=a), s


def low_rank_linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    state: tuple[torch.Tensor | None, ...],
    weight_format: str,
    block_sizes: tuple[int, int],
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    s: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    dropout: float,
    factor_dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x, weight, a, b and bias, each None unless ``wanted``; see :func:`low_rank_linear`.

    Args:
        dy: ``(M, N)``.
        x: for the gradients of weight and a.
        weight: for that of x.
        state: with ``weight``.
        weight_format: with ``weight``.
        block_sizes: with ``weight``.
        a: for the gradient of x.
        b: for those of x and a.
        s: for that of b.
        seed: as in the forward pass.
        scale: as in the forward pass.
        dropout: as in the forward pass.
        factor_dtype: of the gradients of a and b.
        wanted: whether the gradients of x, weight, a, b and bias are.
    """
    want_x, want_weight, want_a, want_b, want_bias = wanted
    dy = unit_rows(dy)
    m, n = dy.shape
    mask, keep = _mask(seed, dropout)
    dx = dweight = da = db = dbias = None
    # Sums of float64 are written as such, and rounded at the end.
    sums = torch.promote_types(factor_dtype, dy.dtype)
    if want_x or want_a:
        b = b.to(dy.dtype).contiguous()
        ds = torch.empty(m, b.shape[1], dtype=dy.dtype)
    if want_x:
        a = a.to(dy.dtype).contiguous()
        dense = _dense(weight, state, weight_format, block_sizes, n, a.shape[1], dy.dtype)
        dx = _matmul(dy, dense.T, None, ds, a, keep, mask, b.T, scale)
    elif want_a:
        _rank_product(dy, b, ds, scale)
    if want_a:
        x = unit_rows(x)
        da = torch.empty(ds.shape[1], x.shape[1], dtype=sums)
        _rank_product(x.T, ds, da.T, keep, mask, transposed=True)
        da = da.to(factor_dtype)
    if want_b:
        db = _rank_product(dy.T, s, torch.empty(n, s.shape[1], dtype=sums), scale).to(factor_dtype)
    if want_weight and _by_torch(dy.dtype, m, "gradient"):
        dweight = torch.mm(dy.T, x)
    elif want_weight:
        slots = torch.empty(m, dtype=torch.int32)  # never read, but so many rows are worth their threads
        offsets = torch.tensor([0, m], dtype=torch.int32)
        dweight = grouped_matmul_dweight(x, dy, slots, offsets, 0, 0, False, False)[0][0]
    if want_bias:
        dbias = dy.sum(0)
    return dx, dweight, da, db, dbias
