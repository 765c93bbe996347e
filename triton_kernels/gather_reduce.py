"""Weighted sums and means of gathered rows of one or many tables, and the dot products for gradients of the weights.

Floor: each touched row read once, ids, offsets and weights read once, ``B·D`` elements written (``gather_dot``: read).
Rows are read 16 bytes per thread; ``UNROLL`` rows of each of a program's bags are in flight at once, and several
programs share a multiprocessor, so that ids of one program are loaded while rows of another are. Nothing is kept in
shared memory.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from gossamer._row_codes import scale_stride

if TYPE_CHECKING:
    from gossamer.ops._bags import Bags
    from gossamer.ops.gather_reduce import GatherDot, GatherReduce

NUM_WARPS = 4
# Bytes of a table row, or of several short ones, that a program holds at a time: 16 per thread.
TILE_BYTES = 16 * 32 * NUM_WARPS
MAX_BAGS = 16
# Most rows in flight: a fixed-width bag up to this size is unrolled whole, a longer one by the number that divides it
# best.
UNROLL = 8
MAX_UNROLL = 10
DOT_TILE_BYTES = 4 * TILE_BYTES
# The largest alignment in bytes that rows, strides and dims are tested for: that of a thread's load.
LOAD_BYTES = 16
# Columns of the layout of gossamer.ops' Features, one row per feature.
ELEMENT, ROW, ROWS, DIM, COLUMN, POOLING, LAYOUT_COLUMNS = (tl.constexpr(i) for i in range(7))

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8"}
_SIZES = [
    "num_bags",
    "num_positions",
    "num_rows",
    "padding_idx",
    "width",
    "dim",
    "blocks",
    "stride_tn",
    "stride_on",
    "stride_ib",
    "stride_ij",
    "stride_wb",
    "stride_wj",
]
_DOT_SIZES = [name for name in _SIZES if name not in ("blocks", "stride_on", "stride_wb", "stride_wj")] + ["stride_gb"]


class Lists(NamedTuple):
    """Pointers of bags, None for each that is absent; see gossamer.ops' Bags."""

    index: torch.Tensor
    offsets: torch.Tensor | None
    weights: torch.Tensor | None
    layout: torch.Tensor | None


class Scales(NamedTuple):
    """Scales of rows of codes, and elements from one row's to the next's."""

    each: torch.Tensor  # "values" is an attribute of Triton's own tuples
    stride: int


def scales_of(scale: torch.Tensor | None) -> Scales | None:
    """The scales of a table of codes as passed to kernels; None for a table of floats."""
    return None if scale is None else Scales(scale, scale_stride(scale))


def lists_of(bags: Bags) -> Lists:
    """The pointers of bags, their offsets contiguous."""
    offsets = None if bags.offsets is None else bags.offsets.contiguous()
    return Lists(bags.index, offsets, bags.weights, bags.features.layout)


def dims_of(table: torch.Tensor, bags: Bags) -> list[int]:
    """Columns of each feature's rows; without features, columns of the table's."""
    return bags.features.dim or [table.shape[1]]


def mean_dim(dims: list[int]) -> int:
    """The dim that tiles are made for: the mean over features, not the largest."""
    return -(-sum(dims) // len(dims))


def reduce_tile(dim: int, itemsize: int) -> tuple[int, int]:
    """Bags and columns of one program of ``gather_reduce``: ``itemsize`` bytes per element, 16 bytes per thread."""
    block_d = max(16, min(triton.next_power_of_2(dim), TILE_BYTES // itemsize))
    return min(MAX_BAGS, TILE_BYTES // (block_d * itemsize)), block_d


def dot_tile(dim: int, itemsize: int, width: int | None) -> tuple[int, int]:
    """Positions and columns at a time of one program of ``gather_dot``; ``width`` is J, or None for ragged bags."""
    positions = min(16, triton.next_power_of_2(max(width, 1))) if width is not None else 8
    block_d = max(16, min(triton.next_power_of_2(dim), DOT_TILE_BYTES // (positions * itemsize)))
    return positions, block_d


def unroll(width: int) -> int:
    """Rows of a bag of ``width`` in flight: the fewest rounds of at most MAX_UNROLL, with the least left over."""
    if width == 0:
        return UNROLL
    return triton.cdiv(width, triton.cdiv(width, MAX_UNROLL))


def multiple(itemsize: int, *numbers: int) -> int:
    """The largest divisor of all ``numbers`` that is at most a thread's load in elements."""
    return math.gcd(LOAD_BYTES // itemsize, *numbers)


@triton.jit
def bag_range(offsets_ptr, bag, in_batch, num_positions, width):
    """First and end position of each bag: within its row of ``width`` ids, or within the flat list."""
    if offsets_ptr is not None:
        # Clamped, so that malformed offsets stay inside the list.
        begin = tl.maximum(tl.load(offsets_ptr + bag, in_batch, other=0).to(tl.int64), 0)
        end = tl.minimum(tl.load(offsets_ptr + bag + 1, in_batch, other=0).to(tl.int64), num_positions)
    else:
        begin = tl.zeros_like(bag)
        end = tl.where(in_batch, width, 0).to(tl.int64)
    return begin, end


@triton.jit
def load_ids(ids_ptr, inside, num_rows, padding_idx, limit):
    """Ids at the pointers, and which of them count: in the table, below the limit, not the padding row."""
    ids = tl.load(ids_ptr, inside, other=-1).to(tl.int64)
    return ids, (ids >= 0) & (ids < num_rows) & (ids < limit) & (ids != padding_idx)


@triton.jit
def _add_row(
    total,
    count,
    column_ptr,
    in_row,
    ids_ptr,
    weights_ptr,
    scales,
    inside,
    num_rows,
    padding_idx,
    limit,
    stride_tn,
):
    """Add one row of each bag, times its scale and weight, in float32; and one to the count if the id counts."""
    ids, live = load_ids(ids_ptr, inside, num_rows, padding_idx, limit)
    rows = tl.load(column_ptr + ids[:, None] * stride_tn, live[:, None] & in_row[None, :], other=0.0).to(tl.float32)
    if scales is not None:
        rows *= tl.load(scales.each + ids * scales.stride, live, other=0.0)[:, None]
    if weights_ptr is not None:
        # Masked like the rows: a skipped position may hold NaN.
        rows *= tl.load(weights_ptr, live, other=0.0).to(tl.float32)[:, None]
    return total + rows, count + live.to(tl.int32)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["limit_ptr"])
def gather_reduce_kernel(
    table_ptr,
    scales,
    lists,
    limit_ptr,
    out_ptr,
    num_bags,
    num_positions,
    num_rows,
    padding_idx,
    width,
    dim,
    blocks,
    stride_tn,
    stride_td,
    stride_on,
    stride_ib,
    stride_ij,
    stride_wb,
    stride_wj,
    MODE: tl.constexpr,
    WIDTH: tl.constexpr,
    UNROLL: tl.constexpr,
    BAGS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC: tl.constexpr,
):
    """``BAGS`` bags by ``BLOCK_D`` columns, one of ``blocks`` of a row; WIDTH is J where all J are unrolled, else 0.

    With a layout, the programs of one feature follow those of the previous feature. They read that feature's table,
    with its size and dim; programs whose columns lie past the dim do nothing.
    """
    program = tl.program_id(0)
    index_ptr, offsets_ptr, weights_ptr, layout_ptr = lists
    mean: tl.constexpr = MODE == "mean"
    averaged = mean
    if layout_ptr is not None:
        per_feature = tl.cdiv(num_bags, BAGS) * blocks
        feature = (program // per_feature).to(tl.int64)
        program = program % per_feature
        about_ptr = layout_ptr + feature * LAYOUT_COLUMNS
        table_ptr += tl.load(about_ptr + ELEMENT) // 16 * 16
        num_rows = tl.load(about_ptr + ROWS)
        dim = tl.load(about_ptr + DIM)
        out_ptr += tl.load(about_ptr + COLUMN) // VEC * VEC
        averaged = tl.load(about_ptr + POOLING) == 1
        offsets_ptr += feature * num_bags
        stride_tn = dim
    # Because these are known at compile time, a thread can read and write VEC elements at once.
    dim = dim // VEC * VEC
    stride_tn = stride_tn.to(tl.int64) // VEC * VEC
    stride_on = stride_on.to(tl.int64) // VEC * VEC
    bag = (program // blocks).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    column = program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = column < dim
    in_batch = bag < tl.where(program % blocks * BLOCK_D < dim, num_bags, 0)
    limit = num_rows.to(tl.int64)
    if limit_ptr is not None:
        limit = tl.load(limit_ptr).to(tl.int64)
    column_ptr = table_ptr + column.to(tl.int64)[None, :] * stride_td
    ids_base = bag * stride_ib
    weights_base = bag * stride_wb
    begin, end = bag_range(offsets_ptr, bag, in_batch, num_positions, width)
    total = tl.zeros((BAGS, BLOCK_D), tl.float32)
    count = tl.zeros((BAGS,), tl.int32)
    if WIDTH > 0:
        for j in tl.static_range(WIDTH):
            ids_ptr, factors_ptr = index_ptr + ids_base + j * stride_ij, weights_ptr
            if weights_ptr is not None:
                factors_ptr = weights_ptr + weights_base + j * stride_wj
            total, count = _add_row(
                total,
                count,
                column_ptr,
                in_row,
                ids_ptr,
                factors_ptr,
                scales,
                in_batch,
                num_rows,
                padding_idx,
                limit,
                stride_tn,
            )
    else:
        longest = tl.max(end - begin, 0)
        for first in range(0, longest, UNROLL):
            for u in tl.static_range(UNROLL):
                j = begin + first + u
                ids_ptr, factors_ptr = index_ptr + ids_base + j * stride_ij, weights_ptr
                if weights_ptr is not None:
                    factors_ptr = weights_ptr + weights_base + j * stride_wj
                total, count = _add_row(
                    total,
                    count,
                    column_ptr,
                    in_row,
                    ids_ptr,
                    factors_ptr,
                    scales,
                    j < end,
                    num_rows,
                    padding_idx,
                    limit,
                    stride_tn,
                )
    if mean or layout_ptr is not None:
        number = tl.where(averaged, tl.maximum(count, 1), 1).to(tl.float32)
        total = tl.div_rn(total, tl.broadcast_to(number[:, None], (BAGS, BLOCK_D)))
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + bag[:, None] * stride_on + column[None, :], out, in_batch[:, None] & in_row[None, :])


@triton.jit(do_not_specialize=_DOT_SIZES, do_not_specialize_on_alignment=["limit_ptr"])
def gather_dot_kernel(
    dout_ptr,
    table_ptr,
    scales,
    lists,
    limit_ptr,
    out_ptr,
    num_bags,
    num_positions,
    num_rows,
    padding_idx,
    width,
    dim,
    stride_gb,
    stride_gd,
    stride_tn,
    stride_td,
    stride_ib,
    stride_ij,
    MODE: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC: tl.constexpr,
):
    """One bag: its gradient row against ``POSITIONS`` of its table rows at a time. With a layout, as gather_reduce."""
    bag = tl.program_id(0).to(tl.int64)
    index_ptr, offsets_ptr, layout_ptr = lists.index, lists.offsets, lists.layout
    mean: tl.constexpr = MODE == "mean"
    averaged = mean
    if layout_ptr is not None:
        feature = bag // num_bags
        about_ptr = layout_ptr + feature * LAYOUT_COLUMNS
        table_ptr += tl.load(about_ptr + ELEMENT) // 16 * 16
        num_rows = tl.load(about_ptr + ROWS)
        dim = tl.load(about_ptr + DIM)
        dout_ptr += tl.load(about_ptr + COLUMN) // VEC * VEC * stride_gd
        averaged = tl.load(about_ptr + POOLING) == 1
        stride_tn = dim
    dim = dim // VEC * VEC
    stride_tn = stride_tn.to(tl.int64) // VEC * VEC
    stride_gb = stride_gb.to(tl.int64) // VEC * VEC
    limit = num_rows.to(tl.int64)
    if limit_ptr is not None:
        limit = tl.load(limit_ptr).to(tl.int64)
    begin, end = bag_range(offsets_ptr, bag, bag >= 0, num_positions, width)
    if layout_ptr is not None:
        dout_ptr += bag % num_bags * stride_gb
    else:
        dout_ptr += bag * stride_gb
    scale = 1.0
    if mean or layout_ptr is not None:
        count = tl.zeros((POSITIONS,), tl.int32)
        if averaged:
            for first in range(begin, end, POSITIONS):
                j = first + tl.arange(0, POSITIONS)
                _, live = load_ids(index_ptr + bag * stride_ib + j * stride_ij, j < end, num_rows, padding_idx, limit)
                count += live.to(tl.int32)
        scale = tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    for first in range(begin, end, POSITIONS):
        j = first + tl.arange(0, POSITIONS)
        ids, live = load_ids(index_ptr + bag * stride_ib + j * stride_ij, j < end, num_rows, padding_idx, limit)
        total = tl.zeros((POSITIONS, BLOCK_D), tl.float32)
        for start in range(0, dim, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            in_row = column < dim
            gradient = tl.load(dout_ptr + column.to(tl.int64) * stride_gd, in_row, other=0.0)
            row_ptr = table_ptr + ids[:, None] * stride_tn + column.to(tl.int64)[None, :] * stride_td
            row = tl.load(row_ptr, live[:, None] & in_row[None, :], other=0.0)
            total += row.to(tl.float32) * gradient.to(tl.float32)[None, :]
        # Masked again, because a skipped position's zeros times an infinite gradient are NaN.
        dot = tl.where(live, tl.sum(total, 1), 0.0)
        if scales is not None:
            dot *= tl.load(scales.each + ids * scales.stride, live, other=0.0)
        if mean or layout_ptr is not None:
            dot = tl.div_rn(dot, tl.zeros_like(dot) + scale)
        tl.store(out_ptr + bag * width + j, dot.to(out_ptr.dtype.element_ty), j < end)


def flat_strides(index: torch.Tensor) -> tuple[int, int]:
    """Strides of ``index`` from bag to bag and from position to position; a flat list has no bag stride."""
    return (0, index.stride(0)) if index.dim() == 1 else index.stride()


def _reduce(
    out: torch.Tensor,
    table: torch.Tensor,
    lists: Lists,
    limit: torch.Tensor | None,
    dims: list[int],
    mode: str = "sum",
    padding_idx: int = -1,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch the sums into ``out (B, ΣD)``; if the lists have a layout, features have ``dims`` columns."""
    if out.numel() == 0:
        return out
    many = lists.layout is not None
    num_rows, dim = (0, 0) if many else table.shape
    # In a storage of many tables rows are adjacent.
    strides = (0, 1) if many else table.stride()
    width = 0 if lists.offsets is not None else lists.index.shape[1]
    at_once = unroll(width)
    bags, block_d = reduce_tile(mean_dim(dims), table.element_size())
    blocks = triton.cdiv(max(dims), block_d)
    gather_reduce_kernel[(len(dims) * triton.cdiv(out.shape[0], bags) * blocks,)](
        table,
        scales_of(scale),
        lists,
        limit,
        out,
        out.shape[0],
        lists.index.numel(),
        num_rows,
        padding_idx,
        width,
        dim,
        blocks,
        *strides,
        out.stride(0),
        *flat_strides(lists.index),
        *(flat_strides(lists.weights) if lists.weights is not None else (0, 0)),
        MODE=mode,
        WIDTH=width if width <= at_once else 0,
        UNROLL=at_once,
        BAGS=bags,
        BLOCK_D=block_d,
        VEC=multiple(table.element_size(), *dims, strides[0]),
        num_warps=NUM_WARPS,
    )
    return out


def gather_reduce(args: GatherReduce) -> torch.Tensor:
    """``out[b]``, the sum or mean over the contributing ids of bag ``b`` of ``weights · table[id]``, in position order.

    Ids outside the table contribute nothing, dropped or not: raising would wait for the device.
    """
    table, bags = args.table, args.bags
    dims = dims_of(table, bags)
    out = torch.empty(bags.num_bags, sum(dims), dtype=args.out_dtype, device=table.device)
    return _reduce(out, table, lists_of(bags), bags.limit, dims, bags.mode, bags.padding_idx, args.scale)


def sum_slots(
    table: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, top_k: int, weights: torch.Tensor | None
) -> torch.Tensor:
    """Sum the expert-sorted ``table (R, D)`` back to tokens ``(T, D)``: slot ``(t, k)`` reads row ``rows[t·K + k]``.

    ``rows`` and ``offsets`` are a dispatch's; dropped rows are never read.
    """
    index = rows.view(-1, top_k)
    out = torch.empty(index.shape[0], table.shape[1], dtype=table.dtype, device=table.device)
    return _reduce(out, table, Lists(index, None, weights, None), offsets[-1:], [table.shape[1]])


def gather_dot(args: GatherDot) -> torch.Tensor:
    """``out[p] = ⟨dout[bag of p], table[index[p]]⟩`` in the shape of the ids, zero where the id is skipped.

    For a mean it is divided by the number of contributing ids of the bag.
    """
    dout, table, bags = args.dout, args.table, args.bags
    dims, many = dims_of(table, bags), bags.features.layout is not None
    ragged = bags.offsets is not None
    # A ragged list may hold positions outside all bags.
    new = torch.zeros if ragged or max(dims) == 0 else torch.empty
    out = new(bags.index.shape, dtype=args.dtype, device=table.device)
    if out.numel() == 0 or bags.num_lists == 0 or max(dims) == 0:
        return out
    num_rows, dim = (0, 0) if many else table.shape
    strides = (0, 1) if many else table.stride()
    width = 0 if ragged else bags.index.shape[1]
    positions, block_d = dot_tile(mean_dim(dims), table.element_size(), None if ragged else width)
    gather_dot_kernel[(bags.num_lists,)](
        dout,
        table,
        scales_of(args.scale),
        lists_of(bags),
        bags.limit,
        out,
        bags.num_bags,
        bags.index.numel(),
        num_rows,
        bags.padding_idx,
        width,
        dim,
        *dout.stride(),
        *strides,
        *flat_strides(bags.index),
        MODE=bags.mode,
        POSITIONS=positions,
        BLOCK_D=block_d,
        VEC=multiple(table.element_size(), *dims, strides[0], dout.stride(0)),
        num_warps=NUM_WARPS,
    )
    return out


def aot_cases(arch: int) -> list[tuple]:
    """Launches to compile ahead of time: the combine of an expert layer, ragged bags, and many tables."""
    sizes = dict.fromkeys(_SIZES + _DOT_SIZES, "i32")
    cases = []
    for dtype in (torch.bfloat16, torch.float32, torch.int8) if arch == 90 else (torch.float32,):
        size, pointer = dtype.itemsize, f"*{_TYPES[dtype]}:16"
        for dim, form in ((2048, "fixed"), (128, "ragged"), (64, "tables")):
            width = 8 if form == "fixed" else 0
            offsets = None if form == "fixed" else "*i32:16"
            lists = Lists("*i32:16", offsets, "*fp32:16", "*i64:16" if form == "tables" else None)
            bags, block_d = reduce_tile(dim, size)
            common = dict.fromkeys(("dout_ptr", "table_ptr", "out_ptr"), pointer) | {"lists": lists} | sizes
            if dtype == torch.int8:
                common |= dict.fromkeys(("dout_ptr", "out_ptr"), "*fp32:16") | {"scales": Scales("*fp32:16", "i32")}
            common |= {"limit_ptr": "*i32"} if form == "fixed" else {}
            positions, dot_d = dot_tile(dim, size, width or None)
            reduce = {"WIDTH": width, "UNROLL": UNROLL, "BAGS": bags, "BLOCK_D": block_d}
            dot = {"POSITIONS": positions, "BLOCK_D": dot_d}
            for kernel, tile in ((gather_reduce_kernel, reduce), (gather_dot_kernel, dot)):
                names = kernel.arg_names
                signature = {k: v for k, v in common.items() if k in names}
                mode = "mean" if form == "ragged" else "sum"
                constants = {"stride_td": 1, "MODE": mode, "VEC": LOAD_BYTES // size} | tile
                constants |= {"stride_gd": 1} if "stride_gd" in names else {}
                constants |= dict.fromkeys(k for k in names if k not in signature and k not in constants)
                cases.append((kernel, signature, constants, {"num_warps": NUM_WARPS}))
    return cases
