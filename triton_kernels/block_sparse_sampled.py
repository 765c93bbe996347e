"""Sparse results of two dense operands: the sampled half of the products in ``block_sparse``."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from gossamer._activation import Activation
from gossamer._layout import merged, unit_stride
from gossamer.triton_kernels.block_sparse_tile import (
    described,
    load_operand,
    store_tile,
    takes_large_tiles,
)
from gossamer.triton_kernels.common import TMA_ARCH, aot_descriptor, aot_signature, arch_of, dot_precision, gate_code
from gossamer.triton_kernels.tiles import Tile

if TYPE_CHECKING:
    from gossamer.ops._block_sparse_operators import SampledProduct

# Row offsets that a program of sdd compares at a time when it searches for its row.
SEARCH = 1024


def sdd_tile(bm: int, bn: int, itemsize: int, arch: int) -> Tile:
    """Tile of ``sdd``: a block's ``bm`` rows by ``block_m`` columns, which are part of a block or several of a row."""
    if itemsize == 4:
        return Tile(min(64, 4096 // bm), bm, 16, 4, 3)
    large = takes_large_tiles(arch)
    wide = 256 if large else 128
    return Tile(wide, bm, 64, 8 if wide * bm >= 128 * 128 else 4, 4 if large else 3)


class _Strides(NamedTuple):
    """Strides of the dense operands; size of the parts of b and the stride between them, None for a matrix."""

    am: int
    ak: int
    b_part: int | None
    bp: int | None
    bk: int
    bn: int


@triton.jit(do_not_specialize=["K", "nnz", "num_rows", "num_columns"])
def _sdd_kernel(
    a,
    b_ptr,
    bias_ptr,
    values_ptr,
    offsets_ptr,
    indices_ptr,
    K,
    nnz,
    num_rows,
    num_columns,
    strides,
    A_TMA: tl.constexpr,
    A_BY_ROWS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SEARCH_ROWS: tl.constexpr,
):
    # The list of blocks is cut at every multiple of BLOCKS and where a row ends. Row r begins with piece
    # offsets[r] // BLOCKS + r, which needs no table; a piece may be empty.
    piece = tl.program_id(0)
    # Hand-made lists may hold any index; loads outside the operands are masked.
    live = tl.maximum(tl.minimum(tl.load(offsets_ptr + num_rows), nnz), 0)
    row = -1
    for r0 in range(0, num_rows, SEARCH_ROWS):
        r = r0 + tl.arange(0, SEARCH_ROWS)
        start = tl.load(offsets_ptr + r, r < num_rows, other=0)
        row += tl.sum(((start // BLOCKS + r <= piece) & (r < num_rows)).to(tl.int32), 0)
    row = tl.maximum(row, 0)
    pieces = live // BLOCKS + num_rows
    g = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    m = tl.arange(0, BM)
    if piece < pieces:
        window = (piece - row) * BLOCKS
        j = window + g // BN
        first = tl.maximum(window, tl.maximum(tl.load(offsets_ptr + row), 0))
        last = tl.minimum(window + BLOCKS, tl.minimum(tl.load(offsets_ptr + row + 1), nnz))
        if first < last:
            inside = (j >= first) & (j < last)
            RUN: tl.constexpr = min(BN, WIDE)
            block = tl.load(indices_ptr + j, inside, other=0)
            column = tl.maximum(tl.minimum(block, num_columns - 1), 0) * BN + g % BN
            column = tl.max_contiguous(tl.multiple_of(column, RUN), RUN)
            rows = row * BM + m
            MASK: tl.constexpr = "none" if EVEN_K else "terms"
            offset = column.to(tl.int64) * strides.bn
            if strides.b_part is not None:
                # A run of columns lies in one part; without the hints its loads would not be vectorised.
                part = tl.max_constancy(column // strides.b_part, RUN)
                within = tl.max_contiguous(tl.multiple_of(column - part * strides.b_part, RUN), RUN)
                offset = part.to(tl.int64) * strides.bp + within.to(tl.int64) * strides.bn
            acc = tl.zeros((WIDE, BM), tl.float32)
            for k0 in range(0, K, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                x = load_operand(b_ptr, offset, 0, k, k0, K, 1, strides.bk, False, False, MASK)
                w = load_operand(a, rows, row * BM, k, k0, K, strides.am, strides.ak, A_TMA, A_BY_ROWS, MASK)
                acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
            out = values_ptr + j.to(tl.int64) * (BM * BN) + g % BN
            store_tile(acc, bias_ptr, out, row * BM, BN, column, inside, BIAS_ROWS, ACT, WIDE, BM)
    else:
        j = (live // BLOCKS + piece - pieces) * BLOCKS + g // BN
        out = values_ptr + j.to(tl.int64)[:, None] * (BM * BN) + (g % BN)[:, None] + m[None, :] * BN
        zero = tl.zeros((WIDE, BM), values_ptr.dtype.element_ty)
        tl.store(out, zero, ((j >= live) & (j < nnz))[:, None])


def sdd(args: SampledProduct) -> torch.Tensor:
    """``act(a·b + bias)`` at the blocks of a topology, ``(nnz, bm, bn)``; zero after the last block."""
    a, b, bias, topology, bm, bn = args[:6]
    nnz, num_rows = topology.column_indices.shape[0], topology.row_offsets.shape[0] - 1
    values = torch.empty(nnz, bm, bn, dtype=a.dtype, device=a.device)
    if nnz == 0:
        return values
    a, b = unit_stride(a), unit_stride(merged(b, 1))
    b_parts = b.dim() == 3
    arch = arch_of(a)
    tile = sdd_tile(bm, bn, a.element_size(), arch)
    blocks = max(1, tile.block_m // bn)
    operand, a_tma, a_by_rows = described(a, (bm, tile.block_k), arch)
    _sdd_kernel[(nnz // blocks + num_rows + 1, max(1, bn // tile.block_m))](
        operand,
        b,
        None if bias is None else bias.contiguous(),
        values,
        topology.row_offsets,
        topology.column_indices,
        a.shape[1],
        nnz,
        num_rows,
        topology.column_offsets.shape[0] - 1,
        _Strides(*a.stride(), b.shape[2] if b_parts else None, b.stride(0) if b_parts else None, *b.stride()[-2:]),
        A_TMA=a_tma,
        A_BY_ROWS=a_by_rows,
        EVEN_K=a.shape[1] % tile.block_k == 0,
        BIAS_ROWS=args.bias_rows,
        ACT=-1 if args.activation is None else gate_code(Activation(args.activation)),
        PRECISION=dot_precision(a.dtype),
        BM=bm,
        BN=bn,
        BLOCKS=blocks,
        WIDE=tile.block_m,
        BLOCK_K=tile.block_k,
        SEARCH_ROWS=min(SEARCH, triton.next_power_of_2(max(num_rows, 1))),
        **tile.options(),
    )
    return values


def _case(arch: int, dtype: torch.dtype, block: tuple[int, int], parts: bool = False, act: int = -1) -> tuple:
    """One launch of ``sdd``: a weight gradient, both operands contiguous across the sum."""
    bm, bn = block
    tile = sdd_tile(bm, bn, dtype.itemsize, arch)
    tma = arch >= TMA_ARCH
    signature = aot_signature(dtype, "a b_ptr values_ptr", "offsets_ptr indices_ptr", "")
    signature |= dict.fromkeys(("K", "nnz", "num_rows", "num_columns"), "i32")
    part, wide = "i32:16" if parts else None, "i32:16"
    signature["strides"] = _Strides(1, wide, part, part, wide, 1)
    constexprs = {
        "bias_ptr": None,
        "A_TMA": tma,
        "A_BY_ROWS": False,
        "EVEN_K": True,
        "BIAS_ROWS": False,
        "ACT": act,
        "PRECISION": "ieee",
        "BM": bm,
        "BN": bn,
        "BLOCKS": max(1, tile.block_m // bn),
        "WIDE": tile.block_m,
        "BLOCK_K": tile.block_k,
        "SEARCH_ROWS": 64,
    }
    if act >= 0:
        del constexprs["bias_ptr"]
        signature |= aot_signature(dtype, "bias_ptr", "", "")
    if tma:
        signature["a"] = aot_descriptor(dtype, [tile.block_k, bm])
    return _sdd_kernel, signature, constexprs, tile.options()


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    half, single = torch.bfloat16, torch.float32
    return [
        _case(arch, half, (128, 128), act=1),
        _case(arch, half, (128, 128), parts=True),
        _case(arch, half, (32, 32)),
        _case(arch, single, (128, 128)),
    ]
