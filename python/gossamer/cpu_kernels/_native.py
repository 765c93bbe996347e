"""The forms in which tensors are passed to ``gossamer._C``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from gossamer import _C
from gossamer._activation import Activation
from gossamer._panels import PANELS

if TYPE_CHECKING:
    from gossamer.ops._weights import Weight

# Codes of csrc/cpu/dtype.h.
DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int32: 4,
    torch.int64: 5,
    torch.int8: 6,
    torch.int16: 7,
}
# Stands in for a dtype code: scales are bytes that hold exponents of two.
E8M0 = -1


def pointer(tensor: torch.Tensor | None) -> int:
    """The address of a tensor; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def matrix(tensor: torch.Tensor | None) -> tuple[int, int, int, int]:
    """``(pointer, row stride, column stride, dtype code)`` of a 2-D tensor; pointer 0 for None."""
    if tensor is None:
        return 0, 0, 0, 0
    return tensor.data_ptr(), *tensor.stride(), DTYPES[tensor.dtype]


def vector(tensor: torch.Tensor | None) -> tuple[int, int, int]:
    """``(pointer, stride, dtype code)`` of a 1-D tensor; pointer 0 for None."""
    if tensor is None:
        return 0, 0, 0
    return tensor.data_ptr(), tensor.stride(0), DTYPES[tensor.dtype]


def unit_rows(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself if its last dimension is contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def groups(slots: torch.Tensor, offsets: torch.Tensor, num_slots: int) -> tuple[int, int, int, int, int]:
    """``(slots, offsets, R, E, number of slots)`` of a dispatch, whose tensors are contiguous int32."""
    return slots.data_ptr(), offsets.data_ptr(), slots.shape[0], offsets.shape[0] - 1, num_slots


def weights3(weight: torch.Tensor) -> tuple[int, int, int, int]:
    """``(pointer, expert stride, row stride, column stride)`` of ``weight (E, N, C)``."""
    return weight.data_ptr(), *weight.stride()


# A shift that maps every index to 0: as a column shift it means one scale per row, as a row shift too one for all.
_WHOLE_ROW = _ALL_ROWS = 62
# Stands in for a dtype code: scales are themselves codes (nested scales).
NESTED_SCALE = -2
_NO_BLOCKS = (0, 0, 0, 0, 0)
_LEAST_BLOCK = 32
# Products do not round rows of x to 8 bits, and codes do not lie in panels.
_AS_STORED = (False, False)


def quantized_stack(weight: Weight) -> tuple:
    """A quantised stack: format, data, scale, its dtype, ``(N, C)``, row and column shift, scales' size, blocks.

    The last item says whether products round rows to 8 bits, and whether codes lie in panels.
    """
    form, scale, (_, n, c) = weight.format, weight.scale, weight.shape
    if not (weight.data.is_contiguous() and scale.is_contiguous()):
        raise ValueError(
            f"data and scale of a quantised weight must be contiguous, got strides {weight.data.stride()} and "
            f"{scale.stride()}"
        )
    code = E8M0 if form == "mxfp4" else DTYPES[scale.dtype]
    if scale.dim() == 2:
        shifts, scales = (0, _WHOLE_ROW), (n, 1)
    else:
        shift = weight.group_size.bit_length() - 1
        shifts, scales = (shift if form == "fp8_block" else 0, shift), (scale.shape[1], scale.shape[2])
    how = weight.activations == "int8", weight.layout == PANELS
    return form, weight.data.data_ptr(), scale.data_ptr(), code, (n, c), shifts, scales, _NO_BLOCKS, how


def quantized_matrix(weight: Weight) -> tuple | None:
    """The same for a quantised matrix, as a stack of one; None for a layout that products cannot read in place."""
    scale, (n, c) = weight.scale, weight.shape
    if not (weight.data.is_contiguous() and scale.is_contiguous()):
        return None
    data, address = weight.data.data_ptr(), scale.data_ptr()
    if weight.format != "nf4":
        one = scale.shape[0] != n
        shifts = _ALL_ROWS if one else 0, _WHOLE_ROW
        scales = 1 if one else n, 1
        return weight.format, data, address, DTYPES[scale.dtype], (n, c), shifts, scales, _NO_BLOCKS, _AS_STORED
    code, nested_absmax, nested_code, offset, size, nested_size, _, _ = weight.blocks
    parts = [t for t in (code, nested_absmax, nested_code) if t is not None]
    # A row consists of whole blocks, and the smallest step of a product reads at most one block.
    fits = size >= _LEAST_BLOCK and size & (size - 1) == 0 and c % size == 0 and nested_size & (nested_size - 1) == 0
    if not fits or not all(t.is_contiguous() for t in parts):
        return None
    shifts, scales = (0, size.bit_length() - 1), (n, c // size)
    if nested_absmax is None:
        blocks = code.data_ptr(), 0, 0, 0, 0
        return "nf4", data, address, DTYPES[torch.float32], (n, c), shifts, scales, blocks, _AS_STORED
    nested = nested_code.data_ptr(), nested_absmax.data_ptr(), offset.data_ptr(), nested_size.bit_length() - 1
    return "nf4", data, address, NESTED_SCALE, (n, c), shifts, scales, (code.data_ptr(), *nested), _AS_STORED


def activation_form(activation: Activation, interleaved: bool) -> tuple[str, bool, bool, float, float]:
    """``(function of the gate, gated, interleaved, alpha, limit)`` of an expert layer's activation."""
    return activation.gate, activation.gated, interleaved, activation.alpha, activation.limit


# Freed blocks of at least a huge page are kept. The C library would return every block of 32 MiB, and two adjacent ones
# of 2 MiB, to the system, and the next step would pay for clearing their pages again.
REUSED_BYTES = 2 << 20


def empty_huge(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """``torch.empty``, but large tensors reuse freed blocks and are on huge pages if the system has them.

    First touching fresh pages is slow: they are cleared one by one. See :func:`gossamer.empty_cache`.
    """
    count = math.prod(shape)
    if count * dtype.itemsize < REUSED_BYTES:
        # Sizes are separate arguments, since torch takes twice as long to read a tuple.
        return torch.empty(*shape, dtype=dtype, device="cpu")
    tensor = torch.from_dlpack(_C.take_pages(count * dtype.itemsize)).view(dtype).view(shape)
    if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:
        tensor.fill_(math.nan)
    return tensor


def empty_gradient(shape: tuple[int, int, int], dtype: torch.dtype, transposed: bool) -> torch.Tensor:
    """An uninitialised gradient ``(E, N, C)``, a view of ``(E, C, N)`` storage when ``transposed``."""
    e, n, c = shape
    return empty_huge((e, c, n), dtype).transpose(1, 2) if transposed else empty_huge((e, n, c), dtype)
