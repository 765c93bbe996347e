"""The linear layer with a low-rank update: one product whose accumulator starts from the update.

Floor of the forward pass: 2·M·N·(C + r) + 2·M·C·r floating-point operations; M·C + N·C + M·N elements moved.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.common import (
    TMA_ARCH,
    TRITON_NAMES,
    aot_descriptor,
    aot_dtype,
    aot_signature,
    arch_of,
    can_describe,
    choose_tile,
    describe,
    dot_precision,
    grid_size,
    load_rows,
    load_weight,
    multiprocessors,
    tile_coordinates,
    unit_columns,
    weight_operand,
)
from gossamer.triton_kernels.low_rank_products import (
    SHARED_PASS_RANK,
    column_products,
    count_splits,
    keep_mask,
    rank_block,
    row_products,
    signed_bound,
    sum_splits,
)
from gossamer.triton_kernels.quantized_weight import Stored, aot_weight, dequantize, load_tile, run_length, stored
from gossamer.triton_kernels.tiles import Problem, Tile, choose

if TYPE_CHECKING:
    from gossamer.ops._weights import Weight
    from gossamer.ops.low_rank import LowRank, LowRankBackward

# With more rows than this, it is less work to decode a quantised weight once into a temporary matrix than to decode it
# for every row tile of the product.
DECODED_ROWS = 256


class Update(NamedTuple):
    """The low-rank term of a product, ``factor · drop(left · right)``.

    Attributes:
        left: ``(M, r)`` contiguous.
        right: ``(r, N)`` of any strides.
        factor: factor of the term.
        seed: seed of the dropout of its elements, or None.
        dropout: probability that an element is dropped.
    """

    left: torch.Tensor
    right: torch.Tensor
    factor: float
    seed: torch.Tensor | None = None
    dropout: float = 0.0


class _Pointers(NamedTuple):
    bias: torch.Tensor | None
    left: torch.Tensor
    right: torch.Tensor
    y: torch.Tensor
    seed: torch.Tensor | None


class _Sizes(NamedTuple):
    columns: int
    depth: int
    rank: int


class _Strides(NamedTuple):
    x: int
    wn: int
    wk: int
    right_j: int
    right_n: int


@triton.jit(do_not_specialize=["rows", "blocks", "bound"])
def _low_rank_matmul_kernel(
    x,
    w,
    stored,
    to,
    rows,
    sizes,
    blocks,
    factor,
    bound,
    strides,
    FORMAT: tl.constexpr,
    RUN: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """``y = x · Wᵀ + bias + factor · drop(left (rows, rank) · right (rank, columns))``, W ``(columns, depth)``.

    W is ``w``, or ``stored`` if it is quantised, then ``(depth, columns)`` when W_TRANSPOSED. If the depth is split,
    into splits of ``blocks`` blocks, ``y`` is float32 ``(splits, rows, columns)``; the first split has the update, and
    none the bias.
    """
    columns, depth, rank = sizes
    num_m, num_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    split = tl.program_id(1)
    last = tl.minimum((split + 1) * blocks, tl.cdiv(depth, BLOCK_K))
    no_expert = tl.program_id(1) * 0
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLATTEN):
        m_tile, n_tile = tile_coordinates(tile, num_m, num_n, GROUP_M)
        row, n0 = m_tile * BLOCK_M, n_tile * BLOCK_N
        r = row + tl.arange(0, BLOCK_M)
        n = n0 + tl.arange(0, BLOCK_N)
        # Rows past the last are read from the first and never stored.
        inside = tl.where(r < rows, r, 0).to(tl.int64)[:, None]
        x_rows = x if X_TMA else x + inside * strides.x
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        # The update: the rank is padded in registers, at the cost of one matrix instruction.
        for j0 in tl.range(0, tl.where(split == 0, rank, 0), BLOCK_R, num_stages=1):
            j = j0 + tl.arange(0, BLOCK_R)
            left = tl.load(to.left + inside * rank + j[None, :], j[None, :] < rank, other=0.0)
            at = j.to(tl.int64)[:, None] * strides.right_j + n.to(tl.int64)[None, :] * strides.right_n
            right = tl.load(to.right + at, (j < rank)[:, None] & (n < columns)[None, :], other=0.0)
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
        if to.seed is not None:
            acc = tl.where(keep_mask(to.seed, r, n0, bound, BLOCK_N), acc, 0.0)
        acc *= factor
        for block in range(split * blocks, last):
            k0 = block * BLOCK_K
            a = load_rows(x, x_rows, row, k0, depth, X_TMA, EVEN_K, BLOCK_K)
            if FORMAT == "dense":
                b = load_weight(
                    w,
                    no_expert,
                    n0,
                    k0,
                    columns,
                    depth,
                    0,
                    strides.wn,
                    strides.wk,
                    W_TMA,
                    W_TRANSPOSED,
                    EVEN_K,
                    BLOCK_N,
                    BLOCK_K,
                )
            elif W_TRANSPOSED:
                k = k0 + tl.arange(0, BLOCK_K)
                b = load_tile(stored, k, n0, depth, columns, FORMAT, RUN, BLOCK_N).to(to.left.dtype.element_ty)
            else:
                b = load_tile(stored, n, k0, columns, depth, FORMAT, RUN, BLOCK_K)
                b = tl.trans(b.to(to.left.dtype.element_ty))
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if to.bias is not None:
            acc += tl.load(to.bias + n, n < columns, other=0.0).to(tl.float32)[None, :]
        y_rows = to.y + (split.to(tl.int64) * rows + r.to(tl.int64))[:, None] * columns
        tl.store(y_rows + n[None, :], acc.to(to.y.dtype.element_ty), (r < rows)[:, None] & (n < columns)[None, :])


def low_rank_tile(tile: Tile, quantized: bool, dropped: bool) -> Tile:
    """The tile of a product that is one group of grouped_matmul, whose tile would be ``tile``.

    Decoding a weight and drawing a mask take registers, which a larger tile would spill.
    """
    if quantized:
        return Tile(min(tile.block_m, 64), min(tile.block_n, 64), tile.block_k, 4, 3)
    return replace(tile, block_n=min(tile.block_n, 128)) if dropped else tile


def decoding_tile(tile: Tile, run: int) -> Tile:
    """The tile for weights whose scales change every ``run`` columns: each stage has a scale for each column of one."""
    return replace(tile, num_warps=8, num_stages=2) if run == 1 else tile


def low_rank_matmul(
    x: torch.Tensor, weight: Weight, transposed: bool, bias: torch.Tensor | None, update: Update
) -> torch.Tensor:
    """``y = x · Wᵀ + bias + factor · drop(left · right)``.

    Args:
        x: ``(M, K)``.
        weight: ``(N, K)``.
        transposed: whether W is the transpose of ``weight``, which is then ``(K, N)``.
        bias: ``(N,)`` or None.
        update: the last term.

    Returns:
        ``(M, N)`` in the dtype of ``x``.
    """
    x = unit_columns(x)
    (rows, depth), (rank, columns) = x.shape, update.right.shape
    y = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    if weight.quantized and rows > DECODED_ROWS:
        weight = weight._replace(data=dequantize(weight, x.dtype), format="dense")
    quantized = weight.quantized
    arch = arch_of(x)
    tile = choose_tile("grouped_matmul", "sorted", x, arch, rows, 1, columns, depth)
    tile = low_rank_tile(tile, quantized, update.seed is not None)
    if quantized:
        w, codes, strides, flags = None, stored(weight), (0, 0), {"W_TMA": False, "W_TRANSPOSED": transposed}
        along, block = (columns, tile.block_n) if transposed else (depth, tile.block_k)
        run = run_length(weight, along, block)
        tile = decoding_tile(tile, run)
    else:
        dense, run = weight.data.T if transposed else weight.data, 1
        w, flags = weight_operand(dense.unsqueeze(0), arch, tile.block_n, tile.block_k)
        codes, strides = Stored(), dense.stride()
    x_tma = can_describe(x, arch)
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n)
    splits, blocks = 1, triton.cdiv(depth, tile.block_k)
    if tiles < multiprocessors(x):
        splits, blocks = count_splits(tiles, depth, tile.block_k, x)
    whole = splits == 1
    parts = y if whole else torch.empty(splits, rows, columns, dtype=torch.float32, device=x.device)
    bias = None if bias is None else bias.contiguous()
    _low_rank_matmul_kernel[(grid_size(tiles, tile, x), splits)](
        describe(x, [tile.block_m, tile.block_k]) if x_tma else x,
        w,
        codes,
        _Pointers(bias if whole else None, update.left, update.right, parts, update.seed),
        rows,
        _Sizes(columns, depth, rank),
        blocks,
        update.factor,
        signed_bound(update.dropout),
        _Strides(x.stride(0), *strides, *update.right.stride()),
        FORMAT=weight.format,
        RUN=run,
        X_TMA=x_tma,
        EVEN_K=depth % tile.block_k == 0,
        PRECISION=dot_precision(x.dtype),
        BLOCK_R=rank_block(rank, 32 if x.dtype == torch.float32 else 64),
        **flags,
        **tile.constants(),
        **tile.options(),
    )
    return y if whole else sum_splits(parts, y, bias)


def low_rank_linear(args: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    """``y = x·Wᵀ + bias + scale·s·bᵀ`` ``(M, N)`` and ``s = drop(x)·aᵀ`` ``(M, r)``."""
    x, weight, bias, seed, dropout = args
    a, b = weight.a.to(x.dtype), weight.b.to(x.dtype)
    s = row_products(x, a.T, 1.0 / (1.0 - dropout), seed, dropout)
    return low_rank_matmul(x, weight, False, bias, Update(s, b.T, weight.factor)), s


def low_rank_linear_backward(args: LowRankBackward) -> dict[str, torch.Tensor]:
    """The gradients named in ``args.needs``."""
    dy, s, (x, weight, _, seed, dropout), needs, factor_dtype = args
    a, b, scale = weight.a, weight.b, weight.factor
    dy = unit_columns(dy)
    keep = 1.0 / (1.0 - dropout)
    found, ds = {}, None
    want_x, want_a = "x" in needs, "weight.a" in needs
    if want_x or want_a:
        b = b.to(dy.dtype).contiguous()
    if "weight.b" in needs:
        found["weight.b"] = torch.empty(dy.shape[1], s.shape[1], dtype=factor_dtype, device=dy.device)
        shared = (want_x or want_a) and s.shape[1] <= SHARED_PASS_RANK
        ds = column_products(dy, s, found["weight.b"], scale, right=b if shared else None)
    if ds is None and (want_x or want_a):
        ds = row_products(dy, b, scale)
    if want_x:
        found["x"] = low_rank_matmul(dy, weight, True, None, Update(ds, a.to(dy.dtype), keep, seed, dropout))
    if want_a:
        found["weight.a"] = torch.empty(ds.shape[1], x.shape[1], dtype=factor_dtype, device=dy.device)
        column_products(x, ds, found["weight.a"].T, keep, seed, dropout)
    if "weight.data" in needs:
        found["weight.data"] = torch.mm(dy.T, x)
    if "bias" in needs:
        found["bias"] = dy.sum(0)
    return found


def _aot_case(
    arch: int, precision: str, rows: int, weight_format: str, transposed: bool, dropped: bool, run: int | None = None
) -> tuple:
    dtype, quantized = aot_dtype(precision), weight_format != "dense"
    problem = Problem("grouped_matmul", "sorted", precision, rows, 1, 4096, 4096)
    tile = low_rank_tile(choose(problem, arch), quantized, dropped)
    tma = arch >= TMA_ARCH
    signature = aot_signature(dtype, "x w", "", "", "factor") | {"rows": "i32", "blocks": "i32", "bound": "i32"}
    pointer = f"*{TRITON_NAMES[dtype]}:16"
    signature["to"] = _Pointers(None, pointer, pointer, pointer, "*i64:16" if dropped else None)
    signature["sizes"] = _Sizes("i32:16", "i32:16", "i32:16")
    constexprs = {"X_TMA": tma, "W_TMA": tma and not quantized, "W_TRANSPOSED": transposed}
    constexprs |= {"EVEN_K": True, "PRECISION": "ieee", "BLOCK_R": 16, **tile.constants()}
    if tma:
        signature["x"] = aot_descriptor(dtype, [tile.block_m, tile.block_k])
    by_columns, by_rows = ("i32:16", 1), (1, "i32:16")
    right = by_columns if transposed else by_rows
    if quantized:
        run = run or (tile.block_n if transposed else tile.block_k)
        signature["stored"], values = aot_weight(weight_format, run)
        tile = decoding_tile(tile, run)
        signature["strides"] = _Strides("i32:16", 0, 0, *right)
        del signature["w"]
        constexprs["w"] = None
    else:
        signature["stored"], values = Stored(), {"FORMAT": "dense", "RUN": 1}
        signature["strides"] = _Strides("i32:16", *(by_rows if transposed else by_columns), *right)
        if tma:
            block = [tile.block_k, tile.block_n] if transposed else [tile.block_n, tile.block_k]
            signature["w"] = aot_descriptor(dtype, [1, *block])
    return _low_rank_matmul_kernel, signature, constexprs | values, tile.options()


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    return [
        _aot_case(arch, "bf16", 8192, "dense", False, False),
        _aot_case(arch, "bf16", 8192, "dense", True, True),
        _aot_case(arch, "bf16", 16, "dense", False, False),
        _aot_case(arch, "fp32", 8192, "dense", True, False),
        _aot_case(arch, "bf16", 64, "nf4", False, False),
        _aot_case(arch, "bf16", 64, "nf4", True, True),
        # An odd number of columns.
        _aot_case(arch, "bf16", 64, "nf4", False, False, 1),
        _aot_case(arch, "bf16", 64, "nf4", True, False, 1),
        _aot_case(arch, "bf16", 64, "fp8", True, False),
        _aot_case(arch, "bf16", 64, "int8_absmax", False, False),
    ]
