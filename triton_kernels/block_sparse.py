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

from gossamer.triton_kernels.common import (
    TMA_ARCH,
    activation,
    aot_descriptor,
    aot_signature,
    arch_of,
    can_describe,
    column_halves,
    describe,
    dot_precision,
    tile_coordinates,
)
from gossamer.triton_kernels.launch import device_guard
from gossamer.triton_kernels.tiles import LEAST_SHARED_BYTES, Tile, shared_limit

# Offsets of block rows that a program of sdd looks at together when it looks for its own.
SEARCH = 1024


def _takes_large_tiles(arch: int) -> bool:
    """Whether an architecture has the matrix instructions and the shared memory for 256 columns at a time."""
    return arch >= 90 and shared_limit(arch) > LEAST_SHARED_BYTES


def dsd_tile(n: int, bm: int, bn: int, itemsize: int, arch: int) -> Tile:
    """Tile of ``dsd``: ``block_m`` columns of the dense operand by a block's ``bm`` rows, ``block_k`` terms a step."""
    wide = 16
    while wide < min(n, 256):
        wide *= 2
    if itemsize == 4:
        # Without matrix instructions a tile lives on registers.
        return Tile(min(wide, 64, 4096 // bm), bm, 16, 4, 3)
    large = _takes_large_tiles(arch)
    wide = min(wide, 256 if large else 128)
    # A block's index is loaded in the loop: indices run ahead of what they point to and take half of the stages.
    return Tile(wide, bm, 64, 8 if wide * bm >= 128 * 128 else 4, 8 if large else 6)


def sdd_tile(bm: int, bn: int, itemsize: int, arch: int) -> Tile:
    """Tile of ``sdd``: ``block_m`` columns, of a part of a block or of several of a row, by one block's ``bm`` rows."""
    if itemsize == 4:
        return Tile(min(64, 4096 // bm), bm, 16, 4, 3)
    large = _takes_large_tiles(arch)
    wide = 256 if large else 128
    return Tile(wide, bm, 64, 8 if wide * bm >= 128 * 128 else 4, 4 if large else 3)


@triton.jit
def load_operand(
    x, rows, row0, k, k0, limit, stride_row, stride_k, TMA: tl.constexpr, BY_ROWS: tl.constexpr, MASK: tl.constexpr
):
    """``[rows, terms]`` of a dense operand: by descriptor, of its transpose unless BY_ROWS, or at ``rows`` and ``k``.

    MASK is ``"rows"`` or ``"terms"`` where those from ``limit`` on are zero; ``"none"`` where all are there.
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
    """Stores an accumulator ``[COLUMNS, ROWS]``: those columns that are ``inside``, ``row`` and the rows after it."""
    if ACT >= 0 and COLUMNS * ROWS >= 256 * 128:
        # One part after the other, so that what they compute does not spill.
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
    stride_bk,
    stride_bn,
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
            x = load_operand(
                b, n_read, n0, k0 + tl.arange(0, BLOCK_K), k0, N, stride_bn, stride_bk, B_TMA, B_BY_COLUMNS, MASK
            )
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
            pointers = b + n_read.to(tl.int64)[:, None] * stride_bn + k.to(tl.int64)[None, :] * stride_bk
            mask = inside[None, :] if MASK == "none" else inside[None, :] & (n < N)[:, None]
            x = tl.load(pointers, mask, other=0.0)
            block = values + place.to(tl.int64)[:, None] * (BM * BN)
            if TRANSPOSED:
                w = tl.load(block + (kk % BN)[:, None] * BM + m[None, :], inside[:, None], other=0.0)
            else:
                w = tl.load(block + (kk % BN)[:, None] + m[None, :] * BN, inside[:, None], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    y = y_ptr + (row * BM).to(tl.int64) * stride_yr + n.to(tl.int64) * stride_yn
    store_tile(acc, bias_ptr, y, row * BM, stride_yr, n, n < N, BIAS_ROWS, ACT, BLOCK_N, BM)


@triton.jit(do_not_specialize=["K", "nnz", "num_rows"])
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
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
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
    live = tl.load(offsets_ptr + num_rows)
    row = -1
    for r0 in range(0, num_rows, SEARCH_ROWS):
        r = r0 + tl.arange(0, SEARCH_ROWS)
        start = tl.load(offsets_ptr + r, r < num_rows, other=0)
        row += tl.sum(((start // BLOCKS + r <= piece) & (r < num_rows)).to(tl.int32), 0)
    pieces = live // BLOCKS + num_rows
    g = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    m = tl.arange(0, BM)
    if piece < pieces:
        window = (piece - row) * BLOCKS
        j = window + g // BN
        first = tl.maximum(window, tl.load(offsets_ptr + row))
        last = tl.minimum(window + BLOCKS, tl.load(offsets_ptr + row + 1))
        if first < last:
            inside = (j >= first) & (j < last)
            RUN: tl.constexpr = min(BN, WIDE)
            column = tl.load(indices_ptr + j, inside, other=0) * BN + g % BN
            column = tl.max_contiguous(tl.multiple_of(column, RUN), RUN)
            rows = row * BM + m
            MASK: tl.constexpr = "none" if EVEN_K else "terms"
            acc = tl.zeros((WIDE, BM), tl.float32)
            for k0 in range(0, K, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                x = load_operand(b_ptr, column, 0, k, k0, K, stride_bn, stride_bk, False, False, MASK)
                w = load_operand(a, rows, row * BM, k, k0, K, stride_am, stride_ak, A_TMA, A_BY_ROWS, MASK)
                acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
            out = values_ptr + j.to(tl.int64) * (BM * BN) + g % BN
            store_tile(acc, bias_ptr, out, row * BM, BN, column, inside, BIAS_ROWS, ACT, WIDE, BM)
    else:
        j = (live // BLOCKS + piece - pieces) * BLOCKS + g // BN
        out = values_ptr + j.to(tl.int64)[:, None] * (BM * BN) + (g % BN)[:, None] + m[None, :] * BN
        zero = tl.zeros((WIDE, BM), values_ptr.dtype.element_ty)
        tl.store(out, zero, ((j >= live) & (j < nnz))[:, None])


def _unit_stride(operand: torch.Tensor) -> torch.Tensor:
    """``operand`` itself when its rows or columns are contiguous, else a copy."""
    return operand if 1 in operand.stride() else operand.contiguous()


def _described(operand: torch.Tensor, block: tuple[int, int], arch: int) -> tuple[object, bool, bool]:
    """A 2-D operand as a kernel takes it, by descriptor where that can be; whether it is; and whether by its rows."""
    by_rows = operand.stride(1) == 1
    stored, shape = (operand, list(block)) if by_rows else (operand.t(), [block[1], block[0]])
    if can_describe(stored, arch):
        return describe(stored, shape), True, by_rows
    return operand, False, by_rows


def dsd(
    values: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    topology: Sequence[torch.Tensor],
    transposed: bool,
    by_columns: bool,
    activation: int,
) -> torch.Tensor:
    """``act(s·b + bias)`` for the block-sparse ``s`` or its transpose, stored column after column if ``by_columns``.

    ``topology`` is as ``gossamer.ops._block_sparse_operators.topology_tensors`` gives it; ``activation`` −1 is none.
    """
    row_offsets, column_indices, _, column_offsets, row_indices_t, order_t, row_schedule, column_schedule = topology
    values, b = values.contiguous(), _unit_stride(b)
    nnz, bm, bn = values.shape
    offsets, indices, order, schedule = row_offsets, column_indices, None, row_schedule
    if transposed:
        offsets, indices, order, schedule = column_offsets, row_indices_t, order_t, column_schedule
        bm, bn = bn, bm
    num_rows, n = schedule.shape[0], b.shape[1]
    rows = num_rows * bm
    stored = torch.empty((n, rows) if by_columns else (rows, n), dtype=b.dtype, device=b.device)
    y = stored.t() if by_columns else stored
    if stored.numel() == 0:
        return y
    arch = arch_of(b)
    tile = dsd_tile(n, bm, bn, b.element_size(), arch)
    block_k = tile.block_k
    flat = values.view(nnz * values.shape[1], values.shape[2])
    gathered = bn < block_k
    values_tma = not gathered and can_describe(flat, arch)
    operand, b_tma, b_by_columns = (b.t(), False, b.stride(0) == 1)
    if not gathered:
        operand, b_tma, b_by_columns = _described(b.t(), (tile.block_m, block_k), arch)
    with device_guard(b.device):
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
            b.stride(0),
            b.stride(1),
            y.stride(0),
            y.stride(1),
            TRANSPOSED=transposed,
            VALUES_TMA=values_tma,
            B_TMA=b_tma,
            B_BY_COLUMNS=b_by_columns,
            EVEN_N=n % tile.block_m == 0,
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


def sdd(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    topology: Sequence[torch.Tensor],
    block: tuple[int, int],
    bias_rows: bool,
    activation: int,
) -> torch.Tensor:
    """``act(a·b + bias)`` at the blocks of a topology, ``(nnz, bm, bn)``, zero from the last block on.

    ``topology`` is as ``gossamer.ops._block_sparse_operators.topology_tensors`` gives it; ``activation`` −1 is none.
    """
    row_offsets, column_indices = topology[:2]
    (bm, bn), nnz, num_rows = block, column_indices.shape[0], row_offsets.shape[0] - 1
    values = torch.empty(nnz, bm, bn, dtype=a.dtype, device=a.device)
    if nnz == 0:
        return values
    a, b = _unit_stride(a), _unit_stride(b)
    arch = arch_of(a)
    tile = sdd_tile(bm, bn, a.element_size(), arch)
    blocks = max(1, tile.block_m // bn)
    operand, a_tma, a_by_rows = _described(a, (bm, tile.block_k), arch)
    with device_guard(a.device):
        _sdd_kernel[(nnz // blocks + num_rows + 1, max(1, bn // tile.block_m))](
            operand,
            b,
            None if bias is None else bias.contiguous(),
            values,
            row_offsets,
            column_indices,
            a.shape[1],
            nnz,
            num_rows,
            a.stride(0),
            a.stride(1),
            b.stride(0),
            b.stride(1),
            A_TMA=a_tma,
            A_BY_ROWS=a_by_rows,
            EVEN_K=a.shape[1] % tile.block_k == 0,
            BIAS_ROWS=bias_rows,
            ACT=activation,
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


_SIZES = "stride_bk stride_bn"


def _dsd_case(
    arch: int, dtype: torch.dtype, block: tuple[int, int], *, transposed: bool, by_columns: bool, act: int = -1
) -> tuple:
    """One launch of ``dsd`` on many columns, stored by columns or by rows on both sides."""
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


def _sdd_case(arch: int, dtype: torch.dtype, block: tuple[int, int], act: int = -1) -> tuple:
    """One launch of ``sdd``: a weight gradient, both operands contiguous across the sum."""
    bm, bn = block
    tile = sdd_tile(bm, bn, dtype.itemsize, arch)
    tma = arch >= TMA_ARCH
    signature = aot_signature(dtype, "a b_ptr values_ptr", "offsets_ptr indices_ptr", "stride_ak stride_bk")
    signature |= {"K": "i32", "nnz": "i32", "num_rows": "i32"}
    constexprs = {
        "bias_ptr": None,
        "stride_am": 1,
        "stride_bn": 1,
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
        _dsd_case(arch, half, (128, 128), transposed=False, by_columns=True, act=1),
        _dsd_case(arch, half, (64, 64), transposed=True, by_columns=True),
        _dsd_case(arch, half, (128, 128), transposed=True, by_columns=False),
        _dsd_case(arch, half, (32, 32), transposed=False, by_columns=True),
        _dsd_case(arch, single, (128, 128), transposed=False, by_columns=True),
        _sdd_case(arch, half, (128, 128), act=1),
        _sdd_case(arch, half, (32, 32)),
        _sdd_case(arch, single, (128, 128)),
    ]
