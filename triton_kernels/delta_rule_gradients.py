"""The delta rule's gradients of q, k and log decays: through the states of chunks, and through their squares.

The gradient of a log decay is a sum over everything that the decay acts on: each pair of a key before it and a query or
key after it, and the state. It is computed as that sum. The shorter form, a difference of two sums, would have rounding
errors as large as those of the terms that cancel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.delta_rule_chunks import (
    AOT_CALLS,
    BLOCK,
    BY_CHANNEL,
    BY_HEAD,
    CHUNK,
    NO_GATE,
    SQUARE_SIZES,
    Form,
    Operands,
    aot_case,
    aot_operands,
    chunk_of,
    decay_between,
    decay_from_start,
    decay_over,
    decay_to_end,
    decayed_left,
    k_rows,
    num_slots,
    one_row,
    pair_decays,
    per_head,
    q_rows,
    rows,
    square,
    state_tile,
    sums_before,
    tile_width,
)


@triton.jit
def _through_states_kernel(
    of,
    x_ptr,
    f_ptr,
    do_ptr,
    states_ptr,
    dstates_ptr,
    dq_ptr,
    dk_ptr,
    dgate_ptr,
    scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
):
    slot, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, end = chunk_of(of, slot, STEPS, CHUNK)
    if first >= end:
        return
    r = first + tl.arange(0, CHUNK)
    live = r < end
    d = block * BLOCK_K + tl.arange(0, BLOCK_K)
    beta = per_head(of.beta, r, live, head, H)[:, None]
    dq, left = tl.zeros((CHUNK, BLOCK_K), tl.float32), tl.zeros((CHUNK, BLOCK_K), tl.float32)
    right, over = tl.zeros((CHUNK, BLOCK_K), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    for e0 in range(0, DV, BLOCK_V):
        e = e0 + tl.arange(0, BLOCK_V)
        at, inside = state_tile(states_ptr, slot, head, d, e, H, DK, DV)
        state = tl.load(at, inside, other=0.0).to(tl.float32)
        at, inside = state_tile(dstates_ptr, slot, head, d, e, H, DK, DV)
        dstate = tl.load(at, inside, other=0.0)
        over += tl.sum(state * dstate, 1)
        added = rows(x_ptr, r, live, head, e, H, DV) * beta
        right = tl.dot(added, tl.trans(dstate), right, input_precision=PRECISION)
        state = tl.trans(state)
        dq = tl.dot(rows(do_ptr, r, live, head, e, H, DV), state, dq, input_precision=PRECISION)
        left = tl.dot(rows(f_ptr, r, live, head, e, H, DV), state, left, input_precision=PRECISION)
    decay = decay_from_start(of, r, live, head, d, H, DK, GATE)
    dq *= decay * scale
    left *= -decay
    right *= decay_to_end(of, r, end, head, d, H, DK, GATE)
    at = (r.to(tl.int64) * H + head)[:, None] * DK + d[None, :]
    inside = live[:, None] & (d < DK)[None, :]
    tl.store(dq_ptr + at, dq, inside)
    tl.store(dk_ptr + at, left + right, inside)
    if GATE > 0:
        q = q_rows(of, r, live, head, d, H, GROUP, DK)
        k = k_rows(of, r, live, head, d, H, GROUP, DK)
        # Each log decay acts on reads after it, on additions before it, and on the state.
        over *= decay_over(of, r, live, head, d, H, DK, GATE)
        after, before = q * dq + k * left + tl.where((r == end - 1)[:, None], over[None, :], 0.0), k * right
        if GATE == 2:
            tl.store(dgate_ptr + at, tl.cumsum(after, 0, reverse=True) + sums_before(before, CHUNK), inside)
        else:
            after, before = tl.sum(after, 1), tl.sum(before, 1)
            earlier = tl.where(r[:, None] > r[None, :], before[None, :], 0.0)
            dgate = tl.cumsum(after, 0, reverse=True) + tl.sum(earlier, 1)
            tl.store(dgate_ptr + (block.to(tl.int64) * of.tokens + r) * H + head, dgate, live)


@triton.jit
def _diagonal_gradients(
    of, q, k, dkk_ptr, dqk_ptr, slot, first, i, end, head, d,
    H: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a block's q, k on the left, k on the right and g through its own products, decayed by channel."""
    a = tl.arange(0, BLOCK)
    base = (slot.to(tl.int64) * H + head) * CHUNK * CHUNK + i * BLOCK * (CHUNK + 1)
    dq, left = tl.zeros((BLOCK, BLOCK_K), tl.float32), tl.zeros((BLOCK, BLOCK_K), tl.float32)
    right, sums = tl.zeros((BLOCK, BLOCK_K), tl.float32), tl.zeros((BLOCK, BLOCK_K), tl.float32)
    dgate = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    row = first + i * BLOCK
    live = tl.maximum(0, tl.minimum(BLOCK, end - row))
    for step in range(0, live):
        j = live - 1 - step
        later = (a >= j)[:, None]
        key = one_row(of.k, of.k_norm, row + j, end, head // GROUP, d, H // GROUP, DK)[None, :]
        key = tl.where(later, tl.exp(sums) * key, 0.0)
        dquery = tl.load(dqk_ptr + base + a * CHUNK + j)[:, None] * key
        dkey = tl.load(dkk_ptr + base + a * CHUNK + j)[:, None] * key
        dq += dquery
        left += dkey
        through = tl.cumsum(q * dquery + k * dkey, 0, reverse=True)
        dgate += tl.where((a > j)[:, None], through, 0.0)
        sums += tl.where(later, one_row(of.g, None, row + j, end, head, d, H, DK)[None, :], 0.0)
    sums = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    for j in range(0, live):
        g = one_row(of.g, None, row + j, end, head, d, H, DK)[None, :]
        sums += tl.where((a < j)[:, None], g, 0.0)
        query = one_row(of.q, of.q_norm, row + j, end, head // GROUP, d, H // GROUP, DK)[None, :]
        key = one_row(of.k, of.k_norm, row + j, end, head // GROUP, d, H // GROUP, DK)[None, :]
        change = tl.load(dqk_ptr + base + j * CHUNK + a)[:, None] * query
        change += tl.load(dkk_ptr + base + j * CHUNK + a)[:, None] * key
        right += tl.where((a <= j)[:, None], tl.exp(sums) * change, 0.0)
    return dq, left, right, dgate


@triton.jit
def _across_gradient(
    of, dkk_ptr, dqk_ptr, slot, first, i, end, head, d,
    H: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of all of a block's g through the products of later blocks with earlier ones."""
    a = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for later in range(i + 1, CHUNK // BLOCK):
        r = first + later * BLOCK + a
        q, k = decayed_left(of, r, r < end, head, d, H, GROUP, DK, 2)
        for j in range(0, i):
            s = first + j * BLOCK + a
            key = k_rows(of, s, s < end, head, d, H, GROUP, DK)
            key *= decay_to_end(of, s, tl.minimum(end, first + (j + 1) * BLOCK), head, d, H, DK, 2)
            key *= decay_between(of, first, later, j, end, head, d, H, DK, 2, BLOCK)
            dqk = tl.load(square(dqk_ptr, slot, head, later * BLOCK, j * BLOCK, H, CHUNK, BLOCK))
            dkk = tl.load(square(dkk_ptr, slot, head, later * BLOCK, j * BLOCK, H, CHUNK, BLOCK))
            through = q * tl.dot(dqk, key, input_precision=PRECISION)
            through += k * tl.dot(dkk, key, input_precision=PRECISION)
            total += tl.sum(through, 0)
    return total[None, :]


@triton.jit
def _through_squares_kernel(
    of,
    dkk_ptr,
    dqk_ptr,
    dq_ptr,
    dk_ptr,
    dgate_ptr,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot, block = tl.program_id(0), tl.program_id(2)
    head, i = tl.program_id(1) // (CHUNK // BLOCK), tl.program_id(1) % (CHUNK // BLOCK)
    first, end = chunk_of(of, slot, STEPS, CHUNK)
    if first >= end:
        return
    a = tl.arange(0, BLOCK)
    r = first + i * BLOCK + a
    live = r < end
    d = block * BLOCK_K + tl.arange(0, BLOCK_K)
    q = q_rows(of, r, live, head, d, H, GROUP, DK)
    k = k_rows(of, r, live, head, d, H, GROUP, DK)
    dq, left = tl.zeros((BLOCK, BLOCK_K), tl.float32), tl.zeros((BLOCK, BLOCK_K), tl.float32)
    right = tl.zeros((BLOCK, BLOCK_K), tl.float32)
    for j in range(0, i):
        s = first + j * BLOCK + a
        key = k_rows(of, s, s < end, head, d, H, GROUP, DK)
        if GATE > 0:
            key *= decay_to_end(of, s, tl.minimum(end, first + (j + 1) * BLOCK), head, d, H, DK, GATE)
            key *= decay_between(of, first, i, j, end, head, d, H, DK, GATE, BLOCK)
        dqk = tl.load(square(dqk_ptr, slot, head, i * BLOCK, j * BLOCK, H, CHUNK, BLOCK))
        dq = tl.dot(dqk, key, dq, input_precision=PRECISION)
        dkk = tl.load(square(dkk_ptr, slot, head, i * BLOCK, j * BLOCK, H, CHUNK, BLOCK))
        left = tl.dot(dkk, key, left, input_precision=PRECISION)
    decay = decay_from_start(of, r, live, head, d, H, DK, GATE)
    dq *= decay
    left *= decay
    for j in range(i + 1, CHUNK // BLOCK):
        s = first + j * BLOCK + a
        query, key = decayed_left(of, s, s < end, head, d, H, GROUP, DK, GATE)
        dqk = tl.load(square(dqk_ptr, slot, head, j * BLOCK, i * BLOCK, H, CHUNK, BLOCK))
        dkk = tl.load(square(dkk_ptr, slot, head, j * BLOCK, i * BLOCK, H, CHUNK, BLOCK))
        change = tl.dot(tl.trans(dqk), query, input_precision=PRECISION)
        change = tl.dot(tl.trans(dkk), key, change, input_precision=PRECISION)
        if GATE > 0:
            change *= decay_between(of, first, j, i, end, head, d, H, DK, GATE, BLOCK)
        right += change
    right *= decay_to_end(of, r, tl.minimum(end, first + (i + 1) * BLOCK), head, d, H, DK, GATE)
    if GATE == 2:
        after, before = q * dq + k * left, k * right
        dgate = tl.cumsum(after, 0, reverse=True) + sums_before(before, BLOCK)
        own = _diagonal_gradients(
            of, q, k, dkk_ptr, dqk_ptr, slot, first, i, end, head, d, H, GROUP, DK, BLOCK_K, CHUNK, BLOCK
        )
        dq += own[0]
        left += own[1]
        right += own[2]
        dgate += own[3]
        dgate += _across_gradient(
            of, dkk_ptr, dqk_ptr, slot, first, i, end, head, d, H, GROUP, DK, BLOCK_K, PRECISION, CHUNK, BLOCK
        )
    else:
        dqk = tl.load(square(dqk_ptr, slot, head, i * BLOCK, i * BLOCK, H, CHUNK, BLOCK))
        dkk = tl.load(square(dkk_ptr, slot, head, i * BLOCK, i * BLOCK, H, CHUNK, BLOCK))
        if GATE == 1:
            pairs = pair_decays(of, r, live, head, H, BLOCK)
            dqk *= pairs
            dkk *= pairs
        dq = tl.dot(dqk, k, dq, input_precision=PRECISION)
        left = tl.dot(dkk, k, left, input_precision=PRECISION)
        right = tl.dot(tl.trans(dqk), q, right, input_precision=PRECISION)
        right = tl.dot(tl.trans(dkk), k, right, input_precision=PRECISION)
    at = (r.to(tl.int64) * H + head)[:, None] * DK + d[None, :]
    inside = live[:, None] & (d < DK)[None, :]
    tl.store(dq_ptr + at, tl.load(dq_ptr + at, inside, other=0.0) + dq, inside)
    tl.store(dk_ptr + at, tl.load(dk_ptr + at, inside, other=0.0) + left + right, inside)
    if GATE == 2:
        tl.store(dgate_ptr + at, tl.load(dgate_ptr + at, inside, other=0.0) + dgate, inside)


@triton.jit
def _finish_kernel(
    d_ptr,
    x_ptr,
    norm_ptr,
    out_ptr,
    num_rows,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add up a key head's gradients over its value heads, and take them through its norm."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_K)
    inside = (row < num_rows)[:, None] & (d < DK)[None, :]
    total = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for member in range(0, GROUP):
        total += tl.load(d_ptr + (row.to(tl.int64) * GROUP + member)[:, None] * DK + d[None, :], inside, other=0.0)
    at = row.to(tl.int64)[:, None] * DK + d[None, :]
    if norm_ptr is not None:
        norm = tl.load(norm_ptr + row, row < num_rows, other=0.0)[:, None]
        x = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32) * norm
        total = norm * (total - x * tl.sum(x * total, 1)[:, None])
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), inside)


def _finish(grad: torch.Tensor, x: torch.Tensor, norm: torch.Tensor | None, form: Form) -> torch.Tensor:
    """The gradient of q or k ``(T, H_k, D_k)`` from that of each value head."""
    out = torch.empty_like(x)
    num_rows, options = x.shape[0] * x.shape[1], _finish_options(form)
    grid = (triton.cdiv(num_rows, options["ROWS"]),)
    _finish_kernel[grid](grad, x, norm, out, num_rows, GROUP=form.GROUP, DK=form.DK, **options)
    return out


def _finish_options(form: Form) -> dict[str, int]:
    width = triton.next_power_of_2(form.DK)
    return {"ROWS": max(1, 2048 // width), "BLOCK_K": width, "num_warps": 4}


def _options(form: Form, num_warps: int) -> dict[str, int]:
    return {"CHUNK": CHUNK, "BLOCK_K": tile_width(form.DK, 32), "num_warps": num_warps}


def _state_options(form: Form) -> dict[str, int]:
    return _options(form, 4) | {"BLOCK_V": tile_width(form.DV, 32)}


def _square_options(form: Form) -> dict[str, int]:
    return _options(form, 4) | SQUARE_SIZES


class Flows(NamedTuple):
    """The terms of the gradients of q, k and log decays.

    Attributes:
        x: ``(T, H, D_v)``, like f and do.
        states: states at the starts of chunks, ``(slots, H, D_k, D_v)``, like dstates.
        dkk: gradients of the squares, ``(slots, H, CHUNK, CHUNK)``, like dqk.
        dgate: gradients of log decays by head through the squares, ``(T, H)``, or None.
    """

    x: torch.Tensor
    f: torch.Tensor
    do: torch.Tensor
    states: torch.Tensor
    dstates: torch.Tensor
    dkk: torch.Tensor
    dqk: torch.Tensor
    dgate: torch.Tensor | None


def key_gradients(
    of: Operands, form: Form, flows: Flows, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradients of q and k ``(T, H_k, D_k)`` in their dtype, and of the log decays in float32.

    The gradient of decays by head through the squares is in ``flows``.
    """
    device, slots = of.q.device, num_slots(of)
    dq, dk = (torch.empty(of.tokens, form.H, form.DK, dtype=torch.float32, device=device) for _ in range(2))
    state_options, square_options = _state_options(form), _square_options(form)
    blocks = triton.cdiv(form.DK, state_options["BLOCK_K"])
    dgate = None
    if form.GATE != NO_GATE:
        shape = (of.tokens, form.H, form.DK) if form.GATE == BY_CHANNEL else (blocks, of.tokens, form.H)
        dgate = torch.empty(shape, dtype=torch.float32, device=device)
    found, sizes = (dq, dk, dgate), form._asdict()
    _through_states_kernel[(slots, form.H, blocks)](of, *flows[:5], *found, scale, **sizes, **state_options)
    grid = slots, form.H * (CHUNK // BLOCK), blocks
    _through_squares_kernel[grid](of, flows.dkk, flows.dqk, *found, **sizes, **square_options)
    if form.GATE == BY_HEAD:
        dgate = dgate.sum(0) + flows.dgate
    return _finish(dq, of.q, of.q_norm, form), _finish(dk, of.k, of.k_norm, form), dgate


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    wide, cases = "*fp32:16", []
    for call in AOT_CALLS:
        of, form = aot_operands(*call)
        values = form._asdict()
        found = {"of": of, "dq_ptr": wide, "dk_ptr": wide, "dgate_ptr": of.g}
        flows = dict.fromkeys(("x_ptr", "f_ptr", "states_ptr", "dstates_ptr"), wide) | {"do_ptr": of.v, "scale": "fp32"}
        cases.append(aot_case(_through_states_kernel, found | flows, values | _state_options(form)))
        flows = {"dkk_ptr": wide, "dqk_ptr": wide}
        cases.append(aot_case(_through_squares_kernel, found | flows, values | _square_options(form)))
        rest = {"d_ptr": wide, "x_ptr": of.q, "norm_ptr": of.q_norm, "out_ptr": of.q, "num_rows": "i32"}
        cases.append(aot_case(_finish_kernel, rest, values | _finish_options(form)))
    return cases
