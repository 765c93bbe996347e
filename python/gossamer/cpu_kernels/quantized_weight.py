"""Launchers that turn frozen weights in few bits into floating point."""

from __future__ import annotations

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import DTYPES


def dequantize(
    data: torch.Tensor,
    state: tuple[torch.Tensor | None, ...],
    weight_format: str,
    block_sizes: tuple[int, int],
    n: int,
    c: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight ``(N, C)`` in ``dtype``: products in float32, rounded once.

    Args:
        data: the packed values.
        state: code, absmax or scale, nested_absmax, nested_code and offset, each None where there is none.
        weight_format: ``"nf4"``, ``"int8"`` or ``"fp8"``.
        block_sizes: elements to a scale, and scales to a nested one.
        n: rows.
        c: columns.
        dtype: float32, float16, bfloat16 or float64.
    """
    out = torch.empty(n, c, dtype=dtype)
    code, scale, *nested = (None if t is None else t.contiguous() for t in state)
    threads = torch.get_num_threads()
    if weight_format == "nf4":
        data = data.contiguous()
        nested_absmax, nested_code, offset = nested
        index, scales = (None, scale) if nested_absmax is None else (scale, nested_absmax)
        pointers = [0 if t is None else t.data_ptr() for t in (code, scales, index, nested_code, offset)]
        _C.dequantize_nf4(data.data_ptr(), *pointers, n * c, *block_sizes, out.data_ptr(), DTYPES[dtype], threads)
        return out
    fp8 = weight_format == "fp8"
    stride = 1 if scale.shape[0] == n else 0
    factor = 1.0 if fp8 else 1.0 / 127.0
    _C.dequantize_bytes(
        data.data_ptr(),
        n,
        c,
        *data.stride(),
        scale.data_ptr(),
        stride,
        factor,
        fp8,
        out.data_ptr(),
        DTYPES[dtype],
        threads,
    )
    return out
