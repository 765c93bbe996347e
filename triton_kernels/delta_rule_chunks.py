"""Shared by the delta rule's kernels: chunks of packed sequences, decays, and the products and the inverse of a chunk.

A sequence is cut into chunks of CHUNK tokens. Chunk ``j`` of sequence ``n``, which starts at token ``s``, has the slot
``s // CHUNK + n + j``: slots of different chunks differ, there are at most ``T // CHUNK + N`` of them, and a kernel
finds a slot's chunk from the sequences' offsets alone. Slots between sequences may hold no chunk.

Decays are exponentials of sums of log decays, each of which is at most 0. Sums are never subtracted from each other,
since differences would lose digits if decays are strong, and give NaN after a reset (−inf). If each channel has its own
decay, products within a block of BLOCK tokens are summed one column at a time; products between two blocks multiply the
decay up to the start of the later block with the decay after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.common import TRITON_NAMES, dot_precision

if TYPE_CHECKING:
    from gossamer.ops._delta_rule_reference import DeltaRule

CHUNK, BLOCK = 64, 16
L2_EPS = 1e-6
NO_GATE, BY_HEAD, BY_CHANNEL = 0, 1, 2


class Operands(NamedTuple):
    """The arguments of every kernel of a call, contiguous.

    Attributes:
        q: ``(T, H_k, D_k)``, and so is k.
        v: ``(T, H, D_v)``.
        beta: ``(T, H)``.
        g: log decays ``(T, H)`` or ``(T, H, D_k)``, or None.
        q_norm: factors of the rows of q, ``(T, H_k)``, or None; k_norm is the same for k.
        cu_seqlens: ``(N + 1,)``, also if there is only one sequence.
        tokens: T, of all sequences.
        sequences: N.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    beta: torch.Tensor
    g: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    cu_seqlens: torch.Tensor
    tokens: int
    sequences: int


class Form(NamedTuple):
    """The constants that the kernels of a call are compiled for."""

    H: int
    GROUP: int
    DK: int
    DV: int
    GATE: int
    PRECISION: str
    STEPS: int


@triton.jit
def sequence(of, n):
    """First token of sequence ``n`` and its end."""
    start = tl.load(of.cu_seqlens + n).to(tl.int32)
    end = tl.load(of.cu_seqlens + n + 1).to(tl.int32)
    return tl.maximum(start, 0), tl.minimum(end, of.tokens)


@triton.jit
def chunk_of(of, slot, STEPS: tl.constexpr, CHUNK: tl.constexpr):
    """First token of a slot's chunk and its end; both are equal if the slot holds no chunk."""
    low = slot * 0
    high = low + of.sequences
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        known = middle < of.sequences
        first = tl.load(of.cu_seqlens + middle, known, other=0).to(tl.int32)
        before = known & (first // CHUNK + middle <= slot)
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    start, end = sequence(of, low)
    index = slot - start // CHUNK - low
    first = start + tl.maximum(index, 0) * CHUNK
    return first, tl.where(index >= 0, tl.minimum(end, first + CHUNK), first)


@triton.jit
def rows(ptr, r, live, head, d, HEADS: tl.constexpr, D: tl.constexpr):
    """Rows ``r`` and columns ``d`` of one head of ``(T, HEADS, D)`` in float32; zero where a row is not live."""
    at = ptr + (r.to(tl.int64) * HEADS + head)[:, None] * D + d[None, :]
    return tl.load(at, live[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _normed_rows(ptr, norm_ptr, r, live, head, d, HEADS: tl.constexpr, D: tl.constexpr):
    x = rows(ptr, r, live, head, d, HEADS, D)
    if norm_ptr is not None:
        x *= tl.load(norm_ptr + r.to(tl.int64) * HEADS + head, live, other=0.0)[:, None]
    return x


@triton.jit
def q_rows(of, r, live, head, d, H: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr):
    """Rows of q for a value head, normalised if requested."""
    return _normed_rows(of.q, of.q_norm, r, live, head // GROUP, d, H // GROUP, DK)


@triton.jit
def k_rows(of, r, live, head, d, H: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr):
    """Rows of k for a value head, normalised if requested."""
    return _normed_rows(of.k, of.k_norm, r, live, head // GROUP, d, H // GROUP, DK)


@triton.jit
def per_head(ptr, r, live, head, H: tl.constexpr):
    """A column ``(T, H)`` of one head in float32."""
    return tl.load(ptr + r.to(tl.int64) * H + head, live, other=0.0).to(tl.float32)


@triton.jit
def log_decays(of, r, live, head, d, H: tl.constexpr, DK: tl.constexpr, GATE: tl.constexpr):
    """Log decays of rows: a column for each of ``d``, or one for all of them."""
    if GATE == 2:
        return rows(of.g, r, live, head, d, H, DK)
    else:
        return per_head(of.g, r, live, head, H)[:, None]


@triton.jit
def decay_from_start(of, r, live, head, d, H: tl.constexpr, DK: tl.constexpr, GATE: tl.constexpr):
    """Decay from before the first of the rows to after each."""
    if GATE == 0:
        return tl.full((r.shape[0], 1), 1.0, tl.float32)
    else:
        return tl.exp(tl.cumsum(log_decays(of, r, live, head, d, H, DK, GATE), 0))


@triton.jit
def decay_to_end(of, r, end, head, d, H: tl.constexpr, DK: tl.constexpr, GATE: tl.constexpr):
    """Decay from after each of the rows to after the last of them, before ``end``."""
    if GATE == 0:
        return tl.full((r.shape[0], 1), 1.0, tl.float32)
    else:
        later = log_decays(of, r + 1, r + 1 < end, head, d, H, DK, GATE)
        return tl.exp(tl.cumsum(later, 0, reverse=True))


@triton.jit
def decay_over(of, r, live, head, d, H: tl.constexpr, DK: tl.constexpr, GATE: tl.constexpr):
    """Decay over all of the rows: of each of ``d``, or one."""
    if GATE == 0:
        return tl.full((1,), 1.0, tl.float32)
    else:
        return tl.exp(tl.sum(log_decays(of, r, live, head, d, H, DK, GATE), 0))


@triton.jit
def pair_decays(of, r, live, head, H: tl.constexpr, N: tl.constexpr):
    """Decay by head from after row j to after row i, for ``i >= j``; for others 1."""
    a = tl.arange(0, N)
    g = per_head(of.g, r, live, head, H)
    return tl.exp(tl.cumsum(tl.where(a[:, None] > a[None, :], g[:, None], 0.0), 0))


@triton.jit
def sums_before(x, N: tl.constexpr):
    """For each of N rows, the sum of the rows before it; a total minus a large row would lose digits."""
    a = tl.arange(0, N)
    return tl.dot(tl.where(a[:, None] > a[None, :], 1.0, 0.0), x, input_precision="tf32x3")


@triton.jit
def square(ptr, slot, head, i, j, H: tl.constexpr, CHUNK: tl.constexpr, N: tl.constexpr):
    """Addresses of the ``N × N`` values from ``(i, j)`` of a chunk's square ``(slots, H, CHUNK, CHUNK)``."""
    a = tl.arange(0, N)
    return ptr + (slot.to(tl.int64) * H + head) * CHUNK * CHUNK + (i + a)[:, None] * CHUNK + (j + a)[None, :]


@triton.jit
def lower_square(ptr, slot, head, H: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """A chunk's square in float32; blocks above the diagonal are not written in memory and read as zero."""
    a = tl.arange(0, CHUNK) // BLOCK
    return tl.load(square(ptr, slot, head, 0, 0, H, CHUNK, CHUNK), a[:, None] >= a[None, :], other=0.0).to(tl.float32)


@triton.jit
def state_tile(ptr, slot, head, d, e, H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr):
    """Addresses of channels ``d`` and ``e`` of a state ``(slots, H, D_k, D_v)``, and which of them exist."""
    at = ptr + ((slot.to(tl.int64) * H + head) * DK + d)[:, None] * DV + e[None, :]
    return at, (d < DK)[:, None] & (e < DV)[None, :]


@triton.jit
def decayed_left(of, r, live, head, d, H: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, GATE: tl.constexpr):
    """Rows of q and k of a block, times the decay from the block's start."""
    decay = decay_from_start(of, r, live, head, d, H, DK, GATE)
    q = q_rows(of, r, live, head, d, H, GROUP, DK)
    k = k_rows(of, r, live, head, d, H, GROUP, DK)
    return q * decay, k * decay


@triton.jit
def decay_between(
    of, first, i, j, end, head, d, H: tl.constexpr, DK: tl.constexpr, GATE: tl.constexpr, BLOCK: tl.constexpr
):
    """Decay over the blocks of a chunk between block ``j`` and block ``i``, which comes later."""
    r = first + (j + 1) * BLOCK + tl.arange(0, 2 * BLOCK)
    return decay_over(of, r, (r < first + i * BLOCK) & (r < end), head, d, H, DK, GATE)[None, :]


@triton.jit
def one_row(ptr, norm_ptr, r, end, head, d, HEADS: tl.constexpr, D: tl.constexpr):
    """One row of q, k or g in float32; zeros from ``end`` on."""
    live = (r + d * 0 < end) & (d < D)
    x = tl.load(ptr + (r.to(tl.int64) * HEADS + head) * D + d, live, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        x *= tl.load(norm_ptr + r.to(tl.int64) * HEADS + head + d * 0, live, other=0.0)
    return x


@triton.jit
def _diagonal_by_channel(
    of,
    first,
    end,
    head,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``Σ_d k_i k_j exp(Σ_{j<t<=i} g_t)`` of a block's rows, and that of q, for ``i >= j``; zero elsewhere."""
    a = tl.arange(0, BLOCK)
    r = first + a
    kk, qk = tl.zeros((BLOCK, BLOCK), tl.float32), tl.zeros((BLOCK, BLOCK), tl.float32)
    for k0 in range(0, DK, BLOCK_K):
        d = k0 + tl.arange(0, BLOCK_K)
        q = q_rows(of, r, r < end, head, d, H, GROUP, DK)
        k = k_rows(of, r, r < end, head, d, H, GROUP, DK)
        sums = tl.zeros((BLOCK, BLOCK_K), tl.float32)
        for step in range(0, BLOCK):
            j = BLOCK - 1 - step
            right = one_row(of.k, of.k_norm, first + j, end, head // GROUP, d, H // GROUP, DK)[None, :]
            right = tl.where((a >= j)[:, None], tl.exp(sums) * right, 0.0)
            here = (a == j)[None, :]
            kk += tl.where(here, tl.sum(k * right, 1)[:, None], 0.0)
            qk += tl.where(here, tl.sum(q * right, 1)[:, None], 0.0)
            g = one_row(of.g, None, first + j, end, head, d, H, DK)
            sums += tl.where((a >= j)[:, None], g[None, :], 0.0)
    return kk, qk


@triton.jit
def _products_kernel(
    of,
    kk_ptr,
    qk_ptr,
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
    slot, head, i = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, end = chunk_of(of, slot, STEPS, CHUNK)
    a = tl.arange(0, BLOCK)
    r = first + i * BLOCK + a
    for j in range(0, i):
        kk, qk = tl.zeros((BLOCK, BLOCK), tl.float32), tl.zeros((BLOCK, BLOCK), tl.float32)
        for k0 in range(0, DK, BLOCK_K):
            d = k0 + tl.arange(0, BLOCK_K)
            q, k = decayed_left(of, r, r < end, head, d, H, GROUP, DK, GATE)
            s = first + j * BLOCK + a
            right = k_rows(of, s, s < end, head, d, H, GROUP, DK)
            if GATE > 0:
                block_end = tl.minimum(end, first + (j + 1) * BLOCK)
                right *= decay_to_end(of, s, block_end, head, d, H, DK, GATE)
                right *= decay_between(of, first, i, j, end, head, d, H, DK, GATE, BLOCK)
            right = tl.trans(right)
            kk = tl.dot(k, right, kk, input_precision=PRECISION)
            qk = tl.dot(q, right, qk, input_precision=PRECISION)
        tl.store(square(kk_ptr, slot, head, i * BLOCK, j * BLOCK, H, CHUNK, BLOCK), kk)
        to = square(qk_ptr, slot, head, i * BLOCK, j * BLOCK, H, CHUNK, BLOCK)
        tl.store(to, qk.to(qk_ptr.dtype.element_ty))
    if GATE == 2:
        kk, qk = _diagonal_by_channel(of, first + i * BLOCK, end, head, H, GROUP, DK, BLOCK_K, BLOCK)
    else:
        kk, qk = tl.zeros((BLOCK, BLOCK), tl.float32), tl.zeros((BLOCK, BLOCK), tl.float32)
        for k0 in range(0, DK, BLOCK_K):
            d = k0 + tl.arange(0, BLOCK_K)
            q = q_rows(of, r, r < end, head, d, H, GROUP, DK)
            k = k_rows(of, r, r < end, head, d, H, GROUP, DK)
            kk = tl.dot(k, tl.trans(k), kk, input_precision=PRECISION)
            qk = tl.dot(q, tl.trans(k), qk, input_precision=PRECISION)
        if GATE == 1:
            decay = pair_decays(of, r, r < end, head, H, BLOCK)
            kk *= decay
            qk *= decay
    kk = tl.where(a[:, None] > a[None, :], kk, 0.0)
    qk = tl.where(a[:, None] >= a[None, :], qk, 0.0)
    tl.store(square(kk_ptr, slot, head, i * BLOCK, i * BLOCK, H, CHUNK, BLOCK), kk)
    to = square(qk_ptr, slot, head, i * BLOCK, i * BLOCK, H, CHUNK, BLOCK)
    tl.store(to, qk.to(qk_ptr.dtype.element_ty))


@triton.jit
def _scaled_block(of, kk_ptr, slot, head, first, end, i, j, H: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Block ``(i, j)`` of the products of keys, each column times its token's beta."""
    r = first + j * BLOCK + tl.arange(0, BLOCK)
    beta = per_head(of.beta, r, r < end, head, H)
    return tl.load(square(kk_ptr, slot, head, i * BLOCK, j * BLOCK, H, CHUNK, BLOCK)) * beta[None, :]


@triton.jit
def _unit_inverse(a, BLOCK: tl.constexpr):
    """``(I + a)⁻¹`` of a strictly lower triangle, row by row."""
    row = tl.arange(0, BLOCK)
    inverse = tl.where(row[:, None] == row[None, :], 1.0, 0.0)
    for i in range(1, BLOCK):
        factors = tl.sum(tl.where(row[:, None] == i, a, 0.0), 0)
        update = tl.sum(factors[:, None] * inverse, 0)
        inverse = tl.where(row[:, None] == i, inverse - update[None, :], inverse)
    return inverse


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _inverse_kernel(
    of, kk_ptr, inverse_ptr, H: tl.constexpr, STEPS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """``(I + KK·diag(beta))⁻¹`` of each chunk, from its four blocks on the diagonal."""
    slot, head = tl.program_id(0), tl.program_id(1)
    first, end = chunk_of(of, slot, STEPS, CHUNK)
    if first >= end:
        return
    m0 = _unit_inverse(_scaled_block(of, kk_ptr, slot, head, first, end, 0, 0, H, CHUNK, BLOCK), BLOCK)
    m1 = _unit_inverse(_scaled_block(of, kk_ptr, slot, head, first, end, 1, 1, H, CHUNK, BLOCK), BLOCK)
    m2 = _unit_inverse(_scaled_block(of, kk_ptr, slot, head, first, end, 2, 2, H, CHUNK, BLOCK), BLOCK)
    m3 = _unit_inverse(_scaled_block(of, kk_ptr, slot, head, first, end, 3, 3, H, CHUNK, BLOCK), BLOCK)
    a10 = _scaled_block(of, kk_ptr, slot, head, first, end, 1, 0, H, CHUNK, BLOCK)
    a21 = _scaled_block(of, kk_ptr, slot, head, first, end, 2, 1, H, CHUNK, BLOCK)
    a32 = _scaled_block(of, kk_ptr, slot, head, first, end, 3, 2, H, CHUNK, BLOCK)
    m10 = -_product(_product(m1, a10), m0)
    m21 = -_product(_product(m2, a21), m1)
    m32 = -_product(_product(m3, a32), m2)
    a20 = _scaled_block(of, kk_ptr, slot, head, first, end, 2, 0, H, CHUNK, BLOCK)
    a31 = _scaled_block(of, kk_ptr, slot, head, first, end, 3, 1, H, CHUNK, BLOCK)
    m20 = -_product(m2, _product(a20, m0) + _product(a21, m10))
    m31 = -_product(m3, _product(a31, m1) + _product(a32, m21))
    a30 = _scaled_block(of, kk_ptr, slot, head, first, end, 3, 0, H, CHUNK, BLOCK)
    m30 = -_product(m3, _product(a30, m0) + _product(a31, m10) + _product(a32, m20))
    tl.store(square(inverse_ptr, slot, head, 0, 0, H, CHUNK, BLOCK), m0)
    tl.store(square(inverse_ptr, slot, head, BLOCK, BLOCK, H, CHUNK, BLOCK), m1)
    tl.store(square(inverse_ptr, slot, head, 2 * BLOCK, 2 * BLOCK, H, CHUNK, BLOCK), m2)
    tl.store(square(inverse_ptr, slot, head, 3 * BLOCK, 3 * BLOCK, H, CHUNK, BLOCK), m3)
    tl.store(square(inverse_ptr, slot, head, BLOCK, 0, H, CHUNK, BLOCK), m10)
    tl.store(square(inverse_ptr, slot, head, 2 * BLOCK, BLOCK, H, CHUNK, BLOCK), m21)
    tl.store(square(inverse_ptr, slot, head, 3 * BLOCK, 2 * BLOCK, H, CHUNK, BLOCK), m32)
    tl.store(square(inverse_ptr, slot, head, 2 * BLOCK, 0, H, CHUNK, BLOCK), m20)
    tl.store(square(inverse_ptr, slot, head, 3 * BLOCK, BLOCK, H, CHUNK, BLOCK), m31)
    tl.store(square(inverse_ptr, slot, head, 3 * BLOCK, 0, H, CHUNK, BLOCK), m30)


@triton.jit
def _norm_kernel(
    x_ptr, norm_ptr, num_rows, EPS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """``1/sqrt(Σ x² + EPS)`` of each row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (row < num_rows)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * D + d[None, :], inside, other=0.0).to(tl.float32)
    tl.store(norm_ptr + row, 1.0 / tl.sqrt(tl.sum(x * x, 1) + EPS), row < num_rows)


def _norms(x: torch.Tensor) -> torch.Tensor:
    """The factors that normalise rows of ``x (T, H, D)``, ``(T, H)``."""
    norms = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    size = triton.next_power_of_2(x.shape[-1])
    per_program = max(1, 2048 // size)
    _norm_kernel[(triton.cdiv(norms.numel(), per_program),)](
        x, norms, norms.numel(), EPS=L2_EPS, D=x.shape[-1], ROWS=per_program, BLOCK_D=size, num_warps=4
    )
    return norms


def _precision(dtype: torch.dtype) -> str:
    """The precision of products of float32 tiles: TF32 is exact for 16-bit values; float32 takes three passes."""
    return "tf32x3" if dtype == torch.float32 and dot_precision(dtype) == "ieee" else "tf32"


def prepare(args: DeltaRule, g: torch.Tensor | None) -> tuple[Operands, Form]:
    """The operands of a call with tokens, whose log decays are ``g``, and the constants of its kernels."""
    batch, length, key_heads, key_size = args.q.shape
    heads, value_size = args.v.shape[2:]
    tokens = batch * length
    q, k = (x.reshape(tokens, key_heads, key_size).contiguous() for x in (args.q, args.k))
    v = args.v.reshape(tokens, heads, value_size).contiguous()
    bounds = args.cu_seqlens
    if bounds is None:
        bounds = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=q.device)
    norms = (_norms(q), _norms(k)) if args.use_qk_l2norm else (None, None)
    beta, g = args.beta.reshape(tokens, heads).contiguous(), None if g is None else g.reshape(tokens, -1).contiguous()
    gate = NO_GATE if g is None else BY_CHANNEL if args.by_channel else BY_HEAD
    steps = args.num_sequences.bit_length()
    form = Form(heads, heads // key_heads, key_size, value_size, gate, _precision(q.dtype), steps)
    return Operands(q, k, v, beta, g, *norms, bounds.contiguous(), tokens, args.num_sequences), form


def num_slots(of: Operands) -> int:
    """Number of slots: at least the number of chunks, whatever the sequences are."""
    return of.tokens // CHUNK + of.sequences


def contiguous_state(state: torch.Tensor | None) -> torch.Tensor | None:
    """The state in the layout that kernels read."""
    return None if state is None else state.contiguous()


def tile_width(size: int, most: int) -> int:
    """Columns of a tile over ``size`` channels."""
    return min(most, max(16, triton.next_power_of_2(size)))


class Squares(NamedTuple):
    """Squares of each chunk ``(slots, H, CHUNK, CHUNK)``: products of keys, of queries with keys, and the inverse."""

    kk: torch.Tensor
    qk: torch.Tensor
    inverse: torch.Tensor


SQUARE_SIZES = {"CHUNK": CHUNK, "BLOCK": BLOCK}


def _products_options(form: Form) -> dict[str, int]:
    return SQUARE_SIZES | {"BLOCK_K": tile_width(form.DK, 32), "num_warps": 2}


def squares(of: Operands, form: Form) -> Squares:
    """Compute the squares of all chunks at once."""
    slots, shape = num_slots(of), (num_slots(of), form.H, CHUNK, CHUNK)
    kk, qk, inverse = (torch.empty(shape, dtype=torch.float32, device=of.q.device) for _ in range(3))
    _products_kernel[(slots, form.H, CHUNK // BLOCK)](of, kk, qk, **form._asdict(), **_products_options(form))
    _inverse_kernel[(slots, form.H)](of, kk, inverse, H=form.H, STEPS=form.STEPS, **SQUARE_SIZES, num_warps=4)
    return Squares(kk, qk, inverse)


# Gate, dtype, size of heads and of groups of value heads of the calls that are compiled ahead of time.
AOT_CALLS = (
    (BY_CHANNEL, torch.bfloat16, 128, 1),
    (BY_HEAD, torch.bfloat16, 128, 2),
    (NO_GATE, torch.bfloat16, 256, 1),
    (BY_HEAD, torch.float32, 64, 2),
)


def aot_operands(gate: int, dtype: torch.dtype, size: int, group: int) -> tuple[Operands, Form]:
    """The types of the operands and the form of a call, for ahead-of-time compilation."""
    value, wide = f"*{TRITON_NAMES[dtype]}:16", "*fp32:16"
    norms = (wide, wide) if gate == BY_HEAD else (None, None)
    of = Operands(*[value] * 4, None if gate == NO_GATE else wide, *norms, "*i32:16", "i32", "i32")
    return of, Form(4 * group, group, size, size, gate, _precision(dtype), 2)


def aot_case(kernel, signature: dict, constexprs: dict) -> tuple:
    """A case of a kernel from its types and its values, which include warps and stages; None stands for a pointer."""
    options = {name: constexprs[name] for name in ("num_warps", "num_stages") if name in constexprs}
    given = {name: value for name, value in signature.items() if value is not None}
    known = {name: constexprs[name] for name in kernel.arg_names if name in constexprs}
    absent = {name: None for name, value in signature.items() if value is None}
    return kernel, given, known | absent, options


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    wide, cases = "*fp32:16", []
    for call in AOT_CALLS:
        of, form = aot_operands(*call)
        values = form._asdict() | _products_options(form)
        cases.append(aot_case(_products_kernel, {"of": of, "kk_ptr": wide, "qk_ptr": wide}, values))
    of, form = aot_operands(*AOT_CALLS[0])
    squares_only = {"of": of, "kk_ptr": wide, "inverse_ptr": wide}
    cases.append(aot_case(_inverse_kernel, squares_only, form._asdict() | SQUARE_SIZES | {"num_warps": 4}))
    values = {"EPS": L2_EPS, "D": 128, "ROWS": 16, "BLOCK_D": 128, "num_warps": 4}
    norm = {"x_ptr": of.q, "norm_ptr": wide, "num_rows": "i32"}
    return [*cases, aot_case(_norm_kernel, norm, values)]
