"""Table rows stored as integer codes: ``row = scale · codes``, with one scale per row or one for the whole table.

A float32 w becomes the code of ``v = w/scale``, clipped to the range of the dtype: the nearest integer, halves to even,
or by stochastic rounding the one above ``⌊v⌋`` where the fraction of v exceeds ``(u div 2⁸)·2⁻²⁴`` with the uniform
32-bit u of :mod:`gossamer._rounding`. NaN becomes 0.
"""

from __future__ import annotations

import torch

from gossamer._checks import check_same_device, check_tensor

CODE_DTYPES = (torch.int8, torch.int16)
# Learned scales stay at or above this: a scale of zero would divide by zero.
LEAST_SCALE = 2.0**-20


def check_scale(table: torch.Tensor, scale: torch.Tensor) -> None:
    """Check that a table holds codes, and that ``scale`` holds one scale for all its rows or one for each."""
    check_tensor("scale", scale)
    if table.dtype not in CODE_DTYPES:
        raise TypeError(f"table must be int8 or int16 when scale is given, got {table.dtype}")
    if scale.dtype != torch.float32 or scale.layout is not torch.strided:
        raise TypeError(f"scale must be strided float32, got {scale.dtype} with layout {scale.layout}")
    if scale.dim() != 1 or (table.dim() and scale.shape[0] not in (1, table.shape[0])):
        rows = table.shape[0] if table.dim() else 0
        raise ValueError(f"scale must have shape (1,) or (N,) with N={rows}, got {tuple(scale.shape)}")
    if scale.requires_grad:
        raise ValueError("scale must not require a gradient: it is trained by scale_lr, if at all")
    check_same_device(table=table, scale=scale)


def scale_stride(scale: torch.Tensor) -> int:
    """Elements from the scale of one row to that of the next: 0 if all rows share one."""
    return scale.stride(0) if scale.shape[0] > 1 else 0


def scales_of(scale: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The scales ``(n, 1)`` of ``rows (n,)``, or ``(1, 1)`` if all rows share one."""
    return (scale if scale.shape[0] == 1 else scale.index_select(0, rows)).unsqueeze(1)


def decode(codes: torch.Tensor, scale: torch.Tensor | None, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values in ``dtype`` that ``codes (n, D)`` of ``rows (n,)`` stand for; without a scale, the codes
    themselves.
    """
    values = codes.to(dtype)
    return values if scale is None else values * scales_of(scale, rows)


def encode(
    x: torch.Tensor, scale: torch.Tensor | float, dtype: torch.dtype, bits: torch.Tensor | None = None
) -> torch.Tensor:
    """The codes of float32 ``x``: rounded stochastically by uniform 32-bit ``bits``, or without them to the nearest."""
    limits = torch.iinfo(dtype)
    v = x / scale
    v = torch.where(v.isnan(), 0, v).clamp(limits.min, limits.max)
    if bits is None:
        return v.round().to(dtype)
    whole = v.floor()
    return (whole + ((bits >> 8).float() * 2**-24 < v - whole)).to(dtype)


def scale_slope(w: torch.Tensor, grad: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``Σ_j g_j·δ_j`` of rows ``w (n, D)`` with gradients ``g``: the derivative of the loss in each row's scale.

    δ is the derivative of ``clip(round(v))·scale`` in the scale, at ``v = w/scale`` and with rounding differentiated as
    the identity: ``round(v) − v``, or the end of the range if v lies beyond it.
    """
    limits = torch.iinfo(dtype)
    v = w / scale
    beyond = v.clamp(limits.min, limits.max)
    return (grad * torch.where(beyond == v, v.round() - v, beyond)).sum(1)


def scale_rate(scale_lr: float, num_bags: int, dim: int, dtype: torch.dtype) -> float:
    """The distance that a scale moves for a slope of one: ``scale_lr / √(B·D·(2^(bits−1) − 1))``."""
    return scale_lr / max(num_bags * dim * torch.iinfo(dtype).max, 1) ** 0.5


def moved_scale(scale: torch.Tensor, slope: torch.Tensor, rate: float) -> torch.Tensor:
    """Scales after a step down their slopes; NaN stays NaN, so that a divergence shows."""
    return (scale - rate * slope).clamp(min=LEAST_SCALE)
