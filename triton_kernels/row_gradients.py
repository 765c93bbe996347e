"""Ids sorted into runs of one row each, and the sums of output gradients over long runs, piece by piece.

Positions are sorted by id, stably, with torch's radix sort, over 32-bit keys if they can number the rows, which moves
12 bytes per position in each of its four passes. A run of more than PIECE positions is cut into pieces of PIECE,
counted from the run's start, so that no row's sum depends on what else is in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.gather_reduce import COLUMN, DIM, LAYOUT_COLUMNS, POOLING, ROW, ROWS, flat_strides

if TYPE_CHECKING:
    from gossamer.ops._bags import Bags

PIECE = 128
# Elements of the gradients that a program holds at a time: eight for each of 128 threads.
TILE = 1024
KEYS_BLOCK = 1024
RUNS_BLOCK = 1024


class SortedRows(NamedTuple):
    """Pointers to positions sorted by row and to the sources of their gradients; None where absent.

    Attributes:
        ids: the row of each position, sorted.
        order: the positions.
        bags: the bag of each position, if bags are ragged; this and everything below is in the order of the lists.
        offsets: offsets of the bags.
        weights: weights of the positions.
        counts: for a mean, the ids of each bag that contribute.
        argmax: for a maximum, the positions of the maxima.
        layout: layout of the features.
        dout: the gradient of the result.
    """

    ids: torch.Tensor
    order: torch.Tensor
    bags: torch.Tensor | None
    offsets: torch.Tensor | None
    weights: torch.Tensor | None
    counts: torch.Tensor | None
    argmax: torch.Tensor | None
    layout: torch.Tensor | None
    dout: torch.Tensor


@triton.jit(
    do_not_specialize=["num_positions", "num_bags", "num_slots", "num_rows", "sentinel", "padding_idx", "width"]
)
def _keys_kernel(
    index_ptr,
    offsets_ptr,
    layout_ptr,
    keys_ptr,
    bags_ptr,
    num_positions,
    num_bags,
    num_slots,
    num_rows,
    sentinel,
    padding_idx,
    width,
    stride_ib,
    stride_ij,
    CSR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The row of each position, or ``sentinel`` if it contributes nothing; and its bag, if bags are ragged.

    There are ``num_slots`` bags; with a layout, ``num_bags`` of each feature.
    """
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < num_positions
    if CSR:
        # The number of offsets not beyond the position, by bisection.
        low = tl.zeros((BLOCK,), tl.int64)
        high = tl.full((BLOCK,), num_slots + 1, tl.int64)
        size = num_slots + 1
        while size > 0:
            middle = (low + high) // 2
            passed = tl.load(offsets_ptr + middle, low < high, other=0).to(tl.int64) <= position
            low, high = tl.where((low < high) & passed, middle + 1, low), tl.where((low < high) & ~passed, middle, high)
            size = size // 2
        bag = low - 1
        ids = tl.load(index_ptr + position * stride_ij, inside, other=-1).to(tl.int64)
        live = inside & (bag >= 0) & (bag < num_slots)
        tl.store(bags_ptr + position, bag.to(bags_ptr.dtype.element_ty), inside)
    else:
        at = position // width * stride_ib + position % width * stride_ij
        ids = tl.load(index_ptr + at, inside, other=-1).to(tl.int64)
        live = inside
    rows = num_rows + tl.zeros((BLOCK,), tl.int64)
    first_row = tl.zeros((BLOCK,), tl.int64)
    if layout_ptr is not None:
        about_ptr = layout_ptr + tl.where(live, low - 1, 0) // num_bags * LAYOUT_COLUMNS
        rows = tl.load(about_ptr + ROWS, live, other=0)
        first_row = tl.load(about_ptr + ROW, live, other=0)
    live = live & (ids >= 0) & (ids < rows) & (ids != padding_idx)
    keys = tl.where(live, ids + first_row, sentinel)
    tl.store(keys_ptr + position, keys.to(keys_ptr.dtype.element_ty), inside)


@triton.jit
def _starts(ids_ptr, position, num_positions):
    """Mark the positions where runs of equal ids begin."""
    inside = position < num_positions
    here = tl.load(ids_ptr + position, inside, other=-1)
    before = tl.load(ids_ptr + position - 1, inside & (position > 0), other=-1)
    return here, inside & (here != before)


@triton.jit(do_not_specialize=["num_positions"])
def _count_runs_kernel(ids_ptr, counts_ptr, num_positions, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    _, starts = _starts(ids_ptr, block * BLOCK + tl.arange(0, BLOCK), num_positions)
    tl.store(counts_ptr + block, tl.sum(starts.to(tl.int32), 0))


@triton.jit(do_not_specialize=["num_positions"])
def _write_runs_kernel(ids_ptr, totals_ptr, runs_ptr, num_positions, BLOCK: tl.constexpr):
    """First position of each run, and ``num_positions`` after the last; ``totals`` counts runs up to each block."""
    block = tl.program_id(0).to(tl.int64)
    position = block * BLOCK + tl.arange(0, BLOCK)
    _, starts = _starts(ids_ptr, position, num_positions)
    flags = starts.to(tl.int32)
    before = tl.load(totals_ptr + block - 1, block > 0, other=0)
    run = before + tl.cumsum(flags, 0) - flags
    tl.store(runs_ptr + run, position.to(tl.int32), starts)
    if block == tl.num_programs(0) - 1:
        tl.store(runs_ptr + before + tl.sum(flags, 0), num_positions)


@triton.jit
def gradients(at, on, column, dim, rows, sizes, VEC: tl.constexpr):
    """The gradients that sorted positions ``at [P]`` add to their rows, ``[P, C]`` in float32; zeros where not ``on``.

    ``rows`` are SortedRows, and ``sizes`` strides of the gradient, the width of bags and how many there are.
    """
    stride_gb, stride_gd, width, num_bags = sizes
    position = tl.load(rows.order + at, on, other=0)
    if rows.bags is not None:
        bag = tl.load(rows.bags + position, on, other=0).to(tl.int64)
    else:
        bag = position // width
    mask = on[:, None] & (column[None, :] < dim)
    if rows.layout is not None:
        first_column = tl.load(rows.layout + bag // num_bags * LAYOUT_COLUMNS + COLUMN, on, other=0) // VEC * VEC
        row_ptr = rows.dout + ((bag % num_bags) * stride_gb + first_column * stride_gd)[:, None]
    else:
        row_ptr = rows.dout + (bag * stride_gb)[:, None]
    grad = tl.load(row_ptr + column.to(tl.int64)[None, :] * stride_gd, mask, other=0.0).to(tl.float32)
    if rows.argmax is not None:
        if rows.bags is not None:
            place = position - tl.maximum(tl.load(rows.offsets + bag, on, other=0).to(tl.int64), 0)
        else:
            place = position % width
        found = tl.load(rows.argmax + bag[:, None] * dim + column[None, :], mask, other=-1)
        grad = tl.where(found == place.to(tl.int32)[:, None], grad, 0.0)
    if rows.weights is not None:
        grad *= tl.load(rows.weights + position, on, other=0.0).to(tl.float32)[:, None]
    if rows.counts is not None:
        count = tl.load(rows.counts + bag, on, other=1).to(tl.float32)[:, None]
        grad = tl.div_rn(grad, tl.broadcast_to(count, grad.shape))
    return grad


@triton.jit
def about(first, live, rows, num_bags):
    """With a layout, pointers to its rows for the features that sorted positions ``first [R]`` belong to."""
    bag = tl.load(rows.bags + tl.load(rows.order + first, live, other=0), live, other=0).to(tl.int64)
    return rows.layout + bag // num_bags * LAYOUT_COLUMNS


@triton.jit
def long_run(ids_ptr, window, num_positions, sentinel, PIECE: tl.constexpr):
    """Whether a run of more than PIECE positions begins in window number ``window`` of PIECE positions, and where; at
    most one can.
    """
    position = window * PIECE + tl.arange(0, PIECE)
    here, starts = _starts(ids_ptr, position, num_positions)
    after = tl.load(ids_ptr + position + PIECE, position + PIECE < num_positions, other=-1)
    long = starts & (after == here) & (here != sentinel)
    return tl.sum(long.to(tl.int32), 0) > 0, tl.sum(tl.where(long, position, 0), 0)


@triton.jit
def bisect(ids_ptr, id, low, high, UPPER: tl.constexpr):
    """The first position in ``[low, high]`` whose id is at least ``id``; with UPPER, the first whose id is above it."""
    while low < high:
        middle = (low + high) // 2
        found = tl.load(ids_ptr + middle)
        passed = found < id
        if UPPER:
            passed = found <= id
        low, high = tl.where(passed, middle + 1, low), tl.where(passed, high, middle)
    return low


@triton.jit(do_not_specialize=["num_positions", "num_bags", "sentinel", "width", "dim", "stride_gb"])
def sum_pieces_kernel(
    rows,
    partial_ptr,
    num_positions,
    num_bags,
    sentinel,
    width,
    dim,
    stride_gb,
    stride_gd,
    PIECE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC: tl.constexpr,
):
    """Sum one piece of a long run.

    At most two pieces begin among PIECE positions: one of a run that began earlier, with slot ``2·window``, and the
    first piece of a run that begins among them, with slot ``2·window + 1``.
    """
    ids_ptr = rows.ids
    slot = tl.program_id(0).to(tl.int64)
    window = slot // 2
    edge = window * PIECE
    if slot % 2 == 1:
        exists, begin = long_run(ids_ptr, window, num_positions, sentinel, PIECE)
        id = tl.load(ids_ptr + begin)
    else:
        id = tl.load(ids_ptr + edge)
        before = tl.load(ids_ptr + edge - 1, edge > 0, other=-1)
        exists = (id == before) & (id != sentinel)
        begin = edge
        if exists:
            start = bisect(ids_ptr, id, tl.zeros_like(edge), edge, False)
            begin = start + (edge - start + PIECE - 1) // PIECE * PIECE
            far = tl.load(ids_ptr + start + PIECE, start + PIECE < num_positions, other=-1)
            here = tl.load(ids_ptr + begin, begin < num_positions, other=-1)
            exists = (far == id) & (begin < edge + PIECE) & (here == id)
    if exists:
        sizes = (stride_gb.to(tl.int64) // VEC * VEC, stride_gd, width, num_bags)
        dim = dim // VEC * VEC
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros((LANES, BLOCK_D), tl.float32)
        for first in range(0, PIECE, LANES):
            at = begin + first + tl.arange(0, LANES)
            inside = at < num_positions
            on = inside & (tl.load(ids_ptr + at, inside, other=-1) == id)
            dims = dim
            if rows.layout is not None:
                dims = (tl.load(about(at, on, rows, num_bags) + DIM, on, other=0) // VEC * VEC)[:, None]
            total += gradients(at, on, column, dims, rows, sizes, VEC)
        tl.store(partial_ptr + slot * dim + column, tl.sum(total, 0), column < dim)


def piece_tile(dim: int) -> tuple[int, int]:
    """Positions and columns that one program sums at a time."""
    block_d = max(16, min(triton.next_power_of_2(dim), TILE))
    return max(1, min(PIECE, TILE // block_d)), block_d


def sorted_rows(bags: Bags, argmax: torch.Tensor | None, dout: torch.Tensor, num_rows: int) -> SortedRows:
    """The positions sorted by row, ``num_rows`` for those that contribute nothing."""
    index, offsets, layout = bags.index, bags.offsets, bags.features.layout
    csr = offsets is not None
    offsets = offsets.contiguous() if csr else None
    num_positions, device, num_slots = index.numel(), index.device, bags.num_lists
    small = torch.int32 if num_rows < 2**31 else torch.int64
    keys = torch.empty(num_positions, dtype=small, device=device)
    numbers = None
    if csr:
        numbers = torch.empty(num_positions, dtype=torch.int32 if num_slots < 2**31 else torch.int64, device=device)
    _keys_kernel[(triton.cdiv(num_positions, KEYS_BLOCK),)](
        index,
        offsets,
        layout,
        keys,
        numbers,
        num_positions,
        bags.num_bags,
        num_slots,
        num_rows,
        num_rows,
        bags.padding_idx,
        0 if csr else index.shape[1],
        *flat_strides(index),
        CSR=csr,
        BLOCK=KEYS_BLOCK,
        num_warps=4,
    )
    counts = _bag_counts(keys, bags, num_rows) if bags.averages else None
    ids, order = torch.sort(keys, stable=True)
    weights = None if bags.weights is None else bags.weights.reshape(-1).contiguous()
    return SortedRows(ids, order, numbers, offsets, weights, counts, argmax, layout, dout)


def find_runs(ids):
    """First position of each run of equal ids, the number of positions after the last, and the number of runs."""
    num_positions = ids.numel()
    blocks = triton.cdiv(num_positions, RUNS_BLOCK)
    counts = torch.empty(blocks, dtype=torch.int32, device=ids.device)
    _count_runs_kernel[(blocks,)](ids, counts, num_positions, BLOCK=RUNS_BLOCK, num_warps=4)
    totals = torch.cumsum(counts, 0, dtype=torch.int32)
    runs = torch.empty(num_positions + 1, dtype=torch.int32, device=ids.device)
    _write_runs_kernel[(blocks,)](ids, totals, runs, num_positions, BLOCK=RUNS_BLOCK, num_warps=4)
    return runs, totals[-1:]


def _bag_counts(keys: torch.Tensor, bags: Bags, sentinel: int) -> torch.Tensor:
    """Contributing ids of each bag, but at least 1; with features, 1 for bags that are summed."""
    live = keys != sentinel
    if bags.offsets is None:
        return live.view(bags.num_bags, -1).sum(1, dtype=torch.int32).clamp_(min=1)
    before = torch.nn.functional.pad(live.cumsum(0, dtype=torch.int32), (1, 0))
    edges = before[bags.offsets.clamp(0, keys.numel()).long()]
    counts = (edges[1:] - edges[:-1]).clamp_(min=1)
    layout = bags.features.layout
    if layout is None:
        return counts
    return torch.where((layout[:, POOLING.value] == 1).repeat_interleave(bags.num_bags), counts, 1)


def aot_cases(arch: int) -> list[tuple]:
    """Launches to compile ahead of time: ragged lists of many tables, and gradients of one table and of many."""
    keys = {"index_ptr": "*i64:16", "offsets_ptr": "*i64:16", "keys_ptr": "*i32:16", "bags_ptr": "*i32:16"}
    numbers = "num_positions num_bags num_slots num_rows sentinel padding_idx width stride_ib stride_ij".split()
    keys |= dict.fromkeys(numbers, "i32") | {"layout_ptr": "*i64:16"}
    four = {"num_warps": 4}
    cases = [(_keys_kernel, keys, {"CSR": True, "BLOCK": KEYS_BLOCK}, four)]
    ids = {"ids_ptr": "*i32:16", "num_positions": "i32"}
    cases.append((_count_runs_kernel, ids | {"counts_ptr": "*i32:16"}, {"BLOCK": RUNS_BLOCK}, four))
    runs = {"totals_ptr": "*i32:16", "runs_ptr": "*i32:16"}
    cases.append((_write_runs_kernel, ids | runs, {"BLOCK": RUNS_BLOCK}, four))
    sizes = dict.fromkeys("num_positions num_bags sentinel width dim stride_gb".split(), "i32")
    for type_, size, tables in (("bf16", 2, True), ("fp32", 4, False))[: 2 if arch == 90 else 1]:
        rows = sorted_types(f"*{type_}:16", tables)
        lanes, block_d = piece_tile(128)
        constants = {"stride_gd": 1, "PIECE": PIECE, "LANES": lanes, "BLOCK_D": block_d, "VEC": 16 // size}
        cases.append((sum_pieces_kernel, {"rows": rows, "partial_ptr": "*fp32:16"} | sizes, constants, four))
    return cases


def sorted_types(dout: str, tables: bool) -> SortedRows:
    """Types of weighted means over ragged bags, for ahead-of-time compilation."""
    layout = "*i64:16" if tables else None
    return SortedRows("*i32:16", "*i64:16", "*i32:16", "*i64:16", "*fp32:16", "*i32:16", None, layout, dout)
