"""Weighted sums of gathered table rows, and the dot products that are their weights' gradients.

Floor: each listed row read once, ``B·D`` elements written (``gather_dot``: read); no arithmetic worth counting.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.launch import device_guard

NUM_WARPS = 4
# Bytes of one table row, or of several short ones side by side, that a program holds at a time: 16 for each thread.
TILE_BYTES = 16 * 32 * NUM_WARPS
MAX_BAGS = 16
# Rows in flight at once: all of a fixed-width bag up to this many, else this many at a time.
UNROLL = 8
DOT_TILE_BYTES = 4 * TILE_BYTES

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_SIZES = [
    "num_bags",
    "num_positions",
    "num_rows",
    "padding_idx",
    "width",
    "stride_ib",
    "stride_ij",
    "stride_wb",
    "stride_wj",
]


def reduce_tile(dim: int, itemsize: int) -> tuple[int, int]:
    """Bags and columns of one program of ``gather_reduce``: ``itemsize`` bytes an element, 16 bytes a thread."""
    block_d = max(16, min(triton.next_power_of_2(dim), TILE_BYTES // itemsize))
    return min(MAX_BAGS, TILE_BYTES // (block_d * itemsize)), block_d


def dot_tile(dim: int, itemsize: int, width: int | None) -> tuple[int, int]:
    """Positions and columns at a time of one program of ``gather_dot``; ``width`` is J, or None for ragged bags."""
    positions = min(16, triton.next_power_of_2(max(width, 1))) if width is not None else 8
    block_d = max(16, min(triton.next_power_of_2(dim), DOT_TILE_BYTES // (positions * itemsize)))
    return positions, block_d


@triton.jit
def _bag_range(offsets_ptr, bag, in_batch, num_positions, width, CSR: tl.constexpr):
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
def _load_ids(ids_ptr, inside, num_rows, padding_idx, limit):
    """Ids at the pointers, and which of them count: in the table, below the limit, not the padding row."""
    ids = tl.load(ids_ptr, inside, other=-1).to(tl.int64)
    return ids, (ids >= 0) & (ids < num_rows) & (ids < limit) & (ids != padding_idx)


@triton.jit
def _scaled_rows(column_ptr, in_row, ids_ptr, weights_ptr, inside, num_rows, padding_idx, limit, stride_tn):
    """Columns of one table row of each bag times its weight, in float32; zeros where the id does not count."""
    ids, live = _load_ids(ids_ptr, inside, num_rows, padding_idx, limit)
    rows = tl.load(column_ptr + ids[:, None] * stride_tn, live[:, None] & in_row[None, :], other=0.0).to(tl.float32)
    if weights_ptr is not None:
        # Masked as the rows are: a skipped position may hold a NaN.
        rows *= tl.load(weights_ptr, live, other=0.0).to(tl.float32)[:, None]
    return rows


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["limit_ptr"])
def _gather_reduce_kernel(
    table_ptr,
    index_ptr,
    offsets_ptr,
    weights_ptr,
    limit_ptr,
    out_ptr,
    num_bags,
    num_positions,
    num_rows,
    padding_idx,
    width,
    dim,
    stride_tn,
    stride_td,
    stride_ib,
    stride_ij,
    stride_wb,
    stride_wj,
    CSR: tl.constexpr,
    WIDTH: tl.constexpr,
    UNROLL: tl.constexpr,
    BAGS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``BAGS`` bags by ``BLOCK_D`` columns; WIDTH is J where all of a bag's rows are unrolled, else 0."""
    column_blocks = tl.cdiv(dim, BLOCK_D)
    program = tl.program_id(0)
    bag = (program // column_blocks).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    column = program % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    in_batch = bag < num_bags
    in_row = column < dim
    limit = num_rows
    if limit_ptr is not None:
        limit = tl.load(limit_ptr).to(tl.int64)
    column_ptr = table_ptr + column.to(tl.int64)[None, :] * stride_td
    ids_base = bag * stride_ib
    weights_base = bag * stride_wb
    begin, end = _bag_range(offsets_ptr, bag, in_batch, num_positions, width, CSR)
    total = tl.zeros((BAGS, BLOCK_D), tl.float32)
    if WIDTH > 0:
        for j in tl.static_range(WIDTH):
            ids_ptr, factors_ptr = index_ptr + ids_base + j * stride_ij, weights_ptr
            if weights_ptr is not None:
                factors_ptr = weights_ptr + weights_base + j * stride_wj
            total += _scaled_rows(
                column_ptr, in_row, ids_ptr, factors_ptr, in_batch, num_rows, padding_idx, limit, stride_tn
            )
    else:
        longest = tl.max(end - begin, 0)
        for first in range(0, longest, UNROLL):
            for u in tl.static_range(UNROLL):
                j = begin + first + u
                ids_ptr, factors_ptr = index_ptr + ids_base + j * stride_ij, weights_ptr
                if weights_ptr is not None:
                    factors_ptr = weights_ptr + weights_base + j * stride_wj
                total += _scaled_rows(
                    column_ptr, in_row, ids_ptr, factors_ptr, j < end, num_rows, padding_idx, limit, stride_tn
                )
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + bag[:, None] * dim + column[None, :], out, in_batch[:, None] & in_row[None, :])


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=["limit_ptr"])
def _gather_dot_kernel(
    dout_ptr,
    table_ptr,
    index_ptr,
    offsets_ptr,
    limit_ptr,
    out_ptr,
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
    CSR: tl.constexpr,
    POSITIONS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One bag: its gradient row against ``POSITIONS`` of its table rows at a time."""
    bag = tl.program_id(0).to(tl.int64)
    limit = num_rows
    if limit_ptr is not None:
        limit = tl.load(limit_ptr).to(tl.int64)
    begin, end = _bag_range(offsets_ptr, bag, bag >= 0, num_positions, width, CSR)
    for first in range(begin, end, POSITIONS):
        j = first + tl.arange(0, POSITIONS)
        ids, live = _load_ids(index_ptr + bag * stride_ib + j * stride_ij, j < end, num_rows, padding_idx, limit)
        total = tl.zeros((POSITIONS, BLOCK_D), tl.float32)
        for start in range(0, dim, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            in_row = column < dim
            gradient = tl.load(dout_ptr + bag * stride_gb + column.to(tl.int64) * stride_gd, in_row, other=0.0)
            row_ptr = table_ptr + ids[:, None] * stride_tn + column.to(tl.int64)[None, :] * stride_td
            row = tl.load(row_ptr, live[:, None] & in_row[None, :], other=0.0)
            total += row.to(tl.float32) * gradient.to(tl.float32)[None, :]
        # Not total alone: a skipped position's zeros times an infinite gradient are NaN.
        dot = tl.where(live, tl.sum(total, 1), 0.0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + bag * width + j, dot, j < end)


def _flat_strides(index: torch.Tensor) -> tuple[int, int]:
    """Strides of ``index`` from bag to bag and from position to position; a flat list has no bag stride."""
    return (0, index.stride(0)) if index.dim() == 1 else index.stride()


def gather_reduce(
    table: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    limit: torch.Tensor | None,
    padding_idx: int,
) -> torch.Tensor:
    """``out[b]``, the sum over the live ids of bag ``b`` of ``weights · table[id]``, in position order, in float32."""
    num_rows, dim = table.shape
    num_bags = index.shape[0] if offsets is None else offsets.shape[0] - 1
    out = torch.empty(num_bags, dim, dtype=table.dtype, device=table.device)
    if out.numel() == 0:
        return out
    csr = offsets is not None
    width = 0 if csr else index.shape[1]
    bags, block_d = reduce_tile(dim, table.element_size())
    grid = (triton.cdiv(num_bags, bags) * triton.cdiv(dim, block_d),)
    with device_guard(table.device):
        _gather_reduce_kernel[grid](
            table,
            index,
            offsets.contiguous() if csr else None,
            weights,
            limit,
            out,
            num_bags,
            index.numel(),
            num_rows,
            padding_idx,
            width,
            dim,
            *table.stride(),
            *_flat_strides(index),
            *(_flat_strides(weights) if weights is not None else (0, 0)),
            CSR=csr,
            WIDTH=width if width <= UNROLL else 0,
            UNROLL=UNROLL,
            BAGS=bags,
            BLOCK_D=block_d,
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
) -> torch.Tensor:
    """``out[p] = ⟨dout[bag of p], table[index[p]]⟩`` in the shape of ``index``, zero where the id is skipped."""
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
    with device_guard(table.device):
        _gather_dot_kernel[(num_bags,)](
            dout,
            table,
            index,
            offsets.contiguous() if csr else None,
            limit,
            out,
            index.numel(),
            num_rows,
            padding_idx,
            width,
            dim,
            *dout.stride(),
            *table.stride(),
            *_flat_strides(index),
            CSR=csr,
            POSITIONS=positions,
            BLOCK_D=block_d,
            num_warps=NUM_WARPS,
        )
    return out


def aot_cases(arch: int) -> list[tuple]:
    """Launches to compile ahead of time: the combine of an expert layer, and ragged bags, of wide and narrow rows."""
    sizes = dict.fromkeys(_SIZES, "i32")
    cases = []
    for dtype in (torch.bfloat16, torch.float32):
        size, pointer = dtype.itemsize, f"*{_TYPES[dtype]}:16"
        for dim in (2048, 64):
            for csr, width in ((False, 8), (True, 0)):
                bags, block_d = reduce_tile(dim, size)
                common = {
                    "index_ptr": "*i32:16",
                    "out_ptr": pointer,
                    "table_ptr": pointer,
                    "dim": "i32:16",
                    "stride_tn": "i32:16",
                }
                absent = {"stride_td": 1} | ({"limit_ptr": None} if csr else {"offsets_ptr": None})
                common |= {"offsets_ptr": "*i32:16"} if csr else {"limit_ptr": "*i32"}
                reduce = absent | {"CSR": csr, "WIDTH": width, "UNROLL": UNROLL, "BAGS": bags, "BLOCK_D": block_d}
                signature = common | sizes | {"weights_ptr": "*fp32:16"}
                cases.append((_gather_reduce_kernel, signature, reduce, {"num_warps": NUM_WARPS}))
                positions, block_d = dot_tile(dim, size, None if csr else width)
                dot = absent | {"stride_gd": 1, "CSR": csr, "POSITIONS": positions, "BLOCK_D": block_d}
                arguments = set(_gather_dot_kernel.arg_names)
                signature = {k: v for k, v in (common | sizes).items() if k in arguments}
                signature |= {"dout_ptr": pointer, "stride_gb": "i32:16"}
                cases.append((_gather_dot_kernel, signature, dot, {"num_warps": NUM_WARPS}))
    return cases
