"""The forms in which tensors are passed to the products on Hopper GPUs.

The copy engine needs rows that start at multiples of 16 bytes. Other tensors are copied first, which sizes of real
models never need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer._layout import stored_transposed
from gossamer.cpu_kernels._native import groups as native_groups
from gossamer.cuda_kernels._stream import where

if TYPE_CHECKING:
    from gossamer.ops._groups import Groups

# Elements of 16 bits in 16 bytes.
ALIGNED = 8


def _lies_well(x: torch.Tensor) -> bool:
    return (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(s > 0 and s % ALIGNED == 0 and s * x.element_size() < 2**40 for s in x.stride()[:-1])
    )


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself if the copy engine can read it, else a copy with padded rows."""
    if _lies_well(x):
        return x
    width = x.shape[-1]
    padded = torch.empty(*x.shape[:-1], -(-width // ALIGNED) * ALIGNED, dtype=x.dtype, device=x.device)
    return padded[..., :width].copy_(x)


class Operands:
    """Turns tensors into arguments of ``gossamer._C``, and keeps copies alive until the launch."""

    def __init__(self, x: torch.Tensor) -> None:
        self.bfloat16 = x.dtype == torch.bfloat16
        self.device = x.device
        self._kept: list[torch.Tensor] = []

    def rows(self, x: torch.Tensor, div: int) -> tuple[int, int, int, int, int]:
        """``(pointer, rows, width, stride, divisor)``; sorted row ``r`` reads row ``r``, or ``slots[r] // div``."""
        x = _aligned(x)
        self._kept.append(x)
        return x.data_ptr(), *x.shape, x.stride(0), div

    def weight(self, weight: torch.Tensor) -> tuple[int, int, int, int, int, int, bool]:
        """``weight (E, N, C)`` as it is stored: pointer, sizes, strides, and whether storage is ``(E, C, N)``."""
        transposed = stored_transposed(weight)
        stored = _aligned(weight.transpose(1, 2) if transposed else weight)
        self._kept.append(stored)
        return stored.data_ptr(), *stored.shape, stored.stride(0), stored.stride(1), transposed

    def pointer(self, x: torch.Tensor | None) -> int:
        """Address of a contiguous copy of ``x``, or of ``x`` itself; 0 for None."""
        if x is None:
            return 0
        self._kept.append(x.contiguous())
        return self._kept[-1].data_ptr()

    def where(self) -> tuple[int, int]:
        """Index of the device, and its current stream."""
        return where(self.device)


def routing(groups: Groups) -> tuple[int, int, int, int, int]:
    """``(slots, offsets, R, E, T·K)`` of a dispatch, whose tensors are contiguous int32."""
    return native_groups(groups.slots, groups.offsets, groups.rows.shape[0])


def with_depth(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Operands of a product over C columns; for C = 0, one column of zeros, since the copy engine needs a column."""
    if x.shape[1] > 0:
        return x, weight
    return x.new_zeros(x.shape[0], 1), weight.new_zeros(*weight.shape[:2], 1)
