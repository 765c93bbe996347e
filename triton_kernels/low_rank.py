"""The linear layer with a low-rank update: one product whose accumulator starts from the update.

Floor of the forward pass: 2·M·N·(C + r) + 2·M·C·r floating-point operations; M·C + N·C + M·N elements moved.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.common import (
    TMA_ARCH,
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
from gossamer.triton_kernels.quantized_weight import (
    FLOAT,
    FORMATS,
    aot_weight,
    dequantize,
    load_tile,
    operands,
    run_length,
)
from gossamer.triton_kernels.tiles import Problem, Tile, choose

# With more rows than this, a quantised weight would be decoded so often in the product that decoding it once before it,
# into a matrix that lives as long as the product, is less work.
DECODED_ROWS = 256


@triton.jit(do_not_specialize=["rows", "blocks", "bound"])
def _low_rank_matmul_kernel(
    x,
    w,
    bias_ptr,
    left_ptr,
    right_ptr,
    y_ptr,
    seed_ptr,
    code_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    rows,
    columns,
    depth,
    rank,
    blocks,
    factor,
    bound,
    stride_x,
    stride_wn,
    stride_wk,
    stride_right_j,
    stride_right_n,
    stride_row,
    stride_column,
    stride_scale,
    block_size,
    nested_block_size,
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

    A quantised one is stored ``(depth, columns)`` when W_TRANSPOSED. Several splits of the depth, of ``blocks``
    blocks each, give ``y`` float32 ``(splits, rows, columns)``; the first of them has the update, none the bias.
    """
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
        x_rows = x if X_TMA else x + inside * stride_x
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        # The update: the rank is padded in registers, where it costs one instruction of the matrix units.
        for j0 in tl.range(0, tl.where(split == 0, rank, 0), BLOCK_R, num_stages=1):
            j = j0 + tl.arange(0, BLOCK_R)
            left = tl.load(left_ptr + inside * rank + j[None, :], j[None, :] < rank, other=0.0)
            at = j.to(tl.int64)[:, None] * stride_right_j + n.to(tl.int64)[None, :] * stride_right_n
            right = tl.load(right_ptr + at, (j < rank)[:, None] & (n < columns)[None, :], other=0.0)
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
        if seed_ptr is not None:
            acc = tl.where(keep_mask(seed_ptr, r, n0, bound, BLOCK_N), acc, 0.0)
        acc *= factor
        for block in range(split * blocks, last):
            k0 = block * BLOCK_K
            a = load_rows(x, x_rows, row, k0, depth, X_TMA, EVEN_K, BLOCK_K)
            if FORMAT == FLOAT:
                b = load_weight(
                    w,
                    no_expert,
                    n0,
                    k0,
                    columns,
                    depth,
                    0,
                    stride_wn,
                    stride_wk,
                    W_TMA,
                    W_TRANSPOSED,
                    EVEN_K,
                    BLOCK_N,
                    BLOCK_K,
                )
            else:
                state = (code_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr)
                if W_TRANSPOSED:
                    b = load_tile(
                        w,
                        state,
                        k0 + tl.arange(0, BLOCK_K),
                        n0,
                        depth,
                        columns,
                        stride_row,
                        stride_column,
                        stride_scale,
                        block_size,
                        nested_block_size,
                        FORMAT,
                        RUN,
                        BLOCK_N,
                    ).to(left_ptr.dtype.element_ty)
                else:
                    b = load_tile(
                        w,
                        state,
                        n,
                        k0,
                        columns,
                        depth,
                        stride_row,
                        stride_column,
                        stride_scale,
                        block_size,
                        nested_block_size,
                        FORMAT,
                        RUN,
                        BLOCK_K,
                    )
                    b = tl.trans(b.to(left_ptr.dtype.element_ty))
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n, n < columns, other=0.0).to(tl.float32)[None, :]
        y_rows = y_ptr + (split.to(tl.int64) * rows + r.to(tl.int64))[:, None] * columns
        tl.store(y_rows + n[None, :], acc.to(y_ptr.dtype.element_ty), (r < rows)[:, None] & (n < columns)[None, :])


def low_rank_tile(tile: Tile, quantized: bool, dropped: bool) -> Tile:
    """The tile of a product that is one group's of grouped_matmul, whose tile is ``tile``.

    Decoding a weight and drawing a mask take registers, which a larger tile would spill.
    """
    if quantized:
        return Tile(min(tile.block_m, 64), min(tile.block_n, 64), tile.block_k, 4, 3)
    return replace(tile, block_n=min(tile.block_n, 128)) if dropped else tile


def decoding_tile(tile: Tile, run: int) -> Tile:
    """The tile for weights whose scales change every ``run`` columns: each stage has a scale for each column of one."""
    return replace(tile, num_warps=8, num_stages=2) if run == 1 else tile


def low_rank_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    state: tuple[torch.Tensor | None, ...],
    weight_format: str,
    block_sizes: tuple[int, int],
    transposed: bool,
    bias: torch.Tensor | None,
    left: torch.Tensor,
    right: torch.Tensor,
    factor: float,
    seed: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """``y = x · Wᵀ + bias + factor · drop(left · right)``.

    Args:
        x: ``(M, K)``.
        weight: stored as :func:`low_rank_linear` takes it.
        state: of a quantised weight.
        weight_format: ``"float"``, ``"nf4"``, ``"int8"`` or ``"fp8"``.
        block_sizes: of a quantised weight.
        transposed: whether W is the stored weight's transpose.
        bias: ``(N,)`` or None.
        left: ``(M, r)`` contiguous.
        right: ``(r, N)`` of any strides.
        factor: of the update.
        seed: of the dropout of the update's elements, or None.
        dropout: its probability.

    Returns:
        ``(M, N)`` in the dtype of ``x``.
    """
    x = unit_columns(x)
    (rows, depth), (rank, columns) = x.shape, right.shape
    y = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    if weight_format != "float" and rows > DECODED_ROWS:
        n, c = (depth, columns) if transposed else (columns, depth)
        weight = dequantize(weight, state, weight_format, block_sizes, n, c, x.dtype)
        state, weight_format = (None,) * len(state), "float"
    quantized = weight_format != "float"
    arch = arch_of(x)
    tile = choose_tile("grouped_matmul", "sorted", x, arch, rows, 1, columns, depth)
    tile = low_rank_tile(tile, quantized, seed is not None)
    if quantized:
        w, state, numbers = operands(weight, state, weight_format, block_sizes)
        block = tile.block_n if transposed else tile.block_k
        flags = {"W_TMA": False, "W_TRANSPOSED": transposed}
        strides = (0, 0)
        numbers["RUN"] = run_length(weight_format, columns if transposed else depth, block_sizes[0], block)
        tile = decoding_tile(tile, numbers["RUN"])
    else:
        weight = weight.T if transposed else weight
        w, flags = weight_operand(weight.unsqueeze(0), arch, tile.block_n, tile.block_k)
        strides = weight.stride()
        numbers = dict.fromkeys(("stride_row", "stride_column", "stride_scale", "block_size", "nested_block_size"), 0)
        numbers["RUN"] = 1
    x_tma = can_describe(x, arch)
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n)
    splits, blocks = 1, triton.cdiv(depth, tile.block_k)
    if tiles < multiprocessors(x):
        splits, blocks = count_splits(tiles, depth, tile.block_k, x)
    whole = splits == 1
    parts = y if whole else torch.empty(splits, rows, columns, dtype=torch.float32, device=x.device)
    _low_rank_matmul_kernel[(grid_size(tiles, tile, x), splits)](
        describe(x, [tile.block_m, tile.block_k]) if x_tma else x,
        w,
        bias.contiguous() if whole and bias is not None else None,
        left,
        right,
        parts,
        seed,
        *state,
        rows,
        columns,
        depth,
        rank,
        blocks,
        factor,
        signed_bound(dropout),
        x.stride(0),
        *strides,
        *right.stride(),
        **numbers,
        FORMAT=FORMATS[weight_format],
        X_TMA=x_tma,
        EVEN_K=depth % tile.block_k == 0,
        PRECISION=dot_precision(x.dtype),
        BLOCK_R=rank_block(rank, 32 if x.dtype == torch.float32 else 64),
        **flags,
        **tile.constants(),
        **tile.options(),
    )
    return y if whole else sum_splits(parts, y, None if bias is None else bias.contiguous())


def low_rank_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    state: tuple[torch.Tensor | None, ...],
    weight_format: str,
    block_sizes: tuple[int, int],
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``y = x·Wᵀ + bias + scale·s·bᵀ`` with ``s = drop(x)·aᵀ``; returns ``y (M, N)`` and ``s (M, r)``.

    Args:
        x: ``(M, C)`` float.
        weight: ``(N, C)`` of any strides, the dtype of ``x``; or the data of a quantised weight.
        state: code, absmax or scale, nested_absmax, nested_code and offset, which decode that; each may be None.
        weight_format: ``"float"``, ``"nf4"``, ``"int8"`` or ``"fp8"``.
        block_sizes: elements to a scale, and scales to a nested one.
        a: ``(r, C)``, the dtype of ``x`` or float32.
        b: ``(N, r)``, the dtype of ``a``.
        bias: ``(N,)`` or None.
        seed: ``(1,)`` int64, or None without dropout.
        scale: of the update.
        dropout: in [0, 1).
    """
    a, b = a.to(x.dtype), b.to(x.dtype)
    s = row_products(x, a.T, 1.0 / (1.0 - dropout), seed, dropout)
    y = low_rank_matmul(x, weight, state, weight_format, block_sizes, False, bias, s, b.T, scale)
    return y, s


def low_rank_linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    state: tuple[torch.Tensor | None, ...],
    weight_format: str,
    block_sizes: tuple[int, int],
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    s: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    dropout: float,
    factor_dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x, weight, a, b and bias, each None unless ``wanted``; see :func:`low_rank_linear`.

    Args:
        dy: ``(M, N)``.
        x: for the gradients of weight and a.
        weight: for that of x.
        state: with ``weight``.
        weight_format: with ``weight``.
        block_sizes: with ``weight``.
        a: for the gradient of x.
        b: for those of x and a.
        s: for that of b.
        seed: as in the forward pass.
        scale: as in the forward pass.
        dropout: as in the forward pass.
        factor_dtype: of the gradients of a and b.
        wanted: whether the gradients of x, weight, a, b and bias are.
    """
    want_x, want_weight, want_a, want_b, want_bias = wanted
    dy = unit_columns(dy)
    keep = 1.0 / (1.0 - dropout)
    dx = dweight = da = db = dbias = ds = None
    if want_x or want_a:
        b = b.to(dy.dtype).contiguous()
    if want_b:
        db = torch.empty(dy.shape[1], s.shape[1], dtype=factor_dtype, device=dy.device)
        shared = (want_x or want_a) and s.shape[1] <= SHARED_PASS_RANK
        ds = column_products(dy, s, db, scale, right=b if shared else None)
    if ds is None and (want_x or want_a):
        ds = row_products(dy, b, scale)
    if want_x:
        right = a.to(dy.dtype)
        dx = low_rank_matmul(dy, weight, state, weight_format, block_sizes, True, None, ds, right, keep, seed, dropout)
    if want_a:
        da = torch.empty(ds.shape[1], x.shape[1], dtype=factor_dtype, device=dy.device)
        column_products(x, ds, da.T, keep, seed, dropout)
    if want_weight:
        dweight = torch.mm(dy.T, x)
    if want_bias:
        dbias = dy.sum(0)
    return dx, dweight, da, db, dbias


def _aot_case(
    arch: int, precision: str, rows: int, weight_format: str, transposed: bool, dropped: bool, run: int | None = None
) -> tuple:
    dtype, quantized = aot_dtype(precision), weight_format != "float"
    problem = Problem("grouped_matmul", "sorted", precision, rows, 1, 4096, 4096)
    tile = low_rank_tile(choose(problem, arch), quantized, dropped)
    tma = arch >= TMA_ARCH
    signature = aot_signature(dtype, "x w left_ptr right_ptr y_ptr", "", "columns depth rank stride_x", "factor")
    signature |= {"rows": "i32", "blocks": "i32", "bound": "i32"}
    constexprs = {"bias_ptr": None, "seed_ptr": None, "X_TMA": tma, "W_TMA": tma and not quantized}
    constexprs |= {"W_TRANSPOSED": transposed, "EVEN_K": True, "PRECISION": "ieee", "BLOCK_R": 16, **tile.constants()}
    if dropped:
        del constexprs["seed_ptr"]
        signature["seed_ptr"] = "*i64:16"
    wide, unit = ("stride_right_j", "stride_right_n") if transposed else ("stride_right_n", "stride_right_j")
    signature[wide], constexprs[unit] = "i32:16", 1
    if tma:
        signature["x"] = aot_descriptor(dtype, [tile.block_m, tile.block_k])
    if quantized:
        run = run or (tile.block_n if transposed else tile.block_k)
        types, values = aot_weight(weight_format, run)
        tile = decoding_tile(tile, run)
        signature |= {"w": "*u8:16", **types}
        return (
            _low_rank_matmul_kernel,
            signature,
            constexprs | values | {"stride_wn": 0, "stride_wk": 0},
            tile.options(),
        )
    pointers = ("code_ptr", "absmax_ptr", "nested_absmax_ptr", "nested_code_ptr", "offset_ptr")
    sizes = ("stride_row", "stride_column", "stride_scale", "block_size", "nested_block_size")
    constexprs |= dict.fromkeys(pointers) | dict.fromkeys(sizes, 0) | {"FORMAT": FORMATS["float"].value, "RUN": 1}
    wide, unit = ("stride_wk", "stride_wn") if transposed else ("stride_wn", "stride_wk")
    signature[wide], constexprs[unit] = "i32:16", 1
    if tma:
        block = [tile.block_k, tile.block_n] if transposed else [tile.block_n, tile.block_k]
        signature["w"] = aot_descriptor(dtype, [1, *block])
    return _low_rank_matmul_kernel, signature, constexprs, tile.options()


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    return [
        _aot_case(arch, "bf16", 8192, "float", False, False),
        _aot_case(arch, "bf16", 8192, "float", True, True),
        _aot_case(arch, "bf16", 16, "float", False, False),
        _aot_case(arch, "fp32", 8192, "float", True, False),
        _aot_case(arch, "bf16", 64, "nf4", False, False),
        _aot_case(arch, "bf16", 64, "nf4", True, True),
        # An odd number of columns.
        _aot_case(arch, "bf16", 64, "nf4", False, False, 1),
        _aot_case(arch, "bf16", 64, "nf4", True, False, 1),
        _aot_case(arch, "bf16", 64, "fp8", True, False),
        _aot_case(arch, "bf16", 64, "int8", False, False),
    ]
