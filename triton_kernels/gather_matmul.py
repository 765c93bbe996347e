"""Weighted sums and means over bags of products of two small matrices that each id chooses.

Floor: the matrices of each id read (from cache if ids share them), and one result per bag written. A program sums one
tile of one bag. The matrices are smaller than a matrix instruction's tiles, so products are plain multiplications.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.gather_compose import PartForm, PartLists, part_form, part_lists, part_row
from gossamer.triton_kernels.gather_reduce import Lists, bag_range, flat_strides, lists_of

if TYPE_CHECKING:
    from gossamer.ops.gather_matmul import GatherMatmul

NUM_WARPS = 4
BLOCK_K = 4
# Elements of a product's terms that a program holds at a time.
TERMS = 4096
_SIZES = [
    "num_positions",
    "left_rows",
    "right_rows",
    "padding_idx",
    "width",
    "m",
    "k",
    "n",
    "prime",
    "stride_on",
    "stride_ib",
    "stride_ij",
    "stride_wb",
    "stride_wj",
]


@triton.jit(do_not_specialize=_SIZES)
def gather_matmul_kernel(
    left_ptr,
    right_ptr,
    lists,
    parts,
    out_ptr,
    num_positions,
    left_rows,
    right_rows,
    padding_idx,
    width,
    m,
    k,
    n,
    prime,
    stride_on,
    stride_ib,
    stride_ij,
    stride_wb,
    stride_wj,
    MODE: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``BLOCK_M`` by ``BLOCK_N`` entries of the sum of one bag."""
    bag = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end = bag_range(lists.offsets, bag, bag >= 0, num_positions, width)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    count = tl.zeros((1,), tl.int32)
    for j in range(begin, end):
        ids = tl.load(lists.index + bag * stride_ib + j * stride_ij + tl.arange(0, 1)).to(tl.int64)
        live = (ids != padding_idx) if padding_idx >= 0 else ids == ids
        if parts.num_ids > 0:
            live &= (ids >= 0) & (ids < parts.num_ids)
        ids = tl.where(live, ids, 0)
        first = part_row(ids, live, 0, parts, prime, FORM)
        second = part_row(ids, live, 1, parts, prime, FORM)
        in_left = (live & (first < left_rows))[:, None] & (row < m)[:, None]
        in_right = (live & (second < right_rows))[:, None] & (column < n)[None, :]
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for r0 in range(0, k, BLOCK_K):
            r = r0 + tl.arange(0, BLOCK_K)
            a_ptr = left_ptr + first[:, None] * (m * k) + row[:, None] * k + r[None, :]
            b_ptr = right_ptr + second[:, None] * (k * n) + r[:, None] * n + column[None, :]
            a = tl.load(a_ptr, in_left & (r < k)[None, :], other=0.0).to(tl.float32)
            b = tl.load(b_ptr, in_right & (r < k)[:, None], other=0.0).to(tl.float32)
            product += tl.sum(a[:, :, None] * b[None, :, :], 1)
        if lists.weights is not None:
            # Masked like the rows: a skipped position may hold NaN.
            at = lists.weights + bag * stride_wb + j * stride_wj + tl.arange(0, 1)
            product *= tl.load(at, live, other=0.0).to(tl.float32)[:, None]
        total += product
        count += live.to(tl.int32)
    if MODE == "mean":
        number = tl.maximum(count, 1).to(tl.float32)
        total = tl.div_rn(total, tl.broadcast_to(number[:, None], (BLOCK_M, BLOCK_N)))
    to = out_ptr + bag * stride_on + row[:, None] * n + column[None, :]
    tl.store(to, total.to(out_ptr.dtype.element_ty), (row < m)[:, None] & (column < n)[None, :])


def tile(m: int, n: int) -> tuple[int, int]:
    """Rows and columns of a program's tile."""
    block_n = min(triton.next_power_of_2(n), 64)
    return max(1, min(triton.next_power_of_2(m), TERMS // (block_n * BLOCK_K))), block_n


def gather_matmul(args: GatherMatmul) -> torch.Tensor:
    """``out[b]``, the sum or mean over the known ids of bag ``b`` of their products, in position order."""
    left, right, bags, parts = args.left.contiguous(), args.right.contiguous(), args.bags, args.parts
    m, k, n = args.sizes
    out = torch.empty(bags.num_bags, m * n, dtype=args.out_dtype, device=left.device)
    if out.numel() == 0:
        return out
    block_m, block_n = tile(m, n)
    gather_matmul_kernel[(out.shape[0], triton.cdiv(m, block_m), triton.cdiv(n, block_n))](
        left,
        right,
        lists_of(bags),
        part_lists(parts, left.device),
        out,
        bags.index.numel(),
        left.shape[0],
        right.shape[0],
        bags.padding_idx,
        0 if bags.offsets is not None else bags.index.shape[1],
        m,
        k,
        n,
        parts.maps.prime,
        out.stride(0),
        *flat_strides(bags.index),
        *(flat_strides(bags.weights) if bags.weights is not None else (0, 0)),
        MODE=bags.mode,
        FORM=part_form(parts),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=BLOCK_K,
        num_warps=NUM_WARPS,
    )
    return out


def aot_cases(arch: int) -> list[tuple]:
    """Launches to compile ahead of time: the products of a tensor train of rank 16, and their transposes."""
    sizes = dict.fromkeys(_SIZES, "i32") | {"prime": "i64"}
    lists = Lists("*i64:16", "*i64:16", "*fp32:16", None)
    digits = PartLists("*i64:16", None, None, "i64", "i64", "i32", "i32")
    cases = []
    for (m, n), parts, coded in (((4, 4), digits, 0), ((2, 32), digits, 0), ((16, 4), digits._replace(codes="*u8"), 2)):
        block_m, block_n = tile(m, n)
        pointers = dict.fromkeys(("left_ptr", "right_ptr", "out_ptr"), "*fp32:16")
        constants = {"MODE": "sum", "FORM": PartForm(2, coded, 32, 0, 0, False, False)}
        constants |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": BLOCK_K}
        cases.append(
            (
                gather_matmul_kernel,
                pointers | {"lists": lists, "parts": parts} | sizes,
                constants,
                {"num_warps": NUM_WARPS},
            )
        )
    return cases
