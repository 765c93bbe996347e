"""Loading tiles of quantised expert weights: codes to values in registers, scales applied."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from gossamer.ops._weights import Weight

# Values of a kernel's FORMAT; DENSE is a weight in the dtype of the other operand.
DENSE, FP8, INT8, INT4, MXFP4 = 0, 1, 2, 3, 4
FORMAT_CODES = {"fp8": FP8, "fp8_block": FP8, "int8": INT8, "int4": INT4, "mxfp4": MXFP4}
# Architectures with an instruction that converts e4m3.
FP8_ARCH = 89


@triton.jit
def _fp8_values(code, NATIVE: tl.constexpr):
    """Convert e4m3 to float32; without the instruction, by moving bits and scaling, exact for subnormals too."""
    if NATIVE:
        return code.to(tl.float16).to(tl.float32)
    else:
        bits = code.to(tl.uint32)
        magnitude = bits & 0x7F
        # 2^120 is the difference of the two exponent biases.
        value = (magnitude << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
        value = tl.where(magnitude == 0x7F, float("nan"), value)
        return tl.where(bits >= 0x80, -value, value)


@triton.jit
def _e2m1_values(code):
    """Convert e2m1 to float32 in the same way, with a scale of 2^126."""
    bits = code.to(tl.uint32)
    return ((bits >> 3 << 31) | ((bits & 7) << 22)).to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def _e8m0_values(scale):
    """Convert e8m0 to float32; 0 is 2⁻¹²⁷, a subnormal number, and 255 is NaN."""
    bits = scale.to(tl.uint32)
    power = tl.where(bits == 0, 0x00400000, bits << 23)
    return tl.where(bits == 255, 0x7FC00000, power).to(tl.float32, bitcast=True)


@triton.jit
def quantized_tile(
    w,
    scale,
    expert,
    n0,
    c0,
    N,
    C,
    scale_rows,
    scale_columns,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_SHIFT: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``[ROWS, COLUMNS]`` float32 of expert ``expert`` of a contiguous stack ``(E, N, C)`` from row n0 and column c0.

    The scale of (n, c) is that of row ``n >> ROW_SHIFT`` and group ``c // GROUP``. GROUP 0 means one scale per row,
    which is applied only with ROW_SCALE. Zero outside the matrix.
    """
    n = n0 + tl.arange(0, ROWS)
    inside = n < N
    row = expert.to(tl.int64) * N + tl.where(inside, n, 0)
    if FORMAT == 1 or FORMAT == 2:
        c = c0 + tl.arange(0, COLUMNS)
        code = tl.load(w + row[:, None] * C + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        if FORMAT == 1:
            value = _fp8_values(code, NATIVE_FP8)
        else:
            value = code.to(tl.float32)
    else:
        c = c0 // 2 + tl.arange(0, COLUMNS // 2)
        code = tl.load(w + row[:, None] * (C // 2) + c[None, :], mask=inside[:, None] & (c < C // 2)[None, :], other=0)
        # The even column of a pair is in the low bits; join and reshape lay pairs side by side.
        code = tl.reshape(tl.join(code & 15, code >> 4), (ROWS, COLUMNS))
        if FORMAT == 3:
            value = code.to(tl.float32) - 8.0
        else:
            value = _e2m1_values(code)
    scale_row = scale + (expert.to(tl.int64) * scale_rows + (tl.where(inside, n, 0) >> ROW_SHIFT)) * scale_columns
    if GROUP == 0:
        if ROW_SCALE:
            value *= tl.load(scale_row, inside, other=0.0).to(tl.float32)[:, None]
    elif GROUP >= COLUMNS:
        # Tiles start at multiples of their width, so they lie inside one group.
        factor = tl.load(scale_row + c0 // GROUP, inside, other=0)
        factor = _e8m0_values(factor) if FORMAT == 4 else factor.to(tl.float32)
        value *= factor[:, None]
    else:
        group = c0 // GROUP + tl.arange(0, COLUMNS // GROUP)
        known = inside[:, None] & (group < scale_columns)[None, :]
        factor = tl.load(scale_row[:, None] + group[None, :], known, other=0)
        factor = _e8m0_values(factor) if FORMAT == 4 else factor.to(tl.float32)
        value = tl.reshape(value, (ROWS, COLUMNS // GROUP, GROUP)) * factor[:, :, None]
        value = tl.reshape(value, (ROWS, COLUMNS))
    return value


class Codes(NamedTuple):
    """The constants by which a kernel reads a weight: FORMAT and, if quantised, GROUP, ROW_SHIFT and NATIVE_FP8."""

    format: int = DENSE
    group: int = 0
    row_shift: int = 0
    native_fp8: bool = False


def codes_of(weight: Weight, arch: int) -> Codes:
    """The constants by which kernels read a stack."""
    if not weight.quantized:
        return Codes()
    group = 0 if weight.scale.dim() == 2 else weight.group_size
    row_shift = group.bit_length() - 1 if weight.format == "fp8_block" else 0
    return Codes(FORMAT_CODES[weight.format], group, row_shift, arch >= FP8_ARCH)


def stored_codes(weight: Weight, codes: Codes) -> torch.Tensor:
    """The data of a stack as passed to kernels; e4m3 as bytes on hardware that cannot convert it."""
    return weight.data.view(torch.uint8) if codes.format == FP8 and not codes.native_fp8 else weight.data
