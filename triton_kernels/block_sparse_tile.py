"""Shared by the products with block-sparse matrices: loads of dense operands, stores with bias and activation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.common import activation, can_describe, column_halves, describe
from gossamer.triton_kernels.tiles import LEAST_SHARED_BYTES, shared_limit


def takes_large_tiles(arch: int) -> bool:
    """Whether an architecture has the matrix instructions and the shared memory for 256 columns at a time."""
    return arch >= 90 and shared_limit(arch) > LEAST_SHARED_BYTES


@triton.jit
def load_operand(
    x, rows, row0, k, k0, limit, stride_row, stride_k, TMA: tl.constexpr, BY_ROWS: tl.constexpr, MASK: tl.constexpr
):
    """``[rows, terms]`` of a dense operand: by descriptor, of its transpose unless BY_ROWS, or at ``rows`` and ``k``.

    MASK is ``"rows"`` or ``"terms"`` if those from ``limit`` on are to be zero, and ``"none"`` if none are.
    """
    if TMA:
        if BY_ROWS:
            return x.load([row0, k0])
        else:
            return tl.trans(x.load([k0, row0]))
    else:
        pointers = x + rows.to(tl.int64)[:, None] * stride_row + k.to(tl.int64)[None, :] * stride_k
        if MASK == "rows":
            return tl.load(pointers, (rows < limit)[:, None], other=0.0)
        elif MASK == "terms":
            return tl.load(pointers, (k < limit)[None, :], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def _store_part(
    acc,
    bias_ptr,
    out,
    row,
    m0,
    stride_m,
    column,
    inside,
    BIAS_ROWS: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``acc [columns, ROWS]`` with its bias, through its activation, to ``out + m·stride_m`` for rows ``m0`` and on."""
    m = m0 + tl.arange(0, ROWS)
    if bias_ptr is not None:
        if BIAS_ROWS:
            acc += tl.load(bias_ptr + row + m).to(tl.float32)[None, :]
        else:
            acc += tl.load(bias_ptr + column, inside, other=0.0).to(tl.float32)[:, None]
    FAST: tl.constexpr = out.dtype.element_ty != tl.float32
    if ACT >= 0:
        acc, _ = activation(acc, 0.0, 0.0, ACT, FAST)
    tl.store(out[:, None] + m.to(tl.int64)[None, :] * stride_m, acc.to(out.dtype.element_ty), inside[:, None])


@triton.jit
def store_tile(
    acc,
    bias_ptr,
    out,
    row,
    stride_m,
    column,
    inside,
    BIAS_ROWS: tl.constexpr,
    ACT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Store an accumulator ``[COLUMNS, ROWS]`` to ``row`` and the rows after it, in the columns that are ``inside``."""
    if ACT >= 0 and COLUMNS * ROWS >= 256 * 128:
        # One part after the other, which avoids spills.
        left, right = column_halves(acc, COLUMNS, ROWS)
        a, b = column_halves(left, COLUMNS, ROWS // 2)
        c, d = column_halves(right, COLUMNS, ROWS // 2)
        PART: tl.constexpr = ROWS // 4
        _store_part(a, bias_ptr, out, row, 0, stride_m, column, inside, BIAS_ROWS, ACT, PART)
        _store_part(b, bias_ptr, out, row, PART, stride_m, column, inside, BIAS_ROWS, ACT, PART)
        _store_part(c, bias_ptr, out, row, 2 * PART, stride_m, column, inside, BIAS_ROWS, ACT, PART)
        _store_part(d, bias_ptr, out, row, 3 * PART, stride_m, column, inside, BIAS_ROWS, ACT, PART)
    else:
        _store_part(acc, bias_ptr, out, row, 0, stride_m, column, inside, BIAS_ROWS, ACT, ROWS)


def described(operand: torch.Tensor, block: tuple[int, int], arch: int) -> tuple[object, bool, bool]:
    """A 2-D operand as passed to a kernel, whether it is a descriptor, and whether that covers rows."""
    by_rows = operand.stride(1) == 1
    stored, shape = (operand, list(block)) if by_rows else (operand.t(), [block[1], block[0]])
    if can_describe(stored, arch):
        return describe(stored, shape), True, by_rows
    return operand, False, by_rows
