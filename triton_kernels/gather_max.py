"""Maxima by column of gathered table rows, and the position in its bag at which each was found first.

Floor: each touched row read once, ``B·D`` elements written, and ``B·D`` positions if a gradient is wanted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.gather_reduce import NUM_WARPS, bag_range, flat_strides, load_ids, multiple, reduce_tile

if TYPE_CHECKING:
    from gossamer.ops.gather_max import GatherMax

UNROLL = 4

_SIZES = ["num_bags", "num_positions", "num_rows", "padding_idx", "width", "dim", "stride_tn", "stride_ib", "stride_ij"]


@triton.jit(do_not_specialize=_SIZES)
def _gather_max_kernel(
    table_ptr,
    index_ptr,
    offsets_ptr,
    out_ptr,
    argmax_ptr,
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
    UNROLL: tl.constexpr,
    BAGS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC: tl.constexpr,
):
    dim = dim // VEC * VEC
    stride_tn = stride_tn.to(tl.int64) // VEC * VEC
    blocks = tl.cdiv(dim, BLOCK_D)
    program = tl.program_id(0)
    bag = (program // blocks).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    column = program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    in_batch, in_row = bag < num_bags, column < dim
    column_ptr = table_ptr + column.to(tl.int64)[None, :] * stride_td
    begin, end = bag_range(offsets_ptr, bag, in_batch, num_positions, width)
    largest = tl.zeros((BAGS, BLOCK_D), tl.float32)
    first_at = tl.full((BAGS, BLOCK_D), -1, tl.int32)
    longest = tl.max(end - begin, 0)
    for first in range(0, longest, UNROLL):
        for u in tl.static_range(UNROLL):
            j = begin + first + u
            ids_ptr = index_ptr + bag * stride_ib + j * stride_ij
            ids, live = load_ids(ids_ptr, j < end, num_rows, padding_idx, num_rows)
            mask = live[:, None] & in_row[None, :]
            row = tl.load(column_ptr + ids[:, None] * stride_tn, mask, other=0.0).to(tl.float32)
            # NaN counts as the largest; the first of equals is kept.
            greater = (row > largest) | ((row != row) & (largest == largest)) | (first_at < 0)
            largest = tl.where(mask & greater, row, largest)
            first_at = tl.where(mask & greater, (j - begin).to(tl.int32)[:, None], first_at)
    at = bag[:, None] * dim + column[None, :]
    inside = in_batch[:, None] & in_row[None, :]
    tl.store(out_ptr + at, largest.to(out_ptr.dtype.element_ty), inside)
    if argmax_ptr is not None:
        tl.store(argmax_ptr + at, first_at, inside)


def gather_max(args: GatherMax) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima by column over the contributing ids of each bag, zeros if empty; and their positions in the bag, or −1.

    Returns:
        ``(B, D)`` in ``out_dtype``, and ``(B, D)`` int32, or ``(0, D)`` unless ``need_argmax``.
    """
    table, bags = args.table, args.bags
    num_rows, dim = table.shape
    num_bags, index, offsets = bags.num_bags, bags.index, bags.offsets
    out = torch.empty(num_bags, dim, dtype=args.out_dtype, device=table.device)
    argmax = torch.empty(num_bags if args.need_argmax else 0, dim, dtype=torch.int32, device=table.device)
    if out.numel() == 0:
        return out, argmax
    bags_each, block_d = reduce_tile(dim, table.element_size())
    _gather_max_kernel[(triton.cdiv(num_bags, bags_each) * triton.cdiv(dim, block_d),)](
        table,
        index,
        None if offsets is None else offsets.contiguous(),
        out,
        argmax if args.need_argmax else None,
        num_bags,
        index.numel(),
        num_rows,
        bags.padding_idx,
        index.shape[1] if offsets is None else 0,
        dim,
        *table.stride(),
        *flat_strides(index),
        UNROLL=UNROLL,
        BAGS=bags_each,
        BLOCK_D=block_d,
        VEC=multiple(table.element_size(), dim, table.stride(0)),
        num_warps=NUM_WARPS,
    )
    return out, argmax


def aot_cases(arch: int) -> list[tuple]:
    """Launches to compile ahead of time: ragged bags with positions kept, of wide and narrow rows."""
    cases = []
    for size, type_ in ((2, "bf16"), (4, "fp32"))[: 2 if arch == 90 else 1]:
        bags, block_d = reduce_tile(128, size)
        signature = dict.fromkeys(_SIZES, "i32") | dict.fromkeys(("table_ptr", "out_ptr"), f"*{type_}:16")
        signature |= {"index_ptr": "*i64:16", "offsets_ptr": "*i64:16", "argmax_ptr": "*i32:16"}
        constants = {"stride_td": 1, "UNROLL": UNROLL, "BAGS": bags, "BLOCK_D": block_d}
        options = {"num_warps": NUM_WARPS}
        cases.append((_gather_max_kernel, signature, constants | {"VEC": 16 // size}, options))
    return cases
