"""Decode quantised weights: tile by tile inside a product, or as a whole.

A run is a power of two of adjacent elements that share a scale and begin at a multiple of it: a tile then loads one
scale for each of its runs, and a byte for each pair of four-bit elements.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.common import TRITON_NAMES

if TYPE_CHECKING:
    from gossamer.ops._weights import Weight

ROWS, COLUMNS = 16, 256


class Stored(NamedTuple):
    """A quantised weight as passed to kernels: pointers, strides and block sizes; None for those its format lacks."""

    data: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    code: torch.Tensor | None = None
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    stride_row: int | None = None
    stride_column: int | None = None
    stride_scale: int | None = None
    block_size: int | None = None
    nested_block_size: int | None = None


@triton.jit
def decode_fp8(bits):
    """Float32 of the e4m3 number ``bits``, on any hardware: the same bits are a float16 that is 2⁸ times smaller."""
    half = ((bits & 0x80).to(tl.uint16) << 8) | ((bits & 0x7F).to(tl.uint16) << 7)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _nf4_scale(stored, block, on):
    if stored.nested_absmax is not None:
        index = tl.load(stored.scale + block, on, other=0).to(tl.int32)
        coarse = tl.load(stored.nested_absmax + block // stored.nested_block_size, on, other=0.0)
        return tl.load(stored.nested_code + index) * coarse + tl.load(stored.offset)
    else:
        return tl.load(stored.scale + block, on, other=0.0)


@triton.jit
def load_tile(stored, row, column0, rows, columns, FORMAT: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr):
    """``[R, BLOCK]`` of a weight ``(rows, columns)`` from ``column0``, in float32; zeros outside."""
    R: tl.constexpr = row.shape[0]
    on_row = (row < rows)[:, None]
    row = row.to(tl.int64)[:, None]
    column = (column0 + tl.arange(0, BLOCK))[None, :]
    if FORMAT == "nf4":
        if RUN >= 2:
            pair = (column0 // 2 + tl.arange(0, BLOCK // 2))[None, :]
            byte = tl.load(stored.data + row * (columns // 2) + pair, on_row & (pair * 2 < columns), other=0x77)
            index = tl.reshape(tl.join(byte >> 4, byte & 15), (R, BLOCK))
        else:
            at = row * columns + column
            byte = tl.load(stored.data + at // 2, on_row & (column < columns), other=0x77)
            index = tl.where(at % 2 == 0, byte >> 4, byte & 15)
        value = tl.load(stored.code + index.to(tl.int32))
        first = (column0 + tl.arange(0, BLOCK // RUN) * RUN)[None, :]
        block = (row * columns + first) // stored.block_size
        scale = _nf4_scale(stored, block, on_row & (first < columns))
        if RUN == 1:
            return value * scale
        else:
            return tl.reshape(tl.reshape(value, (R, BLOCK // RUN, RUN)) * scale[:, :, None], (R, BLOCK))
    else:
        at = row * stored.stride_row + column.to(tl.int64) * stored.stride_column
        bits = tl.load(stored.data + at, on_row & (column < columns), other=0)
        scale = tl.load(stored.scale + row * stored.stride_scale, on_row, other=0.0)
        if FORMAT == "int8_absmax":
            return bits.to(tl.int8, bitcast=True).to(tl.float32) * (scale * (1.0 / 127.0))
        else:
            return decode_fp8(bits) * scale


@triton.jit
def _dequantize_kernel(
    stored,
    out_ptr,
    rows,
    columns,
    FORMAT: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column0 = tl.program_id(1) * COLUMNS
    value = load_tile(stored, row, column0, rows, columns, FORMAT, RUN, COLUMNS)
    column = column0 + tl.arange(0, COLUMNS)
    to = out_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(to, value.to(out_ptr.dtype.element_ty), (row < rows)[:, None] & (column < columns)[None, :])


def run_length(weight: Weight, columns: int, block: int) -> int:
    """The longest run in tiles of ``block`` columns; see the module. ``block`` if a whole row shares its scale."""
    return math.gcd(columns, weight.blocks.block_size, block) if weight.format == "nf4" else block


def stored(weight: Weight) -> Stored:
    """The arguments of kernels for a quantised weight."""
    scale = weight.scale.contiguous()
    if weight.format == "nf4":
        *parts, block_size, nested_block_size, _, _ = weight.blocks
        parts = [None if t is None else t.contiguous() for t in parts]
        sizes = {"block_size": block_size, "nested_block_size": nested_block_size}
        return Stored(weight.data.contiguous(), scale, *parts, **sizes)
    row, column = weight.data.stride()
    strides = {"stride_row": row, "stride_column": column, "stride_scale": int(scale.numel() > 1)}
    return Stored(weight.data.view(torch.uint8), scale, **strides)


def dequantize(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """The values of a quantised weight ``(N, C)`` in ``dtype``, not float64: products in float32, rounded once."""
    n, c = weight.shape
    out = torch.empty(n, c, dtype=dtype, device=weight.data.device)
    # The second grid dimension is at most 65535.
    _dequantize_kernel[(triton.cdiv(n, ROWS), triton.cdiv(c, COLUMNS))](
        stored(weight),
        out,
        n,
        c,
        FORMAT=weight.format,
        RUN=run_length(weight, c, COLUMNS),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )
    return out


def aot_weight(weight_format: str, block: int) -> tuple[Stored, dict[str, object]]:
    """The types of a quantised weight, and the constants that it sets in a kernel, for ahead-of-time compilation."""
    if weight_format == "nf4":
        pointers = ("*fp32:16",) * 4
        types = Stored("*u8:16", "*u8:16", *pointers, block_size="i32:16", nested_block_size="i32:16")
        return types, {"FORMAT": "nf4", "RUN": min(64, block)}
    types = Stored("*u8:16", "*fp32:16", stride_row="i32:16", stride_column=1, stride_scale=1)
    return types, {"FORMAT": weight_format, "RUN": block}


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    cases = []
    for weight_format in ("nf4", "int8_absmax", "fp8"):
        types, values = aot_weight(weight_format, COLUMNS)
        signature = {"out_ptr": f"*{TRITON_NAMES[torch.bfloat16]}:16", "stored": types}
        signature |= {"rows": "i32:16", "columns": "i32:16"}
        cases.append((_dequantize_kernel, signature, values | {"ROWS": ROWS, "COLUMNS": COLUMNS}, {"num_warps": 4}))
    return cases
