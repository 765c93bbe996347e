"""Weighted sums and means of gathered table rows, of one table or of many, and the dot products behind their weights.

Floor: each touched row read once, ids, offsets and weights read once, ``B·D`` elements written (``gather_dot``: read).
Rows are read 16 bytes a thread; ``UNROLL`` rows of each of a program's bags are in flight at once, and several programs
share a multiprocessor, so that ids of one are on their way while rows of another are. Nothing is kept in shared memory.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

NUM_WARPS = 4
# Bytes of one table row, or of several short ones side by side, that a program holds at a time: 16 for each thread.
TILE_BYTES = 16 * 32 * NUM_WARPS
MAX_BAGS = 16
# Rows in flight at once: all of a fixed-width bag up to so many; of a longer one, what divides it best.
UNROLL = 8
MAX_UNROLL = 10
DOT_TILE_BYTES = 4 * TILE_BYTES
# Table rows, their strides and dims are known to be whole multiples of so many bytes, up to a thread's load.
LOAD_BYTES = 16
# Columns of a TableLayout's tensor, one row a feature.
ELEMENT, ROW, ROWS, DIM, COLUMN, POOLING, LAYOUT_COLUMNS = (tl.constexpr(i) for i in range(7))

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
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


def reduce_tile(dim: int, itemsize: int) -> tuple[int, int]:
    """Bags and columns of one program of ``gather_reduce``: ``itemsize`` bytes an element, 16 bytes a thread."""
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
def bag_range(offsets_ptr, bag, in_batch, num_positions, width, CSR: tl.constexpr):
    """First and end position of each bag: within its row of ``width`` ids, or within the flat list."""
    if CSR:
        # Clamped, so that malformed offsets never lead outside the list.
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
    inside,
    num_rows,
    padding_idx,
    limit,
    stride_tn,
):
    """Add one table row of each bag, times its weight, in float32; and one to the count where the id counts."""
    ids, live = load_ids(ids_ptr, inside, num_rows, padding_idx, limit)
    rows = tl.load(column_ptr + ids[:, None] * stride_tn, live[:, None] & in_row[None, :], other=0.0).to(tl.float32)
    if weights_ptr is not None:
        # Masked as the rows are: a skipped position may hold a NaN.
        rows *= tl.load(weights_ptr, live, other=0.0).to(tl.float32)[:, None]
    return total + rows, count + live.to(tl.int32)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["limit_ptr"])
def gather_reduce_kernel(
    table_ptr,
    index_ptr,
    offsets_ptr,
    weights_ptr,
    limit_ptr,
    layout_ptr,
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
    MEAN: tl.constexpr,
    CSR: tl.constexpr,
    WIDTH: tl.constexpr,
    UNROLL: tl.constexpr,
    BAGS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC: tl.constexpr,
):
    """``BAGS`` bags by ``BLOCK_D`` columns, one of ``blocks`` of a row; WIDTH is J where all J are unrolled, else 0.

    With a layout, programs of one feature follow those of the one before; the table, its size and its dim are that
    feature's, and those whose columns lie past its dim have nothing to do.
    """
    program = tl.program_id(0)
    mean: tl.constexpr = MEAN
    averaged = MEAN
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
    # As compile-time facts, these let a thread read and write VEC elements at once.
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
    begin, end = bag_range(offsets_ptr, bag, in_batch, num_positions, width, CSR)
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
    index_ptr,
    offsets_ptr,
    limit_ptr,
    layout_ptr,
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
    MEAN: tl.constexpr,
    CSR: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC: tl.constexpr,
):
    """One bag: its gradient row against ``POSITIONS`` of its table rows at a time. With a layout, as gather_reduce."""
    bag = tl.program_id(0).to(tl.int64)
    mean: tl.constexpr = MEAN
    averaged = MEAN
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
    begin, end = bag_range(offsets_ptr, bag, bag >= 0, num_positions, width, CSR)
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
        # Not total alone: a skipped position's zeros times an infinite gradient are NaN.
        dot = tl.where(live, tl.sum(total, 1), 0.0)
        if mean or layout_ptr is not None:
            dot = tl.div_rn(dot, tl.zeros_like(dot) + scale)
        tl.store(out_ptr + bag * width + j, dot.to(out_ptr.dtype.element_ty), j < end)


def flat_strides(index: torch.Tensor) -> tuple[int, int]:
    """Strides of ``index`` from bag to bag and from position to position; a flat list has no bag stride."""
    return (0, index.stride(0)) if index.dim() == 1 else index.stride()


def gather_reduce(
    table: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    limit: torch.Tensor | None,
    padding_idx: int,
    mean: bool = False,
    drop: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``out[b]``, the sum or mean over the live ids of bag ``b`` of ``weights · table[id]``, in position order.

    Ids outside the table contribute nothing, dropped or not: raising would wait for the device.
    """
    num_rows, dim = table.shape
    num_bags = index.shape[0] if offsets is None else offsets.shape[0] - 1
    out = torch.empty(num_bags, dim, dtype=out_dtype or table.dtype, device=table.device)
    if out.numel() == 0:
        return out
    csr = offsets is not None
    width = 0 if csr else index.shape[1]
    bags, block_d = reduce_tile(dim, table.element_size())
    blocks = triton.cdiv(dim, block_d)
    at_once = unroll(width)
    gather_reduce_kernel[(triton.cdiv(num_bags, bags) * blocks,)](
        table,
        index,
        offsets.contiguous() if csr else None,
        weights,
        limit,
        None,
        out,
        num_bags,
        index.numel(),
        num_rows,
        padding_idx,
        width,
        dim,
        blocks,
        *table.stride(),
        dim,
        *flat_strides(index),
        *(flat_strides(weights) if weights is not None else (0, 0)),
        MEAN=mean,
        CSR=csr,
        WIDTH=width if width <= at_once else 0,
        UNROLL=at_once,
        BAGS=bags,
        BLOCK_D=block_d,
        VEC=multiple(table.element_size(), dim, table.stride(0)),
        num_warps=NUM_WARPS,
    )
    return out


def gather_dot(
    dout: torch.Tensor,
    table: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor | None,
    limit: torch.Tensor | None,
    padding_idx: int,
    dtype: torch.dtype,
    mean: bool = False,
    drop: bool = False,
) -> torch.Tensor:
    """``out[p] = ⟨dout[bag of p], table[index[p]]⟩`` in the shape of ``index``, zero where the id is skipped.

    For a mean it is divided by the number of live ids in the bag.
    """
    num_rows, dim = table.shape
    csr = offsets is not None
    num_bags = offsets.shape[0] - 1 if csr else index.shape[0]
    # A ragged list may hold positions that lie in no bag.
    new = torch.zeros if csr or dim == 0 else torch.empty
    out = new(index.shape, dtype=dtype, device=table.device)
    if out.numel() == 0 or num_bags == 0 or dim == 0:
        return out
    width = 0 if csr else index.shape[1]
    positions, block_d = dot_tile(dim, table.element_size(), None if csr else width)
    gather_dot_kernel[(num_bags,)](
        dout,
        table,
        index,
        offsets.contiguous() if csr else None,
        limit,
        None,
        out,
        num_bags,
        index.numel(),
        num_rows,
        padding_idx,
        width,
        dim,
        *dout.stride(),
        *table.stride(),
        *flat_strides(index),
        MEAN=mean,
        CSR=csr,
        POSITIONS=positions,
        BLOCK_D=block_d,
        VEC=multiple(table.element_size(), dim, table.stride(0), dout.stride(0)),
        num_warps=NUM_WARPS,
    )
    return out


def aot_cases(arch: int) -> list[tuple]:
    """Launches to compile ahead of time: the combine of an expert layer, ragged bags, and many tables."""
    sizes = dict.fromkeys(_SIZES + _DOT_SIZES, "i32")
    cases = []
    for dtype in (torch.bfloat16, torch.float32) if arch == 90 else (torch.float32,):
        size, pointer = dtype.itemsize, f"*{_TYPES[dtype]}:16"
        for dim, form in ((2048, "fixed"), (128, "ragged"), (64, "tables")):
            csr, width = form != "fixed", 8 if form == "fixed" else 0
            bags, block_d = reduce_tile(dim, size)
            common = dict.fromkeys(("dout_ptr", "table_ptr", "out_ptr"), pointer)
            common |= {"index_ptr": "*i32:16", "weights_ptr": "*fp32:16"} | sizes
            common |= {"offsets_ptr": "*i32:16"} if csr else {"limit_ptr": "*i32"}
            common |= {"layout_ptr": "*i64:16"} if form == "tables" else {}
            positions, dot_d = dot_tile(dim, size, None if csr else width)
            reduce = {"WIDTH": width, "UNROLL": UNROLL, "BAGS": bags, "BLOCK_D": block_d}
            dot = {"POSITIONS": positions, "BLOCK_D": dot_d}
            for kernel, tile in ((gather_reduce_kernel, reduce), (gather_dot_kernel, dot)):
                names = kernel.arg_names
                signature = {k: v for k, v in common.items() if k in names}
                constants = {"stride_td": 1, "CSR": csr, "MEAN": form == "ragged", "VEC": LOAD_BYTES // size} | tile
                constants |= {"stride_gd": 1} if "stride_gd" in names else {}
                constants |= dict.fromkeys(k for k in names if k not in signature and k not in constants)
                cases.append((kernel, signature, constants, {"num_warps": NUM_WARPS}))
    return cases
