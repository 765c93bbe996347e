"""Frozen weights in few bits: tiles of them in floating point inside a product, and the whole of one.

A run is a power of two of adjacent elements that share a scale and begin at a multiple of it: a tile then loads one
scale for each of its runs, and a byte for each pair of four-bit elements.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.common import TRITON_NAMES

# Formats as kernels know them; FLOAT is none of them.
FLOAT, NF4, INT8, FP8 = (tl.constexpr(i) for i in range(4))
FORMATS = {"float": FLOAT, "nf4": NF4, "int8": INT8, "fp8": FP8}
ROWS, COLUMNS = 16, 256


@triton.jit
def decode_fp8(bits):
    """Float32 of the e4m3 number ``bits``, on any hardware: the same bits are a float16 that is 2⁸ times smaller."""
    half = ((bits & 0x80).to(tl.uint16) << 8) | ((bits & 0x7F).to(tl.uint16) << 7)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _nf4_scale(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, block, nested_block_size, on):
    if nested_absmax_ptr is not None:
        index = tl.load(absmax_ptr + block, on, other=0).to(tl.int32)
        coarse = tl.load(nested_absmax_ptr + block // nested_block_size, on, other=0.0)
        return tl.load(nested_code_ptr + index) * coarse + tl.load(offset_ptr)
    else:
        return tl.load(absmax_ptr + block, on, other=0.0)


@triton.jit
def load_tile(
    data_ptr,
    state,
    row,
    column0,
    rows,
    columns,
    stride_row,
    stride_column,
    stride_scale,
    block_size,
    nested_block_size,
    FORMAT: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``[R, BLOCK]`` of a weight ``(rows, columns)`` from ``column0``, in float32; zeros outside.

    ``state`` are pointers to code, absmax or scale, nested absmax, nested code and offset.
    """
    code_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr = state
    R: tl.constexpr = row.shape[0]
    on_row = (row < rows)[:, None]
    row = row.to(tl.int64)[:, None]
    column = (column0 + tl.arange(0, BLOCK))[None, :]
    if FORMAT == NF4:
        if RUN >= 2:
            pair = (column0 // 2 + tl.arange(0, BLOCK // 2))[None, :]
            byte = tl.load(data_ptr + row * (columns // 2) + pair, on_row & (pair * 2 < columns), other=0x77)
            index = tl.reshape(tl.join(byte >> 4, byte & 15), (R, BLOCK))
        else:
            at = row * columns + column
            byte = tl.load(data_ptr + at // 2, on_row & (column < columns), other=0x77)
            index = tl.where(at % 2 == 0, byte >> 4, byte & 15)
        value = tl.load(code_ptr + index.to(tl.int32))
        first = (column0 + tl.arange(0, BLOCK // RUN) * RUN)[None, :]
        block = (row * columns + first) // block_size
        on = on_row & (first < columns)
        scale = _nf4_scale(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, block, nested_block_size, on)
        if RUN == 1:
            return value * scale
        else:
            return tl.reshape(tl.reshape(value, (R, BLOCK // RUN, RUN)) * scale[:, :, None], (R, BLOCK))
    else:
        bits = tl.load(
            data_ptr + row * stride_row + column.to(tl.int64) * stride_column, on_row & (column < columns), other=0
        )
        scale = tl.load(absmax_ptr + row * stride_scale, on_row, other=0.0)
        if FORMAT == INT8:
            return bits.to(tl.int8, bitcast=True).to(tl.float32) * (scale * (1.0 / 127.0))
        else:
            return decode_fp8(bits) * scale


@triton.jit
def _dequantize_kernel(
    data_ptr,
    out_ptr,
    code_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    rows,
    columns,
    stride_row,
    stride_column,
    stride_scale,
    block_size,
    nested_block_size,
    FORMAT: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column0 = tl.program_id(1) * COLUMNS
    value = load_tile(
        data_ptr,
        (code_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr),
        row,
        column0,
        rows,
        columns,
        stride_row,
        stride_column,
        stride_scale,
        block_size,
        nested_block_size,
        FORMAT,
        RUN,
        COLUMNS,
    )
    column = column0 + tl.arange(0, COLUMNS)
    to = out_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(to, value.to(out_ptr.dtype.element_ty), (row < rows)[:, None] & (column < columns)[None, :])


def run_length(weight_format: str, columns: int, block_size: int, block: int) -> int:
    """The longest run in tiles of ``block`` columns; see the module. ``block`` where a row shares its scale."""
    return math.gcd(columns, block_size, block) if weight_format == "nf4" else block


def operands(
    data: torch.Tensor, state: tuple[torch.Tensor | None, ...], weight_format: str, block_sizes: tuple[int, int]
) -> tuple[torch.Tensor, list, dict[str, int]]:
    """What kernels take for a weight: bytes, the state, and strides and block sizes by argument name."""
    state = [None if t is None else t.contiguous() for t in state]
    scale = state[1]
    sizes = {"block_size": block_sizes[0], "nested_block_size": block_sizes[1]}
    if weight_format == "nf4":
        return data.contiguous(), state, {"stride_row": 0, "stride_column": 0, "stride_scale": 0, **sizes}
    strides = {"stride_row": data.stride(0), "stride_column": data.stride(1), "stride_scale": int(scale.numel() > 1)}
    return data.view(torch.uint8), state, strides | sizes


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
        dtype: float32, float16 or bfloat16.
    """
    out = torch.empty(n, c, dtype=dtype, device=data.device)
    data, state, numbers = operands(data, state, weight_format, block_sizes)
    # Of the second size of a grid there may be 65535.
    _dequantize_kernel[(triton.cdiv(n, ROWS), triton.cdiv(c, COLUMNS))](
        data,
        out,
        *state,
        n,
        c,
        **numbers,
        FORMAT=FORMATS[weight_format],
        RUN=run_length(weight_format, c, block_sizes[0], COLUMNS),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )
    return out


def aot_weight(weight_format: str, block: int) -> tuple[dict[str, str], dict[str, int | None]]:
    """Types and values of the arguments that a quantised weight gives a kernel, for ahead-of-time compilation."""
    signature = {"absmax_ptr": "*fp32:16"}
    constexprs = dict.fromkeys(("code_ptr", "nested_absmax_ptr", "nested_code_ptr", "offset_ptr"))
    if weight_format == "nf4":
        pointers = ("code_ptr", "nested_absmax_ptr", "nested_code_ptr", "offset_ptr")
        signature = dict.fromkeys(pointers, "*fp32:16") | {"absmax_ptr": "*u8:16"}
        signature |= {"block_size": "i32:16", "nested_block_size": "i32:16"}
        constexprs = {"stride_row": 0, "stride_column": 0, "stride_scale": 0}
        return signature, constexprs | {"FORMAT": FORMATS["nf4"].value, "RUN": min(64, block)}
    signature["stride_row"] = "i32:16"
    constexprs |= {"stride_column": 1, "stride_scale": 1, "block_size": 0, "nested_block_size": 0}
    return signature, constexprs | {"FORMAT": FORMATS[weight_format].value, "RUN": block}


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    cases = []
    for weight_format in ("nf4", "int8", "fp8"):
        types, values = aot_weight(weight_format, COLUMNS)
        signature = {"data_ptr": "*u8:16", "out_ptr": f"*{TRITON_NAMES[torch.bfloat16]}:16"} | types
        signature |= {"rows": "i32:16", "columns": "i32:16"}
        cases.append((_dequantize_kernel, signature, values | {"ROWS": ROWS, "COLUMNS": COLUMNS}, {"num_warps": 4}))
    return cases
