"""Stochastic rounding by a counter-based generator: the bits depend only on (seed, step, row, column).

All arithmetic is modulo 2⁶⁴ or 2³², ``γ`` is ``0x9E3779B97F4A7C15``, and ``mix64`` and ``mix32`` are the functions of
this module::

    k = mix64(mix64(mix64(seed) + step·γ) + row·γ)
    u(column) = mix32((low32(k) + column·0x9E3779B9) XOR high32(k))

``step`` counts from 1, ``row`` is the row in its table (the linear row where there are many tables), and u a uniform
32-bit number. A float32 x becomes bfloat16 by adding ``u mod 2¹⁶`` to its bits and cutting off the low 16, float16 by
adding ``u mod 2¹³`` and cutting off 13; below 2⁻¹⁴, where float16 has a fixed grid, x in units of 2⁻²⁴ is rounded up,
in magnitude, where its fraction exceeds ``(u div 2⁸)·2⁻²⁴``. Infinity and NaN are kept.
"""

from __future__ import annotations

import torch

_LOW = 0xFFFFFFFF


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)


def _shift(z: torch.Tensor, by: int) -> torch.Tensor:
    return (z >> by) & (2 ** (64 - by) - 1)


def mix64(z: torch.Tensor) -> torch.Tensor:
    """Scramble 64-bit numbers held in int64."""
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def mix32(x: torch.Tensor) -> torch.Tensor:
    """Scramble 32-bit numbers held in the low half of int64."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _LOW
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _LOW
    return x ^ (x >> 15)


def random_bits(seed: int, step: torch.Tensor, rows: torch.Tensor, dim: int) -> torch.Tensor:
    """``u`` for each of ``rows`` and column: ``(len(rows), dim)`` int64 in ``[0, 2³²)``.

    Args:
        seed: in ``[0, 2⁶³)``.
        step: one int64 element.
        rows: ``(n,)`` int64.
        dim: columns.
    """
    key = mix64(torch.full((1,), seed, dtype=torch.int64, device=rows.device))
    key = mix64(mix64(key + step * _GOLDEN) + rows * _GOLDEN).unsqueeze(1)
    column = torch.arange(dim, device=rows.device) * 0x9E3779B9
    return mix32(((key + column) & _LOW) ^ _shift(key, 32))


def round_stochastically(x: torch.Tensor, bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float32 ``x`` rounded to ``dtype``, bfloat16 or float16, by ``bits`` of the same shape, as the module
    describes.
    """
    pattern = x.view(torch.int32).long() & _LOW
    if dtype == torch.bfloat16:
        rounded = ((pattern + (bits & 0xFFFF)) & 0xFFFF0000).to(torch.int32).view(torch.float32)
    else:
        rounded = ((pattern + (bits & 0x1FFF)) & 0xFFFFE000).to(torch.int32).view(torch.float32)
        grid = x.abs() * 2**24
        whole = grid.floor()
        up = (bits >> 8).float() * 2**-24 < grid - whole
        small = torch.copysign((whole + up) * 2**-24, x)
        rounded = torch.where(x.abs() < 2**-14, small, rounded)
    return torch.where(x.isfinite(), rounded, x).to(dtype)
