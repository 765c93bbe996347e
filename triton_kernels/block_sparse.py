"""Products with block-sparse matrices: dense results of one sparse operand, and sparse results of two dense ones.

Floor of either: 2·nnz·bm·bn·N floating-point operations, N the dimension that is not blocked; the blocks and their
indices once, both dense matrices once.

In both kernels the long side of a tile, the first of its accumulator, runs along what is cheap to widen: columns of the
dense operand, or neighbouring blocks of one block row. The other side is one block. So blocks of 16 rows still feed
matrix instructions that want 64, and a tile of one operand is used by as many columns as in a dense product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

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
    tile_coordinates,
)
from gossamer.triton_kernels.tiles import Tile

__all__ = ["aot_cases", "dsd", "dsd_tile", "sdd"]


def dsd_tile(n: int, bm: int, bn: int, itemsize: int, arch: int) -> Tile:
    """Tile of ``dsd``: ``block_m`` columns of the dense operand by a block's ``bm`` rows, ``block_k`` terms a step."""
    wide = 16
    while wide < min(n, 256):
        wide *= 2
    if itemsize == 4:
        # Without matrix instructions a tile lives on registers.
        return Tile(min(wide, 64, 4096 // bm), bm, 16, 4, 3)
    large = takes_large_tiles(arch)
    wide = min(wide, 256 if large else 128)
    # A block's index is loaded in the loop: indices run ahead of what they point to and take half of the stages.
    return Tile(wide, bm, 64, 8 if wide * bm >= 128 * 128 else 4, 8 if large else 6)


@triton.jit(do_not_specialize=["N", "num_rows"])
def _dsd_kernel(
    values,
    b,
    bias_ptr,
    y_ptr,
    offsets_ptr,
    indices_ptr,
    order_ptr,
    schedule_ptr,
    N,
    num_rows,
    b_part,
    y_part,
    stride_bp,
    stride_bk,
    stride_bn,
    stride_yp,
    stride_yr,
    stride_yn,
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
    # Rows with many blocks start first, whichever columns they are for, so that no long one is left at the end.
    n_tile, r = tile_coordinates(tl.program_id(0), tl.cdiv(N, BLOCK_N), num_rows, GROUP_N)
    row = tl.load(schedule_ptr + r)
    first = tl.load(offsets_ptr + row)
    last = tl.load(offsets_ptr + row + 1)
    n0 = n_tile * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    # Columns past the end are read from the tile's first and never stored, where that spares a mask.
    n_read = tl.where(n < N, n, n0) if B_BY_COLUMNS else n
    MASK: tl.constexpr = "none" if (B_BY_COLUMNS or EVEN_N) else "rows"
    m = tl.arange(0, BM)
    acc = tl.zeros((BLOCK_N, BM), tl.float32)
    if BN >= BLOCK_K:
        STEPS: tl.constexpr = BN // BLOCK_K
        for step in range(first * STEPS, last * STEPS):
            j = step // STEPS
            within = step % STEPS * BLOCK_K
            k0 = tl.load(indices_ptr + j) * BN + within
            place = j if order_ptr is None else tl.load(order_ptr + j)
            source, first_n = b, n0
            if b_part is not None:
                part = k0 // b_part
                k0 -= part * b_part
                if B_TMA:
                    # By columns the parts make one matrix of rows; what a tile reads of the next part is not stored.
                    first_n = n0 + part * N
                else:
                    source = b + part.to(tl.int64) * stride_bp
            k = k0 + tl.arange(0, BLOCK_K)
            x = load_operand(source, n_read, first_n, k, k0, N, stride_bn, stride_bk, B_TMA, B_BY_COLUMNS, MASK)
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
        # A step takes the terms of several blocks, whose columns lie apart.
        PER_STEP: tl.constexpr = BLOCK_K // BN
        kk = tl.arange(0, BLOCK_K)
        for j0 in range(first, last, PER_STEP):
            j = j0 + kk // BN
            inside = j < last
            column = tl.load(indices_ptr + j, inside, other=0)
            place = j if order_ptr is None else tl.load(order_ptr + j, inside, other=0)
            k = tl.max_contiguous(tl.multiple_of(column * BN + kk % BN, BN), BN)
            pointers = b + n_read.to(tl.int64)[:, None] * stride_bn
            if b_part is None:
                pointers += k.to(tl.int64)[None, :] * stride_bk
            else:
                part = tl.max_constancy(column * BN // b_part, BN)
                within = tl.max_contiguous(tl.multiple_of(k - part * b_part, BN), BN)
                pointers += (part.to(tl.int64) * stride_bp + within.to(tl.int64) * stride_bk)[None, :]
            mask = inside[None, :] if MASK == "none" else inside[None, :] & (n < N)[:, None]
            x = tl.load(pointers, mask, other=0.0)
            block = values + place.to(tl.int64)[:, None] * (BM * BN)
            if TRANSPOSED:
                w = tl.load(block + (kk % BN)[:, None] * BM + m[None, :], inside[:, None], other=0.0)
            else:
                w = tl.load(block + (kk % BN)[:, None] + m[None, :] * BN, inside[:, None], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    y = y_ptr + n.to(tl.int64) * stride_yn
    if y_part is None:
        y += (row * BM).to(tl.int64) * stride_yr
    else:
        part = row * BM // y_part
        y += part.to(tl.int64) * stride_yp + (row * BM - part * y_part).to(tl.int64) * stride_yr
    store_tile(acc, bias_ptr, y, row * BM, stride_yr, n, n < N, BIAS_ROWS, ACT, BLOCK_N, BM)


def dsd(
    values: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    topology: Sequence[torch.Tensor],
    transposed: bool,
    by_columns: bool,
    parts: int,
    activation: int,
) -> torch.Tensor:
    """``act(s·b + bias)`` for the block-sparse ``s`` or its transpose, stored column after column if ``by_columns``.

    ``topology`` is as ``gossamer.ops._block_sparse_operators.topology_tensors`` gives it; ``activation`` −1 is none.
    ``b`` is a matrix or ``(G, depth/G, N)``; the result too comes in ``parts`` parts where that is not 0.
    """
    row_offsets, column_indices, _, column_offsets, row_indices_t, order_t, row_schedule, column_schedule = topology[:8]
    values, b = values.contiguous(), unit_stride(merged(b, 0))
    nnz, bm, bn = values.shape
    offsets, indices, order, schedule = row_offsets, column_indices, None, row_schedule
    if transposed:
        offsets, indices, order, schedule = column_offsets, row_indices_t, order_t, column_schedule
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
        offsets,
        indices,
        order,
        schedule,
        n,
        num_rows,
        b.shape[1] if b_parts else None,
        height if y_parts else None,
        b.stride(0) if b_parts else None,
        *b.stride()[-2:],
        y.stride(0) if y_parts else None,
        *y.stride()[-2:],
        TRANSPOSED=transposed,
        VALUES_TMA=values_tma,
        B_TMA=b_tma,
        B_BY_COLUMNS=b_by_columns,
        # Of columns it means nothing, and n may be the number of tokens.
        EVEN_N=b_by_columns or n % tile.block_m == 0,
        BIAS_ROWS=by_columns,
        ACT=activation,
        PRECISION=dot_precision(b.dtype),
        BM=bm,
        BN=bn,
        BLOCK_N=tile.block_m,
        BLOCK_K=block_k,
        GROUP_N=tile.group_m,
        **tile.options(),
    )
    return y


_PARTS = ("b_part", "y_part", "stride_bp", "stride_yp")


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
    """One launch of ``dsd`` on many columns, stored by columns or by rows on both sides, in parts by columns."""
    bm, bn = block
    tile = dsd_tile(4096, bm, bn, dtype.itemsize, arch)
    tma = arch >= TMA_ARCH and bn >= tile.block_k
    signature = aot_signature(dtype, "values b y_ptr", "offsets_ptr indices_ptr schedule_ptr", "")
    signature |= {"N": "i32", "num_rows": "i32"}
    unit = {"stride_bk": 1, "stride_yr": 1} if by_columns else {"stride_bn": 1, "stride_yn": 1}
    signature |= {name: "i32:16" for name in ("stride_bk", "stride_bn", "stride_yr", "stride_yn") if name not in unit}
    constexprs = {
        "bias_ptr": None,
        "order_ptr": None,
        **({} if parts else dict.fromkeys(_PARTS)),
        **unit,
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
    if parts:
        signature |= dict.fromkeys(_PARTS, "i32:16")
    if transposed:
        del constexprs["order_ptr"]
        signature["order_ptr"] = "*i32:16"
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
