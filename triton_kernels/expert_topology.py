"""The lists of blocks of an expert layer's hidden activation: one program's prefix sums, then each number on its own.

Floor: E+1 offsets read, ``5 · rows · wide`` int32 of lists written; places read R slots and write R + padded rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from gossamer.ops._expert_topology import ExpertPlaces, ExpertTopology

# Experts that one program adds up, or ranks, at a time.
CHUNK = 1024
# Numbers of each list that a program writes.
TILE = 512


@triton.jit
def _upper_bound(values_ptr, count, wanted, STEPS: tl.constexpr):
    """The number of the ascending ``values[0:count]`` that are at most ``wanted``, for ``count < 2^STEPS``."""
    low = tl.zeros_like(wanted)
    high = low + count
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        searching = low < high
        value = tl.load(values_ptr + middle, searching, other=0)
        low = tl.where(searching & (value <= wanted), middle + 1, low)
        high = tl.where(searching & (value > wanted), middle, high)
    return low


@triton.jit(do_not_specialize=["experts", "bm"])
def _padded_offsets_kernel(offsets_ptr, padded_offsets_ptr, experts, bm, CHUNK: tl.constexpr):
    tl.store(padded_offsets_ptr, 0)
    start = 0
    for first in range(0, experts, CHUNK):
        e = first + tl.arange(0, CHUNK)
        here = e < experts
        counts = tl.load(offsets_ptr + e + 1, here, other=0) - tl.load(offsets_ptr + e, here, other=0)
        padded = (counts + bm - 1) // bm * bm
        tl.store(padded_offsets_ptr + e + 1, start + tl.cumsum(padded, 0), here)
        start += tl.sum(padded, 0)


@triton.jit(do_not_specialize=["experts", "wide", "bm"])
def _columns_kernel(
    padded_offsets_ptr,
    column_offsets_ptr,
    column_schedule_ptr,
    experts,
    wide,
    bm,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The columns of one expert: where their lists begin, and their places among the longest."""
    expert = tl.program_id(0)
    begin = tl.load(padded_offsets_ptr + expert)
    end = tl.load(padded_offsets_ptr + expert + 1)
    rank = 0
    for first in range(0, experts, CHUNK):
        e = first + tl.arange(0, CHUNK)
        here = e < experts
        rows = tl.load(padded_offsets_ptr + e + 1, here, other=0) - tl.load(padded_offsets_ptr + e, here, other=0)
        before = (rows > end - begin) | ((rows == end - begin) & (e < expert))
        rank += tl.sum((here & before).to(tl.int32), 0)
    start, blocks = begin // bm * wide, (end - begin) // bm
    for first in range(0, wide, TILE):
        c = first + tl.arange(0, TILE)
        tl.store(column_offsets_ptr + expert * wide + c, start + c * blocks, c < wide)
        tl.store(column_schedule_ptr + rank * wide + c, expert * wide + c, c < wide)
    if expert == experts - 1:
        tl.store(column_offsets_ptr + experts * wide, end // bm * wide)


@triton.jit(do_not_specialize=["experts", "rows", "wide", "bm"])
def _blocks_kernel(
    offsets_ptr,
    padded_offsets_ptr,
    row_offsets_ptr,
    column_indices_ptr,
    row_indices_ptr,
    row_indices_t_ptr,
    column_indices_t_ptr,
    order_t_ptr,
    row_schedule_ptr,
    live_rows_ptr,
    experts,
    rows,
    wide,
    bm,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Entries of both lists of blocks, and those of each block row."""
    live = tl.load(padded_offsets_ptr + experts) // bm
    if tl.program_id(0) == 0:
        tl.store(row_offsets_ptr + rows, live * wide)
    # The last tile may end past 2³¹ entries.
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    here = at < rows.to(tl.int64) * wide
    entry = tl.where(here, at, 0).to(tl.int32)
    row, c = entry // wide, entry % wide
    inside = row < live
    # Both lists have equally many entries per expert, so entry i belongs to the same expert in both.
    expert = tl.minimum(_upper_bound(padded_offsets_ptr + 1, experts, row * bm, STEPS), experts - 1)
    start = tl.load(padded_offsets_ptr + expert) // bm
    blocks = tl.load(padded_offsets_ptr + expert + 1) // bm - start
    columns = experts * wide
    tl.store(column_indices_ptr + at, tl.where(inside, expert * wide + c, columns), here)
    tl.store(row_indices_ptr + at, tl.where(inside, row, rows), here)
    local, height = entry - start * wide, tl.maximum(blocks, 1)
    row_t = start + local % height
    tl.store(row_indices_t_ptr + at, tl.where(inside, row_t, rows), here)
    tl.store(column_indices_t_ptr + at, tl.where(inside, expert * wide + local // height, columns), here)
    tl.store(order_t_ptr + at, tl.where(inside, row_t * wide + local // height, entry), here)
    # All rows with blocks have equally many, so they are sorted by length already.
    first = here & (c == 0)
    tl.store(row_offsets_ptr + row, tl.minimum(row, live) * wide, first)
    tl.store(row_schedule_ptr + row, row, first)
    count = tl.load(offsets_ptr + expert + 1) - tl.load(offsets_ptr + expert)
    left = tl.minimum(count - (row - start) * bm, bm)
    tl.store(live_rows_ptr + row, tl.where(inside, left, 0), first)


@triton.jit(do_not_specialize=["experts", "num_slots", "padded_rows"])
def _places_kernel(
    offsets_ptr,
    padded_offsets_ptr,
    slots_ptr,
    slots_of_rows_ptr,
    rows_of_slots_ptr,
    experts,
    num_slots,
    padded_rows,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    here = at < num_slots
    sorted_row = tl.where(here, at, 0).to(tl.int32)
    slot = tl.load(slots_ptr + at, here, other=0)
    expert = _upper_bound(offsets_ptr + 1, experts, sorted_row, STEPS)
    kept = expert < experts
    known = tl.minimum(expert, experts - 1)
    row = tl.load(padded_offsets_ptr + known) + sorted_row - tl.load(offsets_ptr + known)
    # A dispatch other than the topology's may have more rows than there is room for, and one made by hand may hold
    # anything.
    here = here & (slot >= 0) & (slot < num_slots)
    fits = (row >= 0) & (row < tl.minimum(tl.load(padded_offsets_ptr + known + 1), padded_rows))
    tl.store(rows_of_slots_ptr + slot, tl.where(kept, row, padded_rows), here)
    tl.store(slots_of_rows_ptr + row, slot, here & kept & fits)


def _steps(experts: int) -> int:
    return experts.bit_length()


def expert_topology(args: ExpertTopology) -> tuple[torch.Tensor, ...]:
    """The lists of blocks; contiguous int32 in and out."""
    (offsets, rows, wide, bm), found = args, args.new_lists()
    experts = offsets.shape[0] - 1
    row_offsets, columns, row_indices, column_offsets, rows_t, columns_t, order_t, row_schedule, *rest = found
    column_schedule, live_rows, padded_offsets = rest
    _padded_offsets_kernel[(1,)](offsets, padded_offsets, experts, bm, CHUNK=CHUNK, num_warps=4)
    lists = (padded_offsets, column_offsets, column_schedule)
    _columns_kernel[(experts,)](*lists, experts, wide, bm, CHUNK=CHUNK, TILE=TILE, num_warps=4)
    _blocks_kernel[(max(1, triton.cdiv(rows * wide, TILE)),)](
        offsets,
        padded_offsets,
        row_offsets,
        columns,
        row_indices,
        rows_t,
        columns_t,
        order_t,
        row_schedule,
        live_rows,
        experts,
        rows,
        wide,
        bm,
        STEPS=_steps(experts),
        TILE=TILE,
        num_warps=4,
    )
    return found


def expert_places(args: ExpertPlaces) -> tuple[torch.Tensor, torch.Tensor]:
    """The slot in each padded row, and the padded row of each slot; contiguous int32 in and out."""
    offsets, padded_offsets, slots, padded_rows = args
    experts, num_slots = offsets.shape[0] - 1, slots.shape[0]
    slots_of_rows = slots.new_full((padded_rows,), num_slots)
    rows_of_slots = torch.empty_like(slots)
    if num_slots:
        _places_kernel[(triton.cdiv(num_slots, TILE),)](
            offsets,
            padded_offsets,
            slots,
            slots_of_rows,
            rows_of_slots,
            experts,
            num_slots,
            padded_rows,
            STEPS=_steps(experts),
            TILE=TILE,
            num_warps=4,
        )
    return slots_of_rows, rows_of_slots


def aot_cases(arch: int) -> list[tuple]:
    """Launches to compile ahead of time: few and many experts."""

    def case(kernel, pointers: str, sizes: str, constants: dict) -> tuple:
        signature = {f"{name}_ptr": "*i32:16" for name in pointers.split()} | dict.fromkeys(sizes.split(), "i32")
        return kernel, signature, constants, {"num_warps": 4}

    lists = "row_offsets column_indices row_indices row_indices_t column_indices_t order_t row_schedule live_rows"
    cases = [
        case(_padded_offsets_kernel, "offsets padded_offsets", "experts bm", {"CHUNK": CHUNK}),
        case(
            _columns_kernel,
            "padded_offsets column_offsets column_schedule",
            "experts wide bm",
            {"CHUNK": CHUNK, "TILE": TILE},
        ),
    ]
    for experts in (8, 512):
        constants = {"STEPS": _steps(experts), "TILE": TILE}
        cases.append(case(_blocks_kernel, f"offsets padded_offsets {lists}", "experts rows wide bm", constants))
        places = "offsets padded_offsets slots slots_of_rows rows_of_slots"
        cases.append(case(_places_kernel, places, "experts num_slots padded_rows", constants))
    return cases
