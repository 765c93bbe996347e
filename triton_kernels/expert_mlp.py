"""The expert feed-forward layer: gathered GEMM with GLU, GEMM, weighted sum to tokens.

Floor, R = T·K: 6·R·H·I floating-point operations gated, 4·R·H·I ungated; the weights, x and y moved once, the
activation twice and, for training, the pre-activation once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from gossamer._activation import Activation
from gossamer._layout import stored_transposed
from gossamer.triton_kernels.common import (
    TMA_ARCH,
    LowRankTerm,
    RowTables,
    activation,
    add_low_rank,
    aot_descriptor,
    aot_dtype,
    aot_low_rank,
    aot_signature,
    arch_of,
    can_describe,
    choose_tile,
    clamped,
    column_halves,
    describe,
    dot_precision,
    gate_code,
    grid_size,
    load_rows,
    load_weight,
    low_rank_arguments,
    row_tile,
    row_tiles,
    tile_coordinates,
    unit_columns,
    up_factor,
    weight_operand,
)
from gossamer.triton_kernels.expert_mlp_backward import (
    AOT_FORMS,
    activation_form,
    aot_form,
    expert_mlp_backward,
    low_rank_term,
    low_rows,
)
from gossamer.triton_kernels.gather_reduce import sum_slots
from gossamer.triton_kernels.grouped_matmul import rows_times_weight
from gossamer.triton_kernels.split_matmul import decode_plans, split_expert_mlp
from gossamer.triton_kernels.tiles import Problem, Tile, choose, with_update

if TYPE_CHECKING:
    from gossamer.ops.expert_mlp import ExpertMlp, ExpertMlpOutput

__all__ = ["expert_mlp", "expert_mlp_backward"]


@triton.jit
def _load_gate_up(
    w,
    expert,
    n0,
    k0,
    I,
    C,
    stride_e,
    stride_n,
    stride_k,
    W_TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``[BLOCK_K, 2·BLOCK_N]`` of a concatenated weight: columns ``n0:`` of the gate half, then of the up half.

    One operand of double width reads the row tile from shared memory once where two products would read it twice.
    """
    if W_TMA:
        return tl.trans(tl.reshape(w.load([expert, 0, n0, k0]), (2 * BLOCK_N, BLOCK_K)))
    else:
        k = (k0 + tl.arange(0, BLOCK_K))[:, None]
        j = tl.arange(0, 2 * BLOCK_N)
        n = n0 + j % BLOCK_N
        row = tl.max_contiguous(tl.where(j < BLOCK_N, n, n + I), 8).to(tl.int64)[None, :]
        ptrs = w + expert.to(tl.int64) * stride_e + row * stride_n + k.to(tl.int64) * stride_k
        if EVEN_K:
            return tl.load(ptrs, mask=(n < I)[None, :], other=0.0)
        else:
            return tl.load(ptrs, mask=(n < I)[None, :] & (k < C), other=0.0)


@triton.jit
def _finish_up(
    gate,
    up,
    bias,
    preact_rows,
    act_rows,
    inside,
    n0,
    I,
    alpha,
    limit,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PART: tl.constexpr,
):
    """Add the bias to PART activation columns from ``n0`` on, store the pre-activation, activate and store that.

    Interleaved columns are passed as they are, ``[BLOCK_M, 2·PART]``, in ``gate``.
    """
    n = n0 + tl.arange(0, PART)
    mask = inside[:, None] & (n < I)[None, :]
    if INTERLEAVED:
        pair = 2 * n0 + tl.arange(0, 2 * PART)
        if bias is not None:
            gate += tl.load(bias + pair, pair < 2 * I, other=0.0).to(tl.float32)[None, :]
        if preact_rows is not None:
            pair_mask = inside[:, None] & (pair < 2 * I)[None, :]
            tl.store(preact_rows + pair[None, :], gate.to(act_rows.dtype.element_ty), pair_mask)
        gate, up = tl.split(tl.reshape(gate, (gate.shape[0], PART, 2)))
    else:
        if bias is not None:
            gate += tl.load(bias + n, n < I, other=0.0).to(tl.float32)[None, :]
            if GATED:
                up += tl.load(bias + I + n, n < I, other=0.0).to(tl.float32)[None, :]
        if preact_rows is not None:
            tl.store(preact_rows + n[None, :], gate.to(act_rows.dtype.element_ty), mask)
            if GATED:
                tl.store(preact_rows + I + n[None, :], up.to(act_rows.dtype.element_ty), mask)
    FAST: tl.constexpr = act_rows.dtype.element_ty != tl.float32
    out, _ = activation(gate, alpha, limit, ACT, FAST)
    if GATED:
        factor, _ = up_factor(up, limit, ACT)
        out *= factor
    tl.store(act_rows + n[None, :], out.to(act_rows.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["capacity", "num_slots"])
def _up_kernel(
    x_ptr,
    w,
    bias_ptr,
    preact_ptr,
    act_ptr,
    slots_ptr,
    table_ptr,
    capacity,
    num_slots,
    I,
    C,
    strides,
    constants,
    low,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    X_DIV: tl.constexpr,
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
    """``strides`` are of rows of x and of the weight's dimensions, ``constants`` the activation's alpha and limit."""
    stride_x, stride_we, stride_wn, stride_wk = strides
    alpha, limit = constants
    num_live = tl.load(table_ptr)
    num_n = tl.cdiv(I, BLOCK_N)
    WIDE: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    for tile in tl.range(tl.program_id(0), num_live * num_n, tl.num_programs(0), flatten=FLATTEN):
        m, n_tile = tile_coordinates(tile, num_live, num_n, GROUP_M)
        expert, row, row_end = row_tile(table_ptr, capacity, m)
        r = row + tl.arange(0, BLOCK_M)
        x_index = clamped(tl.load(slots_ptr + tl.where(r < row_end, r, row)), num_slots - 1) // X_DIV
        x_rows = x_ptr + x_index.to(tl.int64)[:, None] * stride_x
        n0 = n_tile * BLOCK_N
        acc = tl.zeros((BLOCK_M, WIDE), tl.float32)
        if low is not None:
            j = tl.arange(0, WIDE)
            if GATED and not INTERLEAVED:
                column = n0 + j % BLOCK_N
                low_row = tl.where(j < BLOCK_N, column, column + I)
                live = column < I
            else:
                low_row = n_tile * WIDE + j
                live = low_row < (2 * I if GATED else I)
            acc = add_low_rank(acc, low, expert, r, r < row_end, low_row, live, PRECISION, RANK_TILE)
        for k in range(0, tl.cdiv(C, BLOCK_K)):
            a = load_rows(x_ptr, x_rows, row, k * BLOCK_K, C, False, EVEN_K, BLOCK_K)
            if GATED and not INTERLEAVED:
                b = _load_gate_up(
                    w,
                    expert,
                    n0,
                    k * BLOCK_K,
                    I,
                    C,
                    stride_we,
                    stride_wn,
                    stride_wk,
                    W_TMA,
                    EVEN_K,
                    BLOCK_N,
                    BLOCK_K,
                )
            else:
                b = load_weight(
                    w,
                    expert,
                    n_tile * WIDE,
                    k * BLOCK_K,
                    2 * I if GATED else I,
                    C,
                    stride_we,
                    stride_wn,
                    stride_wk,
                    W_TMA,
                    W_TRANSPOSED,
                    EVEN_K,
                    WIDE,
                    BLOCK_K,
                )
            acc = tl.dot(a, b, acc, input_precision=PRECISION)

        width = 2 * I if GATED else I
        preact_rows = preact_ptr if preact_ptr is None else preact_ptr + r.to(tl.int64)[:, None] * width
        act_rows = act_ptr + r.to(tl.int64)[:, None] * I
        bias = bias_ptr if bias_ptr is None else bias_ptr + expert.to(tl.int64) * width
        PART: tl.constexpr = BLOCK_N // 2
        left, right = column_halves(acc, BLOCK_M, WIDE)
        if GATED and not INTERLEAVED:
            first, second = column_halves(left, BLOCK_M, BLOCK_N)
            first_up, second_up = column_halves(right, BLOCK_M, BLOCK_N)
        else:
            first, second = left, right
            first_up, second_up = left, right
        for part in tl.static_range(2):
            _finish_up(
                first if part == 0 else second,
                first_up if part == 0 else second_up,
                bias,
                preact_rows,
                act_rows,
                r < row_end,
                n0 + part * PART,
                I,
                alpha,
                limit,
                ACT,
                GATED,
                INTERLEAVED,
                PART,
            )


def gate_up_operand(
    gate_up: torch.Tensor, arch: int, block_n: int, block_k: int, gated: bool, interleaved: bool
) -> tuple[object, dict[str, bool]]:
    """``gate_up`` as passed to the up-projection: for a concatenated pair, one descriptor covers both halves."""
    if not gated or interleaved:
        return weight_operand(gate_up, arch, 2 * block_n if gated else block_n, block_k)
    transposed = stored_transposed(gate_up)
    if can_describe(gate_up, arch):
        halves = gate_up.unflatten(1, (2, -1))
        return describe(halves, [1, 2, block_n, block_k]), {"W_TMA": True, "W_TRANSPOSED": False}
    return gate_up, {"W_TMA": False, "W_TRANSPOSED": transposed}


def up_projection(
    args: ExpertMlp, tile: Tile | None = None, tables: RowTables | None = None, low: LowRankTerm | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The activation ``(R, I)`` of sorted rows and, if saved, the pre-activation ``(R, 2I)``.

    ``low`` is an update of the weight, which the accumulator starts from; ``tables`` as in
    :func:`gossamer.triton_kernels.common.row_tiles`.
    """
    x, gate_up, bias, activation = unit_columns(args.x), args.gate_up.data, args.gate_up.bias, args.activation
    num_rows, (num_experts, wide, c) = args.groups.slots.shape[0], gate_up.shape
    i = wide // activation.halves
    act = torch.empty(num_rows, i, dtype=x.dtype, device=x.device)
    preact = torch.empty(num_rows, wide, dtype=x.dtype, device=x.device) if args.save else None
    arch = arch_of(x)
    if tile is None:
        form = activation_form(activation, args.interleaved)
        tile = choose_tile("expert_mlp_up", form, x, arch, num_rows, num_experts, i, c, low is not None)
    table_tensor, capacity = row_tiles(args.groups.offsets, num_rows, tile.block_m, tables)
    w, w_flags = gate_up_operand(gate_up, arch, tile.block_n, tile.block_k, activation.gated, args.interleaved)
    grid = grid_size(capacity * triton.cdiv(i, tile.block_n), tile, x)
    _up_kernel[(grid,)](
        x,
        w,
        None if bias is None else bias.contiguous(),
        preact,
        act,
        args.groups.slots,
        table_tensor,
        capacity,
        args.groups.rows.shape[0],
        i,
        c,
        (x.stride(0), *gate_up.stride()),
        (activation.alpha, activation.limit),
        **low_rank_arguments(low),
        ACT=gate_code(activation),
        GATED=activation.gated,
        INTERLEAVED=args.interleaved,
        X_DIV=args.weights.shape[1],
        EVEN_K=c % tile.block_k == 0,
        PRECISION=dot_precision(x.dtype),
        **w_flags,
        **tile.constants(),
        **tile.options(),
    )
    return act, preact


def expert_mlp(args: ExpertMlp) -> ExpertMlpOutput:
    """``y`` and, with ``args.save``, the tensors for the backward pass, whose dropped rows are not written."""
    if args.gate_up.quantized:
        return split_expert_mlp(args), None, None, None
    x, groups, weights = args.x, args.groups, args.weights
    num_rows, top_k = groups.slots.shape[0], weights.shape[1]
    gate_up, down = args.gate_up.with_factors_in(x.dtype), args.down.with_factors_in(x.dtype)
    updated = gate_up.a is not None or down.a is not None
    if x.numel() == 0:
        preact = x.new_empty(num_rows, gate_up.shape[1]) if args.save else None
        low = (
            x.new_empty(num_rows, w.a.shape[1], dtype=torch.float32) if args.save and w.a is not None else None
            for w in (gate_up, down)
        )
        return x.new_zeros(x.shape[0], down.shape[1]), preact, *low
    args = args._replace(x=unit_columns(x))
    if not args.save and not updated and (plans := decode_plans(args)):
        return split_expert_mlp(args, plans), None, None, None
    tables: RowTables = {}
    s1 = s2 = None
    if gate_up.a is not None:
        s1 = low_rows(args.x, gate_up.a, groups, top_k, tables)
    act, preact = up_projection(args, tables=tables, low=low_rank_term(s1, gate_up))
    if down.a is not None:
        s2 = low_rows(act, down.a, groups, 0, tables)
    # Packed rows and a sum per token rather than a scatter: no atomics, and the order of the sum is fixed.
    out = rows_times_weight(
        act, down.data, down.bias, groups, 0, False, False, tables=tables, low=low_rank_term(s2, down)
    )
    y = sum_slots(out, groups.rows, groups.offsets, top_k, weights)
    return (y, preact, s1, s2) if args.save else (y, None, None, None)


def aot_case(
    arch: int,
    problem: Problem,
    tile: Tile,
    layout: str = "usual",
    act: Activation | None = None,
    rank: int | None = None,
) -> tuple:
    """One launch, for ahead-of-time compilation: (kernel, signature, constexprs, options).

    ``layout`` says how the weight is stored and read: one of ``AOT_LAYOUTS``; ``rank`` is that of its update, if any.
    """
    act = act or Activation("gelu" if problem.form == "ungated" else "swiglu")
    dtype, interleaved = aot_dtype(problem.precision), problem.form == "interleaved"
    signature = aot_signature(dtype, "x_ptr w preact_ptr act_ptr", "slots_ptr table_ptr", "I C")
    signature["constants"] = ("fp32", "fp32")
    transposed, stacked = layout == "transposed", act.gated and not interleaved
    rows_and_columns = (1, "i32:16") if transposed else ("i32:16", 1)
    # One descriptor covers both halves of a stacked weight, unless it is stored transposed.
    tma = arch >= TMA_ARCH and layout != "pointers" and not (stacked and transposed)
    signature["strides"] = ("i32:16", "i32:16", *rows_and_columns)
    signature |= {"capacity": "i32", "num_slots": "i32"}
    if tma:
        rows = [2, tile.block_n] if stacked else [act.halves * tile.block_n]
        signature["w"] = aot_descriptor(dtype, [1, tile.block_k, *rows] if transposed else [1, *rows, tile.block_k])
    low_signature, low_constexprs = aot_low_rank(dtype, rank)
    signature |= low_signature
    constexprs = low_constexprs | {"bias_ptr": None, "X_DIV": 8, "W_TRANSPOSED": transposed}
    constexprs |= {**aot_form(tma, act, interleaved), **tile.constants()}
    return _up_kernel, signature, constexprs, tile.options()


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    cases = []
    for precision, mean_rows, name, form in AOT_FORMS:
        problem = Problem("expert_mlp_up", form, precision, mean_rows, 64, 2048, 2048)
        tile = choose(problem, arch)
        cases.append(aot_case(arch, problem, tile, act=Activation(name)))
        cases.append(aot_case(arch, problem, with_update(problem, tile, arch), act=Activation(name), rank=64))
    return cases
