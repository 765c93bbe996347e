"""Skinny products over a rank: rows of activations times a factor, and the factors' gradients, without atomics.

Sums are cut into splits of fixed length that are added in order. Each product reads the activations once; if the rank
is small, the gradients of ``s`` and ``b`` share one pass. Floor: the activations' bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.common import TRITON_NAMES, aot_signature, dot_precision, multiprocessors, unit_columns

SUM_BLOCK = 1024
# Up to this rank a shared pass writes fewer bytes of partial sums than a second pass would read.
SHARED_PASS_RANK = 32
# Programs per multiprocessor, and the smallest share of a sum that is worth a program of its own.
PROGRAMS = 2
LEAST_DEPTH = 512


@triton.jit
def keep_mask(seed_ptr, row, column0, bound, COLUMNS: tl.constexpr):
    """``[rows, COLUMNS]``: which elements dropout keeps, in rows ``row`` from column ``column0``, a multiple of 4.

    Bit for bit the mask of :mod:`gossamer.ops._philox`; ``bound`` is its threshold less 2³¹, for a signed comparison.
    """
    row = row.to(tl.int64)[:, None]
    group = (column0 // 4 + tl.arange(0, COLUMNS // 4))[None, :]
    zero = tl.zeros((row.shape[0], COLUMNS // 4), tl.uint32)
    c0, c1, c2, c3 = tl.philox(
        tl.load(seed_ptr), zero + group.to(tl.uint32), zero, zero + row.to(tl.uint32), zero + (row >> 32).to(tl.uint32)
    )
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    words = tl.reshape(words, (row.shape[0], COLUMNS))
    return (words ^ 0x80000000).to(tl.int32, bitcast=True) >= bound


@triton.jit(do_not_specialize=["rows", "blocks", "bound"])
def _row_products_kernel(
    big_ptr,
    small_ptr,
    out_ptr,
    seed_ptr,
    rows,
    depth,
    rank,
    blocks,
    factor,
    bound,
    stride_big,
    stride_small_k,
    stride_small_j,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``out[split, m, j] = factor · Σ drop(big[m, k]) · small(k, j)`` over the split's ``blocks`` blocks of terms."""
    split = tl.program_id(2)
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    # Counted in blocks, so that the compiler knows the alignment of terms.
    last = tl.minimum((split + 1) * blocks, tl.cdiv(depth, BLOCK_K))
    big_rows = big_ptr + tl.where(r < rows, r, 0).to(tl.int64)[:, None] * stride_big
    small_columns = small_ptr + tl.where(j < rank, j, 0).to(tl.int64)[None, :] * stride_small_j
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for block in range(split * blocks, last):
        k0 = block * BLOCK_K
        k = k0 + tl.arange(0, BLOCK_K)
        tile = tl.load(big_rows + k[None, :], mask=k[None, :] < depth, other=0.0)
        if seed_ptr is not None:
            tile = tl.where(keep_mask(seed_ptr, r, k0, bound, BLOCK_K), tile, 0.0).to(tile.dtype)
        small = tl.load(small_columns + k.to(tl.int64)[:, None] * stride_small_k, mask=k[:, None] < depth, other=0.0)
        acc = tl.dot(tile, small, acc, input_precision=PRECISION)
    to = out_ptr + (split.to(tl.int64) * rows + r)[:, None] * rank + j[None, :]
    tl.store(to, (acc * factor).to(out_ptr.dtype.element_ty), (r < rows)[:, None] & (j < rank)[None, :])


@triton.jit(do_not_specialize=["rows", "blocks", "bound"])
def _column_products_kernel(
    big_ptr,
    small_ptr,
    out_ptr,
    right_ptr,
    row_out_ptr,
    seed_ptr,
    rows,
    columns,
    rank,
    blocks,
    factor,
    bound,
    stride_big,
    stride_split,
    stride_out_n,
    stride_out_j,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``out[split, n, j] = factor · Σ drop(big[m, n]) · small[m, j]`` over the split's ``blocks`` blocks of rows.

    With ``right (columns, rank)``, for which all of the rank must lie in one block, each block of columns also stores
    ``row_out[block, m, j] = factor · Σ big[m, n] · right[n, j]`` over its own columns.
    """
    split = tl.program_id(2)
    n0 = tl.program_id(0) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    j = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    last = tl.minimum((split + 1) * blocks, tl.cdiv(rows, BLOCK_M))
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    inside = (n < columns)[:, None] & (j < rank)[None, :]
    if right_ptr is not None:
        right = tl.load(right_ptr + n.to(tl.int64)[:, None] * rank + j[None, :], inside, other=0.0)
    for block in range(split * blocks, last):
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        on = m < rows
        at = m.to(tl.int64)[:, None]
        tile = tl.load(big_ptr + at * stride_big + n[None, :], on[:, None] & (n < columns)[None, :], other=0.0)
        if seed_ptr is not None:
            tile = tl.where(keep_mask(seed_ptr, m, n0, bound, BLOCK_N), tile, 0.0).to(tile.dtype)
        small = tl.load(small_ptr + at * rank + j[None, :], on[:, None] & (j < rank)[None, :], other=0.0)
        acc = tl.dot(tl.trans(tile), small, acc, input_precision=PRECISION)
        if right_ptr is not None:
            product = tl.dot(tile, right, input_precision=PRECISION) * factor
            to = row_out_ptr + (tl.program_id(0).to(tl.int64) * rows + at) * rank + j[None, :]
            tl.store(to, product, on[:, None] & (j < rank)[None, :])
    to = out_ptr + split.to(tl.int64) * stride_split + n.to(tl.int64)[:, None] * stride_out_n
    to += j.to(tl.int64)[None, :] * stride_out_j
    tl.store(to, (acc * factor).to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "splits"])
def _sum_splits_kernel(
    parts_ptr, bias_ptr, out_ptr, rows, columns, splits, stride_out_i, stride_out_j, BLOCK: tl.constexpr
):
    """``out(i, j) = Σ parts[split, i, j] + bias[j]``, the splits in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = rows.to(tl.int64) * columns
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        total += tl.load(parts_ptr + split * size + at, inside, other=0.0)
    i, j = at // columns, at % columns
    if bias_ptr is not None:
        total += tl.load(bias_ptr + j, inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + i * stride_out_i + j * stride_out_j, total.to(out_ptr.dtype.element_ty), inside)


def sum_splits(parts: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``out (I, J)``, of any strides, is the sum of ``parts (splits, I, J)`` float32, and of ``bias (J,)``."""
    splits, rows, columns = parts.shape
    _sum_splits_kernel[(triton.cdiv(rows * columns, SUM_BLOCK),)](
        parts, bias, out, rows, columns, splits, *out.stride(), BLOCK=SUM_BLOCK, num_warps=4
    )
    return out


def count_splits(tiles: int, depth: int, block: int, tensor: torch.Tensor) -> tuple[int, int]:
    """``(splits, blocks of each)`` of a sum, with enough splits to occupy every multiprocessor."""
    wanted = max(1, PROGRAMS * multiprocessors(tensor) // tiles)
    wanted = min(wanted, triton.cdiv(depth, LEAST_DEPTH))
    blocks = triton.cdiv(depth, block)
    per_split = triton.cdiv(blocks, wanted)
    return triton.cdiv(blocks, per_split), per_split


def rank_block(rank: int, most: int = 64) -> int:
    """Columns of a tile over the rank."""
    return min(most, max(16, triton.next_power_of_2(rank)))


def row_tile(rows: int, rank: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Blocks and launch options of the products of rows."""
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_K": 32, "BLOCK_R": rank_block(rank, 32)}, {"num_warps": 4, "num_stages": 3}
    block_m = 16 if rows <= 16 else 64
    return {"BLOCK_M": block_m, "BLOCK_K": 128, "BLOCK_R": rank_block(rank)}, {"num_warps": 4, "num_stages": 3}


def column_tile(rank: int, dtype: torch.dtype, shared: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Blocks and launch options of the products of columns; ``shared`` with products of rows."""
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_R": rank_block(rank, 32)}, {"num_warps": 4, "num_stages": 2}
    block_n, stages = (256, 2) if shared else (128, 3)
    return {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_R": rank_block(rank)}, {"num_warps": 8, "num_stages": stages}


def signed_bound(dropout: float) -> int:
    """The ``bound`` of :func:`keep_mask`."""
    return int(dropout * 2**32) - 2**31


def row_products(
    big: torch.Tensor, small: torch.Tensor, factor: float, seed: torch.Tensor | None = None, dropout: float = 0.0
) -> torch.Tensor:
    """``factor · drop(big (M, K)) · small (K, r)``, ``(M, r)`` in the dtype of ``big``; ``small`` of any strides."""
    big = unit_columns(big)
    (rows, depth), rank = big.shape, small.shape[1]
    out = torch.empty(rows, rank, dtype=big.dtype, device=big.device)
    if rows == 0:
        return out
    blocks, options = row_tile(rows, rank, big.dtype)
    grid = triton.cdiv(rows, blocks["BLOCK_M"]), triton.cdiv(rank, blocks["BLOCK_R"])
    splits, per_split = count_splits(grid[0] * grid[1], depth, blocks["BLOCK_K"], big)
    parts = out if splits == 1 else torch.empty(splits, rows, rank, dtype=torch.float32, device=big.device)
    _row_products_kernel[(*grid, splits)](
        big,
        small,
        parts,
        seed,
        rows,
        depth,
        rank,
        per_split,
        factor,
        signed_bound(dropout),
        big.stride(0),
        *small.stride(),
        PRECISION=dot_precision(big.dtype),
        **blocks,
        **options,
    )
    return out if splits == 1 else sum_splits(parts, out)


def column_products(
    big: torch.Tensor,
    small: torch.Tensor,
    out: torch.Tensor,
    factor: float,
    seed: torch.Tensor | None = None,
    dropout: float = 0.0,
    right: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """``out (N, r) = factor · drop(big (M, N))ᵀ · small (M, r)``, into ``out`` of any strides and dtype.

    With ``right (N, r)``, of a rank up to SHARED_PASS_RANK, ``factor · big · right (M, r)`` is made in the same pass
    and returned in the dtype of ``big``.
    """
    big = unit_columns(big)
    (rows, columns), rank = big.shape, small.shape[1]
    shared = right is not None
    row_out = torch.empty(rows, rank, dtype=big.dtype, device=big.device) if shared else None
    if rows == 0:
        out.zero_()
        return row_out
    blocks, options = column_tile(rank, big.dtype, shared)
    grid = triton.cdiv(columns, blocks["BLOCK_N"]), triton.cdiv(rank, blocks["BLOCK_R"])
    splits, per_split = count_splits(grid[0] * grid[1], rows, blocks["BLOCK_M"], big)
    whole = splits == 1
    parts = out if whole else torch.empty(splits, columns, rank, dtype=torch.float32, device=big.device)
    row_parts = torch.empty(grid[0], rows, rank, dtype=torch.float32, device=big.device) if shared else None
    _column_products_kernel[(*grid, splits)](
        big,
        small,
        parts,
        right,
        row_parts,
        seed,
        rows,
        columns,
        rank,
        per_split,
        factor,
        signed_bound(dropout),
        big.stride(0),
        columns * rank,
        *(out.stride() if whole else (rank, 1)),
        PRECISION=dot_precision(big.dtype),
        **blocks,
        **options,
    )
    if not whole:
        sum_splits(parts, out)
    return sum_splits(row_parts, row_out) if shared else None


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    four = {"num_warps": 4}
    sums = aot_signature(torch.bfloat16, "out_ptr bias_ptr", "", "columns stride_out_i")
    sums |= {"parts_ptr": "*fp32:16", "rows": "i32", "splits": "i32"}
    cases = [(_sum_splits_kernel, sums, {"stride_out_j": 1, "BLOCK": SUM_BLOCK}, four)]
    for dtype, rank, dropped in ((torch.bfloat16, 16, True), (torch.bfloat16, 64, False), (torch.float32, 16, False)):
        common = {"rows": "i32", "blocks": "i32", "bound": "i32", "factor": "fp32"}
        given = {"PRECISION": "ieee"} | ({} if dropped else {"seed_ptr": None})
        seed = {"seed_ptr": "*i64:16"} if dropped else {}
        signature = aot_signature(dtype, "big_ptr small_ptr", "", "depth rank stride_big stride_small_j")
        signature |= {"out_ptr": "*fp32:16"} | common | seed
        blocks, options = row_tile(8192, rank, dtype)
        cases.append((_row_products_kernel, signature, given | {"stride_small_k": 1} | blocks, options))
        shared = rank <= SHARED_PASS_RANK and not dropped
        blocks, options = column_tile(rank, dtype, shared)
        signature = aot_signature(dtype, "big_ptr small_ptr", "", "columns rank stride_big stride_split stride_out_n")
        signature |= {"out_ptr": "*fp32:16"} | common | seed
        if shared:
            signature |= {"right_ptr": f"*{TRITON_NAMES[dtype]}:16", "row_out_ptr": "*fp32:16"}
        else:
            given = given | {"right_ptr": None, "row_out_ptr": None}
        cases.append((_column_products_kernel, signature, given | {"stride_out_j": 1} | blocks, options))
    return cases
