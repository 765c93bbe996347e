"""Grouped products whose summed dimension is cut into parts, also with weights of few bits.

One kernel multiplies; each of its programs has a row tile, a column tile and a part of the summed dimension. If there
are several parts, programs write their sums in float32, and the next kernel adds them in order, so that bits do not
depend on timing.

Floor with few rows: the weights of the touched experts read once, at the memory's speed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from gossamer._activation import Activation
from gossamer._layout import stored_transposed
from gossamer.triton_kernels.common import (
    TRITON_NAMES,
    RowTables,
    _cuda_sm_count,
    activation,
    aot_signature,
    arch_of,
    clamped,
    dot_precision,
    gate_code,
    load_rows,
    load_weight,
    row_tile,
    row_tiles,
    tile_coordinates,
    unit_columns,
    up_factor,
)
from gossamer.triton_kernels.gather_reduce import sum_slots
from gossamer.triton_kernels.quantized_tile import (
    DENSE,
    FORMAT_CODES,
    FP8,
    FP8_ARCH,
    codes_of,
    quantized_tile,
    stored_codes,
)
from gossamer.triton_kernels.split_tiles import SplitTile, choose_split, decodes

if TYPE_CHECKING:
    from gossamer.ops._groups import Groups
    from gossamer.ops._weights import Weight
    from gossamer.ops.expert_mlp import ExpertMlp

# The number of multiprocessors assumed under the interpreter.
INTERPRETED_SMS = 4


@triton.jit(do_not_specialize=["capacity", "num_slots", "part_stride"])
def _split_matmul_kernel(
    x,
    w,
    scales,
    bias_ptr,
    y_ptr,
    slots_ptr,
    table_ptr,
    capacity,
    num_slots,
    N,
    C,
    strides,
    part_stride,
    X_DIV: tl.constexpr,
    SCATTER: tl.constexpr,
    ZERO_DROPPED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    CODES: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``scales`` are those of codes, their rows and columns; ``strides`` of x's rows and of the weight's dimensions."""
    scale, scale_rows, scale_columns = scales
    stride_x, stride_we, stride_wn, stride_wk = strides
    FORMAT: tl.constexpr = CODES[0]
    GROUP: tl.constexpr = CODES[1]
    ROW_SHIFT: tl.constexpr = CODES[2]
    NATIVE_FP8: tl.constexpr = CODES[3]
    num_live = tl.load(table_ptr)
    num_n = tl.cdiv(N, BLOCK_N)
    part = tl.program_id(1)
    steps = tl.cdiv(C, BLOCK_K)
    first = steps * part // tl.num_programs(1)
    last = steps * (part + 1) // tl.num_programs(1)
    y_part = y_ptr + part.to(tl.int64) * part_stride
    for tile in range(tl.program_id(0), num_live * num_n, tl.num_programs(0)):
        m, n_tile = tile_coordinates(tile, num_live, num_n, GROUP_M)
        expert, row, row_end = row_tile(table_ptr, capacity, m)
        r = row + tl.arange(0, BLOCK_M)
        # Rows past the group are read from its first row and never stored.
        inside = tl.where(r < row_end, r, row)
        if X_DIV > 0:
            x_index = clamped(tl.load(slots_ptr + inside), num_slots - 1) // X_DIV
        else:
            x_index = inside
        x_rows = x + x_index.to(tl.int64)[:, None] * stride_x
        n0 = n_tile * BLOCK_N
        n = n0 + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(first, last):
            a = load_rows(x, x_rows, row, k * BLOCK_K, C, False, EVEN_K, BLOCK_K)
            if FORMAT == 0:
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
                    False,
                    W_TRANSPOSED,
                    EVEN_K,
                    BLOCK_N,
                    BLOCK_K,
                )
            elif TRANSPOSED:
                b = quantized_tile(
                    w,
                    scale,
                    expert,
                    k * BLOCK_K,
                    n0,
                    C,
                    N,
                    scale_rows,
                    scale_columns,
                    FORMAT,
                    GROUP,
                    ROW_SHIFT,
                    True,
                    NATIVE_FP8,
                    BLOCK_K,
                    BLOCK_N,
                ).to(a.dtype)
            else:
                b = quantized_tile(
                    w,
                    scale,
                    expert,
                    n0,
                    k * BLOCK_K,
                    N,
                    C,
                    scale_rows,
                    scale_columns,
                    FORMAT,
                    GROUP,
                    ROW_SHIFT,
                    False,
                    NATIVE_FP8,
                    BLOCK_N,
                    BLOCK_K,
                )
                b = tl.trans(b.to(a.dtype))
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if FORMAT > 0 and GROUP == 0 and not TRANSPOSED:
            # If a weight has one scale per row, it multiplies the finished sum.
            factor = tl.load(scale + expert.to(tl.int64) * scale_rows + n, n < N, other=0.0)
            acc *= factor.to(tl.float32)[None, :]
        if bias_ptr is not None:
            if part == 0:
                acc += tl.load(bias_ptr + expert.to(tl.int64) * N + n, n < N, other=0.0).to(tl.float32)[None, :]
        if SCATTER:
            y_index = clamped(tl.load(slots_ptr + inside), num_slots - 1)
        else:
            y_index = r
        y_rows = y_part + y_index.to(tl.int64)[:, None] * N
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
            y_rows = y_part + y_index.to(tl.int64)[:, None] * N
            zero = tl.zeros((BLOCK_M, BLOCK_N), y_ptr.dtype.element_ty)
            tl.store(y_rows + n[None, :], zero, (r < row_end)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["parts", "part_stride", "alpha", "limit"])
def _finish_kernel(
    part_ptr,
    out_ptr,
    offsets_ptr,
    parts,
    part_stride,
    num_experts,
    I,
    alpha,
    limit,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the parts of one row and, unless ACT is −1, activates it: ``(parts, R, 2I)`` to ``(R, I)``."""
    r = tl.program_id(0)
    if ACT >= 0:
        # Dropped rows have no pre-activation, and nothing reads their activation.
        if r >= tl.load(offsets_ptr + num_experts):
            return
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    width = 2 * I if GATED else I
    if GATED:
        step = 2 if INTERLEAVED else 1
        second = 1 if INTERLEAVED else I
    else:
        step = 1
        second = 0
    at = part_ptr + r.to(tl.int64) * width + i * step
    gate = tl.zeros((BLOCK,), tl.float32)
    up = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        gate += tl.load(at, i < I, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(at + second, i < I, other=0.0).to(tl.float32)
        at += part_stride
    if ACT >= 0:
        gate, _ = activation(gate, alpha, limit, ACT, out_ptr.dtype.element_ty != tl.float32)
        if GATED:
            factor, _ = up_factor(up, limit, ACT)
            gate *= factor
    tl.store(out_ptr + r.to(tl.int64) * I + i, gate.to(out_ptr.dtype.element_ty), i < I)


@triton.jit(do_not_specialize=["parts", "part_stride", "num_rows"])
def _combine_kernel(
    part_ptr,
    rows_ptr,
    weights_ptr,
    offsets_ptr,
    y_ptr,
    parts,
    part_stride,
    num_rows,
    num_experts,
    H,
    stride_weights_t,
    stride_weights_k,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``y[t] = Σ_k weights[t, k] · Σ_s part[s, rows[t, k]]`` over slots with an expert."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = tl.minimum(tl.load(offsets_ptr + num_experts), num_rows)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(TOP_K):
        r = tl.load(rows_ptr + t * TOP_K + k)
        if (r >= 0) & (r < live):
            weight = tl.load(weights_ptr + t * stride_weights_t + k * stride_weights_k).to(tl.float32)
            at = part_ptr + r.to(tl.int64) * H + h
            value = tl.zeros((BLOCK,), tl.float32)
            for _ in range(parts):
                value += tl.load(at, h < H, other=0.0).to(tl.float32)
                at += part_stride
            total += weight * value
    tl.store(y_ptr + t * H + h, total.to(y_ptr.dtype.element_ty), h < H)


def _multiprocessors(x: torch.Tensor) -> int:
    return _cuda_sm_count(x.device.index) if x.is_cuda else INTERPRETED_SMS


def _plan(x: torch.Tensor, weight: Weight, num_rows: int, n: int, c: int) -> SplitTile:
    bits = 8 * weight.data.shape[2] // max(1, weight.shape[2]) if weight.quantized else 16
    precision = TRITON_NAMES[x.dtype] if dot_precision(x.dtype) == "ieee" else "tf32"
    return choose_split(precision, bits, num_rows, weight.shape[0], n, c, arch_of(x), _multiprocessors(x))


def decode_plans(args: ExpertMlp) -> tuple[SplitTile, SplitTile] | None:
    """The cuts of both products of a layer with few rows, or None if whole products fill the device."""
    x, num_rows = args.x, args.groups.slots.shape[0]
    experts, wide, h = args.gate_up.shape
    if not decodes(num_rows, experts):
        return None
    up = _plan(x, args.gate_up, num_rows, wide, h)
    out = _plan(x, args.down, num_rows, h, args.down.shape[2])
    return (up, out) if max(up.splits, out.splits) > 1 else None


def split_matmul(
    x: torch.Tensor,
    weight: Weight,
    groups: Groups,
    x_div: int,
    *,
    scatter: bool = False,
    zero_dropped: bool = False,
    transposed: bool = False,
    plan: SplitTile | None = None,
    tables: RowTables | None = None,
) -> torch.Tensor:
    """``x[g(r)] · weightᵀ + bias`` in parts: ``(splits, R, N)`` in float32, or in the dtype of ``x`` if there is one.

    ``transposed`` sums over the rows of the (quantised) weight instead; ``scatter``, ``zero_dropped`` and ``tables``
    are as in :func:`gossamer.triton_kernels.grouped_matmul.rows_times_weight`.
    """
    num_rows, (_, n, c), bias = groups.slots.shape[0], weight.shape, weight.bias
    if transposed:
        n, c = c, n
    plan = plan or _plan(x, weight, num_rows, n, c)
    tile, splits = plan.tile, plan.splits
    y = torch.empty(splits, num_rows, n, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    if y.numel() == 0:
        return y
    x = unit_columns(x)
    table, capacity = row_tiles(groups.offsets, num_rows, tile.block_m, tables)
    codes = codes_of(weight, arch_of(x))
    if weight.quantized:
        scale = weight.scale
        scales, strides = (scale, scale.shape[1], 1 if scale.dim() == 2 else scale.shape[2]), (0, 0, 0)
    else:
        scales, strides = (None, 0, 0), weight.data.stride()
    _split_matmul_kernel[(capacity * triton.cdiv(n, tile.block_n), splits)](
        x,
        stored_codes(weight, codes),
        scales,
        None if bias is None else bias.contiguous(),
        y,
        groups.slots,
        table,
        capacity,
        groups.rows.shape[0],
        n,
        c,
        (x.stride(0), *strides),
        num_rows * n,
        X_DIV=x_div,
        SCATTER=scatter,
        ZERO_DROPPED=zero_dropped,
        TRANSPOSED=transposed,
        W_TRANSPOSED=not weight.quantized and stored_transposed(weight.data),
        CODES=tuple(codes),
        EVEN_K=c % tile.block_k == 0,
        PRECISION=dot_precision(x.dtype),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        **tile.options(),
    )
    return y


def finish(
    parts: torch.Tensor, offsets: torch.Tensor, dtype: torch.dtype, form: Activation | None, interleaved: bool = False
) -> torch.Tensor:
    """The sum of ``parts (S, R, ·)``, activated: ``(R, I)``; or, without an activation, the sum itself."""
    splits, num_rows, wide = parts.shape
    i = wide // (form.halves if form else 1)
    out = torch.empty(num_rows, i, dtype=dtype, device=parts.device)
    if out.numel() == 0:
        return out
    block = 512
    _finish_kernel[(num_rows, triton.cdiv(i, block))](
        parts,
        out,
        offsets,
        splits,
        num_rows * wide,
        offsets.shape[0] - 1,
        i,
        form.alpha if form else 0.0,
        form.limit if form else 0.0,
        ACT=gate_code(form) if form else -1,
        GATED=form is not None and form.gated,
        INTERLEAVED=interleaved,
        BLOCK=block,
        num_warps=4,
    )
    return out


def split_expert_mlp(args: ExpertMlp, plans: tuple[SplitTile | None, SplitTile | None] = (None, None)) -> torch.Tensor:
    """The layer of gossamer.expert_mlp, computed by products in parts. Nothing is saved for a backward pass."""
    x, weights, (_, rows, offsets) = args.x, args.weights, args.groups
    top_k = weights.shape[1]
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    tables: RowTables = {}
    preact = split_matmul(x, args.gate_up, args.groups, top_k, plan=plans[0], tables=tables)
    act = finish(preact, offsets, x.dtype, args.activation, args.interleaved)
    out = split_matmul(act, args.down, args.groups, 0, plan=plans[1], tables=tables)
    if out.shape[0] == 1:
        return sum_slots(out[0], rows, offsets, top_k, weights)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = 512
    _combine_kernel[(x.shape[0], triton.cdiv(x.shape[1], block))](
        out,
        rows,
        weights,
        offsets,
        y,
        out.shape[0],
        out.shape[1] * out.shape[2],
        out.shape[1],
        offsets.shape[0] - 1,
        x.shape[1],
        *weights.stride(),
        TOP_K=top_k,
        BLOCK=block,
        num_warps=4,
    )
    return y


def aot_case(arch: int, dtype: torch.dtype, plan: SplitTile, weight_format: str | None, transposed: bool) -> tuple:
    """One product, for ahead-of-time compilation: (kernel, signature, constexprs, options)."""
    tile = plan.tile
    signature = aot_signature(dtype, "x w y_ptr", "slots_ptr table_ptr", "N C")
    signature |= {"capacity": "i32", "num_slots": "i32", "part_stride": "i32"}
    scale = {None: None, "int4": "*bf16:16", "mxfp4": "*u8:16"}.get(weight_format, "*fp32:16")
    signature["scales"] = (scale, "i32:16", "i32:16")
    signature["strides"] = ("i32:16", "i32:16", "i32:16", "i32" if weight_format else 1)
    if plan.splits > 1:
        signature["y_ptr"] = "*fp32:16"
    constexprs = {"bias_ptr": None, "X_DIV": 8, "SCATTER": False, "ZERO_DROPPED": False, "TRANSPOSED": transposed}
    constexprs |= {"W_TRANSPOSED": False, "EVEN_K": True, "PRECISION": "ieee"}
    constexprs |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m}
    code = FORMAT_CODES[weight_format] if weight_format else DENSE
    native = arch >= FP8_ARCH
    group = {"fp8_block": 128, "int4": 32, "mxfp4": 32}.get(weight_format, 0)
    constexprs["CODES"] = (code, group, 7 if weight_format == "fp8_block" else 0, native)
    if code == FP8:
        signature["w"] = "*fp8e4nv:16" if native else "*u8:16"
    elif weight_format is not None:
        signature["w"] = "*i8:16" if weight_format == "int8" else "*u8:16"
    return _split_matmul_kernel, signature, constexprs, tile.options()


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    cases = []
    for weight_format, bits in ((None, 16), ("fp8_block", 8), ("mxfp4", 4)):
        plan = choose_split("bf16", bits, 64, 64, 4096, 4096, arch, 132)
        cases.append(aot_case(arch, torch.bfloat16, plan, weight_format, False))
    for weight_format, bits, transposed in (("int4", 4, False), ("fp8", 8, True), ("int8", 8, True)):
        plan = choose_split("bf16", bits, 65536, 64, 4096, 4096, arch, 132)
        cases.append(aot_case(arch, torch.bfloat16, plan, weight_format, transposed))
    for weight_format, bits in (("fp8_block", 8), ("mxfp4", 4)):
        plan = choose_split("fp32", bits, 65536, 64, 4096, 4096, arch, 132)
        cases.append(aot_case(arch, torch.float32, plan, weight_format, False))
    signature = aot_signature(torch.bfloat16, "out_ptr", "offsets_ptr", "num_experts I", "alpha limit")
    signature |= {"part_ptr": "*fp32:16", "parts": "i32", "part_stride": "i32"}
    constexprs = {"ACT": 0, "GATED": True, "INTERLEAVED": False, "BLOCK": 512}
    cases.append((_finish_kernel, signature, constexprs, {"num_warps": 4}))
    signature = aot_signature(
        torch.bfloat16, "y_ptr", "rows_ptr offsets_ptr", "num_experts H stride_weights_t stride_weights_k"
    )
    signature |= {"part_ptr": "*fp32:16", "weights_ptr": "*fp32:16"}
    signature |= dict.fromkeys(("parts", "part_stride", "num_rows"), "i32")
    cases.append((_combine_kernel, signature, {"TOP_K": 8, "BLOCK": 512}, {"num_warps": 4}))
    return cases
