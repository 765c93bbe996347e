"""The backward pass of the expert feed-forward layer, from the pre-activation alone.

Floor, R = T·K: 12·R·H·I floating-point operations gated, 8·R·H·I ungated; the pre-activation read and written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

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
    choose_tile,
    column_eighths,
    dot_precision,
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
from gossamer.triton_kernels.gather_reduce import sum_slots
from gossamer.triton_kernels.grouped_matmul import rows_times_weight
from gossamer.triton_kernels.grouped_matmul_dweight import group_sums, grouped_matmul_dweight
from gossamer.triton_kernels.routing_weight_gradient import routing_weight_gradient
from gossamer.triton_kernels.tiles import Problem, Tile, choose, with_update


@triton.jit
def _load_preact(preact_rows, inside, n0, I, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, PART: tl.constexpr):
    """Gate and up columns ``n0 : n0 + PART`` of the pre-activation; interleaved ones as they are, in both results."""
    n = n0 + tl.arange(0, PART)
    mask = inside[:, None] & (n < I)[None, :]
    if GATED and INTERLEAVED:
        pair = 2 * n0 + tl.arange(0, 2 * PART)
        gate = tl.load(preact_rows + pair[None, :], inside[:, None] & (pair < 2 * I)[None, :], other=0.0)
        up = gate
    else:
        gate = tl.load(preact_rows + n[None, :], mask, other=0.0)
        up = gate
        if GATED:
            up = tl.load(preact_rows + I + n[None, :], mask, other=0.0)
    return gate, up


@triton.jit
def _finish_down_backward(
    dact,
    gate,
    up,
    dpreact_rows,
    act_rows,
    row_weight,
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
    """Turn PART columns of ``dy·W2`` into d(pre-activation) and the weighted activation; return ``⟨dy·W2, act⟩``."""
    n = n0 + tl.arange(0, PART)
    mask = inside[:, None] & (n < I)[None, :]
    FAST: tl.constexpr = gate.dtype != tl.float32
    if GATED and INTERLEAVED:
        pair = 2 * n0 + tl.arange(0, 2 * PART)
        pair_mask = inside[:, None] & (pair < 2 * I)[None, :]
        gate, up = tl.split(tl.reshape(gate, (dact.shape[0], PART, 2)))
    gate = gate.to(tl.float32)
    up = up.to(tl.float32)
    value, slope = activation(gate, alpha, limit, ACT, FAST)
    if GATED:
        factor, factor_slope = up_factor(up, limit, ACT)
        act = value * factor
    else:
        act = value
    # Unweighted: <dy W2, act> is the gradient of the routing weight itself.
    dots = tl.sum(tl.where(mask, dact * act, 0.0), 1)
    if act_rows is not None:
        tl.store(act_rows + n[None, :], (row_weight[:, None] * act).to(act_rows.dtype.element_ty), mask)
    if dpreact_rows is not None:
        dact *= row_weight[:, None]
        if GATED:
            dgate = dact * factor * slope
            dup = dact * value * factor_slope
            if INTERLEAVED:
                pairs = tl.reshape(tl.join(dgate, dup), (dact.shape[0], 2 * PART))
                tl.store(dpreact_rows + pair[None, :], pairs.to(dpreact_rows.dtype.element_ty), pair_mask)
            else:
                tl.store(dpreact_rows + n[None, :], dgate.to(dpreact_rows.dtype.element_ty), mask)
                tl.store(dpreact_rows + I + n[None, :], dup.to(dpreact_rows.dtype.element_ty), mask)
        else:
            tl.store(dpreact_rows + n[None, :], (dact * slope).to(dpreact_rows.dtype.element_ty), mask)
    return dots


@triton.jit(do_not_specialize=["capacity", "num_rows"])
def _down_backward_kernel(
    dy,
    w,
    preact_ptr,
    dpreact_ptr,
    act_ptr,
    partial_ptr,
    weights_ptr,
    slots_ptr,
    table_ptr,
    capacity,
    num_rows,
    I,
    C,
    stride_dy,
    stride_we,
    stride_wn,
    stride_wk,
    alpha,
    limit,
    low_s_ptr,
    low_b_ptr,
    low_rank,
    low_scale,
    stride_low_e,
    stride_low_n,
    stride_low_j,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DY_DIV: tl.constexpr,
    W_TMA: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    num_live = tl.load(table_ptr)
    num_n = tl.cdiv(I, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_live * num_n, tl.num_programs(0), flatten=FLATTEN):
        m, n_tile = tile_coordinates(tile, num_live, num_n, GROUP_M)
        expert, row, row_end = row_tile(table_ptr, capacity, m)
        r = row + tl.arange(0, BLOCK_M)
        slot = tl.load(slots_ptr + tl.where(r < row_end, r, row))
        dy_rows = dy + (slot // DY_DIV).to(tl.int64)[:, None] * stride_dy
        n0 = n_tile * BLOCK_N
        width = 2 * I if GATED else I
        inside = r < row_end
        r64 = r.to(tl.int64)
        row_weight = tl.load(weights_ptr + slot).to(tl.float32)
        preact_rows = preact_ptr + r64[:, None] * width
        dact = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        n = n0 + tl.arange(0, BLOCK_N)
        if low_s_ptr is not None:
            dact = add_low_rank(
                dact,
                low_s_ptr,
                low_b_ptr,
                expert,
                r,
                inside,
                n,
                n < I,
                low_rank,
                low_scale,
                stride_low_e,
                stride_low_n,
                stride_low_j,
                PRECISION,
                RANK_BLOCKS,
                BLOCK_R,
            )
        for k in range(0, tl.cdiv(C, BLOCK_K)):
            a = load_rows(dy, dy_rows, row, k * BLOCK_K, C, False, EVEN_K, BLOCK_K)
            b = load_weight(
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
                W_TRANSPOSED,
                EVEN_K,
                BLOCK_N,
                BLOCK_K,
            )
            dact = tl.dot(a, b, dact, input_precision=PRECISION)

        dpreact_rows = dpreact_ptr if dpreact_ptr is None else dpreact_ptr + r64[:, None] * width
        act_rows = act_ptr if act_ptr is None else act_ptr + r64[:, None] * I
        PARTS: tl.constexpr = 8
        PART: tl.constexpr = BLOCK_N // PARTS
        pieces = column_eighths(dact, BLOCK_M, BLOCK_N)
        dots = tl.zeros((BLOCK_M,), tl.float32)
        for part in tl.static_range(PARTS):
            n_part = n0 + part * PART
            gate, up = _load_preact(preact_rows, inside, n_part, I, GATED, INTERLEAVED, PART)
            dots += _finish_down_backward(
                pieces[part],
                gate,
                up,
                dpreact_rows,
                act_rows,
                row_weight,
                inside,
                n_part,
                I,
                alpha,
                limit,
                ACT,
                GATED,
                INTERLEAVED,
                PART,
            )
        if partial_ptr is not None:
            tl.store(partial_ptr + n_tile.to(tl.int64) * num_rows + r, dots, inside)

    # Weight gradients read whole blocks of rows, past the last group into the dropped rows, which must be finite there.
    num_all = tl.load(table_ptr + 1)
    for tile in range(num_live * num_n + tl.program_id(0), num_all * num_n, tl.num_programs(0)):
        _, row, row_end = row_tile(table_ptr, capacity, tile // num_n)
        r = row + tl.arange(0, BLOCK_M)
        n = tile % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (r < row_end)[:, None] & (n < I)[None, :]
        zero = tl.zeros((BLOCK_M, BLOCK_N), preact_ptr.dtype.element_ty)
        if act_ptr is not None:
            tl.store(act_ptr + r.to(tl.int64)[:, None] * I + n[None, :], zero, mask)
        if dpreact_ptr is not None:
            dpreact_rows = dpreact_ptr + r.to(tl.int64)[:, None] * (2 * I if GATED else I)
            tl.store(dpreact_rows + n[None, :], zero, mask)
            if GATED:
                tl.store(dpreact_rows + I + n[None, :], zero, mask)


def activation_form(activation: Activation, interleaved: bool) -> str:
    """The form of a launch with an activation, as :class:`gossamer.triton_kernels.tiles.Problem` names it."""
    return "ungated" if not activation.gated else "interleaved" if interleaved else "gated"


def down_backward(
    dy: torch.Tensor,
    down: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
    preact: torch.Tensor,
    activation: Activation,
    interleaved: bool,
    wants: tuple[bool, bool, bool],
    overwrite: bool,
    tile: Tile | None = None,
    tables: RowTables | None = None,
    low: LowRankTerm | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """d(preact), the weighted activation and the routing-weight partial sums, each None where ``wants`` says no.

    ``low`` is what flows back through an update of the weight; ``tables`` as in
    :func:`gossamer.triton_kernels.common.row_tiles`.
    """
    num_rows, (num_experts, h, i), device = slots.shape[0], down.shape, dy.device
    arch = arch_of(dy)
    if tile is None:
        form = activation_form(activation, interleaved)
        tile = choose_tile("expert_mlp_down_backward", form, dy, arch, num_rows, num_experts, i, h, low is not None)
    want_dpreact, want_act, want_partial = wants
    num_n = triton.cdiv(i, tile.block_n)
    dpreact = (preact if overwrite else torch.empty_like(preact)) if want_dpreact else None
    act = torch.empty(num_rows, i, dtype=dy.dtype, device=device) if want_act else None
    partial = torch.empty(num_n, num_rows, dtype=torch.float32, device=device) if want_partial else None
    table_tensor, capacity = row_tiles(offsets, num_rows, tile.block_m, tables)
    w, w_flags = weight_operand(down.transpose(1, 2), arch, tile.block_n, tile.block_k)
    _down_backward_kernel[(grid_size(capacity * num_n, tile, dy),)](
        dy,
        w,
        preact,
        dpreact,
        act,
        partial,
        weights,
        slots,
        table_tensor,
        capacity,
        num_rows,
        i,
        h,
        dy.stride(0),
        down.stride(0),
        down.stride(2),
        down.stride(1),
        activation.alpha,
        activation.limit,
        **low_rank_arguments(low),
        ACT=activation.code,
        GATED=activation.gated,
        INTERLEAVED=interleaved,
        DY_DIV=weights.shape[1],
        EVEN_K=h % tile.block_k == 0,
        PRECISION=dot_precision(dy.dtype),
        **w_flags,
        **tile.constants(),
        **tile.options(),
    )
    return dpreact, act, partial


@dataclass(frozen=True)
class Products:
    """The matrix products of a backward pass, by whichever kernels: functions of the arguments of those here."""

    down_backward: Callable
    rows_times_weight: Callable
    dweight: Callable


def dweight(x, dy, slots, offsets, x_div, dy_div, transposed, tables=None):
    """The weight gradient alone, of operands whose dropped rows are finite; see :func:`grouped_matmul_dweight`."""
    return grouped_matmul_dweight(x, dy, slots, offsets, x_div, dy_div, transposed, False, finite=True, tables=tables)[
        0
    ]


def _sharing_tables() -> Products:
    """The products here, whose launches in tiles of as many rows share a table."""
    tables: RowTables = {}
    return Products(*(functools.partial(f, tables=tables) for f in (down_backward, rows_times_weight, dweight)))


def expert_mlp_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    slots: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
    preact: torch.Tensor,
    activation: Activation,
    interleaved: bool,
    needs: list[bool],
    overwrite: bool,
    products: Products | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of x, gate_up, down, weights, gate_up_bias, down_bias, empty where ``needs`` says no.

    d(preact) is written over ``preact`` when ``overwrite``; ``products`` are those of this module unless given.
    """
    products = products or _sharing_tables()
    num_rows, top_k = slots.shape[0], weights.shape[1]
    need_x, need_gate_up, need_down, need_weights, need_gate_up_bias, need_down_bias = needs
    # Each its own tensor: results of an operator may not alias.
    dx, dgate_up, ddown, dweights, dgate_up_bias, ddown_bias = (x.new_empty(0) for _ in range(6))
    x, dy, weights = unit_columns(x), unit_columns(dy), weights.contiguous()
    wants = (need_x or need_gate_up or need_gate_up_bias, need_down, need_weights)
    dpreact = act = partial = None
    if num_rows and any(wants):
        dpreact, act, partial = products.down_backward(
            dy, down, slots, offsets, weights, preact, activation, interleaved, wants, overwrite
        )
    else:
        dpreact, act = preact, preact[:, : down.shape[2]]
    if need_weights:
        dweights = (
            routing_weight_gradient(partial, dy, down_bias, rows, offsets, weights)
            if num_rows
            else torch.empty_like(weights)
        )
        partial = None
    if need_down:
        ddown = products.dweight(act, dy, slots, offsets, 0, top_k, stored_transposed(down))
    # The weighted activation is freed before the larger gradient is allocated.
    del act
    if need_down_bias:
        ddown_bias = group_sums(dy, slots, offsets, top_k, weights)
    if need_x:
        dx_rows = products.rows_times_weight(dpreact, gate_up.transpose(1, 2), None, slots, offsets, 0, False, False)
        dx = sum_slots(dx_rows, rows, offsets, top_k, None)
        del dx_rows
    if need_gate_up:
        dgate_up = products.dweight(x, dpreact, slots, offsets, top_k, 0, stored_transposed(gate_up))
    if need_gate_up_bias:
        dgate_up_bias = group_sums(dpreact, slots, offsets, 0)
    return dx, dgate_up, ddown, dweights, dgate_up_bias, ddown_bias


AOT_FORMS = (
    ("bf16", 1024, "swiglu", "gated"),
    ("bf16", 1024, "clamped_swiglu", "interleaved"),
    ("bf16", 1024, "gelu", "ungated"),
    ("bf16", 8, "swiglu", "gated"),
    ("fp32", 1024, "swiglu", "gated"),
)


def aot_form(tma: bool, act: Activation, interleaved: bool) -> dict[str, object]:
    """The compile-time arguments that the forward and the backward kernel share, for ahead-of-time compilation."""
    form = {"ACT": act.code, "GATED": act.gated, "INTERLEAVED": interleaved, "W_TMA": tma, "EVEN_K": True}
    return form | {"PRECISION": "ieee"}


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
    dtype = aot_dtype(problem.precision)
    signature = aot_signature(
        dtype,
        "dy w preact_ptr dpreact_ptr act_ptr weights_ptr",
        "slots_ptr table_ptr",
        "I C stride_dy stride_we",
        "alpha limit",
    )
    # The kernel reads the transpose of the weight.
    usual, tma = layout != "transposed", arch >= TMA_ARCH and layout != "pointers"
    wide, unit = ("stride_wk", "stride_wn") if usual else ("stride_wn", "stride_wk")
    signature[wide] = "i32:16"
    signature |= {"capacity": "i32", "num_rows": "i32", "partial_ptr": "*fp32:16"}
    if tma:
        block = [tile.block_k, tile.block_n] if usual else [tile.block_n, tile.block_k]
        signature["w"] = aot_descriptor(dtype, [1, *block])
    low_signature, low_constexprs = aot_low_rank(dtype, rank)
    signature |= low_signature
    constexprs = low_constexprs | {unit: 1, "DY_DIV": 8, "W_TRANSPOSED": usual}
    constexprs |= {**aot_form(tma, act, problem.form == "interleaved"), **tile.constants()}
    return _down_backward_kernel, signature, constexprs, tile.options()


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    cases = []
    for precision, mean_rows, name, form in AOT_FORMS:
        problem = Problem("expert_mlp_down_backward", form, precision, mean_rows, 64, 2048, 2048)
        tile = choose(problem, arch)
        cases.append(aot_case(arch, problem, tile, act=Activation(name)))
        cases.append(aot_case(arch, problem, with_update(problem, tile, arch), act=Activation(name), rank=64))
    return cases
