"""The terms of the gradient of composed vectors: rows of each position, gradients of factors and of weights.

Floor: ids and codes read once; if values are requested, also the rows that ids name and the gradient of the result
(from cache if positions share them); one number written per part and position, and D for each factor. A program decodes
``BLOCK_P`` positions, and walks through the columns ``BLOCK_D`` at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from gossamer._numerics import rows_dtype
from gossamer.triton_kernels.gather_compose import PartForm, PartLists, part_form, part_lists, part_row

if TYPE_CHECKING:
    from gossamer.ops.gather_compose_gradient import ComposeGradient

BLOCK_P, BLOCK_D, NUM_WARPS = 32, 32, 4
_SIZES = [
    "num_positions",
    "num_bags",
    "num_rows",
    "padding_idx",
    "width",
    "dim",
    "columns",
    "prime",
    "stride_gb",
    "stride_tn",
]


@triton.jit
def _values(table_ptr, row, live, in_row, column, num_rows, prime, stride_tn, WRAP: tl.constexpr):
    """Elements of rows, or of blocks that begin there, as float32; zero where there are none."""
    at = column.to(tl.int64)[None, :]
    place = row[:, None] * stride_tn + at
    read = live & (row < num_rows)
    if WRAP:
        place = row[:, None] + at
        place = tl.where(place >= prime, place - prime, place) % num_rows
        read = live
    return tl.load(table_ptr + place, read[:, None] & in_row[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_SIZES)
def compose_gradient_kernel(
    dout_ptr,
    table_ptr,
    index_ptr,
    weights_ptr,
    bag_ptr,
    counts_ptr,
    parts,
    rows_ptr,
    factors_ptr,
    dots_ptr,
    num_positions,
    num_bags,
    num_rows,
    padding_idx,
    width,
    dim,
    columns,
    prime,
    stride_gb,
    stride_tn,
    OPERATION: tl.constexpr,
    ELEMENTS: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Serve ``BLOCK_P`` positions; a result whose pointer is None is not written."""
    number_of_parts: tl.constexpr = FORM.parts
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < num_positions
    if bag_ptr is not None:
        bag = tl.load(bag_ptr + p, inside, other=num_bags)
    else:
        bag = p // width
    ids = tl.load(index_ptr + p, inside, other=-1).to(tl.int64)
    live = inside & (bag < num_bags)
    if padding_idx >= 0:
        live &= ids != padding_idx
    if parts.num_ids > 0:
        live &= (ids >= 0) & (ids < parts.num_ids)
    ids = tl.where(live, ids, 0)
    kind = rows_ptr.dtype.element_ty
    for part in tl.static_range(number_of_parts):
        row = part_row(ids, live, part, parts, prime, FORM)
        if ELEMENTS:
            for first in range(0, columns, BLOCK_D):
                column = first + tl.arange(0, BLOCK_D)
                place = row[:, None] + column.to(tl.int64)[None, :]
                if FORM.wrap:
                    place = tl.where(place >= prime, place - prime, place) % num_rows
                place = tl.where(live[:, None], place, -1)
                in_row = (column < columns) & (part * columns + column < dim)
                to = rows_ptr + p[:, None] * dim + part * columns + column[None, :]
                tl.store(to, place.to(kind), inside[:, None] & in_row[None, :])
        else:
            tl.store(rows_ptr + p * number_of_parts + part, tl.where(live, row, -1).to(kind), inside)
    if factors_ptr is not None or dots_ptr is not None:
        share = tl.full((BLOCK_P,), 1.0, tl.float32)
        if weights_ptr is not None:
            # Masked like the rows: a skipped position may hold NaN.
            share = tl.load(weights_ptr + p, live, other=0.0).to(tl.float32)
        if counts_ptr is not None:
            share = tl.div_rn(share, tl.load(counts_ptr + bag, live, other=1.0))
        dot = tl.zeros((BLOCK_P,), tl.float32)
        for first in range(0, columns, BLOCK_D):
            column = first + tl.arange(0, BLOCK_D)
            whole = tl.full((BLOCK_P, BLOCK_D), 1.0 if OPERATION == "mul" else 0.0, tl.float32)
            for part in tl.static_range(number_of_parts):
                row = part_row(ids, live, part, parts, prime, FORM)
                if OPERATION == "concat":
                    at = part * columns + column
                    in_row = (column < columns) & (at < dim)
                    own = _values(table_ptr, row, live, in_row, column, num_rows, prime, stride_tn, FORM.wrap)
                    mask = live[:, None] & in_row[None, :]
                    dout = tl.load(dout_ptr + bag[:, None] * stride_gb + at[None, :], mask, other=0.0)
                    dot += tl.sum(own * dout, 1)
                else:
                    own = _values(table_ptr, row, live, column < dim, column, num_rows, prime, stride_tn, FORM.wrap)
                    whole = whole * own if OPERATION == "mul" else whole + own
            if OPERATION != "concat":
                mask = live[:, None] & (column < dim)[None, :]
                dout = tl.load(dout_ptr + bag[:, None] * stride_gb + column[None, :], mask, other=0.0)
                dot += tl.sum(tl.where(mask, whole, 0.0) * dout, 1)
                if factors_ptr is not None:
                    for part in tl.static_range(number_of_parts):
                        others = dout * share[:, None]
                        for other in tl.static_range(number_of_parts):
                            if other != part:
                                row = part_row(ids, live, other, parts, prime, FORM)
                                in_row = column < dim
                                others *= _values(
                                    table_ptr, row, live, in_row, column, num_rows, prime, stride_tn, FORM.wrap
                                )
                        to = factors_ptr + (p * number_of_parts + part)[:, None] * dim + column[None, :]
                        tl.store(to, others, inside[:, None] & (column < dim)[None, :])
        if dots_ptr is not None:
            tl.store(dots_ptr + p, dot * share, inside)


def compose_gradient(
    args: ComposeGradient, counts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """:attr:`Parts.listed` of each position (−1 if it adds nothing), and the gradients of factors and weights.

    ``counts (B,)`` of the gradient's dtype are the ids of each bag that contribute, for means.
    """
    bags, parts, device = args.bags, args.parts, args.table.device
    table = args.table.contiguous() if parts.block or args.table.stride(-1) != 1 else args.table
    dout = args.dout if args.dout.stride(-1) == 1 else args.dout.contiguous()
    index = bags.index.reshape(-1).contiguous()
    count, number = index.numel(), parts.maps.count
    rows = torch.empty(count, parts.listed, dtype=rows_dtype(table.shape[0]), device=device)
    factors = dout.new_empty(count, number, parts.dim) if args.factors else None
    dots = dout.new_empty(count) if args.weights else None
    if count == 0:
        return rows, factors, dots
    compose_gradient_kernel[(triton.cdiv(count, BLOCK_P),)](
        dout,
        table,
        index,
        None if bags.weights is None else bags.weights.reshape(-1).contiguous(),
        bags.numbers() if bags.offsets is not None else None,
        counts,
        part_lists(parts, device),
        rows,
        factors,
        dots,
        count,
        bags.num_bags,
        table.shape[0],
        bags.padding_idx,
        0 if bags.offsets is not None else bags.index.shape[1],
        parts.dim,
        parts.block or table.shape[1],
        parts.maps.prime,
        dout.stride(0),
        1 if parts.block else table.stride(0),
        OPERATION=parts.operation,
        ELEMENTS=parts.block > 0 and not parts.whole_blocks,
        FORM=part_form(parts),
        BLOCK_P=BLOCK_P,
        BLOCK_D=BLOCK_D,
        num_warps=NUM_WARPS,
    )
    return rows, factors, dots


def aot_cases(arch: int) -> list[tuple]:
    """Launches to compile ahead of time: factors of digits, weights of packed codes, and elements of wrapped blocks."""
    sizes = dict.fromkeys(_SIZES, "i32") | {"prime": "i64"}
    pointers = {"dout_ptr": "*fp32:16", "table_ptr": "*fp32:16", "index_ptr": "*i64:16", "rows_ptr": "*i32:16"}
    known = PartLists("*i64:16", None, None, "i64", "i64", "i32", "i32")
    coded = known._replace(codes="*u8", rare="*u8")
    cases = []
    for operation, part_pointers, form, elements, given in (
        ("mul", known, PartForm(2, 0, 0, 0, 0, False, False), False, ("weights_ptr", "bag_ptr", "factors_ptr")),
        ("concat", coded, PartForm(4, 4, 8, 6, 0, False, False), False, ("bag_ptr", "counts_ptr", "dots_ptr")),
        ("concat", known, PartForm(4, 0, 0, 0, 1, False, True), True, ()),
    ):
        types = {"weights_ptr": "*fp32:16", "bag_ptr": "*i64:16", "counts_ptr": "*fp32:16"}
        types |= {"factors_ptr": "*fp32:16", "dots_ptr": "*fp32:16"}
        signature = pointers | {name: types[name] for name in given} | {"parts": part_pointers} | sizes
        constants = {name: None for name in types if name not in given}
        constants |= {"OPERATION": operation, "ELEMENTS": elements, "FORM": form}
        constants |= {"BLOCK_P": BLOCK_P, "BLOCK_D": BLOCK_D}
        cases.append((compose_gradient_kernel, signature, constants, {"num_warps": NUM_WARPS}))
    return cases
