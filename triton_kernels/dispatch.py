"""Counting sort of expert ids on the device: counts by spans of slots, placement by earlier spans and in-tile rank.

Floor: R ids read twice, 2·R int32 written, and ``(E+1)·spans`` counts written once and read by each of the spans.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

# Slots of one tile. Ranks within a tile cost TILE comparisons per slot, counts cost E+1 words per span.
TILE = 128
# The most slots that a single program sorts, without counts in memory, and its tile.
SINGLE_SLOTS = 512
SINGLE_TILE = 256
# The most programs. Each program adds up the counts of all programs, which saves a launch but reads programs²·(E+1)
# words from the L2 cache; MOST_COUNTS bounds that for many experts (not measured).
SPANS = 256
MOST_COUNTS = 1 << 24
# Experts that a program handles at once, and counts that it reads at a time, of at most AT_ONCE spans.
MOST_EXPERTS = 2048
COUNTS = 4096
AT_ONCE = 32
STRIP = 8

_SIZES = ["num_rows", "top_k", "stride_t", "stride_k", "num_experts", "num_spans", "tiles"]


def expert_chunk(num_experts: int) -> int:
    """Experts handled at a time, of the E and the bin of dropped slots: a power of two."""
    return max(32, min(MOST_EXPERTS, triton.next_power_of_2(num_experts + 1)))


def spans_at_once(chunk: int) -> int:
    """Spans whose counts of ``chunk`` experts a program reads at a time."""
    return max(1, min(AT_ONCE, COUNTS // chunk))


def spans_of(num_rows: int, num_experts: int) -> tuple[int, int]:
    """``(programs, tiles of each)``: one tile each, unless that takes too many programs."""
    tiles = triton.cdiv(num_rows, TILE)
    most = min(SPANS, max(32, math.isqrt(MOST_COUNTS // (num_experts + 1))))
    tiles_per_span = triton.cdiv(tiles, most)
    return triton.cdiv(tiles, tiles_per_span), tiles_per_span


@triton.jit
def _load_experts(ids_ptr, slot, num_rows, top_k, stride_t, stride_k, num_experts, CONTIGUOUS: tl.constexpr):
    """Expert of each slot: E for a dropped one, E+1 beyond the last slot."""
    inside = slot < num_rows
    if CONTIGUOUS:
        address = slot
    else:
        flat = tl.where(inside, slot, 0).to(tl.int32)
        address = (flat // top_k).to(tl.int64) * stride_t + (flat % top_k).to(tl.int64) * stride_k
    expert = tl.load(ids_ptr + address, inside, other=0)
    expert = tl.where((expert < 0) | (expert > num_experts), num_experts, expert).to(tl.int32)
    return tl.where(inside, expert, num_experts + 1)


@triton.jit
def _count(
    ids_ptr,
    span,
    tiles,
    first,
    num_rows,
    top_k,
    stride_t,
    stride_k,
    num_experts,
    CONTIGUOUS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The number of slots of a span for each of the experts from ``first`` on."""
    counts = tl.zeros((CHUNK,), tl.int32)
    for tile in range(tiles):
        slot = (span * tiles + tile) * TILE + tl.arange(0, TILE)
        expert = _load_experts(ids_ptr, slot, num_rows, top_k, stride_t, stride_k, num_experts, CONTIGUOUS)
        here = (expert >= first) & (expert < first + CHUNK)
        counts += tl.histogram(tl.where(here, expert - first, 0), CHUNK, mask=here)
    return counts


@triton.jit(do_not_specialize=_SIZES)
def _count_kernel(
    ids_ptr,
    counts_ptr,
    num_rows,
    top_k,
    stride_t,
    stride_k,
    num_experts,
    num_spans,
    tiles,
    CONTIGUOUS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    span = tl.program_id(0).to(tl.int64)
    for first in range(0, num_experts + 1, CHUNK):
        counts = _count(
            ids_ptr, span, tiles, first, num_rows, top_k, stride_t, stride_k, num_experts, CONTIGUOUS, TILE, CHUNK
        )
        e = first + tl.arange(0, CHUNK)
        tl.store(counts_ptr + span * (num_experts + 1) + e, counts, e <= num_experts)


@triton.jit(do_not_specialize=_SIZES)
def _place_kernel(
    ids_ptr,
    counts_ptr,
    slots_ptr,
    rows_ptr,
    offsets_ptr,
    num_rows,
    top_k,
    stride_t,
    stride_k,
    num_experts,
    num_spans,
    tiles,
    CONTIGUOUS: tl.constexpr,
    SINGLE: tl.constexpr,
    TILE: tl.constexpr,
    STRIP: tl.constexpr,
    CHUNK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Write each slot of a span to its row. SINGLE: the span holds all slots, and nothing was counted before."""
    span = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILE)
    start = 0
    for first in range(0, num_experts + 1, CHUNK):
        e = first + tl.arange(0, CHUNK)
        if SINGLE:
            totals = _count(
                ids_ptr, span, tiles, first, num_rows, top_k, stride_t, stride_k, num_experts, CONTIGUOUS, TILE, CHUNK
            )
            before = tl.zeros((CHUNK,), tl.int32)
        else:
            totals = tl.zeros((CHUNK,), tl.int32)
            before = tl.zeros((CHUNK,), tl.int32)
            for other in range(0, num_spans, AT_ONCE):
                s = (other + tl.arange(0, AT_ONCE))[:, None]
                known = (s < num_spans) & (e <= num_experts)[None, :]
                counts = tl.load(counts_ptr + s.to(tl.int64) * (num_experts + 1) + e[None, :], known, other=0)
                totals += tl.sum(counts, 0)
                before += tl.sum(tl.where(s < span, counts, 0), 0)
        offsets = start + tl.cumsum(totals, 0) - totals
        start += tl.sum(totals, 0)
        if span == 0:
            tl.store(offsets_ptr + e, offsets, e <= num_experts)

        next_row = offsets + before
        for tile in range(tiles):
            base = (span * tiles + tile) * TILE
            slot = base + lane
            expert = _load_experts(ids_ptr, slot, num_rows, top_k, stride_t, stride_k, num_experts, CONTIGUOUS)
            here = (expert >= first) & (expert < first + CHUNK) & (slot < num_rows)
            local = tl.where(here, expert - first, 0)
            # Earlier slots of the tile with the same expert, STRIP at a time: all TILE·TILE pairs at once would spill.
            earlier = tl.zeros((STRIP, TILE), tl.int32)
            for other in range(0, TILE, STRIP):
                j = other + tl.arange(0, STRIP)
                ids = _load_experts(ids_ptr, base + j, num_rows, top_k, stride_t, stride_k, num_experts, CONTIGUOUS)
                earlier += ((ids[:, None] == expert[None, :]) & (j[:, None] < lane[None, :])).to(tl.int32)
            row = tl.gather(next_row, local, 0) + tl.sum(earlier, 0)
            tl.store(rows_ptr + slot, row, here)
            tl.store(slots_ptr + row, slot.to(tl.int32), here)
            next_row += tl.histogram(local, CHUNK, mask=here)


def dispatch(expert_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``slots, rows, offsets`` of :func:`gossamer.dispatch`, in two launches, or in one for few slots."""
    num_rows, top_k = expert_ids.numel(), expert_ids.shape[1]
    device = expert_ids.device
    slots = torch.empty(num_rows, dtype=torch.int32, device=device)
    rows = torch.empty_like(slots)
    if num_rows == 0:
        return slots, rows, torch.zeros(num_experts + 1, dtype=torch.int32, device=device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    single = num_rows <= SINGLE_SLOTS
    tile = SINGLE_TILE if single else TILE
    num_spans, tiles = (1, triton.cdiv(num_rows, tile)) if single else spans_of(num_rows, num_experts)
    sizes = (num_rows, top_k, *expert_ids.stride(), num_experts, num_spans, tiles)
    shared = {"CONTIGUOUS": expert_ids.is_contiguous(), "TILE": tile, "CHUNK": expert_chunk(num_experts)}
    options = _options(shared["CHUNK"], single)
    counts = offsets
    if not single:
        counts = torch.empty(num_spans * (num_experts + 1), dtype=torch.int32, device=device)
        _count_kernel[(num_spans,)](expert_ids, counts, *sizes, **shared, num_warps=options["num_warps"])
    _place_kernel[(num_spans,)](
        expert_ids,
        counts,
        slots,
        rows,
        offsets,
        *sizes,
        **shared,
        SINGLE=single,
        STRIP=STRIP,
        AT_ONCE=spans_at_once(shared["CHUNK"]),
        **options,
    )
    return slots, rows, offsets


def _options(chunk: int, single: bool) -> dict[str, int]:
    """Warps and register limit of a placing program: enough warps to keep its vectors of experts in registers.

    Without the limit the assembler spills a few bytes to fit more programs on a multiprocessor.
    """
    warps = 8 if single or chunk > 1024 else 4
    return {"num_warps": warps, "maxnreg": 96}


def aot_cases(arch: int) -> list[tuple]:
    """Launches to compile ahead of time: few and many experts, contiguous and strided ids."""
    sizes = dict.fromkeys(_SIZES, "i32")
    outputs = dict.fromkeys(["slots_ptr", "rows_ptr", "offsets_ptr"], "*i32:16")
    cases = []
    for num_experts in (8, 128, 4096):
        chunk = expert_chunk(num_experts)
        for contiguous, ids in ((True, "*i64:16"), (False, "*i32")):
            signature = {"ids_ptr": ids, "counts_ptr": "*i32:16", **sizes}
            shared = {"CONTIGUOUS": contiguous, "TILE": TILE, "CHUNK": chunk}
            warps = _options(chunk, False)["num_warps"]
            cases.append((_count_kernel, signature, shared, {"num_warps": warps}))
            for single, tile in ((False, TILE), (True, SINGLE_TILE)):
                place = {**shared, "TILE": tile, "SINGLE": single, "STRIP": STRIP, "AT_ONCE": spans_at_once(chunk)}
                cases.append((_place_kernel, signature | outputs, place, _options(chunk, single)))
    return cases
