"""Launchers that decode quantised weights to floating point."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import DTYPES, pointer

if TYPE_CHECKING:
    from gossamer.ops._weights import Weight


def dequantize(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """The values ``(N, C)`` of a quantised weight in ``dtype``, float64 too: float32 products, rounded once."""
    shape = weight.shape
    out = torch.empty(shape, dtype=dtype)
    target = out.data_ptr(), DTYPES[dtype], torch.get_num_threads()
    data, scale = weight.data, weight.scale.contiguous()
    if weight.format == "nf4":
        data = data.contiguous()
        *parts, block_size, nested_block_size, _, _ = weight.blocks
        code, nested_absmax, nested_code, offset = (None if t is None else t.contiguous() for t in parts)
        # With double quantisation the scales are codes as well.
        single = nested_absmax is None
        args = _C.NF4Weight(
            packed=pointer(data),
            code=pointer(code),
            scales=pointer(scale if single else nested_absmax),
            nested_index=pointer(None if single else scale),
            nested_code=pointer(nested_code),
            offset=pointer(offset),
            count=out.numel(),
            block_size=block_size,
            nested_block_size=nested_block_size,
        )
        _C.dequantize_nf4(args, *target)
        return out
    args = _C.ByteWeight(
        values=data.data_ptr(),
        format=weight.format,
        sizes=shape,
        strides=data.stride(),
        scales=scale.data_ptr(),
        scale_stride=1 if scale.shape[0] == shape[0] else 0,
    )
    _C.dequantize_bytes(args, *target)
    return out
