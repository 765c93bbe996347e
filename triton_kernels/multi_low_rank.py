"""Low-rank updates of many adapters: skinny products over ragged groups of rows, and their gradients.

Floor, M rows and A adapters in use: 2·M·r·(C + N) floating-point operations forward and twice as many backward; M·(C +
N) + A·r·(C + N) elements moved, and the result read if the update is added to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.common import (
    aot_signature,
    clamped,
    dot_precision,
    group_range,
    rank_block,
    row_tile,
    row_tiles,
    unit_columns,
)
from gossamer.triton_kernels.tiles import choose_block_m

if TYPE_CHECKING:
    from gossamer.ops.multi_low_rank import MultiLowRank, MultiLowRankBackward

# The number of programs that fills a large GPU twice. Tiles are split along their sums until there are that many.
MANY_PROGRAMS = 256
MOST_SPLITS = 16


def shrink_block_m(x: torch.Tensor, num_rows: int, groups: int) -> int:
    """Rows of a tile of a shrink and its expand."""
    return min(choose_block_m(num_rows / groups), 32 if x.element_size() == 4 else 64)


def _block_n(dtype: torch.dtype, rank: int) -> int:
    return 64 if dtype == torch.float32 or rank_block(rank) > 32 else 128


def splits(programs: int, most: int) -> int:
    """The number of parts, a power of two up to ``most``, into which to cut the sums of ``programs`` tiles."""
    count = 1
    while count * 2 <= min(most, MOST_SPLITS) and programs * count * 2 <= MANY_PROGRAMS:
        count *= 2
    return count


@triton.jit
def _rank_of(ranks_ptr, group, rank):
    if ranks_ptr is None:
        return rank
    else:
        own = tl.load(ranks_ptr + group)
        return tl.where((own < 0) | (own > rank), rank, own).to(tl.int32)


@triton.jit
def _scale_of(scales_ptr, group, scale):
    if scales_ptr is None:
        return scale
    else:
        return tl.load(scales_ptr + group).to(tl.float32)


@triton.jit(do_not_specialize=["capacity", "num_rows", "num_slots"])
def _shrink_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    scales_ptr,
    ranks_ptr,
    slots_ptr,
    table_ptr,
    capacity,
    num_rows,
    num_slots,
    C,
    rank,
    scale,
    stride_x,
    stride_we,
    stride_wj,
    stride_wk,
    X_DIV: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0)
    if m < tl.load(table_ptr):
        group, row, row_end = row_tile(table_ptr, capacity, m)
        r = row + tl.arange(0, BLOCK_M)
        inside = r < row_end
        if X_DIV > 0:
            x_index = clamped(tl.load(slots_ptr + tl.where(inside, r, row)), num_slots - 1) // X_DIV
        else:
            x_index = tl.where(inside, r, row)
        x_rows = x_ptr + x_index.to(tl.int64)[:, None] * stride_x
        split = tl.program_id(1)
        j = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
        live = j < _rank_of(ranks_ptr, group, rank)
        w_rows = w_ptr + group.to(tl.int64) * stride_we + j.to(tl.int64)[None, :] * stride_wj
        per_split = tl.cdiv(tl.cdiv(C, BLOCK_K), SPLITS) * BLOCK_K
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for k0 in range(split * per_split, tl.minimum(C, (split + 1) * per_split), BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = tl.load(x_rows + k[None, :], (k < C)[None, :], other=0.0)
            w = tl.load(w_rows + k.to(tl.int64)[:, None] * stride_wk, (k < C)[:, None] & live[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
        acc *= _scale_of(scales_ptr, group, scale)
        s_rows = s_ptr + (split.to(tl.int64) * num_rows + r)[:, None] * rank
        tl.store(s_rows + j[None, :], acc, inside[:, None] & (j < rank)[None, :])


@triton.jit(do_not_specialize=["capacity", "num_rows", "num_slots"])
def _expand_kernel(
    s_ptr,
    sum_ptr,
    w_ptr,
    y_ptr,
    scales_ptr,
    ranks_ptr,
    slots_ptr,
    table_ptr,
    capacity,
    num_rows,
    num_slots,
    N,
    rank,
    scale,
    stride_we,
    stride_wn,
    stride_wj,
    stride_y,
    SPLITS: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    num_n = tl.cdiv(N, BLOCK_N)
    m = tl.program_id(0) // num_n
    n_tile = tl.program_id(0) % num_n
    num_live = tl.load(table_ptr)
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if m < num_live:
        group, row, row_end = row_tile(table_ptr, capacity, m)
        r = row + tl.arange(0, BLOCK_M)
        inside = r < row_end
        own_rank = _rank_of(ranks_ptr, group, rank)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for j0 in range(0, rank, BLOCK_R):
            j = j0 + tl.arange(0, BLOCK_R)
            mask = inside[:, None] & (j < rank)[None, :]
            s_rows = s_ptr + r.to(tl.int64)[:, None] * rank + j[None, :]
            s = tl.load(s_rows, mask, other=0.0)
            for _ in range(1, SPLITS):
                s_rows += num_rows.to(tl.int64) * rank
                s += tl.load(s_rows, mask, other=0.0)
            if sum_ptr is not None:
                if n_tile == 0:
                    tl.store(sum_ptr + r.to(tl.int64)[:, None] * rank + j[None, :], s, mask)
            w_rows = w_ptr + group.to(tl.int64) * stride_we + n.to(tl.int64)[None, :] * stride_wn
            w_mask = (j < own_rank)[:, None] & (n < N)[None, :]
            w = tl.load(w_rows + j.to(tl.int64)[:, None] * stride_wj, w_mask, other=0.0)
            acc = tl.dot(s.to(w.dtype), w, acc, input_precision=PRECISION)
        acc *= _scale_of(scales_ptr, group, scale)
        slot = clamped(tl.load(slots_ptr + r, inside, other=0), num_slots - 1)
        y_rows = y_ptr + slot.to(tl.int64)[:, None] * stride_y + n[None, :]
        mask = inside[:, None] & (n < N)[None, :]
        if ADD:
            acc += tl.load(y_rows, mask, other=0.0).to(tl.float32)
        tl.store(y_rows, acc.to(y_ptr.dtype.element_ty), mask)
    elif not ADD:
        if m < tl.load(table_ptr + 1):
            _, row, row_end = row_tile(table_ptr, capacity, m)
            r = row + tl.arange(0, BLOCK_M)
            slot = clamped(tl.load(slots_ptr + r, r < row_end, other=0), num_slots - 1)
            y_rows = y_ptr + slot.to(tl.int64)[:, None] * stride_y + n[None, :]
            zero = tl.zeros((BLOCK_M, BLOCK_N), y_ptr.dtype.element_ty)
            tl.store(y_rows, zero, (r < row_end)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def _factor_gradient_kernel(
    s_ptr,
    v_ptr,
    out_ptr,
    scales_ptr,
    ranks_ptr,
    slots_ptr,
    offsets_ptr,
    num_rows,
    num_slots,
    C,
    rank,
    scale,
    stride_v,
    stride_split,
    stride_oe,
    stride_oj,
    stride_oc,
    V_DIV: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    group = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    start, end = group_range(offsets_ptr, group, num_rows)
    per_split = tl.cdiv(tl.cdiv(end - start, BLOCK_K), SPLITS) * BLOCK_K
    begin = start + split * per_split
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    j = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for r0 in range(begin, tl.minimum(end, begin + per_split), BLOCK_K):
        r = r0 + tl.arange(0, BLOCK_K)
        inside = r < end
        if V_DIV > 0:
            v_index = clamped(tl.load(slots_ptr + r, inside, other=0), num_slots - 1) // V_DIV
        else:
            v_index = r
        v_rows = v_ptr + v_index.to(tl.int64)[:, None] * stride_v
        v = tl.load(v_rows + c[None, :], inside[:, None] & (c < C)[None, :], other=0.0)
        s_rows = s_ptr + r.to(tl.int64)[:, None] * rank
        s = tl.load(s_rows + j[None, :], inside[:, None] & (j < rank)[None, :], other=0.0)
        acc = tl.dot(tl.trans(s.to(v.dtype)), v, acc, input_precision=PRECISION)
    acc *= _scale_of(scales_ptr, group, scale)
    acc = tl.where((j < _rank_of(ranks_ptr, group, rank))[:, None], acc, 0.0)
    out = out_ptr + split.to(tl.int64) * stride_split + group.to(tl.int64) * stride_oe
    out += j.to(tl.int64)[:, None] * stride_oj + c.to(tl.int64)[None, :] * stride_oc
    tl.store(out, acc.to(out_ptr.dtype.element_ty), (j < rank)[:, None] & (c < C)[None, :])


@triton.jit
def _sum_splits_kernel(parts_ptr, out_ptr, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(parts_ptr + i, i < count, other=0.0)
    for _ in range(1, SPLITS):
        parts_ptr += count
        total += tl.load(parts_ptr + i, i < count, other=0.0)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), i < count)


def shrink(
    x: torch.Tensor,
    weight: torch.Tensor,
    slots: torch.Tensor,
    table: tuple[torch.Tensor, int],
    block_m: int,
    x_div: int,
    scales: torch.Tensor | None = None,
    scale: float = 1.0,
    ranks: torch.Tensor | None = None,
    split: bool = True,
) -> torch.Tensor:
    """``scale[i]·x[g(r)]·weight[i]ᵀ`` for ``weight (A, r, C)``, as float32 parts ``(S, R, r)`` that add up to it.

    ``g(r)`` is ``r`` when ``x_div`` is 0, else ``slots[r] // x_div``. Rows without a group are not written.
    """
    (table_tensor, capacity), num_rows, (_, rank, c) = table, slots.shape[0], weight.shape
    block_r, block_k = rank_block(rank), 32 if x.element_size() == 4 else 128 if rank <= 32 else 64
    rank_tiles = triton.cdiv(rank, block_r)
    count = splits(capacity * rank_tiles, c // (2 * block_k)) if split else 1
    parts = torch.empty(count, num_rows, rank, dtype=torch.float32, device=x.device)
    if parts.numel() == 0 or capacity == 0:
        return parts
    _shrink_kernel[(capacity, count, rank_tiles)](
        x,
        weight,
        parts,
        scales,
        ranks,
        slots,
        table_tensor,
        capacity,
        num_rows,
        x.shape[0] * x_div,
        c,
        rank,
        scale,
        x.stride(0),
        *weight.stride(),
        X_DIV=x_div,
        SPLITS=count,
        PRECISION=dot_precision(x.dtype),
        BLOCK_M=block_m,
        BLOCK_R=block_r,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=3,
    )
    return parts


class _Rows(NamedTuple):
    """Rows sorted by adapter, and their tiles."""

    slots: torch.Tensor
    table: tuple[torch.Tensor, int]
    block_m: int


class _Scale(NamedTuple):
    """The factor of an update, and the ranks of adapters."""

    scales: torch.Tensor | None
    scale: float
    ranks: torch.Tensor | None


def _expand(
    parts: torch.Tensor,
    total: torch.Tensor | None,
    weight: torch.Tensor,
    y: torch.Tensor,
    rows: _Rows,
    scale: _Scale,
    *,
    add: bool,
) -> None:
    """``y[slot] (+)= scale[i]·s·weight[i]ᵀ`` with ``s`` the sum of ``parts``, which goes to ``total`` if given."""
    (table_tensor, capacity), (_, n, rank) = rows.table, weight.shape
    block_n = _block_n(weight.dtype, rank)
    if y.numel() == 0:
        return
    _expand_kernel[(capacity * triton.cdiv(n, block_n),)](
        parts,
        total,
        weight,
        y,
        scale.scales,
        scale.ranks,
        rows.slots,
        table_tensor,
        capacity,
        parts.shape[1],
        y.shape[0],
        n,
        rank,
        scale.scale,
        *weight.stride(),
        y.stride(0),
        SPLITS=parts.shape[0],
        ADD=add,
        PRECISION=dot_precision(weight.dtype),
        BLOCK_M=rows.block_m,
        BLOCK_N=block_n,
        BLOCK_R=rank_block(rank),
        num_warps=4,
        num_stages=2,
    )


def factor_gradient(
    s: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    v_div: int,
    out: torch.Tensor,
    transposed: bool,
    scales: torch.Tensor | None = None,
    scale: float = 1.0,
    ranks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write ``scale[i]·Σ_r s[r]ᵀ·v[g(r)]`` over each group's rows to ``out (A, r, C)``, or ``(A, C, r)`` transposed.

    ``s (R, r)`` is sorted by group; ``g(r)`` as in :func:`shrink`, by ``v_div``. Groups without rows get zeros.
    """
    if out.numel() == 0:
        return out
    num_groups, rank, c = offsets.shape[0] - 1, s.shape[1], v.shape[1]
    block_r, block_c, block_k = rank_block(rank), 64, 32 if v.element_size() == 4 else 64
    rank_tiles, tiles = triton.cdiv(rank, block_r), triton.cdiv(c, block_c)
    count = splits(num_groups * rank_tiles * tiles, slots.shape[0] // (4 * block_k))
    parts = out if count == 1 else torch.empty(count, *out.shape, dtype=torch.float32, device=out.device)
    stride_e, stride_j, stride_c = out.stride()
    if transposed:
        stride_j, stride_c = stride_c, stride_j
    _factor_gradient_kernel[(num_groups * count, tiles, rank_tiles)](
        s,
        v,
        parts,
        scales,
        ranks,
        slots,
        offsets,
        slots.shape[0],
        v.shape[0] * v_div,
        c,
        rank,
        scale,
        v.stride(0),
        out.numel(),
        stride_e,
        stride_j,
        stride_c,
        V_DIV=v_div,
        SPLITS=count,
        PRECISION=dot_precision(v.dtype),
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=3,
    )
    if count > 1:
        block = 1024
        _sum_splits_kernel[(triton.cdiv(out.numel(), block),)](
            parts, out, out.numel(), SPLITS=count, BLOCK=block, num_warps=4
        )
    return out


def multi_low_rank(args: MultiLowRank, y: torch.Tensor, *, add: bool) -> torch.Tensor:
    """Write the updates to ``y (M, N)`` or add them; returns ``x·aᵀ (M, r)`` float32 by adapter, empty unless saved."""
    x, slots = unit_columns(args.x), args.slots
    num_rows, rank = slots.shape[0], args.a.shape[1]
    a, b = args.a.to(x.dtype), args.b.to(x.dtype)
    total = torch.empty((num_rows, rank) if args.save else (0,), dtype=torch.float32, device=x.device)
    if num_rows == 0:
        return total
    block_m = shrink_block_m(x, num_rows, a.shape[0])
    rows = _Rows(slots, row_tiles(args.offsets, num_rows, block_m), block_m)
    parts = shrink(x, a, *rows, 1, ranks=args.ranks)
    scale = _Scale(args.scales, args.scale, args.ranks)
    _expand(parts, total if args.save else None, b, y, rows, scale, add=add)
    return total


def multi_low_rank_backward(args: MultiLowRankBackward) -> dict[str, torch.Tensor]:
    """The gradients named in ``args.needs``."""
    forward, needs = args.forward, args.needs
    a, b, slots, offsets, ranks = forward.a, forward.b, forward.slots, forward.offsets, forward.ranks
    scale = {"scales": forward.scales, "scale": forward.scale, "ranks": ranks}
    x, dy = unit_columns(forward.x), unit_columns(args.dy)
    num_rows, c = x.shape
    shapes = {"x": (num_rows, c), "a": a.shape, "b": b.shape}
    found = {name: getattr(forward, name).new_empty(shapes[name]) for name in needs}
    if num_rows and ("x" in needs or "a" in needs):
        block_m = shrink_block_m(x, num_rows, a.shape[0])
        rows = _Rows(slots, row_tiles(offsets, num_rows, block_m), block_m)
        # The transposes of the factors: (A, r, N) shrinks dy, (A, C, r) expands to dx.
        b_t, a_t = b.to(x.dtype).transpose(1, 2), a.to(x.dtype).transpose(1, 2)
        parts = shrink(dy, b_t, *rows, 1, **scale, split="x" in needs)
        ds = parts[0]
        if "x" in needs:
            summed = "a" in needs and parts.shape[0] > 1
            ds = torch.empty_like(ds) if summed else ds
            _expand(parts, ds if summed else None, a_t, found["x"], rows, _Scale(None, 1.0, ranks), add=False)
        if "a" in needs:
            factor_gradient(ds, x, slots, offsets, 1, found["a"], False, ranks=ranks)
    elif "a" in needs:
        found["a"].zero_()
    if "b" in needs:
        factor_gradient(args.s, dy, slots, offsets, 1, found["b"], True, **scale)
    return found


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    cases = []
    for dtype, block_m, rank, count in (
        (torch.bfloat16, 16, 16, 16),
        (torch.bfloat16, 64, 64, 1),
        (torch.float32, 32, 16, 1),
    ):
        wide = dtype == torch.float32
        absent = {"ranks_ptr": None, "PRECISION": "ieee", "BLOCK_R": rank_block(rank)}
        floats = {"scales_ptr": "*fp32:16", "num_rows": "i32", "num_slots": "i32", "scale": "fp32"}
        rows = {"capacity": "i32", **floats}
        signature = aot_signature(dtype, "x_ptr w_ptr", "slots_ptr table_ptr", "C rank stride_x stride_we stride_wj")
        constexprs = {"stride_wk": 1, "X_DIV": 1, "SPLITS": count, "BLOCK_M": block_m}
        constexprs["BLOCK_K"] = 32 if wide else 128 if rank <= 32 else 64
        signature |= {"s_ptr": "*fp32:16", **rows}
        cases.append((_shrink_kernel, signature, constexprs | absent, {"num_warps": 4, "num_stages": 3}))

        signature = aot_signature(dtype, "w_ptr y_ptr", "slots_ptr table_ptr", "N rank stride_we stride_wn stride_y")
        constexprs = {
            "stride_wj": 1,
            "SPLITS": count,
            "ADD": True,
            "BLOCK_M": block_m,
            "BLOCK_N": _block_n(dtype, rank),
        }
        signature |= {"s_ptr": "*fp32:16", "sum_ptr": "*fp32:16", **rows}
        cases.append((_expand_kernel, signature, constexprs | absent, {"num_warps": 4, "num_stages": 2}))

        signature = aot_signature(
            dtype, "v_ptr out_ptr", "slots_ptr offsets_ptr", "C rank stride_v stride_split stride_oe stride_oj"
        )
        signature |= {"s_ptr": "*fp32:16", **floats}
        constexprs = {"stride_oc": 1, "V_DIV": 1, "SPLITS": 1, "BLOCK_C": 64, "BLOCK_K": 32 if wide else 64}
        cases.append((_factor_gradient_kernel, signature, constexprs | absent, {"num_warps": 4, "num_stages": 3}))
    signature = {"parts_ptr": "*fp32:16", "out_ptr": "*bf16:16", "count": "i32"}
    cases.append((_sum_splits_kernel, signature, {"SPLITS": 16, "BLOCK": 1024}, {"num_warps": 4}))
    return cases
