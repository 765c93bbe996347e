"""Products with block-sparse matrices: dense results of one sparse operand, and sparse results of two dense ones.

Floor of either: 2·nnz·bm·bn·N floating-point operations, with N the dimension that is not blocked; the blocks and their
indices, and both dense matrices, moved once.

In both kernels the long side of a tile, the first of its accumulator, runs along what is cheap to widen: columns of the
dense operand, or neighbouring blocks of one block row. The other side is one block. So blocks of 16 rows can feed
matrix instructions that need 64 rows, and a tile of one operand serves as many columns as in a dense product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from gossamer._activation import Activation
from gossamer._layout import merged, side_by_side, unit_stride
from gossamer.triton_kernels.block_sparse_sampled import sdd
from gossamer.triton_kernels.block_sparse_tile import (
    described,
    load_operand,
    store_tile,
    takes_large_tiles,
)
from gossamer.triton_kernels.common import (
    TMA_ARCH,
    aot_descriptor,
    aot_signature,
    arch_of,
    can_describe,
    describe,
    dot_precision,
    gate_code,
    tile_coordinates,
)
from gossamer.triton_kernels.tiles import Tile

if TYPE_CHECKING:
    from gossamer.ops._block_sparse_operators import BlockProduct

__all__ = ["aot_cases", "dsd", "dsd_tile", "sdd"]


def dsd_tile(n: int, bm: int, bn: int, itemsize: int, arch: int) -> Tile:
    """Tile of ``dsd``: ``block_m`` columns of the dense operand by ``bm`` rows of a block, ``block_k`` terms a step."""
    wide = 16
    while wide < min(n, 256):
        wide *= 2
    if itemsize == 4:
        # Without matrix instructions registers limit the tile.
        return Tile(min(wide, 64, 4096 // bm), bm, 16, 4, 3)
    large = takes_large_tiles(arch)
    wide = min(wide, 256 if large else 128)
    # Block indices are loaded in the loop before the blocks, and take half of the pipeline stages.
    return Tile(wide, bm, 64, 8 if wide * bm >= 128 * 128 else 4, 8 if large else 6)


class _Lists(NamedTuple):
    """The blocks list by list; ``order`` is None if the values have the same order."""

    offsets: torch.Tensor
    indices: torch.Tensor
    order: torch.Tensor | None
    schedule: torch.Tensor


class _Strides(NamedTuple):
    """Strides of the dense operand and the result; sizes of their parts and strides between them, None for a matrix."""

    b_part: int | None
    y_part: int | None
    bp: int | None
    bk: int
    bn: int
    yp: int | None
    yr: int
    yn: int


@triton.jit
def _clamp(index, size):
    """The nearest index in ``[0, size)``, since lists made by hand may hold anything."""
    return tl.maximum(tl.minimum(index, size - 1), 0)


@triton.jit(do_not_specialize=["N", "num_rows", "num_columns", "nnz"])
def _dsd_kernel(
    values,
    b,
    bias_ptr,
    y_ptr,
    lists,
    N,
    num_rows,
    num_columns,
    nnz,
    strides,
    TRANSPOSED: tl.constexpr,
    VALUES_TMA: tl.constexpr,
    B_TMA: tl.constexpr,
    B_BY_COLUMNS: tl.constexpr,
    EVEN_N: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    # Rows with many blocks start first, in all columns, so that no long row runs alone at the end.
    n_tile, r = tile_coordinates(tl.program_id(0), tl.cdiv(N, BLOCK_N), num_rows, GROUP_N)
    row = _clamp(tl.load(lists.schedule + r), num_rows)
    first = _clamp(tl.load(lists.offsets + row), nnz + 1)
    last = _clamp(tl.load(lists.offsets + row + 1), nnz + 1)
    n0 = n_tile * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    # For columns past the end the tile's first column is read, which saves a mask; they are never stored.
    n_read = tl.where(n < N, n, n0) if B_BY_COLUMNS else n
    MASK: tl.constexpr = "none" if (B_BY_COLUMNS or EVEN_N) else "rows"
    m = tl.arange(0, BM)
    acc = tl.zeros((BLOCK_N, BM), tl.float32)
    if BN >= BLOCK_K:
        STEPS: tl.constexpr = BN // BLOCK_K
        for step in range(first * STEPS, last * STEPS):
            j = step // STEPS
            within = step % STEPS * BLOCK_K
            k0 = _clamp(tl.load(lists.indices + j), num_columns) * BN + within
            place = j if lists.order is None else _clamp(tl.load(lists.order + j), nnz)
            source, first_n = b, n0
            if strides.b_part is not None:
                part = k0 // strides.b_part
                k0 -= part * strides.b_part
                if B_TMA:
                    # By columns the parts form one matrix of rows; values read from the next part are not stored.
                    first_n = n0 + part * N
                else:
                    source = b + part.to(tl.int64) * strides.bp
            k = k0 + tl.arange(0, BLOCK_K)
            x = load_operand(source, n_read, first_n, k, k0, N, strides.bn, strides.bk, B_TMA, B_BY_COLUMNS, MASK)
            k = within + tl.arange(0, BLOCK_K)
            if VALUES_TMA:
                if TRANSPOSED:
                    w = values.load([place * BN + within, 0])
                else:
                    w = tl.trans(values.load([place * BM, within]))
            else:
                block = values + place.to(tl.int64) * (BM * BN)
                if TRANSPOSED:
                    w = tl.load(block + k[:, None] * BM + m[None, :])
                else:
                    w = tl.load(block + k[:, None] + m[None, :] * BN)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    else:
        # A step takes terms of several blocks, whose columns are not adjacent.
        PER_STEP: tl.constexpr = BLOCK_K // BN
        kk = tl.arange(0, BLOCK_K)
        for j0 in range(first, last, PER_STEP):
            j = j0 + kk // BN
            inside = j < last
            column = _clamp(tl.load(lists.indices + j, inside, other=0), num_columns)
            place = j if lists.order is None else _clamp(tl.load(lists.order + j, inside, other=0), nnz)
            k = tl.max_contiguous(tl.multiple_of(column * BN + kk % BN, BN), BN)
            pointers = b + n_read.to(tl.int64)[:, None] * strides.bn
            if strides.b_part is None:
                pointers += k.to(tl.int64)[None, :] * strides.bk
            else:
                part = tl.max_constancy(column * BN // strides.b_part, BN)
                within = tl.max_contiguous(tl.multiple_of(k - part * strides.b_part, BN), BN)
                pointers += (part.to(tl.int64) * strides.bp + within.to(tl.int64) * strides.bk)[None, :]
            mask = inside[None, :] if MASK == "none" else inside[None, :] & (n < N)[:, None]
            x = tl.load(pointers, mask, other=0.0)
            block = values + place.to(tl.int64)[:, None] * (BM * BN)
            if TRANSPOSED:
                w = tl.load(block + (kk % BN)[:, None] * BM + m[None, :], inside[:, None], other=0.0)
            else:
                w = tl.load(block + (kk % BN)[:, None] + m[None, :] * BN, inside[:, None], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    y = y_ptr + n.to(tl.int64) * strides.yn
    if strides.y_part is None:
        y += (row * BM).to(tl.int64) * strides.yr
    else:
        part = row * BM // strides.y_part
        y += part.to(tl.int64) * strides.yp + (row * BM - part * strides.y_part).to(tl.int64) * strides.yr
    store_tile(acc, bias_ptr, y, row * BM, strides.yr, n, n < N, BIAS_ROWS, ACT, BLOCK_N, BM)


def dsd(args: BlockProduct) -> torch.Tensor:
    """``act(s·b + bias)`` for the block-sparse ``s`` or its transpose: ``(rows, N)``, or ``(parts, rows/parts, N)``."""
    topology, bias, parts, by_columns, transposed = (
        args.topology,
        args.bias,
        args.parts,
        args.by_columns,
        args.transposed,
    )
    values, b = args.values.contiguous(), unit_stride(merged(args.b, 0))
    nnz, bm, bn = values.shape
    schedule, num_columns = topology.row_schedule, topology.column_schedule.shape[0]
    lists = _Lists(topology.row_offsets, topology.column_indices, None, schedule)
    if transposed:
        schedule, num_columns = topology.column_schedule, schedule.shape[0]
        lists = _Lists(topology.column_offsets, topology.row_indices_t, topology.order_t, schedule)
        bm, bn = bn, bm
    num_rows, n = schedule.shape[0], b.shape[-1]
    lead, height = ((parts,), num_rows * bm // parts) if parts else ((), num_rows * bm)
    stored = torch.empty((*lead, n, height) if by_columns else (*lead, height, n), dtype=b.dtype, device=b.device)
    y = stored.mT if by_columns else stored
    if stored.numel() == 0:
        return y
    arch = arch_of(b)
    tile = dsd_tile(n, bm, bn, b.element_size(), arch)
    block_k = tile.block_k
    flat = values.view(nnz * values.shape[1], values.shape[2])
    gathered = bn < block_k
    values_tma = not gathered and can_describe(flat, arch)
    operand, b_tma, b_by_columns = b, False, b.stride(-2) == 1
    if not gathered and b.dim() == 2:
        operand, b_tma, b_by_columns = described(b.t(), (tile.block_m, block_k), arch)
    elif not gathered and b_by_columns and b.mT.is_contiguous():
        operand, b_tma, b_by_columns = described(side_by_side(b.mT, 0), (tile.block_m, block_k), arch)
    b_parts, y_parts = b.dim() == 3, parts > 0 and by_columns
    _dsd_kernel[(triton.cdiv(n, tile.block_m) * num_rows,)](
        describe(flat, [block_k, bm] if transposed else [bm, block_k]) if values_tma else values,
        operand,
        None if bias is None else bias.contiguous(),
        y,
        lists,
        n,
        num_rows,
        num_columns,
        nnz,
        _Strides(
            b.shape[1] if b_parts else None,
            height if y_parts else None,
            b.stride(0) if b_parts else None,
            *b.stride()[-2:],
            y.stride(0) if y_parts else None,
            *y.stride()[-2:],
        ),
        TRANSPOSED=transposed,
        VALUES_TMA=values_tma,
        B_TMA=b_tma,
        B_BY_COLUMNS=b_by_columns,
        # Kernels by columns do not read n, which may be the number of tokens; a constant saves compilations.
        EVEN_N=b_by_columns or n % tile.block_m == 0,
        BIAS_ROWS=by_columns,
        ACT=-1 if args.activation is None else gate_code(Activation(args.activation)),
        PRECISION=dot_precision(b.dtype),
        BM=bm,
        BN=bn,
        BLOCK_N=tile.block_m,
        BLOCK_K=block_k,
        GROUP_N=tile.group_m,
        **tile.options(),
    )
    return y


def _dsd_case(
    arch: int,
    dtype: torch.dtype,
    block: tuple[int, int],
    *,
    transposed: bool,
    by_columns: bool,
    parts: bool = False,
    act: int = -1,
) -> tuple:
    """One launch of ``dsd`` on many columns; both sides are stored by columns (then in parts) or by rows."""
    bm, bn = block
    tile = dsd_tile(4096, bm, bn, dtype.itemsize, arch)
    tma = arch >= TMA_ARCH and bn >= tile.block_k
    signature = aot_signature(dtype, "values b y_ptr", "", "")
    signature |= dict.fromkeys(("N", "num_rows", "num_columns", "nnz"), "i32")
    signature["lists"] = _Lists("*i32:16", "*i32:16", "*i32:16" if transposed else None, "*i32:16")
    part, wide = "i32:16" if parts else None, "i32:16"
    along, across = (1, wide) if by_columns else (wide, 1)
    signature["strides"] = _Strides(part, part, part, along, across, part, along, across)
    constexprs = {
        "bias_ptr": None,
        "TRANSPOSED": transposed,
        "VALUES_TMA": tma,
        "B_TMA": tma,
        "B_BY_COLUMNS": by_columns,
        "EVEN_N": True,
        "BIAS_ROWS": by_columns,
        "ACT": act,
        "PRECISION": "ieee",
        "BM": bm,
        "BN": bn,
        "BLOCK_N": tile.block_m,
        "BLOCK_K": tile.block_k,
        "GROUP_N": tile.group_m,
    }
    if act >= 0:
        del constexprs["bias_ptr"]
        signature |= aot_signature(dtype, "bias_ptr", "", "")
    if tma:
        signature["values"] = aot_descriptor(dtype, [tile.block_k, bm] if transposed else [bm, tile.block_k])
        wide = [tile.block_m, tile.block_k]
        signature["b"] = aot_descriptor(dtype, wide if by_columns else wide[::-1])
    return _dsd_kernel, signature, constexprs, tile.options()


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    half, single = torch.bfloat16, torch.float32
    return [
        _dsd_case(arch, half, (128, 128), transposed=False, by_columns=True, act=1),
        _dsd_case(arch, half, (64, 64), transposed=True, by_columns=True),
        _dsd_case(arch, half, (128, 128), transposed=True, by_columns=False),
        _dsd_case(arch, half, (32, 32), transposed=False, by_columns=True),
        _dsd_case(arch, half, (128, 128), transposed=False, by_columns=True, parts=True),
        _dsd_case(arch, single, (128, 128), transposed=False, by_columns=True),
    ]
