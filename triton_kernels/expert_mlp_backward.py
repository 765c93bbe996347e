"""The backward pass of the expert feed-forward layer; of the forward pass it needs only the pre-activation.

Floor, R = T·K: 12·R·H·I floating-point operations gated, 8·R·H·I ungated; the pre-activation read and written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
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
    aot_pointer,
    aot_signature,
    arch_of,
    choose_tile,
    clamped,
    column_eighths,
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
from gossamer.triton_kernels.gather_reduce import sum_slots
from gossamer.triton_kernels.grouped_matmul import rows_times_weight
from gossamer.triton_kernels.grouped_matmul_dweight import group_sums, weight_gradient
from gossamer.triton_kernels.multi_low_rank import factor_gradient, shrink, shrink_block_m
from gossamer.triton_kernels.routing_weight_gradient import routing_weight_gradient
from gossamer.triton_kernels.tiles import Problem, Tile, choose, with_update

if TYPE_CHECKING:
    from gossamer.ops._groups import Groups
    from gossamer.ops._weights import Weight
    from gossamer.ops.expert_mlp import ExpertMlpBackward


@triton.jit
def _load_preact(preact_rows, inside, n0, I, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, PART: tl.constexpr):
    """Gate and up columns ``n0 : n0 + PART`` of the pre-activation; if they are interleaved, both results hold both."""
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


@triton.jit(do_not_specialize=["capacity", "num_rows", "num_slots"])
def _down_backward_kernel(
    dy,
    w,
    preact_ptr,
    outputs,
    lists,
    capacity,
    num_rows,
    num_slots,
    I,
    C,
    strides,
    constants,
    low,
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
    RANK_TILE: tl.constexpr,
):
    """``outputs`` are d(preact), the activation and partial sums; ``lists`` routing weights, slots and row tiles.

    ``strides`` and ``constants`` as those of the up-projection.
    """
    dpreact_ptr, act_ptr, partial_ptr = outputs
    weights_ptr, slots_ptr, table_ptr = lists
    stride_dy, stride_we, stride_wn, stride_wk = strides
    alpha, limit = constants
    num_live = tl.load(table_ptr)
    num_n = tl.cdiv(I, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_live * num_n, tl.num_programs(0), flatten=FLATTEN):
        m, n_tile = tile_coordinates(tile, num_live, num_n, GROUP_M)
        expert, row, row_end = row_tile(table_ptr, capacity, m)
        r = row + tl.arange(0, BLOCK_M)
        slot = clamped(tl.load(slots_ptr + tl.where(r < row_end, r, row)), num_slots - 1)
        dy_rows = dy + (slot // DY_DIV).to(tl.int64)[:, None] * stride_dy
        n0 = n_tile * BLOCK_N
        width = 2 * I if GATED else I
        inside = r < row_end
        r64 = r.to(tl.int64)
        row_weight = tl.load(weights_ptr + slot).to(tl.float32)
        preact_rows = preact_ptr + r64[:, None] * width
        dact = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        n = n0 + tl.arange(0, BLOCK_N)
        if low is not None:
            dact = add_low_rank(dact, low, expert, r, inside, n, n < I, PRECISION, RANK_TILE)
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

    # Weight gradients read whole blocks of rows, also past the last group; dropped rows must be finite there.
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


def low_rows(
    x: torch.Tensor, factor: torch.Tensor, groups: Groups, x_div: int, tables: RowTables, scale: float = 1.0
) -> torch.Tensor:
    """``scale·x[g(r)]·factor[e]ᵀ`` ``(R, r)`` float32 for ``factor (E, r, C)``; see ``shrink``."""
    num_rows = groups.slots.shape[0]
    block_m = shrink_block_m(x, num_rows, factor.shape[0])
    table = row_tiles(groups.offsets, num_rows, block_m, tables)
    parts = shrink(x, factor, groups.slots, table, block_m, x_div, scale=scale)
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def low_rank_term(s: torch.Tensor | None, weight: Weight) -> LowRankTerm | None:
    """The update of a product, with ``s`` its ``x·aᵀ``."""
    return None if s is None else LowRankTerm(s, weight.b, weight.factor)


def down_backward(
    args: ExpertMlpBackward,
    wants: tuple[bool, bool, bool],
    overwrite: bool,
    tile: Tile | None = None,
    tables: RowTables | None = None,
    low: LowRankTerm | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """d(preact), the weighted activation and the routing-weight partial sums; None for each that ``wants`` excludes.

    d(preact) is written over ``preact`` when ``overwrite``. ``low`` is the gradient through an update of the weight;
    ``tables`` as in :func:`gossamer.triton_kernels.common.row_tiles`.
    """
    forward, dy, preact = args.forward, args.dy, args.preact
    down, weights, groups, activation = forward.down.data, forward.weights, forward.groups, forward.activation
    num_rows, (num_experts, h, i), device = groups.slots.shape[0], down.shape, dy.device
    arch = arch_of(dy)
    if tile is None:
        form = activation_form(activation, forward.interleaved)
        tile = choose_tile("expert_mlp_down_backward", form, dy, arch, num_rows, num_experts, i, h, low is not None)
    want_dpreact, want_act, want_partial = wants
    num_n = triton.cdiv(i, tile.block_n)
    dpreact = (preact if overwrite else torch.empty_like(preact)) if want_dpreact else None
    act = torch.empty(num_rows, i, dtype=dy.dtype, device=device) if want_act else None
    partial = torch.empty(num_n, num_rows, dtype=torch.float32, device=device) if want_partial else None
    table_tensor, capacity = row_tiles(groups.offsets, num_rows, tile.block_m, tables)
    w, w_flags = weight_operand(down.transpose(1, 2), arch, tile.block_n, tile.block_k)
    _down_backward_kernel[(grid_size(capacity * num_n, tile, dy),)](
        dy,
        w,
        preact,
        (dpreact, act, partial),
        (weights, groups.slots, table_tensor),
        capacity,
        num_rows,
        groups.rows.shape[0],
        i,
        h,
        (dy.stride(0), down.stride(0), down.stride(2), down.stride(1)),
        (activation.alpha, activation.limit),
        **low_rank_arguments(low),
        ACT=gate_code(activation),
        GATED=activation.gated,
        INTERLEAVED=forward.interleaved,
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
    """The matrix products of a backward pass, by any kernels; they take the arguments of this module's functions."""

    down_backward: Callable
    rows_times_weight: Callable
    weight_gradient: Callable


def _sharing(tables: RowTables) -> Products:
    """The products of this module; launches whose tiles have equally many rows share a table."""
    return Products(
        functools.partial(down_backward, tables=tables),
        functools.partial(rows_times_weight, tables=tables),
        functools.partial(weight_gradient, tables=tables),
    )


def expert_mlp_backward(
    args: ExpertMlpBackward, overwrite: bool, products: Products | None = None
) -> dict[str, torch.Tensor]:
    """The gradients that ``args.needs`` names.

    d(preact) is written over ``preact`` when ``overwrite``; ``products`` are those of this module unless given.
    """
    forward, needs, groups = args.forward, frozenset(args.needs), args.forward.groups
    gate_up, down = forward.gate_up, forward.down
    inputs = forward.inputs()
    num_rows, top_k = groups.slots.shape[0], forward.weights.shape[1]
    if num_rows == 0:
        return {name: torch.zeros_like(inputs[name]) for name in needs}
    tables: RowTables = {}
    products = products or _sharing(tables)
    found = {}
    x, dy = unit_columns(forward.x), unit_columns(args.dy)
    first, second = gate_up.with_factors_in(x.dtype), down.with_factors_in(x.dtype)
    forward = forward._replace(x=x, weights=forward.weights.contiguous())
    args = args._replace(dy=dy, forward=forward)
    wants = (
        not needs.isdisjoint(("x", "gate_up.data", "gate_up.bias", "gate_up.a", "gate_up.b")),
        not needs.isdisjoint(("down.data", "down.a")),
        "weights" in needs,
    )

    def factor_like(name: str) -> torch.Tensor:
        return torch.empty(inputs[name].shape, dtype=inputs[name].dtype, device=x.device)

    dpreact = act = partial = None
    if any(wants):
        term = {}
        if second.a is not None:
            ds2 = low_rows(dy, second.b.transpose(1, 2), groups, top_k, tables, second.factor)
            term = {"low": LowRankTerm(ds2, second.a.transpose(1, 2), 1.0)}
        dpreact, act, partial = products.down_backward(args, wants, overwrite, **term)
    if "weights" in needs:
        found["weights"] = routing_weight_gradient(partial, dy, down.bias, groups.rows, groups.offsets, forward.weights)
        partial = None
    if "down.data" in needs:
        found["down.data"] = products.weight_gradient(
            act, dy, groups, 0, top_k, stored_transposed(down.data), finite=True
        )
    if "down.a" in needs:
        found["down.a"] = da = factor_like("down.a")
        factor_gradient(ds2, act, groups.slots, groups.offsets, 0, da, False)
    # The weighted activation is freed before the larger gradient is allocated.
    del act
    if "down.b" in needs:
        found["down.b"] = db = factor_like("down.b")
        # An index out of range would end the process on CUDA; kernels use the nearest one.
        slots = groups.slots.clamp(0, max(forward.weights.numel() - 1, 0))
        weighted = args.s2 * forward.weights.view(-1).index_select(0, slots).unsqueeze(1)
        factor_gradient(weighted, dy, groups.slots, groups.offsets, top_k, db, True, scale=second.factor)
    if "down.bias" in needs:
        found["down.bias"] = group_sums(dy, groups, top_k, forward.weights)

    term = {}
    if first.a is not None and not needs.isdisjoint(("x", "gate_up.a")):
        ds1 = low_rows(dpreact, first.b.transpose(1, 2), groups, 0, tables, first.factor)
        term = {"low": LowRankTerm(ds1, first.a.transpose(1, 2), 1.0)}
    if "x" in needs:
        dx_rows = products.rows_times_weight(dpreact, first.data.transpose(1, 2), None, groups, 0, False, False, **term)
        found["x"] = sum_slots(dx_rows, groups.rows, groups.offsets, top_k, None)
        del dx_rows
    if "gate_up.data" in needs:
        found["gate_up.data"] = products.weight_gradient(
            x, dpreact, groups, top_k, 0, stored_transposed(gate_up.data), finite=True
        )
    if "gate_up.a" in needs:
        found["gate_up.a"] = da = factor_like("gate_up.a")
        factor_gradient(ds1, x, groups.slots, groups.offsets, top_k, da, False)
    if "gate_up.b" in needs:
        found["gate_up.b"] = db = factor_like("gate_up.b")
        factor_gradient(args.s1, dpreact, groups.slots, groups.offsets, 0, db, True, scale=first.factor)
    if "gate_up.bias" in needs:
        found["gate_up.bias"] = group_sums(dpreact, groups, 0)
    return found


AOT_FORMS = (
    ("bf16", 1024, "swiglu", "gated"),
    ("bf16", 1024, "clamped_swiglu", "interleaved"),
    ("bf16", 1024, "gelu", "ungated"),
    ("bf16", 8, "swiglu", "gated"),
    ("fp32", 1024, "swiglu", "gated"),
)


def aot_form(tma: bool, act: Activation, interleaved: bool) -> dict[str, object]:
    """The compile-time arguments that the forward and the backward kernel share, for ahead-of-time compilation."""
    form = {"ACT": gate_code(act), "GATED": act.gated, "INTERLEAVED": interleaved, "W_TMA": tma, "EVEN_K": True}
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
    signature = aot_signature(dtype, "dy w preact_ptr", "", "I C")
    pointer = aot_pointer(dtype)
    signature |= {"outputs": (pointer, pointer, "*fp32:16"), "lists": (pointer, "*i32:16", "*i32:16")}
    # The kernel reads the transpose of the weight.
    usual, tma = layout != "transposed", arch >= TMA_ARCH and layout != "pointers"
    rows_and_columns = (1, "i32:16") if usual else ("i32:16", 1)
    signature |= {"strides": ("i32:16", "i32:16", *rows_and_columns), "constants": ("fp32", "fp32")}
    signature |= {"capacity": "i32", "num_rows": "i32", "num_slots": "i32"}
    if tma:
        block = [tile.block_k, tile.block_n] if usual else [tile.block_n, tile.block_k]
        signature["w"] = aot_descriptor(dtype, [1, *block])
    low_signature, low_constexprs = aot_low_rank(dtype, rank)
    signature |= low_signature
    constexprs = low_constexprs | {"DY_DIV": 8, "W_TRANSPOSED": usual}
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
