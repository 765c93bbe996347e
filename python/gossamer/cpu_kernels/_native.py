"""How tensors are handed to ``gossamer._C``."""

from __future__ import annotations

import torch

# Codes of csrc/cpu/dtype.h.
DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int32: 4,
    torch.int64: 5,
}


def matrix(tensor: torch.Tensor | None) -> tuple[int, int, int, int]:
    """``(pointer, row stride, column stride, dtype code)`` of a 2-D tensor; pointer 0 for None."""
    if tensor is None:
        return 0, 0, 0, 0
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1), DTYPES[tensor.dtype]


def vector(tensor: torch.Tensor | None) -> tuple[int, int, int]:
    """``(pointer, stride, dtype code)`` of a 1-D tensor; pointer 0 for None."""
    if tensor is None:
        return 0, 0, 0
    return tensor.data_ptr(), tensor.stride(0), DTYPES[tensor.dtype]


def unit_rows(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself when its last dimension is contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
