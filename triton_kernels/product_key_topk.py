"""The highest sums of one score from each of two lists, and the gradients of both lists, in one kernel each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.common import aot_signature

if TYPE_CHECKING:
    from gossamer.ops.product_key_topk import ProductKeyTopk, ProductKeyTopkBackward

LARGEST = torch.finfo(torch.float32).max
# Scores, or pairs, that a program holds.
BLOCK = 2048


@triton.jit
def _ordered(x):
    """Floats as int32 of the same order, −∞ above the lowest int32 and both zeros equal."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _number(ordered):
    """The float that an integer of :func:`_ordered` stands for."""
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def _best(
    scores_ptr,
    row,
    inside,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOWEST: tl.constexpr,
    MOST: tl.constexpr,
):
    """The K highest scores of each row in order, as :func:`_ordered` numbers, and their places; LOWEST past K."""
    n = tl.arange(0, BLOCK_N)[None, :]
    here = inside[:, None] & (n < N)
    x = tl.load(scores_ptr + row[:, None] * N + n, here, other=float("-inf"))
    x = tl.minimum(tl.where(x == x, x, float("-inf")), MOST)
    left = tl.where(here, _ordered(x), LOWEST)
    rank = tl.arange(0, K_PAD)[None, :]
    best = tl.full((row.shape[0], K_PAD), LOWEST, tl.int32)
    places = tl.zeros((row.shape[0], K_PAD), tl.int32)
    for k in range(TOP_K):
        at = tl.argmax(left, 1, tie_break_left=True)
        highest = tl.max(left, 1)
        best = tl.where(rank == k, highest[:, None], best)
        places = tl.where(rank == k, at[:, None], places)
        left = tl.where(n == at[:, None], LOWEST, left)
    return best, places


@triton.jit(do_not_specialize=["num_rows"])
def _product_key_topk_kernel(
    scores1_ptr,
    scores2_ptr,
    values_ptr,
    ids_ptr,
    num_rows,
    N1: tl.constexpr,
    N2: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    LOWEST: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N1: tl.constexpr,
    BLOCK_N2: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside, row = t < num_rows, t.to(tl.int64)
    best1, places1 = _best(scores1_ptr, row, inside, N1, TOP_K, K_PAD, BLOCK_N1, LOWEST, MOST)
    best2, places2 = _best(scores2_ptr, row, inside, N2, TOP_K, K_PAD, BLOCK_N2, LOWEST, MOST)
    # Pairs are in row-major order of their ranks, so the first of equal sums is the one with the lower ranks.
    exists = (best1 > LOWEST)[:, :, None] & (best2 > LOWEST)[:, None, :]
    left1, left2 = _number(best1)[:, :, None], _number(best2)[:, None, :]
    masked = (left1 == float("-inf")) | (left2 == float("-inf"))
    sums = tl.minimum(tl.maximum(left1 + left2, -MOST), MOST)
    sums = _ordered(tl.where(masked, float("-inf"), sums))
    left = tl.reshape(tl.where(exists, sums, LOWEST), (BLOCK_T, K_PAD * K_PAD))
    pair, rank = tl.arange(0, K_PAD * K_PAD)[None, :], tl.arange(0, K_PAD)[None, :]
    for k in range(TOP_K):
        at = tl.argmax(left, 1, tie_break_left=True)
        value = _number(tl.max(left, 1))
        first = tl.sum(tl.where(rank == (at // K_PAD)[:, None], places1, 0), 1)
        second = tl.sum(tl.where(rank == (at % K_PAD)[:, None], places2, 0), 1)
        left = tl.where(pair == at[:, None], LOWEST, left)
        tl.store(values_ptr + row * TOP_K + k, value, inside)
        tl.store(ids_ptr + row * TOP_K + k, first.to(tl.int64) * N2 + second, inside)


@triton.jit
def _store_gradient(
    dvalues_ptr,
    values_ptr,
    ids_ptr,
    dscores_ptr,
    row,
    inside,
    N2: tl.constexpr,
    FIRST: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((row.shape[0], BLOCK_N), tl.float32)
    for k in range(TOP_K):
        at = row * TOP_K + k
        live = inside & (tl.load(values_ptr + at, inside, other=0.0) > float("-inf"))
        dvalue = tl.load(dvalues_ptr + at, live, other=0.0)
        pair = tl.load(ids_ptr + at, inside, other=0)
        place = (pair // N2 if FIRST else pair % N2).to(tl.int32)
        total += tl.where(n == place[:, None], dvalue[:, None], 0.0)
    tl.store(dscores_ptr + row[:, None] * N + n, total, inside[:, None] & (n < N))


@triton.jit(do_not_specialize=["num_rows"])
def _product_key_topk_backward_kernel(
    dvalues_ptr,
    values_ptr,
    ids_ptr,
    dscores1_ptr,
    dscores2_ptr,
    num_rows,
    N1: tl.constexpr,
    N2: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N1: tl.constexpr,
    BLOCK_N2: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside, row = t < num_rows, t.to(tl.int64)
    _store_gradient(dvalues_ptr, values_ptr, ids_ptr, dscores1_ptr, row, inside, N2, True, N1, TOP_K, BLOCK_N1)
    _store_gradient(dvalues_ptr, values_ptr, ids_ptr, dscores2_ptr, row, inside, N2, False, N2, TOP_K, BLOCK_N2)


def _blocks(sizes: tuple[int, int], held: int) -> dict[str, int]:
    """Rows and scores of each list that a program holds; ``held`` counts its other values per row."""
    block1, block2 = map(triton.next_power_of_2, sizes)
    rows = max(1, min(16, BLOCK // max(block1, block2, held)))
    return {"BLOCK_T": rows, "BLOCK_N1": block1, "BLOCK_N2": block2}


def _search(sizes: tuple[int, int], top_k: int) -> dict[str, int | float]:
    k_pad = triton.next_power_of_2(top_k)
    shared = {"N1": sizes[0], "N2": sizes[1], "TOP_K": top_k, "K_PAD": k_pad, "LOWEST": -(2**31), "MOST": LARGEST}
    return shared | _blocks(sizes, k_pad * k_pad)


def product_key_topk(args: ProductKeyTopk) -> tuple[torch.Tensor, torch.Tensor]:
    """``values (R, K)`` float32 and ``ids (R, K)`` int64 from float32 scores; see gossamer.product_key_topk."""
    scores1, scores2 = args.scores1.contiguous(), args.scores2.contiguous()
    shape = (scores1.shape[0], args.top_k)
    values = torch.empty(shape, dtype=torch.float32, device=scores1.device)
    ids = torch.empty(shape, dtype=torch.int64, device=scores1.device)
    if shape[0] == 0:
        return values, ids
    tile = _search((scores1.shape[1], scores2.shape[1]), args.top_k)
    grid = (triton.cdiv(shape[0], tile["BLOCK_T"]),)
    _product_key_topk_kernel[grid](scores1, scores2, values, ids, shape[0], **tile, num_warps=4)
    return values, ids


def product_key_topk_backward(args: ProductKeyTopkBackward) -> tuple[torch.Tensor, torch.Tensor]:
    """``dscores1 (R, N₁)`` and ``dscores2 (R, N₂)``, the pairs of a row summed in their order."""
    num_rows, top_k = args.ids.shape
    dvalues, n1, n2 = args.dvalues.contiguous(), *args.sizes
    gradients = tuple(torch.empty(num_rows, n, dtype=torch.float32, device=dvalues.device) for n in (n1, n2))
    if num_rows == 0:
        return gradients
    tile = _blocks((n1, n2), 1)
    _product_key_topk_backward_kernel[(triton.cdiv(num_rows, tile["BLOCK_T"]),)](
        dvalues,
        args.values.contiguous(),
        args.ids.contiguous(),
        *gradients,
        num_rows,
        N1=n1,
        N2=n2,
        TOP_K=top_k,
        **tile,
        num_warps=4,
    )
    return gradients


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    sizes, top_k = (1024, 1024), 16
    signature = aot_signature(torch.float32, "scores1_ptr scores2_ptr values_ptr", "", "")
    signature |= {"ids_ptr": "*i64:16", "num_rows": "i32"}
    cases = [(_product_key_topk_kernel, signature, _search(sizes, top_k), {"num_warps": 4})]
    signature = aot_signature(torch.float32, "dvalues_ptr values_ptr dscores1_ptr dscores2_ptr", "", "")
    signature |= {"ids_ptr": "*i64:16", "num_rows": "i32"}
    constexprs = {"N1": sizes[0], "N2": sizes[1], "TOP_K": top_k} | _blocks(sizes, 1)
    cases.append((_product_key_topk_backward_kernel, signature, constexprs, {"num_warps": 4}))
    return cases
