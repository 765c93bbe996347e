"""Weighted sums and means of vectors that are composed of several table rows, decoded from ids as they are read.

Floor: ids, offsets, weights and codes read once, each touched row once, ``B·D`` elements written. A program sums
``BAGS`` bags by ``BLOCK_D`` columns; if parts are concatenated, its columns are those of one part, and it decodes only
that part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.gather_reduce import NUM_WARPS, Lists, bag_range, flat_strides, lists_of, reduce_tile
from gossamer.triton_kernels.map_ids import map_kind, map_numbers, map_row

if TYPE_CHECKING:
    from gossamer.ops.composed_rows import Parts
    from gossamer.ops.gather_compose import GatherCompose

UNROLL = 4
_SIZES = [
    "num_bags",
    "num_positions",
    "num_rows",
    "padding_idx",
    "width",
    "dim",
    "columns",
    "blocks",
    "prime",
    "stride_tn",
    "stride_on",
    "stride_ib",
    "stride_ij",
    "stride_wb",
    "stride_wj",
]


class PartLists(NamedTuple):
    """Maps ``(H, 5)``, and the codes, as bytes, of ids below ``frequent`` and of others; None if no part is coded."""

    maps: torch.Tensor
    codes: torch.Tensor | None
    rare: torch.Tensor | None
    num_ids: int
    frequent: int
    code_width: int
    rare_width: int


class PartForm(NamedTuple):
    """The constants of a kernel: H, how many of the first parts are coded, bits of codes, and the maps' arithmetic."""

    parts: int
    coded: int
    bits: int
    rare_bits: int
    kind: int
    mixed: bool
    wrap: bool


@triton.jit
def _code(codes_ptr, ids, there, width, part, BITS: tl.constexpr):
    """Codes of ``BITS`` bits of a part, from rows of ``width`` bytes."""
    bit = part * BITS
    found = tl.zeros_like(ids)
    for k in tl.static_range((BITS + 14) // 8):
        byte = tl.zeros_like(ids) + (bit // 8 + k)
        found |= tl.load(codes_ptr + ids * width + byte, there & (byte < width), other=0).to(tl.int64) << (8 * k)
    return (found >> (bit % 8)) & ((1 << BITS) - 1)


@triton.jit
def _coded_row(ids, live, part, lists, FORM: tl.constexpr):
    """The row of a coded part for each id that counts."""
    bits: tl.constexpr = FORM.bits
    rare_bits: tl.constexpr = FORM.rare_bits
    often = live & (ids < lists.frequent)
    row = _code(lists.codes, ids, often, lists.code_width, part, bits)
    if lists.rare is not None:
        seldom = live & (ids >= lists.frequent)
        row += _code(lists.rare, ids - lists.frequent, seldom, lists.rare_width, part, rare_bits)
    return row + tl.load(lists.maps + part * 5 + 2)


@triton.jit
def part_row(ids, live, part, lists, prime, FORM: tl.constexpr):
    """The row of a part for each id that counts."""
    kind: tl.constexpr = FORM.kind
    mixed: tl.constexpr = FORM.mixed
    if FORM.coded == 0:
        row = map_row(ids, lists.maps + part * 5, prime, kind, mixed)
    elif FORM.coded == FORM.parts:
        row = _coded_row(ids, live, part, lists, FORM)
    elif part < FORM.coded:
        row = _coded_row(ids, live, part, lists, FORM)
    else:
        row = map_row(ids, lists.maps + part * 5, prime, kind, mixed)
    return row


@triton.jit(do_not_specialize=_SIZES)
def gather_compose_kernel(
    table_ptr,
    lists,
    parts,
    out_ptr,
    num_bags,
    num_positions,
    num_rows,
    padding_idx,
    width,
    dim,
    columns,
    blocks,
    prime,
    stride_tn,
    stride_on,
    stride_ib,
    stride_ij,
    stride_wb,
    stride_wj,
    MODE: tl.constexpr,
    OPERATION: tl.constexpr,
    FORM: tl.constexpr,
    UNROLL: tl.constexpr,
    BAGS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``BAGS`` bags by ``BLOCK_D`` columns, one of ``blocks`` of a row, or of a part of a concatenation."""
    program = tl.program_id(0)
    index_ptr, offsets_ptr, weights_ptr = lists.index, lists.offsets, lists.weights
    number_of_parts: tl.constexpr = FORM.parts
    own = 0
    if OPERATION == "concat":
        own = program // blocks % number_of_parts
        bag = (program // (blocks * number_of_parts)).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    else:
        bag = (program // blocks).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    column = program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = (column < columns) & (own * columns + column < dim)
    in_batch = bag < num_bags
    begin, end = bag_range(offsets_ptr, bag, in_batch, num_positions, width)
    total = tl.zeros((BAGS, BLOCK_D), tl.float32)
    count = tl.zeros((BAGS,), tl.int32)
    at = column.to(tl.int64)[None, :]
    for first in range(0, tl.max(end - begin, 0), UNROLL):
        for u in tl.static_range(UNROLL):
            j = begin + first + u
            ids = tl.load(index_ptr + bag * stride_ib + j * stride_ij, j < end, other=-1).to(tl.int64)
            live = (j < end) & (ids != padding_idx) if padding_idx >= 0 else j < end
            if parts.num_ids > 0:
                live &= (ids >= 0) & (ids < parts.num_ids)
            ids = tl.where(live, ids, 0)
            if OPERATION == "concat":
                row = part_row(ids, live, own, parts, prime, FORM)
                place = row[:, None] * stride_tn + at
                if FORM.wrap:
                    place = row[:, None] + at
                    place = tl.where(place >= prime, place - prime, place) % num_rows
                    read = live
                else:
                    read = live & (row < num_rows)
                found = tl.load(table_ptr + place, read[:, None] & in_row[None, :], other=0.0).to(tl.float32)
            else:
                found = tl.full((BAGS, BLOCK_D), 1.0 if OPERATION == "mul" else 0.0, tl.float32)
                for part in tl.static_range(number_of_parts):
                    row = part_row(ids, live, part, parts, prime, FORM)
                    read = live & (row < num_rows)
                    mask = read[:, None] & in_row[None, :]
                    more = tl.load(table_ptr + row[:, None] * stride_tn + at, mask, other=0.0).to(tl.float32)
                    found = found * more if OPERATION == "mul" else found + more
            if weights_ptr is not None:
                # Masked like the rows: a skipped position may hold NaN.
                weight = tl.load(weights_ptr + bag * stride_wb + j * stride_wj, live, other=0.0)
                found *= weight.to(tl.float32)[:, None]
            total += found
            count += live.to(tl.int32)
    if MODE == "mean":
        number = tl.maximum(count, 1).to(tl.float32)
        total = tl.div_rn(total, tl.broadcast_to(number[:, None], (BAGS, BLOCK_D)))
    to = out_ptr + bag[:, None] * stride_on + own * columns + column[None, :]
    tl.store(to, total.to(out_ptr.dtype.element_ty), in_batch[:, None] & in_row[None, :])


def _bytes(codes: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """Codes as bytes, and how many a row has."""
    if codes is None:
        return None, 0
    flat = codes.contiguous().view(torch.uint8)
    return flat, flat.shape[1]


def part_lists(parts: Parts, device: torch.device) -> PartLists:
    """The parts as passed to kernels."""
    (codes, code_width), (rare, rare_width) = _bytes(parts.codes), _bytes(parts.rare)
    frequent = 0 if parts.codes is None else parts.codes.shape[0]
    maps = map_numbers(tuple(parts.maps.numbers()), device)
    return PartLists(maps, codes, rare, parts.num_ids, frequent, code_width, rare_width)


def part_form(parts: Parts) -> PartForm:
    """The constants of kernels for these parts."""
    bits, rare_bits = [*parts.bits, 0, 0][:2]
    maps = parts.maps
    return PartForm(maps.count, parts.coded, bits, rare_bits, map_kind(maps), maps.mixed, parts.wrap)


def gather_compose(args: GatherCompose) -> torch.Tensor:
    """``out[b]``, the sum or mean over the known ids of bag ``b`` of their composed vectors, in position order."""
    table, bags, parts = args.table, args.bags, args.parts
    table = table.contiguous() if parts.block or table.stride(-1) != 1 else table
    out = torch.empty(bags.num_bags, parts.dim, dtype=args.out_dtype, device=table.device)
    if out.numel() == 0:
        return out
    columns = parts.block or table.shape[1]
    count, block_d = reduce_tile(columns, table.element_size())
    blocks = triton.cdiv(columns, block_d)
    each = parts.maps.count if parts.operation == "concat" else 1
    gather_compose_kernel[(triton.cdiv(out.shape[0], count) * blocks * each,)](
        table,
        lists_of(bags),
        part_lists(parts, table.device),
        out,
        out.shape[0],
        bags.index.numel(),
        table.shape[0],
        bags.padding_idx,
        0 if bags.offsets is not None else bags.index.shape[1],
        parts.dim,
        columns,
        blocks,
        parts.maps.prime,
        1 if parts.block else table.stride(0),
        out.stride(0),
        *flat_strides(bags.index),
        *(flat_strides(bags.weights) if bags.weights is not None else (0, 0)),
        MODE=bags.mode,
        OPERATION=parts.operation,
        FORM=part_form(parts),
        UNROLL=UNROLL,
        BAGS=count,
        BLOCK_D=block_d,
        num_warps=NUM_WARPS,
    )
    return out


def aot_cases(arch: int) -> list[tuple]:
    """Launches to compile ahead of time: products of digits, joined packed codes, and wrapped blocks."""
    sizes = dict.fromkeys(_SIZES, "i32") | {"prime": "i64"}
    lists = Lists("*i64:16", "*i64:16", "*fp32:16", None)
    known = PartLists("*i64:16", None, None, "i64", "i64", "i32", "i32")
    coded = known._replace(codes="*u8", rare="*u8")
    cases = []
    for operation, part_pointers, form in (
        ("mul", known, PartForm(2, 0, 0, 0, 0, False, False)),
        ("concat", coded, PartForm(4, 4, 8, 6, 0, False, False)),
        ("concat", known, PartForm(4, 0, 0, 0, 1, False, True)),
    ):
        bags, block_d = reduce_tile(16, 4)
        signature = {"table_ptr": "*fp32:16", "out_ptr": "*fp32:16", "lists": lists, "parts": part_pointers} | sizes
        constants = {"MODE": "sum", "OPERATION": operation, "FORM": form, "UNROLL": UNROLL}
        constants |= {"BAGS": bags, "BLOCK_D": block_d}
        cases.append((gather_compose_kernel, signature, constants, {"num_warps": NUM_WARPS}))
    return cases
