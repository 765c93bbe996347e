"""The delta rule forward and by one token.

There are three steps: the products and the inverse of each chunk, for all chunks at once; a pass over the chunks of
each sequence that carries the state; and the outputs from the states at the starts of chunks, again for all chunks at
once. Within a chunk let ``KK`` be the decayed products of its keys below the diagonal and ``S`` the state at its start.
Then ``X = (I + KK·diag(β))⁻¹ (V − K S)`` holds the corrections of its tokens before scaling, and the tokens add ``β X``
to the state along their keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from gossamer.ops._delta_rule_reference import log_decay
from gossamer.triton_kernels.delta_rule_chunks import (
    AOT_CALLS,
    L2_EPS,
    SQUARE_SIZES,
    Form,
    Operands,
    Squares,
    aot_case,
    aot_operands,
    chunk_of,
    contiguous_state,
    decay_from_start,
    decay_over,
    decay_to_end,
    k_rows,
    lower_square,
    num_slots,
    per_head,
    prepare,
    q_rows,
    rows,
    sequence,
    squares,
    state_tile,
    tile_width,
)

if TYPE_CHECKING:
    from gossamer.ops._delta_rule_reference import DeltaRule


@triton.jit
def load_part(ptr, slot, head, part, e, H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K rows of a state from row ``part * BLOCK_K`` on; zeros if there is no state."""
    if ptr is not None:
        at, inside = state_tile(ptr, slot, head, part * BLOCK_K + tl.arange(0, BLOCK_K), e, H, DK, DV)
        return tl.load(at, inside, other=0.0).to(tl.float32)
    else:
        return tl.zeros((BLOCK_K, e.shape[0]), tl.float32)


@triton.jit
def store_part(
    ptr, slot, head, part, e, value, H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Store the rows that :func:`load_part` loads, but none past the last row."""
    if ptr is not None:
        if part * BLOCK_K < DK:
            at, inside = state_tile(ptr, slot, head, part * BLOCK_K + tl.arange(0, BLOCK_K), e, H, DK, DV)
            tl.store(at, value, inside)


@triton.jit
def _read(
    of, r, live, head, d, state,
    H: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The values that a chunk's keys read from rows ``d`` of the state before it."""
    k = k_rows(of, r, live, head, d, H, GROUP, DK)
    return tl.dot(k * decay_from_start(of, r, live, head, d, H, DK, GATE), state, input_precision=PRECISION)


@triton.jit
def _moved(
    of, r, end, head, d, state, added,
    H: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows ``d`` of the state after a chunk that ends at ``end``: decayed, plus the rows that its tokens add."""
    k = k_rows(of, r, r < end, head, d, H, GROUP, DK)
    k *= decay_to_end(of, r, end, head, d, H, DK, GATE)
    state *= decay_over(of, r, r < end, head, d, H, DK, GATE)[:, None]
    return tl.dot(tl.trans(k), added, state, input_precision=PRECISION)


@triton.jit
def _states_kernel(
    of,
    inverse_ptr,
    initial_ptr,
    x_ptr,
    states_ptr,
    final_ptr,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    STEPS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, head = tl.program_id(0), tl.program_id(1)
    start, last = sequence(of, n)
    e = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    # Parts are multiplied one after the other, since all at once would not fit into registers.
    d0 = tl.arange(0, BLOCK_K)
    d1, d2, d3 = d0 + BLOCK_K, d0 + 2 * BLOCK_K, d0 + 3 * BLOCK_K
    s0 = load_part(initial_ptr, n, head, 0, e, H, DK, DV, BLOCK_K)
    s1 = load_part(initial_ptr, n, head, 1, e, H, DK, DV, BLOCK_K)
    s2 = load_part(initial_ptr, n, head, 2, e, H, DK, DV, BLOCK_K)
    s3 = load_part(initial_ptr, n, head, 3, e, H, DK, DV, BLOCK_K)
    slots = of.tokens // CHUNK + of.sequences
    for first in range(start, last, CHUNK):
        slot = tl.minimum(start // CHUNK + n + (first - start) // CHUNK, slots - 1)
        store_part(states_ptr, slot, head, 0, e, s0, H, DK, DV, BLOCK_K)
        store_part(states_ptr, slot, head, 1, e, s1, H, DK, DV, BLOCK_K)
        store_part(states_ptr, slot, head, 2, e, s2, H, DK, DV, BLOCK_K)
        store_part(states_ptr, slot, head, 3, e, s3, H, DK, DV, BLOCK_K)
        end = tl.minimum(last, first + CHUNK)
        r = first + tl.arange(0, CHUNK)
        live = r < end
        wanted = rows(of.v, r, live, head, e, H, DV) - _read(of, r, live, head, d0, s0, H, GROUP, DK, GATE, PRECISION)
        if PARTS > 1:
            wanted -= _read(of, r, live, head, d1, s1, H, GROUP, DK, GATE, PRECISION)
        if PARTS > 2:
            wanted -= _read(of, r, live, head, d2, s2, H, GROUP, DK, GATE, PRECISION)
        if PARTS > 3:
            wanted -= _read(of, r, live, head, d3, s3, H, GROUP, DK, GATE, PRECISION)
        x = tl.dot(lower_square(inverse_ptr, slot, head, H, CHUNK, BLOCK), wanted, input_precision=PRECISION)
        to = x_ptr + (r.to(tl.int64) * H + head)[:, None] * DV + e[None, :]
        tl.store(to, x.to(x_ptr.dtype.element_ty), live[:, None] & (e < DV)[None, :])
        added = x * per_head(of.beta, r, live, head, H)[:, None]
        s0 = _moved(of, r, end, head, d0, s0, added, H, GROUP, DK, GATE, PRECISION)
        if PARTS > 1:
            s1 = _moved(of, r, end, head, d1, s1, added, H, GROUP, DK, GATE, PRECISION)
        if PARTS > 2:
            s2 = _moved(of, r, end, head, d2, s2, added, H, GROUP, DK, GATE, PRECISION)
        if PARTS > 3:
            s3 = _moved(of, r, end, head, d3, s3, added, H, GROUP, DK, GATE, PRECISION)
    store_part(final_ptr, n, head, 0, e, s0, H, DK, DV, BLOCK_K)
    store_part(final_ptr, n, head, 1, e, s1, H, DK, DV, BLOCK_K)
    store_part(final_ptr, n, head, 2, e, s2, H, DK, DV, BLOCK_K)
    store_part(final_ptr, n, head, 3, e, s3, H, DK, DV, BLOCK_K)


@triton.jit
def _outputs_kernel(
    of,
    qk_ptr,
    x_ptr,
    states_ptr,
    o_ptr,
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
    BLOCK: tl.constexpr,
):
    slot, head = tl.program_id(0), tl.program_id(1)
    first, end = chunk_of(of, slot, STEPS, CHUNK)
    if first >= end:
        return
    e = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    r = first + tl.arange(0, CHUNK)
    live = r < end
    o = tl.zeros((CHUNK, BLOCK_V), tl.float32)
    for k0 in range(0, DK, BLOCK_K):
        d = k0 + tl.arange(0, BLOCK_K)
        q = q_rows(of, r, live, head, d, H, GROUP, DK)
        q *= decay_from_start(of, r, live, head, d, H, DK, GATE)
        at, inside = state_tile(states_ptr, slot, head, d, e, H, DK, DV)
        state = tl.load(at, inside, other=0.0).to(tl.float32)
        o = tl.dot(q, state, o, input_precision=PRECISION)
    added = rows(x_ptr, r, live, head, e, H, DV) * per_head(of.beta, r, live, head, H)[:, None]
    o = tl.dot(lower_square(qk_ptr, slot, head, H, CHUNK, BLOCK), added, o, input_precision=PRECISION)
    to = o_ptr + (r.to(tl.int64) * H + head)[:, None] * DV + e[None, :]
    tl.store(to, (o * scale).to(o_ptr.dtype.element_ty), live[:, None] & (e < DV)[None, :])


@triton.jit
def _step_kernel(
    of,
    state_ptr,
    o_ptr,
    scale,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    GATE: tl.constexpr,
    L2NORM: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK_K)
    e = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    row = n.to(tl.int64) * H + head
    key = (n.to(tl.int64) * (H // GROUP) + head // GROUP) * DK + d
    q = tl.load(of.q + key, d < DK, other=0.0).to(tl.float32)
    k = tl.load(of.k + key, d < DK, other=0.0).to(tl.float32)
    if L2NORM:
        q /= tl.sqrt(tl.sum(q * q, 0) + EPS)
        k /= tl.sqrt(tl.sum(k * k, 0) + EPS)
    at, inside = state_tile(state_ptr, n, head, d, e, H, DK, DV)
    state = tl.load(at, inside, other=0.0)
    if GATE == 1:
        state *= tl.exp(tl.load(of.g + row).to(tl.float32))
    if GATE == 2:
        state *= tl.exp(tl.load(of.g + row * DK + d, d < DK, other=0.0).to(tl.float32))[:, None]
    v = tl.load(of.v + row * DV + e, e < DV, other=0.0).to(tl.float32)
    added = (v - tl.sum(state * k[:, None], 0)) * tl.load(of.beta + row).to(tl.float32)
    state += k[:, None] * added[None, :]
    tl.store(at, state, inside)
    o = tl.sum(state * q[:, None], 0) * scale
    tl.store(o_ptr + row * DV + e, o.to(o_ptr.dtype.element_ty), e < DV)


class Chunks(NamedTuple):
    """The results of the first two steps: ``x (T, H, D_v)`` by token and ``states (slots, H, D_k, D_v)`` by chunk."""

    squares: Squares
    x: torch.Tensor
    states: torch.Tensor


def state_tile_options(form: Form, num_warps: int, least: int = 32) -> dict[str, int]:
    """Tiles of a pass that carries the state of all key channels, in at most four parts of at least ``least`` rows.

    With more than 16 columns a program's registers spill.
    """
    width = max(tile_width(form.DK, least), triton.next_power_of_2(triton.cdiv(form.DK, 4)))
    tiles = {"PARTS": triton.cdiv(form.DK, width), "BLOCK_K": width, "BLOCK_V": tile_width(form.DV, 16)}
    return SQUARE_SIZES | tiles | {"num_warps": num_warps, "num_stages": 1}


def _states_options(form: Form) -> dict[str, int]:
    # Products in three passes hold the remainders of both operands, and every four warps have a copy.
    return state_tile_options(form, 4 if form.PRECISION == "tf32x3" else 8)


def _output_options(form: Form) -> dict[str, int]:
    tiles = {"BLOCK_K": tile_width(form.DK, 32), "BLOCK_V": tile_width(form.DV, 64)}
    return SQUARE_SIZES | tiles | {"num_warps": 4}


def _step_options(form: Form) -> dict[str, int | float]:
    tiles = {"BLOCK_K": tile_width(form.DK, 256), "BLOCK_V": tile_width(form.DV, 32)}
    return tiles | {"EPS": L2_EPS, "num_warps": 4}


def run_chunks(of: Operands, form: Form, initial: torch.Tensor | None, final: torch.Tensor | None) -> Chunks:
    """Run the first two steps."""
    found = squares(of, form)
    x = torch.empty(of.v.shape, dtype=torch.float32, device=of.v.device)
    states = torch.empty(num_slots(of), form.H, form.DK, form.DV, dtype=torch.float32, device=of.v.device)
    options = _states_options(form)
    grid = of.sequences, form.H, triton.cdiv(form.DV, options["BLOCK_V"])
    _states_kernel[grid](of, found.inverse, initial, x, states, final, **form._asdict(), **options)
    return Chunks(found, x, states)


def run_forward(args: DeltaRule) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``o (B, T, H, D_v)`` and the final state, or None if that is not requested."""
    o = torch.empty(args.v.shape, dtype=args.v.dtype, device=args.v.device)
    final = None
    if args.output_final_state:
        final = torch.empty(args.state_shape, dtype=torch.float32, device=args.v.device)
    if args.num_sequences == 0 or o.numel() == 0:
        if final is not None:
            final.copy_(0 if args.initial_state is None else args.initial_state)
        return o, final
    of, form = prepare(args, log_decay(args))
    chunks = run_chunks(of, form, contiguous_state(args.initial_state), final)
    options = _output_options(form)
    grid = num_slots(of), form.H, triton.cdiv(form.DV, options["BLOCK_V"])
    operands = of, chunks.squares.qk, chunks.x, chunks.states, o, args.scale
    _outputs_kernel[grid](*operands, **form._asdict(), **options)
    return o, final


def run_step(args: DeltaRule) -> torch.Tensor:
    """``o (B, 1, H, D_v)`` for one token of each sequence; the states ``initial_state`` change in place."""
    o = torch.empty(args.v.shape, dtype=args.v.dtype, device=args.v.device)
    if o.numel() == 0:
        return o
    of, form = prepare(args._replace(use_qk_l2norm=False), log_decay(args))
    options = _step_options(form)
    grid = of.sequences, form.H, triton.cdiv(form.DV, options["BLOCK_V"])
    _step_kernel[grid](of, args.initial_state, o, args.scale, *form[:5], L2NORM=args.use_qk_l2norm, **options)
    return o


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    wide, cases = "*fp32:16", []
    for call in AOT_CALLS:
        of, form = aot_operands(*call)
        values = form._asdict()
        states = dict.fromkeys(("inverse_ptr", "initial_ptr", "x_ptr", "states_ptr", "final_ptr"), wide)
        options = values | _states_options(form)
        cases.append(aot_case(_states_kernel, {"of": of} | states, options))
        outputs = dict.fromkeys(("qk_ptr", "x_ptr", "states_ptr"), wide) | {"o_ptr": of.v, "scale": "fp32"}
        cases.append(aot_case(_outputs_kernel, {"of": of} | outputs, values | _output_options(form)))
        step = {"of": of._replace(q_norm=None, k_norm=None), "state_ptr": wide, "o_ptr": of.v, "scale": "fp32"}
        cases.append(aot_case(_step_kernel, step, values | _step_options(form) | {"L2NORM": True}))
    return cases
