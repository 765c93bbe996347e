"""The expert feed-forward layer: gathered GEMM with GLU, GEMM, weighted sum to tokens; and its memory-lean backward.

Floors, R = T·K: forward 6·R·H·I floating-point operations, backward twice that (two thirds of it ungated).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer._activation import Activation
from gossamer.triton_kernels.common import (
    aot_descriptor,
    aot_signature,
    Tile,
    activation,
    arch_of,
    can_describe,
    column_halves,
    describe,
    dot_precision,
    grid_size,
    load_rows,
    load_weight,
    prefetch_l2,
    row_tile,
    row_tiles,
    tile_coordinates,
    unit_columns,
    up_factor,
)
from gossamer.triton_kernels.gather_reduce import gather_reduce
from gossamer.triton_kernels.grouped_matmul import (
    choose_block_m,
    group_sums,
    grouped_matmul_dweight,
    rows_times_weight,
    weight_operand,
)


def choose_up_tile(arch: int, dtype: torch.dtype, mean_rows: float, halves: int) -> Tile:
    """The tile of the up-projection; block_n counts activation columns, each of ``halves`` accumulator columns."""
    block_m = choose_block_m(mean_rows)
    if dtype == torch.float32:
        return Tile(min(block_m, 64), 64 // halves, 16, 4, 3)
    if block_m < 128:
        return Tile(block_m, 128 // halves, 64, 4, 4 if arch >= 90 else 3)
    if arch >= 90:
        return Tile(128, 256 // halves, 64, 8, 3)
    return Tile(128, 128 // halves, 64, 8, 3)


def choose_down_backward_tile(arch: int, dtype: torch.dtype, mean_rows: float) -> Tile:
    """The tile of the fused backward of the down-projection and the activation."""
    block_m = choose_block_m(mean_rows)
    if dtype == torch.float32:
        return Tile(min(block_m, 64), 64, 16, 4, 3)
    return Tile(block_m, 128, 64, 4 if block_m < 128 else 8, 3)


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

    Interleaved columns come as they are, ``[BLOCK_M, 2·PART]``, in ``gate``.
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
    out, _ = activation(gate, alpha, limit, ACT)
    if GATED:
        factor, _ = up_factor(up, limit, ACT)
        out *= factor
    tl.store(act_rows + n[None, :], out.to(act_rows.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["capacity"])
def _up_kernel(
    x,
    w,
    bias_ptr,
    preact_ptr,
    act_ptr,
    slots_ptr,
    table_ptr,
    capacity,
    I,
    C,
    stride_x,
    stride_we,
    stride_wn,
    stride_wk,
    alpha,
    limit,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    X_DIV: tl.constexpr,
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
):
    num_live = tl.load(table_ptr)
    num_n = tl.cdiv(I, BLOCK_N)
    WIDE: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    for tile in tl.range(tl.program_id(0), num_live * num_n, tl.num_programs(0), flatten=FLATTEN):
        m, n_tile = tile_coordinates(tile, num_live, num_n, GROUP_M)
        expert, row, row_end = row_tile(table_ptr, capacity, m)
        r = row + tl.arange(0, BLOCK_M)
        if X_TMA:
            x_rows = x
        else:
            x_index = tl.load(slots_ptr + tl.where(r < row_end, r, row)) // X_DIV
            x_rows = x + x_index.to(tl.int64)[:, None] * stride_x
        n0 = n_tile * BLOCK_N
        acc = tl.zeros((BLOCK_M, WIDE), tl.float32)
        for k in range(0, tl.cdiv(C, BLOCK_K)):
            a = load_rows(x, x_rows, row, k * BLOCK_K, C, X_TMA, EVEN_K, BLOCK_K)
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
    """``gate_up`` as the up-projection takes it: for a concatenated pair, one descriptor over both halves."""
    if not gated or interleaved:
        return weight_operand(gate_up, arch, 2 * block_n if gated else block_n, block_k)
    transposed = gate_up.stride(1) == 1 and gate_up.stride(2) != 1
    if can_describe(gate_up, arch):
        halves = gate_up.unflatten(1, (2, -1))
        return describe(halves, [1, 2, block_n, block_k]), {"W_TMA": True, "W_TRANSPOSED": False}
    return gate_up, {"W_TMA": False, "W_TRANSPOSED": transposed}


def _up(x, gate_up, gate_up_bias, slots, table, activation, interleaved, save_preact, x_div, tile):
    num_rows, wide, c = slots.shape[0], gate_up.shape[1], x.shape[1]
    i = wide // activation.halves
    act = torch.empty(num_rows, i, dtype=x.dtype, device=x.device)
    preact = torch.empty(num_rows, wide, dtype=x.dtype, device=x.device) if save_preact else None
    table_tensor, capacity = table
    arch = arch_of(x)
    w, w_flags = gate_up_operand(gate_up, arch, tile.block_n, tile.block_k, activation.gated, interleaved)
    x_tma = x_div == 0 and can_describe(x, arch)
    grid = grid_size(capacity * triton.cdiv(i, tile.block_n), tile, x)
    _up_kernel[(grid,)](
        describe(x, [tile.block_m, tile.block_k]) if x_tma else x,
        w,
        None if gate_up_bias is None else gate_up_bias.contiguous(),
        preact,
        act,
        slots,
        table_tensor,
        capacity,
        i,
        c,
        x.stride(0),
        gate_up.stride(0),
        gate_up.stride(1),
        gate_up.stride(2),
        activation.alpha,
        activation.limit,
        ACT=activation.code,
        GATED=activation.gated,
        INTERLEAVED=interleaved,
        X_DIV=x_div,
        X_TMA=x_tma,
        EVEN_K=c % tile.block_k == 0,
        PRECISION=dot_precision(x.dtype),
        **w_flags,
        **tile.constants(),
        **tile.options(),
    )
    return act, preact


def expert_mlp(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    slots: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
    activation: Activation,
    interleaved: bool,
    save_preact: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``y (T, H)`` and the pre-activation ``(R, 2I)`` (empty unless ``save_preact``); see gossamer.expert_mlp."""
    num_rows, top_k = slots.shape[0], weights.shape[1]
    if x.numel() == 0 or gate_up.shape[1] == 0:
        preact = x.new_empty((num_rows, gate_up.shape[1]) if save_preact else (0,))
        if x.numel() == 0:
            return torch.empty_like(x, memory_format=torch.contiguous_format), preact
    x = unit_columns(x)
    tile = choose_up_tile(arch_of(x), x.dtype, num_rows / (offsets.shape[0] - 1), activation.halves)
    table = row_tiles(offsets, num_rows, tile.block_m)
    act, preact = _up(
        x, gate_up, gate_up_bias, slots, table, activation, interleaved, save_preact, top_k, tile
    )
    # Packed rows and a sum per token rather than a scatter: no atomics, and the order of the sum is fixed.
    out = rows_times_weight(act, down, down_bias, slots, offsets, 0, False, False)
    y = gather_reduce(out, rows.view(-1, top_k), None, weights, offsets[-1:], -1)
    return y, x.new_empty(0) if preact is None else preact


@triton.jit
def _finish_down_backward(
    dact,
    preact_rows,
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
    """Turn PART columns of ``dy·W2`` into d(pre-activation) and the weighted activation; returns ``⟨dy·W2, act⟩`` by row."""
    n = n0 + tl.arange(0, PART)
    mask = inside[:, None] & (n < I)[None, :]
    if GATED and INTERLEAVED:
        pair = 2 * n0 + tl.arange(0, 2 * PART)
        pair_mask = inside[:, None] & (pair < 2 * I)[None, :]
        both = tl.load(preact_rows + pair[None, :], pair_mask, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(both, (dact.shape[0], PART, 2)))
    else:
        gate = tl.load(preact_rows + n[None, :], mask, other=0.0).to(tl.float32)
        if GATED:
            up = tl.load(preact_rows + I + n[None, :], mask, other=0.0).to(tl.float32)
    value, slope = activation(gate, alpha, limit, ACT)
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
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DY_DIV: tl.constexpr,
    DY_TMA: tl.constexpr,
    PREFETCH: tl.constexpr,
    W_TMA: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    num_live = tl.load(table_ptr)
    num_n = tl.cdiv(I, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_live * num_n, tl.num_programs(0), flatten=FLATTEN):
        m, n_tile = tile_coordinates(tile, num_live, num_n, GROUP_M)
        expert, row, row_end = row_tile(table_ptr, capacity, m)
        r = row + tl.arange(0, BLOCK_M)
        slot = tl.load(slots_ptr + tl.where(r < row_end, r, row))
        if DY_TMA:
            dy_rows = dy
        else:
            dy_rows = dy + (slot // DY_DIV).to(tl.int64)[:, None] * stride_dy
        n0 = n_tile * BLOCK_N
        width = 2 * I if GATED else I
        if PREFETCH:
            # The epilogue reads as many bytes as the loop streams; asked for now, they wait in L2 by then.
            line = n0 + 64 * tl.arange(0, BLOCK_N // 64)
            wanted = (r < row_end)[:, None] & (line < I)[None, :]
            first = preact_ptr + r.to(tl.int64)[:, None] * width + line[None, :] + (n0 if INTERLEAVED else 0)
            prefetch_l2(tl.where(wanted, first, preact_ptr))
            if GATED:
                prefetch_l2(tl.where(wanted, first + (BLOCK_N if INTERLEAVED else I), preact_ptr))
        dact = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, tl.cdiv(C, BLOCK_K)):
            a = load_rows(dy, dy_rows, row, k * BLOCK_K, C, DY_TMA, EVEN_K, BLOCK_K)
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

        row_weight = tl.load(weights_ptr + slot).to(tl.float32)
        inside = r < row_end
        r64 = r.to(tl.int64)
        preact_rows = preact_ptr + r64[:, None] * width
        dpreact_rows = dpreact_ptr if dpreact_ptr is None else dpreact_ptr + r64[:, None] * width
        act_rows = act_ptr if act_ptr is None else act_ptr + r64[:, None] * I
        PART: tl.constexpr = BLOCK_N // 4
        left, right = column_halves(dact, BLOCK_M, BLOCK_N)
        first, second = column_halves(left, BLOCK_M, BLOCK_N // 2)
        third, fourth = column_halves(right, BLOCK_M, BLOCK_N // 2)
        dots = tl.zeros((BLOCK_M,), tl.float32)
        for part in tl.static_range(4):
            piece = first if part == 0 else second if part == 1 else third if part == 2 else fourth
            dots += _finish_down_backward(
                piece,
                preact_rows,
                dpreact_rows,
                act_rows,
                row_weight,
                inside,
                n0 + part * PART,
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


@triton.jit(do_not_specialize=["num_rows"])
def _weight_gradient_kernel(
    partial_ptr,
    dy_ptr,
    bias_ptr,
    dweights_ptr,
    rows_ptr,
    offsets_ptr,
    num_rows,
    num_partials,
    num_experts,
    H,
    stride_dy,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    row = tl.load(rows_ptr + slot, slot < num_rows, other=0)
    live = (slot < num_rows) & (row < tl.load(offsets_ptr + num_experts))
    total = tl.zeros((SLOTS,), tl.float32)
    for _ in range(num_partials):
        total += tl.load(partial_ptr + row, live, other=0.0)
        partial_ptr += num_rows
    if bias_ptr is not None:
        expert = tl.zeros((SLOTS,), tl.int32)
        for e0 in range(0, num_experts, BLOCK_E):
            e = e0 + tl.arange(0, BLOCK_E)
            end = tl.load(offsets_ptr + e + 1, e < num_experts, other=2147483647)
            expert += tl.sum((end[None, :] <= row[:, None]).to(tl.int32), 1)
        dy_row = dy_ptr + (slot // TOP_K).to(tl.int64)[:, None] * stride_dy
        bias_row = bias_ptr + expert.to(tl.int64)[:, None] * H
        for h0 in range(0, H, BLOCK_H):
            h = h0 + tl.arange(0, BLOCK_H)
            inside = live[:, None] & (h < H)[None, :]
            dy = tl.load(dy_row + h[None, :], inside, other=0.0).to(tl.float32)
            total += tl.sum(dy * tl.load(bias_row + h[None, :], inside, other=0.0).to(tl.float32), 1)
    tl.store(dweights_ptr + slot, total.to(dweights_ptr.dtype.element_ty), slot < num_rows)


def _down_backward(dy, down, slots, weights, preact, table, activation, interleaved, wants, overwrite, tile, dy_div, prefetch=True):
    """d(preact), the weighted activation and the routing-weight partial sums, each None where ``wants`` says no."""
    num_rows, i, h, device = slots.shape[0], down.shape[2], down.shape[1], dy.device
    want_dpreact, want_act, want_partial = wants
    num_n = triton.cdiv(i, tile.block_n)
    dpreact = (preact if overwrite else torch.empty_like(preact)) if want_dpreact else None
    act = torch.empty(num_rows, i, dtype=dy.dtype, device=device) if want_act else None
    partial = torch.empty(num_n, num_rows, dtype=torch.float32, device=device) if want_partial else None
    table_tensor, capacity = table
    w, w_flags = weight_operand(down.transpose(1, 2), arch_of(dy), tile.block_n, tile.block_k)
    dy_tma = dy_div == 0 and can_describe(dy, arch_of(dy))
    _down_backward_kernel[(grid_size(capacity * num_n, tile, dy),)](
        describe(dy, [tile.block_m, tile.block_k]) if dy_tma else dy,
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
        ACT=activation.code,
        GATED=activation.gated,
        INTERLEAVED=interleaved,
        DY_DIV=dy_div,
        DY_TMA=dy_tma,
        PREFETCH=prefetch and dy.is_cuda and dy.element_size() == 2 and tile.block_n >= 64,
        EVEN_K=h % tile.block_k == 0,
        PRECISION=dot_precision(dy.dtype),
        **w_flags,
        **tile.constants(),
        **tile.options(),
    )
    return dpreact, act, partial


def _routing_weight_gradient(partial, dy, down_bias, rows, offsets, weights):
    num_rows, (num_tokens, top_k) = rows.shape[0], weights.shape
    dweights = torch.empty(num_tokens, top_k, dtype=weights.dtype, device=weights.device)
    slots_per_program = 64
    _weight_gradient_kernel[(triton.cdiv(num_rows, slots_per_program),)](
        partial,
        dy,
        None if down_bias is None else down_bias.contiguous(),
        dweights,
        rows,
        offsets,
        num_rows,
        partial.shape[0],
        offsets.shape[0] - 1,
        dy.shape[1],
        dy.stride(0),
        TOP_K=top_k,
        SLOTS=slots_per_program,
        BLOCK_E=64,
        BLOCK_H=64,
        num_warps=4,
    )
    return dweights


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
) -> tuple[torch.Tensor, ...]:
    """Gradients of x, gate_up, down, weights, gate_up_bias, down_bias, empty where ``needs`` says no.

    d(preact) is written over ``preact`` when ``overwrite``.
    """
    num_rows, top_k = slots.shape[0], weights.shape[1]
    need_x, need_gate_up, need_down, need_weights, need_gate_up_bias, need_down_bias = needs
    none = x.new_empty(0)
    dx = dgate_up = ddown = dweights = dgate_up_bias = ddown_bias = none
    x, dy, weights = unit_columns(x), unit_columns(dy), weights.contiguous()
    wants = (need_x or need_gate_up or need_gate_up_bias, need_down, need_weights)
    dpreact = act = partial = None
    if num_rows and any(wants):
        tile = choose_down_backward_tile(arch_of(x), x.dtype, num_rows / (offsets.shape[0] - 1))
        table = row_tiles(offsets, num_rows, tile.block_m)
        dpreact, act, partial = _down_backward(
            dy, down, slots, weights, preact, table, activation, interleaved, wants, overwrite, tile, top_k
        )
    else:
        dpreact, act = preact, preact[:, : down.shape[2]]
    if need_weights:
        dweights = (
            _routing_weight_gradient(partial, dy, down_bias, rows, offsets, weights)
            if num_rows
            else torch.empty_like(weights)
        )
        partial = None
    if need_down:
        ddown = _dweight_like(down, act, dy, slots, offsets, 0, top_k)
    # The weighted activation is freed before the larger gradient is allocated.
    del act
    if need_down_bias:
        row_weights = weights.view(-1)[slots]
        ddown_bias = group_sums(dy, slots, offsets, top_k, row_weights)
    if need_x:
        dx_rows = rows_times_weight(dpreact, gate_up.transpose(1, 2), None, slots, offsets, 0, False, False)
        dx = gather_reduce(dx_rows, rows.view(-1, top_k), None, None, offsets[-1:], -1)
        del dx_rows
    if need_gate_up:
        dgate_up = _dweight_like(gate_up, x, dpreact, slots, offsets, top_k, 0)
    if need_gate_up_bias:
        dgate_up_bias = group_sums(dpreact, slots, offsets, 0)
    return dx, dgate_up, ddown, dweights, dgate_up_bias, ddown_bias


def _dweight_like(weight, x, dy, slots, offsets, x_div, dy_div):
    """The weight gradient in the memory order of ``weight``."""
    transposed = weight.stride(1) == 1 and weight.stride(2) != 1
    return grouped_matmul_dweight(x, dy, slots, offsets, x_div, dy_div, transposed, False)[0]


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    cases = []
    tma = arch >= 90
    for dtype, mean_rows, name, interleaved in (
        (torch.bfloat16, 1024, "swiglu", False),
        (torch.bfloat16, 1024, "clamped_swiglu", True),
        (torch.bfloat16, 1024, "gelu", False),
        (torch.bfloat16, 8, "swiglu", False),
        (torch.float32, 1024, "swiglu", False),
    ):
        act = Activation(name)
        form = {"ACT": act.code, "GATED": act.gated, "INTERLEAVED": interleaved, "W_TMA": tma, "EVEN_K": True}
        form |= {"PRECISION": "ieee"}
        tile = choose_up_tile(arch, dtype, mean_rows, act.halves)
        signature = aot_signature(
            dtype,
            "x w preact_ptr act_ptr",
            "slots_ptr table_ptr",
            "I C stride_x stride_we stride_wn",
            "alpha limit",
        )
        signature["capacity"] = "i32"
        if tma:
            stacked = act.gated and not interleaved
            rows = [2, tile.block_n] if stacked else [act.halves * tile.block_n]
            signature["w"] = aot_descriptor(dtype, [1, *rows, tile.block_k])
        constexprs = {"bias_ptr": None, "stride_wk": 1, "X_DIV": 8, "X_TMA": False, "W_TRANSPOSED": False}
        constexprs |= {**form, **tile.constants()}
        cases.append((_up_kernel, signature, constexprs, tile.options()))

        tile = choose_down_backward_tile(arch, dtype, mean_rows)
        signature = aot_signature(
            dtype,
            "dy w preact_ptr dpreact_ptr act_ptr weights_ptr",
            "slots_ptr table_ptr",
            "I C stride_dy stride_we stride_wk",
            "alpha limit",
        )
        signature |= {"capacity": "i32", "num_rows": "i32", "partial_ptr": "*fp32:16"}
        if tma:
            signature["w"] = aot_descriptor(dtype, [1, tile.block_k, tile.block_n])
        constexprs = {"stride_wn": 1, "DY_DIV": 8, "DY_TMA": False, "PREFETCH": dtype != torch.float32}
        constexprs |= {"W_TRANSPOSED": True, **form, **tile.constants()}
        cases.append((_down_backward_kernel, signature, constexprs, tile.options()))

    signature = aot_signature(
        torch.bfloat16, "dy_ptr bias_ptr dweights_ptr", "rows_ptr offsets_ptr", "num_partials num_experts H stride_dy"
    )
    signature |= {"partial_ptr": "*fp32:16", "num_rows": "i32"}
    constexprs = {"TOP_K": 8, "SLOTS": 64, "BLOCK_E": 64, "BLOCK_H": 64}
    cases.append((_weight_gradient_kernel, signature, constexprs, {"num_warps": 4}))
    return cases
