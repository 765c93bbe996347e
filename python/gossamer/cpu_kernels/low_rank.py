"""Launchers of the native linear layer with a low-rank update."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import (
    empty_gradient,
    groups,
    matrix,
    quantized_matrix,
    quantized_stack,
    unit_rows,
    vector,
)
from gossamer.cpu_kernels.quantized_weight import dequantize

if TYPE_CHECKING:
    from gossamer.ops._weights import Weight
    from gossamer.ops.low_rank import BaseLinear, LowRank, LowRankBackward

# The seed of a dropout mask and the smallest random word that is kept; None without dropout.
Mask = tuple[int, int] | None


# From this many rows on, torch's product was measured faster: along a weight's rows, along its columns, for its
# gradient.
_FROM_ROWS = {
    ("avx2", torch.float32): {"rows": 2048, "columns": 96, "gradient": 1},
    ("avx512_bf16", torch.bfloat16): {"rows": 256, "columns": math.inf, "gradient": 1},
    ("amx", torch.bfloat16): {"rows": 512, "columns": 1, "gradient": 1},
    ("amx", torch.float16): {"rows": 192, "columns": 1, "gradient": 1},
    # Intel processors, for which torch has Intel's own float32 products.
    ("amx", torch.float32): {"rows": 192, "columns": 1, "gradient": math.inf},
}


class Update(NamedTuple):
    """An update of a product ``x · weightᵀ``: ``factor · drop(left (M, r) · right (r, N))``.

    With ``a (r, D)``, ``left`` is not an input but a result, ``left_factor · x · aᵀ``.
    """

    left: torch.Tensor
    right: torch.Tensor
    factor: float
    mask: Mask = None
    a: torch.Tensor | None = None
    left_factor: float = 1.0


def _by_torch(dtype: torch.dtype, rows: int, product: str) -> bool:
    """Whether torch computes a product: one along a weight's ``"rows"`` or ``"columns"``, or its ``"gradient"``."""
    isa = _C.isa()
    if (isa, dtype) in _FROM_ROWS:
        return rows >= _FROM_ROWS[isa, dtype][product]
    # Kernels of older instruction sets convert bfloat16; torch multiplies it directly if the processor can.
    return isa == "generic" or (dtype == torch.bfloat16 and _C.multiplies_bfloat16())


def _mask(seed: torch.Tensor | None, dropout: float) -> tuple[Mask, float]:
    """The mask, and the factor of kept elements."""
    if seed is None:
        return None, 1.0
    return (int(seed) & (2**64 - 1), int(dropout * 2**32)), 1.0 / (1.0 - dropout)


def _dense(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    if weight.data.dim() == 3:
        return weight.dequantize(dtype)[0]
    return weight.data if weight.format == "dense" else dequantize(weight, dtype)


def _in_place(weight: Weight, dtype: torch.dtype, rows: int) -> tuple | None:
    """The form in which our product reads a quantised weight's codes; None if they are decoded to a matrix first."""
    if weight.format == "dense" or weight.data.numel() == 0:
        return None
    if weight.data.dim() == 3:
        return quantized_stack(weight)
    return None if _by_torch(dtype, rows, "rows") else quantized_matrix(weight)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor.to(dtype)``, but quicker if nothing changes."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _factor(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The factor of an update in the dtype of the products, contiguous."""
    return _cast(factor, dtype).contiguous()


def _rank_product(
    big: torch.Tensor,
    small: torch.Tensor,
    out: torch.Tensor,
    factor: float,
    mask: Mask = None,
    transposed: bool = False,
) -> torch.Tensor:
    """``out (R, r) = factor · drop(big (R, D)) · small (D, r)``; one stride of each matrix is 1."""
    if big.shape[1] == 0:
        return out.zero_()
    sizes = (*out.shape, big.shape[1])
    product = _C.RankProduct(sizes, matrix(big), matrix(small), matrix(out), factor, mask, transposed)
    _C.rank_product(product, torch.get_num_threads())
    return out


def _matmul(
    x: torch.Tensor, weight: Weight | torch.Tensor, bias: torch.Tensor | None, update: Update | None = None
) -> torch.Tensor:
    """``x · weightᵀ + bias``, plus the update if there is one."""
    quantized, (rows, depth) = None, x.shape
    if not isinstance(weight, torch.Tensor):
        quantized = _in_place(weight, x.dtype, rows)
        if quantized is None:
            weight = _dense(weight, x.dtype)
    # The fifth item of a quantised weight's form is (N, C).
    n = weight.shape[0] if quantized is None else quantized[4][0]
    # An empty sum is left to torch as well, since an empty x has no address.
    by_torch = quantized is None and (
        depth == 0 or _by_torch(x.dtype, rows, "rows" if weight.stride(-1) == 1 else "columns")
    )
    added = factor_a = None
    if update is not None:
        left, right, factor, mask, a, left_factor = update
        added = (left.shape[1], matrix(left), matrix(right), factor, mask)
        if a is not None and by_torch:
            _rank_product(x, a.T, left, left_factor)
        elif a is not None:
            factor_a = (matrix(a), left_factor)
    if by_torch:
        y = torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)
        if added is None:
            return y
    else:
        y = torch.empty(rows, n, dtype=x.dtype)
    # Passed by position: pybind11 takes a tenth of a microsecond longer for each argument passed by name.
    operands = matrix(None if by_torch else x), matrix(None if quantized else weight), quantized
    product = _C.LowRank((rows, n, depth), *operands, vector(bias), matrix(y), added, factor_a)
    _C.low_rank_matmul(product, torch.get_num_threads())
    return y


def _weight_gradient(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """``dyᵀ·x`` ``(N, C)``, as the weight gradient of one expert that has all rows."""
    x, dy = unit_rows(x), unit_rows(dy)
    (m, c), n = x.shape, dy.shape[1]
    dweight = empty_gradient((1, n, c), x.dtype, False)
    slots = torch.zeros(m, dtype=torch.int32)  # not followed; its length decides the number of threads
    offsets = torch.tensor([0, m], dtype=torch.int32)
    _C.grouped_matmul_dweight(
        groups=groups(slots, offsets, m),
        n=n,
        c=c,
        x=matrix(x),
        x_div=0,
        dy=matrix(dy),
        dy_div=0,
        dweight=dweight.data_ptr(),
        transposed=False,
        dbias=0,
        num_threads=torch.get_num_threads(),
    )
    return dweight[0]


def base_linear(args: BaseLinear) -> torch.Tensor:
    """``x·Wᵀ + bias``, by torch's product or the native one, whichever was measured faster."""
    return _matmul(unit_rows(args.x), args.weight, args.bias)


def low_rank_linear(args: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    """``y = x·Wᵀ + bias + scale·s·bᵀ`` ``(M, N)`` and ``s = drop(x)·aᵀ`` ``(M, r)``."""
    x, weight, bias, seed, dropout = args
    x = unit_rows(x)
    a, b, scale = _factor(weight.a, x.dtype), _factor(weight.b, x.dtype), weight.factor
    mask, keep = _mask(seed, dropout)
    s = torch.empty(x.shape[0], a.shape[0], dtype=x.dtype)
    if mask is not None:
        _rank_product(x, a.T, s, keep, mask)
        return _matmul(x, weight, bias, Update(s, b.T, scale)), s
    return _matmul(x, weight, bias, Update(s, b.T, scale, a=a)), s


def low_rank_linear_backward(args: LowRankBackward) -> dict[str, torch.Tensor]:
    """The gradients named in ``args.needs``."""
    dy, s, (x, weight, _, seed, dropout), needs, factor_dtype = args
    a, b, scale = weight.a, weight.b, weight.factor
    dy = unit_rows(dy)
    m, n = dy.shape
    mask, keep = _mask(seed, dropout)
    found = {}
    # float64 sums are written unrounded, and rounded at the end.
    sums = torch.promote_types(factor_dtype, dy.dtype)
    want_x, want_a = "x" in needs, "weight.a" in needs
    if want_x or want_a:
        b = _factor(b, dy.dtype)
        ds = torch.empty(m, b.shape[1], dtype=dy.dtype)
    if want_x:
        a = _factor(a, dy.dtype)
        dense = _dense(weight, dy.dtype)
        found["x"] = _matmul(dy, dense.T, None, Update(ds, a, keep, mask, b.T, scale))
    elif want_a:
        _rank_product(dy, b, ds, scale)
    if want_a:
        x = unit_rows(x)
        da = torch.empty(ds.shape[1], x.shape[1], dtype=sums)
        _rank_product(x.T, ds, da.T, keep, mask, transposed=True)
        found["weight.a"] = _cast(da, factor_dtype)
    if "weight.b" in needs:
        db = _rank_product(dy.T, s, torch.empty(n, s.shape[1], dtype=sums), scale)
        found["weight.b"] = _cast(db, factor_dtype)
    if "weight.data" in needs and _by_torch(dy.dtype, m, "gradient"):
        found["weight.data"] = torch.mm(dy.T, x)
    elif "weight.data" in needs:
        found["weight.data"] = _weight_gradient(x, dy)
    if "bias" in needs:
        found["bias"] = dy.sum(0)
    return found
