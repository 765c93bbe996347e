"""Grouped matrix products: rows of ragged groups against their group's weight.

Floor of one product: 2·R·N·C floating-point operations; R·C + E·N·C + R·N elements moved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.common import (
    TMA_ARCH,
    LowRankTerm,
    RowTables,
    add_low_rank,
    aot_descriptor,
    aot_dtype,
    aot_low_rank,
    aot_signature,
    arch_of,
    can_describe,
    choose_tile,
    clamped,
    describe,
    dot_precision,
    grid_size,
    load_rows,
    load_weight,
    low_rank_arguments,
    row_tile,
    row_tiles,
    tile_coordinates,
    unit_columns,
    weight_operand,
)
from gossamer.triton_kernels.grouped_matmul_dweight import grouped_matmul_dweight
from gossamer.triton_kernels.split_matmul import finish, split_matmul
from gossamer.triton_kernels.tiles import Problem, Tile, choose, with_update

if TYPE_CHECKING:
    from gossamer.ops._groups import Groups
    from gossamer.ops.grouped_matmul import GroupedMatmul

__all__ = ["grouped_matmul", "grouped_matmul_dweight"]


@triton.jit(do_not_specialize=["capacity", "num_slots"])
def _grouped_matmul_kernel(
    x,
    w,
    bias_ptr,
    y_ptr,
    slots_ptr,
    table_ptr,
    capacity,
    num_slots,
    N,
    C,
    strides,
    low,
    X_DIV: tl.constexpr,
    SCATTER: tl.constexpr,
    ZERO_DROPPED: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
    RANK_TILE: tl.constexpr,
):
    """``strides`` are of rows of x, of experts, rows and columns of the weight, and of rows of y."""
    stride_x, stride_we, stride_wn, stride_wk, stride_y = strides
    num_live = tl.load(table_ptr)
    num_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_live * num_n, tl.num_programs(0), flatten=FLATTEN):
        m, n_tile = tile_coordinates(tile, num_live, num_n, GROUP_M)
        expert, row, row_end = row_tile(table_ptr, capacity, m)
        r = row + tl.arange(0, BLOCK_M)
        # Rows past the group are read from its first row and never stored.
        inside = tl.where(r < row_end, r, row)
        if X_DIV > 0:
            x_index = clamped(tl.load(slots_ptr + inside), num_slots - 1) // X_DIV
        else:
            x_index = inside
        x_rows = x if X_TMA else x + x_index.to(tl.int64)[:, None] * stride_x
        n0 = n_tile * BLOCK_N
        n = n0 + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if low is not None:
            acc = add_low_rank(acc, low, expert, r, r < row_end, n, n < N, PRECISION, RANK_TILE)
        for k in range(0, tl.cdiv(C, BLOCK_K)):
            a = load_rows(x, x_rows, row, k * BLOCK_K, C, X_TMA, EVEN_K, BLOCK_K)
            b = load_weight(
                w,
                expert,
                n0,
                k * BLOCK_K,
                N,
                C,
                stride_we,
                stride_wn,
                stride_wk,
                W_TMA,
                W_TRANSPOSED,
                EVEN_K,
                BLOCK_N,
                BLOCK_K,
            )
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + expert.to(tl.int64) * N + n, n < N, other=0.0).to(tl.float32)[None, :]
        if SCATTER:
            y_index = clamped(tl.load(slots_ptr + inside), num_slots - 1)
        else:
            y_index = r
        y_rows = y_ptr + y_index.to(tl.int64)[:, None] * stride_y
        tl.store(y_rows + n[None, :], acc.to(y_ptr.dtype.element_ty), (r < row_end)[:, None] & (n < N)[None, :])

    if ZERO_DROPPED:
        num_all = tl.load(table_ptr + 1)
        for tile in range(num_live * num_n + tl.program_id(0), num_all * num_n, tl.num_programs(0)):
            _, row, row_end = row_tile(table_ptr, capacity, tile // num_n)
            r = row + tl.arange(0, BLOCK_M)
            if SCATTER:
                y_index = clamped(tl.load(slots_ptr + r, r < row_end, other=0), num_slots - 1)
            else:
                y_index = r
            n = tile % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
            y_rows = y_ptr + y_index.to(tl.int64)[:, None] * stride_y
            zero = tl.zeros((BLOCK_M, BLOCK_N), y_ptr.dtype.element_ty)
            tl.store(y_rows + n[None, :], zero, (r < row_end)[:, None] & (n < N)[None, :])


def rows_times_weight(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    groups: Groups,
    x_div: int,
    scatter: bool,
    zero_dropped: bool,
    tile: Tile | None = None,
    tables: RowTables | None = None,
    low: LowRankTerm | None = None,
) -> torch.Tensor:
    """Launch the grouped product; ``tables`` as in :func:`gossamer.triton_kernels.common.row_tiles`.

    ``low`` is an update of the weight, which the accumulator starts from.
    """
    num_rows, (num_experts, n, c) = groups.slots.shape[0], weight.shape
    y = torch.empty(num_rows, n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = unit_columns(x)
    arch = arch_of(x)
    if tile is None:
        form = "gathered" if x_div else "sorted"
        tile = choose_tile("grouped_matmul", form, x, arch, num_rows, num_experts, n, c, low is not None)
    table_tensor, capacity = row_tiles(groups.offsets, num_rows, tile.block_m, tables)
    w, w_flags = weight_operand(weight, arch, tile.block_n, tile.block_k)
    x_tma = x_div == 0 and can_describe(x, arch)
    grid = grid_size(capacity * triton.cdiv(n, tile.block_n), tile, x)
    _grouped_matmul_kernel[(grid,)](
        describe(x, [tile.block_m, tile.block_k]) if x_tma else x,
        w,
        None if bias is None else bias.contiguous(),
        y,
        groups.slots,
        table_tensor,
        capacity,
        groups.rows.shape[0],
        n,
        c,
        (x.stride(0), *weight.stride(), y.stride(0)),
        **low_rank_arguments(low),
        X_DIV=x_div,
        SCATTER=scatter,
        ZERO_DROPPED=zero_dropped,
        X_TMA=x_tma,
        EVEN_K=c % tile.block_k == 0,
        PRECISION=dot_precision(x.dtype),
        **w_flags,
        **tile.constants(),
        **tile.options(),
    )
    return y


def grouped_matmul(args: GroupedMatmul) -> torch.Tensor:
    """``(R, N)``, or ``(R, C)`` if transposed; dropped rows are zero."""
    weight = args.weight
    if weight.quantized:
        y = split_matmul(
            args.x,
            weight,
            args.groups,
            args.x_div,
            scatter=not args.y_grouped,
            zero_dropped=True,
            transposed=args.transposed,
        )
        return y[0] if y.shape[0] == 1 else finish(y, args.groups.offsets, args.x.dtype, None)
    values = weight.data.transpose(1, 2) if args.transposed else weight.data
    return rows_times_weight(args.x, values, weight.bias, args.groups, args.x_div, not args.y_grouped, True)


def aot_case(arch: int, problem: Problem, tile: Tile, layout: str = "usual", rank: int | None = None) -> tuple:
    """One launch, for ahead-of-time compilation: (kernel, signature, constexprs, options).

    ``layout`` says how the weight is stored and read: one of ``AOT_LAYOUTS``.
    """
    dtype, gathered, transposed = aot_dtype(problem.precision), problem.form == "gathered", layout == "transposed"
    tma = arch >= TMA_ARCH and layout != "pointers"
    signature = aot_signature(dtype, "x w y_ptr", "slots_ptr table_ptr", "N C")
    rows_and_columns = (1, "i32:16") if transposed else ("i32:16", 1)
    signature["strides"] = ("i32:16", "i32:16", *rows_and_columns, "i32:16")
    signature |= {"capacity": "i32", "num_slots": "i32"}
    low_signature, low_constexprs = aot_low_rank(dtype, rank)
    signature |= low_signature
    constexprs = low_constexprs | {
        "bias_ptr": None,
        "X_DIV": 8 if gathered else 0,
        "SCATTER": False,
        "ZERO_DROPPED": gathered,
        "X_TMA": tma and not gathered,
        "W_TMA": tma,
        "W_TRANSPOSED": transposed,
        "EVEN_K": True,
        "PRECISION": "ieee",
        **tile.constants(),
    }
    if tma:
        block = [tile.block_k, tile.block_n] if transposed else [tile.block_n, tile.block_k]
        signature["w"] = aot_descriptor(dtype, [1, *block])
        if not gathered:
            signature["x"] = aot_descriptor(dtype, [tile.block_m, tile.block_k])
    return _grouped_matmul_kernel, signature, constexprs, tile.options()


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    cases = []
    for precision, mean_rows in (("bf16", 1024), ("bf16", 8), ("fp32", 1024)):
        for form, layout in (("gathered", "usual"), ("sorted", "usual"), ("sorted", "transposed")):
            problem = Problem("grouped_matmul", form, precision, mean_rows, 64, 4096, 4096)
            cases.append(aot_case(arch, problem, choose(problem, arch), layout))
        # The down product with an update.
        problem = Problem("grouped_matmul", "sorted", precision, mean_rows, 64, 4096, 4096)
        cases.append(aot_case(arch, problem, with_update(problem, choose(problem, arch), arch), rank=64))
    return cases
