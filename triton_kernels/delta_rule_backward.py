"""The delta rule's gradients: the steps of the forward pass are recomputed, then differentiated in the opposite order.

Names are those of the forward pass, and ``M = (I + KK·diag(β))⁻¹``. A pass over the chunks, from the last to the first,
carries the gradient of the state. For each chunk it computes ``dU``, the gradient of the rows that its tokens add to
the state, and ``F = Mᵀ(β dU)``, the gradient of its values. A second step then computes, for all chunks at once, the
gradients of the chunks' squares, and from these and the states the gradients of q, k and the log decays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from gossamer.ops._delta_rule_reference import log_decay
from gossamer.triton_kernels.delta_rule_chunks import (
    AOT_CALLS,
    BY_HEAD,
    SQUARE_SIZES,
    Form,
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
    square,
    tile_width,
)
from gossamer.triton_kernels.delta_rule_forward import load_part, run_chunks, state_tile_options, store_part
from gossamer.triton_kernels.delta_rule_gradients import Flows, key_gradients

if TYPE_CHECKING:
    from gossamer.ops._delta_rule_reference import DeltaRule


@triton.jit
def _added_gradient(
    of, r, end, head, d, dstate,
    H: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient, through rows ``d`` of the state after a chunk, of the rows that its tokens add."""
    k = k_rows(of, r, r < end, head, d, H, GROUP, DK)
    return tl.dot(k * decay_to_end(of, r, end, head, d, H, DK, GATE), dstate, input_precision=PRECISION)


@triton.jit
def _moved_back(
    of, r, live, head, d, dstate, do, f,
    H: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of rows ``d`` of the state before a chunk, from that of the state after it."""
    decay = decay_from_start(of, r, live, head, d, H, DK, GATE)
    k = k_rows(of, r, live, head, d, H, GROUP, DK) * decay
    dstate *= decay_over(of, r, live, head, d, H, DK, GATE)[:, None]
    dstate -= tl.dot(tl.trans(k), f, input_precision=PRECISION)
    # The barrier separates the two products, so that the queries can take the registers of the keys.
    tl.debug_barrier()
    q = q_rows(of, r, live, head, d, H, GROUP, DK) * decay
    return tl.dot(tl.trans(q), do, dstate, input_precision=PRECISION)


@triton.jit
def _states_backward_kernel(
    of,
    qk_ptr,
    inverse_ptr,
    do_ptr,
    dfinal_ptr,
    f_ptr,
    du_ptr,
    dstates_ptr,
    dinitial_ptr,
    scale,
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
    d0 = tl.arange(0, BLOCK_K)
    d1, d2, d3 = d0 + BLOCK_K, d0 + 2 * BLOCK_K, d0 + 3 * BLOCK_K
    s0 = load_part(dfinal_ptr, n, head, 0, e, H, DK, DV, BLOCK_K)
    s1 = load_part(dfinal_ptr, n, head, 1, e, H, DK, DV, BLOCK_K)
    s2 = load_part(dfinal_ptr, n, head, 2, e, H, DK, DV, BLOCK_K)
    s3 = load_part(dfinal_ptr, n, head, 3, e, H, DK, DV, BLOCK_K)
    slots = of.tokens // CHUNK + of.sequences
    chunks = tl.maximum(last - start + CHUNK - 1, 0) // CHUNK
    for step in range(0, chunks):
        index = chunks - 1 - step
        first = start + index * CHUNK
        slot = tl.minimum(start // CHUNK + n + index, slots - 1)
        store_part(dstates_ptr, slot, head, 0, e, s0, H, DK, DV, BLOCK_K)
        store_part(dstates_ptr, slot, head, 1, e, s1, H, DK, DV, BLOCK_K)
        store_part(dstates_ptr, slot, head, 2, e, s2, H, DK, DV, BLOCK_K)
        store_part(dstates_ptr, slot, head, 3, e, s3, H, DK, DV, BLOCK_K)
        end = tl.minimum(last, first + CHUNK)
        r = first + tl.arange(0, CHUNK)
        live = r < end
        do = rows(do_ptr, r, live, head, e, H, DV) * scale
        du = tl.dot(tl.trans(lower_square(qk_ptr, slot, head, H, CHUNK, BLOCK)), do, input_precision=PRECISION)
        du += _added_gradient(of, r, end, head, d0, s0, H, GROUP, DK, GATE, PRECISION)
        if PARTS > 1:
            du += _added_gradient(of, r, end, head, d1, s1, H, GROUP, DK, GATE, PRECISION)
        if PARTS > 2:
            du += _added_gradient(of, r, end, head, d2, s2, H, GROUP, DK, GATE, PRECISION)
        if PARTS > 3:
            du += _added_gradient(of, r, end, head, d3, s3, H, GROUP, DK, GATE, PRECISION)
        at = (r.to(tl.int64) * H + head)[:, None] * DV + e[None, :]
        inside = live[:, None] & (e < DV)[None, :]
        tl.store(du_ptr + at, du, inside)
        du *= per_head(of.beta, r, live, head, H)[:, None]
        inverse = lower_square(inverse_ptr, slot, head, H, CHUNK, BLOCK)
        f = tl.dot(tl.trans(inverse), du, input_precision=PRECISION)
        tl.store(f_ptr + at, f, inside)
        s0 = _moved_back(of, r, live, head, d0, s0, do, f, H, GROUP, DK, GATE, PRECISION)
        if PARTS > 1:
            s1 = _moved_back(of, r, live, head, d1, s1, do, f, H, GROUP, DK, GATE, PRECISION)
        if PARTS > 2:
            s2 = _moved_back(of, r, live, head, d2, s2, do, f, H, GROUP, DK, GATE, PRECISION)
        if PARTS > 3:
            s3 = _moved_back(of, r, live, head, d3, s3, do, f, H, GROUP, DK, GATE, PRECISION)
    store_part(dinitial_ptr, n, head, 0, e, s0, H, DK, DV, BLOCK_K)
    store_part(dinitial_ptr, n, head, 1, e, s1, H, DK, DV, BLOCK_K)
    store_part(dinitial_ptr, n, head, 2, e, s2, H, DK, DV, BLOCK_K)
    store_part(dinitial_ptr, n, head, 3, e, s3, H, DK, DV, BLOCK_K)


@triton.jit
def _square_gradients_kernel(
    of,
    kk_ptr,
    qk_ptr,
    x_ptr,
    f_ptr,
    du_ptr,
    do_ptr,
    dkk_ptr,
    dqk_ptr,
    dbeta_ptr,
    dgate_ptr,
    scale,
    H: tl.constexpr,
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot, head = tl.program_id(0), tl.program_id(1)
    first, end = chunk_of(of, slot, STEPS, CHUNK)
    if first >= end:
        return
    a = tl.arange(0, CHUNK)
    r = first + a
    live = r < end
    dqk, fx = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((CHUNK, CHUNK), tl.float32)
    dbeta = tl.zeros((CHUNK,), tl.float32)
    for e0 in range(0, DV, BLOCK_V):
        e = e0 + tl.arange(0, BLOCK_V)
        x = rows(x_ptr, r, live, head, e, H, DV)
        dqk = tl.dot(rows(do_ptr, r, live, head, e, H, DV), tl.trans(x), dqk, input_precision=PRECISION)
        fx = tl.dot(rows(f_ptr, r, live, head, e, H, DV), tl.trans(x), fx, input_precision=PRECISION)
        dbeta += tl.sum(x * rows(du_ptr, r, live, head, e, H, DV), 1)
    beta = per_head(of.beta, r, live, head, H)[None, :]
    fx = tl.where(a[:, None] > a[None, :], fx, 0.0)
    tl.store(square(dkk_ptr, slot, head, 0, 0, H, CHUNK, CHUNK), -fx * beta)
    dqk = tl.where(a[:, None] >= a[None, :], dqk * beta * scale, 0.0)
    tl.store(square(dqk_ptr, slot, head, 0, 0, H, CHUNK, CHUNK), dqk)
    fx *= lower_square(kk_ptr, slot, head, H, CHUNK, BLOCK)
    tl.store(dbeta_ptr + r.to(tl.int64) * H + head, dbeta - tl.sum(fx, 0), live)
    if dgate_ptr is not None:
        # The gradient of each log decay sums the flow from the keys before it to the queries and keys after it.
        passing = dqk * lower_square(qk_ptr, slot, head, H, CHUNK, BLOCK) - fx * beta
        passing = tl.where(a[:, None] > a[None, :], passing, 0.0)
        passing = tl.cumsum(passing, 1) - passing
        dgate = tl.sum(tl.where(a[:, None] >= a[None, :], passing, 0.0), 0)
        tl.store(dgate_ptr + r.to(tl.int64) * H + head, dgate, live)


class Gradients(NamedTuple):
    """The gradients, in the shapes and dtypes of the arguments; None for an argument that is None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    beta: torch.Tensor
    g: torch.Tensor | None
    a_log: torch.Tensor | None
    dt_bias: torch.Tensor | None
    initial_state: torch.Tensor | None


def _through_gate(args: DeltaRule, dg: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The gradients of g, A_log and dt_bias, from that of the log decays."""
    if args.g is None:
        return None, None, None
    if args.a_log is None:
        return dg.view(args.g.shape).to(args.g.dtype), None, None
    with torch.enable_grad():
        leaves = [t if t is None else t.detach().requires_grad_() for t in (args.g, args.a_log, args.dt_bias)]
        decays = log_decay(args._replace(g=leaves[0], a_log=leaves[1], dt_bias=leaves[2]))
        found = iter(torch.autograd.grad(decays, [t for t in leaves if t is not None], dg.view(decays.shape)))
    return tuple(None if t is None else next(found) for t in leaves)


def run_backward(args: DeltaRule, do: torch.Tensor, dfinal_state: torch.Tensor | None) -> Gradients:
    """The gradients of all arguments, from those of the output ``(B, T, H, D_v)`` and of the final state, or None."""
    device = args.q.device
    dinitial = None if args.initial_state is None else torch.empty_like(args.initial_state).contiguous()
    if args.num_sequences == 0 or args.v.numel() == 0:
        if dinitial is not None:
            dinitial.copy_(0 if dfinal_state is None else dfinal_state)
        rest = (None if t is None else torch.zeros_like(t) for t in args[:7])
        return Gradients(*rest, dinitial)
    of, form = prepare(args, log_decay(args))
    do = do.reshape(of.v.shape).contiguous()
    chunks = run_chunks(of, form, contiguous_state(args.initial_state), None)
    f, du = (torch.empty(of.v.shape, dtype=torch.float32, device=device) for _ in range(2))
    dstates = torch.empty(chunks.states.shape, dtype=torch.float32, device=device)
    options = _states_options(form)
    _states_backward_kernel[(of.sequences, form.H, triton.cdiv(form.DV, options["BLOCK_V"]))](
        of,
        chunks.squares.qk,
        chunks.squares.inverse,
        do,
        contiguous_state(dfinal_state),
        f,
        du,
        dstates,
        dinitial,
        args.scale,
        **form._asdict(),
        **options,
    )
    dkk, dqk = (torch.empty(chunks.squares.kk.shape, dtype=torch.float32, device=device) for _ in range(2))
    dbeta = torch.empty(of.beta.shape, dtype=torch.float32, device=device)
    dgate = torch.empty_like(dbeta) if form.GATE == BY_HEAD else None
    operands = of, chunks.squares.kk, chunks.squares.qk, chunks.x, f, du, do, dkk, dqk, dbeta, dgate, args.scale
    constants = {"H": form.H, "DV": form.DV, "PRECISION": form.PRECISION, "STEPS": form.STEPS}
    _square_gradients_kernel[(num_slots(of), form.H)](*operands, **constants, **_square_options(form))
    flows = Flows(chunks.x, f, do, chunks.states, dstates, dkk, dqk, dgate)
    dq, dk, dg = key_gradients(of, form, flows, args.scale)
    return Gradients(
        dq.view(args.q.shape),
        dk.view(args.k.shape),
        f.to(args.v.dtype).view(args.v.shape),
        dbeta.to(args.beta.dtype).view(args.beta.shape),
        *_through_gate(args, dg),
        dinitial,
    )


def _states_options(form: Form) -> dict[str, int]:
    # From 64 rows on, products read their right side from shared memory, since three passes would lack registers for
    # it.
    return state_tile_options(form, 4, least=64 if form.PRECISION == "tf32x3" else 32)


def _square_options(form: Form) -> dict[str, int]:
    return SQUARE_SIZES | {"BLOCK_V": tile_width(form.DV, 32), "num_warps": 8}


# Bytes that a thread may spill in float32: no tile holds both parts of 64 × 64 squares in its registers.
AOT_SPILLS = {"_states_backward_kernel": 512}


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    wide, cases = "*fp32:16", []
    for call in AOT_CALLS:
        of, form = aot_operands(*call)
        values = form._asdict()
        given = {"of": of, "do_ptr": of.v, "scale": "fp32"} | dict.fromkeys(("f_ptr", "du_ptr"), wide)
        names = ("qk_ptr", "inverse_ptr", "dfinal_ptr", "dstates_ptr", "dinitial_ptr")
        states = given | dict.fromkeys(names, wide)
        cases.append(aot_case(_states_backward_kernel, states, values | _states_options(form)))
        squares = given | dict.fromkeys(("kk_ptr", "qk_ptr", "x_ptr", "dkk_ptr", "dqk_ptr", "dbeta_ptr"), wide)
        squares["dgate_ptr"] = wide if form.GATE == BY_HEAD else None
        cases.append(aot_case(_square_gradients_kernel, squares, values | _square_options(form)))
    return cases
