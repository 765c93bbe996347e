"""Counting sort of expert ids on the device: tile histograms, prefix sums over tiles, placement by in-tile rank.

Floor: R ids read twice, 2·R int32 written, and ``(E+1)·ceil(R / 128)`` counts written and read twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.launch import device_guard

# Slots of one tile. Ranks within a tile cost TILE comparisons a slot, counts cost E+1 words a tile.
TILE = 128
# The most slots that one program sorts alone, without counts in memory.
SINGLE_TILE = 256
STRIP = 8
# Left to itself the assembler spills a few bytes to fit more programs on a multiprocessor.
PLACE_REGISTERS = 96
SCAN_TILES = 1024

_SIZES = ["num_rows", "top_k", "stride_t", "stride_k", "num_experts", "num_tiles"]


def expert_chunk(num_experts: int, most: int) -> int:
    """Experts handled at a time, of the E and the bin of dropped slots: a power of two, at most ``most``."""
    return max(32, min(most, triton.next_power_of_2(num_experts + 1)))


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


@triton.jit(do_not_specialize=_SIZES)
def _histogram_kernel(
    ids_ptr,
    counts_ptr,
    num_rows,
    top_k,
    stride_t,
    stride_k,
    num_experts,
    num_tiles,
    CONTIGUOUS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    slot = tile * TILE + tl.arange(0, TILE)
    expert = _load_experts(ids_ptr, slot, num_rows, top_k, stride_t, stride_k, num_experts, CONTIGUOUS)
    for first in range(0, num_experts + 1, CHUNK):
        here = (expert >= first) & (expert < first + CHUNK)
        counts = tl.histogram(tl.where(here, expert - first, 0), CHUNK, mask=here)
        e = first + tl.arange(0, CHUNK)
        tl.store(counts_ptr + e.to(tl.int64) * num_tiles + tile, counts, e <= num_experts)


@triton.jit(do_not_specialize=["num_tiles"])
def _scan_tiles_kernel(counts_ptr, totals_ptr, num_tiles, BLOCK: tl.constexpr):
    """Turn the counts of one expert into the rows of it in earlier tiles, and write their total."""
    expert = tl.program_id(0).to(tl.int64)
    row_ptr = counts_ptr + expert * num_tiles
    total = 0
    for first in range(0, num_tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        counts = tl.load(row_ptr + tile, tile < num_tiles, other=0)
        tl.store(row_ptr + tile, total + tl.cumsum(counts, 0) - counts, tile < num_tiles)
        total += tl.sum(counts, 0)
    tl.store(totals_ptr + expert, total)


@triton.jit(do_not_specialize=_SIZES)
def _place_kernel(
    ids_ptr,
    counts_ptr,
    totals_ptr,
    slots_ptr,
    rows_ptr,
    offsets_ptr,
    num_rows,
    top_k,
    stride_t,
    stride_k,
    num_experts,
    num_tiles,
    CONTIGUOUS: tl.constexpr,
    SINGLE: tl.constexpr,
    TILE: tl.constexpr,
    STRIP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write each slot of a tile to its row; SINGLE: the tile holds all slots, and nothing was counted before."""
    tile = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILE)
    slot = tile * TILE + lane
    expert = _load_experts(ids_ptr, slot, num_rows, top_k, stride_t, stride_k, num_experts, CONTIGUOUS)
    inside = slot < num_rows

    row = tl.zeros((TILE,), tl.int32)
    start = 0
    for first in range(0, num_experts + 1, CHUNK):
        e = first + tl.arange(0, CHUNK)
        here = (expert >= first) & (expert < first + CHUNK)
        if SINGLE:
            totals = tl.histogram(tl.where(here, expert - first, 0), CHUNK, mask=here)
        else:
            totals = tl.load(totals_ptr + e, e <= num_experts, other=0)
        offsets = start + tl.cumsum(totals, 0) - totals
        start += tl.sum(totals, 0)
        row = tl.where(here, tl.gather(offsets, tl.where(here, expert - first, 0), 0), row)
        if tile == 0:
            tl.store(offsets_ptr + e, offsets, e <= num_experts)

    # Earlier slots of the tile with the same expert, STRIP at a time: all TILE·TILE pairs at once would spill.
    earlier = tl.zeros((STRIP, TILE), tl.int32)
    for first in range(0, TILE, STRIP):
        j = first + tl.arange(0, STRIP)
        other = _load_experts(ids_ptr, tile * TILE + j, num_rows, top_k, stride_t, stride_k, num_experts, CONTIGUOUS)
        earlier += ((other[:, None] == expert[None, :]) & (j[:, None] < lane[None, :])).to(tl.int32)
    row += tl.sum(earlier, 0)
    if not SINGLE:
        row += tl.load(counts_ptr + expert.to(tl.int64) * num_tiles + tile, inside, other=0)
    tl.store(rows_ptr + slot, row, inside)
    tl.store(slots_ptr + row, slot.to(tl.int32), inside)


def dispatch(expert_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``slots, rows, offsets`` of :func:`gossamer.dispatch`, in three launches, or in one for few slots."""
    num_rows, top_k = expert_ids.numel(), expert_ids.shape[1]
    device = expert_ids.device
    slots = torch.empty(num_rows, dtype=torch.int32, device=device)
    rows = torch.empty_like(slots)
    if num_rows == 0:
        return slots, rows, torch.zeros(num_experts + 1, dtype=torch.int32, device=device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    single = num_rows <= SINGLE_TILE
    num_tiles = 1 if single else triton.cdiv(num_rows, TILE)
    sizes = (num_rows, top_k, *expert_ids.stride(), num_experts, num_tiles)
    contiguous = expert_ids.is_contiguous()
    counts = totals = offsets
    with device_guard(device):
        if not single:
            scratch = torch.empty((num_experts + 1) * (num_tiles + 1), dtype=torch.int32, device=device)
            totals, counts = scratch[: num_experts + 1], scratch[num_experts + 1 :]
            chunk = expert_chunk(num_experts, 512)
            _histogram_kernel[(num_tiles,)](
                expert_ids, counts, *sizes, CONTIGUOUS=contiguous, TILE=TILE, CHUNK=chunk, num_warps=1
            )
            _scan_tiles_kernel[(num_experts + 1,)](counts, totals, num_tiles, BLOCK=SCAN_TILES, num_warps=4)
        _place_kernel[(num_tiles,)](
            expert_ids,
            counts,
            totals,
            slots,
            rows,
            offsets,
            *sizes,
            CONTIGUOUS=contiguous,
            SINGLE=single,
            TILE=SINGLE_TILE if single else TILE,
            STRIP=STRIP,
            CHUNK=expert_chunk(num_experts, 1024),
            num_warps=8 if single else 4,
            maxnreg=PLACE_REGISTERS,
        )
    return slots, rows, offsets


def aot_cases(arch: int) -> list[tuple]:
    """Launches to compile ahead of time: few and many experts, contiguous and strided ids."""
    sizes = dict.fromkeys(_SIZES, "i32")
    cases = [
        (
            _scan_tiles_kernel,
            {"counts_ptr": "*i32", "totals_ptr": "*i32:16", "num_tiles": "i32"},
            {"BLOCK": SCAN_TILES},
            {"num_warps": 4},
        )
    ]
    for num_experts in (8, 128, 4096):
        for contiguous, ids in ((True, "*i64:16"), (False, "*i32")):
            histogram = {"CONTIGUOUS": contiguous, "TILE": TILE, "CHUNK": expert_chunk(num_experts, 512)}
            signature = {"ids_ptr": ids, "counts_ptr": "*i32", **sizes}
            cases.append((_histogram_kernel, signature, histogram, {"num_warps": 1}))
            outputs = dict.fromkeys(["slots_ptr", "rows_ptr", "offsets_ptr"], "*i32:16")
            signature = {"ids_ptr": ids, "counts_ptr": "*i32", "totals_ptr": "*i32:16", **outputs, **sizes}
            for single, tile, warps in ((False, TILE, 4), (True, SINGLE_TILE, 8)):
                options = {"num_warps": warps, "maxnreg": PLACE_REGISTERS}
                place = {"SINGLE": single, "TILE": tile, "STRIP": STRIP, "CHUNK": expert_chunk(num_experts, 1024)}
                cases.append((_place_kernel, signature, {"CONTIGUOUS": contiguous, **place}, options))
    return cases
