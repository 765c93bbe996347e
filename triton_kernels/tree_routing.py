"""Gates of soft trees or binary codes and the experts that they choose; the gradient of the scores. One kernel each.

A program holds the leaves of several tokens' trees in the layout of a complete tree. If a tree is not complete, each
leaf above the last level takes the left of two places, and nothing reaches the right one. A code is a complete tree in
which all nodes of a level share one split.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.common import aot_signature

if TYPE_CHECKING:
    from gossamer.ops.tree_routing import TreeRouting, TreeRoutingBackward

LARGEST = torch.finfo(torch.float32).max
EPSILON = 1e-8
LOG_EPSILON = 1e-6
# Leaves that a program holds.
BLOCK = 512


@triton.jit
def _shares(v, gamma):
    """The shares S(v) and 1 − S(v) that go each way at splits of value ``v``, and the slope of S."""
    u = v / gamma
    u = tl.minimum(tl.maximum(tl.where(u == u, u, -0.5), -0.5), 0.5)
    over, under = u + 0.5, 0.5 - u
    return over * over * (3 - 2 * over), under * under * (3 - 2 * under), 6 * over * under / gamma


@triton.jit
def _level_shares(splits, inside, gamma, LEVEL: tl.constexpr, INNER: tl.constexpr, CODED: tl.constexpr):
    """The shares that go left and right at the nodes of a level, and the slope of the left one."""
    if CODED:
        v = tl.load(splits + LEVEL, inside, other=0.0)[:, None]
        step, rest, slope = _shares(v, gamma)
        return rest, step, -slope
    else:
        node = ((1 << LEVEL) - 1 + tl.arange(0, 1 << LEVEL))[None, :]
        # Places without a node send everything left.
        v = tl.load(splits[:, None] + node, inside[:, None] & (node < INNER), other=float("inf"))
        return _shares(v, gamma)


@triton.jit
def _reach(splits, inside, gamma, LEVELS: tl.constexpr, INNER: tl.constexpr, CODED: tl.constexpr):
    """The share that reaches each node of level ``LEVELS``; the leaves are the level behind the last splits."""
    reach = tl.full((inside.shape[0], 1), 1.0, tl.float32)
    for level in tl.static_range(LEVELS):
        left, right, _ = _level_shares(splits, inside, gamma, level, INNER, CODED)
        reach = tl.reshape(tl.join(reach * left, reach * right), (inside.shape[0], 2 << level))
    return reach


@triton.jit
def _live(score, LOWEST: tl.constexpr):
    """Scores with −∞ in place of NaN and of masked ones, and the largest number in place of +∞."""
    return tl.where(score > LOWEST, tl.minimum(score, -LOWEST), float("-inf"))


@triton.jit
def _leaf_scores(part, expert, here, reach, E: tl.constexpr, LOWEST: tl.constexpr):
    """A tree's leaf scores as given, and with −∞ where a score does not count or nothing reaches the leaf."""
    score = tl.load((part + E - 1)[:, None] + expert, here, other=float("-inf"))
    return score, tl.where(reach > 0, _live(score, LOWEST), float("-inf"))


@triton.jit
def _experts(E: tl.constexpr, DEEP: tl.constexpr, BLOCK_E: tl.constexpr):
    """The expert of each place of a complete tree, and whether it has one."""
    leaf = tl.arange(0, BLOCK_E)
    expert = tl.where(leaf < DEEP, leaf, DEEP + (leaf - DEEP) // 2)
    return expert[None, :], ((expert < E) & ((leaf < DEEP) | ((leaf - DEEP) % 2 == 0)))[None, :]


@triton.jit(do_not_specialize=["num_tokens", "gamma"])
def _tree_routing_kernel(
    scores_ptr,
    gates_ptr,
    norm_ptr,
    ids_ptr,
    weights_ptr,
    reach_ptr,
    sums_ptr,
    num_tokens,
    gamma,
    PARTS: tl.constexpr,
    E: tl.constexpr,
    CODED: tl.constexpr,
    TOP_K: tl.constexpr,
    LEVELS: tl.constexpr,
    INNER: tl.constexpr,
    DEEP: tl.constexpr,
    LOWEST: tl.constexpr,
    EPS: tl.constexpr,
    LOG_EPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < num_tokens
    row = t.to(tl.int64)
    expert, exists = _experts(E, DEEP, BLOCK_E)
    here = inside[:, None] & exists
    PART: tl.constexpr = LEVELS if CODED else 2 * E - 1
    scores = scores_ptr + row * (PARTS * (PART + 1) if CODED else PARTS * PART)
    top = tl.full((BLOCK_T,), LOWEST, tl.float32)
    for j in range(PARTS):
        if CODED:
            score = tl.load(scores + PARTS * PART + j, inside, other=float("-inf"))
            top = tl.maximum(top, _live(score, LOWEST))
        else:
            reach = _reach(scores + j * PART, inside, gamma, LEVELS, INNER, CODED)
            _, counted = _leaf_scores(scores + j * PART, expert, here, reach, E, LOWEST)
            top = tl.maximum(top, tl.max(counted, 1))
    gates = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for j in range(PARTS):
        reach = _reach(scores + j * PART, inside, gamma, LEVELS, INNER, CODED)
        if reach_ptr is not None:
            tl.store(reach_ptr + ((row * PARTS + j) * E)[:, None] + expert, reach, here)
        if sums_ptr is not None:
            leaves = tl.where(exists, reach, 0.0)
            tl.store(sums_ptr + (row * PARTS + j) * 2, -tl.sum(leaves * tl.log(leaves + LOG_EPS), 1), inside)
            tl.store(sums_ptr + (row * PARTS + j) * 2 + 1, tl.sum(leaves, 1), inside)
        if CODED:
            score = tl.load(scores + PARTS * PART + j, inside, other=float("-inf"))
            share = tl.exp(_live(score, LOWEST) - top)
            gates += share[:, None] * tl.where(exists, reach, 0.0)
            total += share
        else:
            _, counted = _leaf_scores(scores + j * PART, expert, here, reach, E, LOWEST)
            shares = tl.exp(counted - top[:, None]) * (reach + EPS)
            gates += shares
            total += tl.sum(shares, 1)
    gates /= tl.where(total > 0, total, 1.0)[:, None]
    tl.store(gates_ptr + (row * E)[:, None] + expert, gates, here)
    tl.store(norm_ptr + row * 2, top, inside)
    tl.store(norm_ptr + row * 2 + 1, total, inside)
    if TOP_K == E:
        tl.store(ids_ptr + (row * E)[:, None] + expert, tl.where(gates > 0, expert, E).to(tl.int64), here)
    elif TOP_K > 0:
        left = tl.where(exists, gates, -1.0)
        for k in range(TOP_K):
            best = tl.argmax(left, 1, tie_break_left=True)
            weight = tl.max(left, 1)
            chosen = tl.arange(0, BLOCK_E)[None, :] == best[:, None]
            found = tl.sum(tl.where(chosen, expert, 0), 1)
            tl.store(ids_ptr + row * TOP_K + k, tl.where(weight > 0, found, E).to(tl.int64), inside)
            tl.store(weights_ptr + row * TOP_K + k, weight, inside)
            left = tl.where(chosen, -1.0, left)


@triton.jit
def _store_level(
    splits,
    dsplits,
    dreach,
    inside,
    gamma,
    LEVEL: tl.constexpr,
    INNER: tl.constexpr,
    CODED: tl.constexpr,
):
    """Store the gradient of a level's splits; return the gradient of its nodes from that of their children."""
    reach = _reach(splits, inside, gamma, LEVEL, INNER, CODED)
    left, right, slope = _level_shares(splits, inside, gamma, LEVEL, INNER, CODED)
    dleft, dright = tl.split(tl.reshape(dreach, (inside.shape[0], 1 << LEVEL, 2)))
    dsplit = reach * (dleft - dright) * slope
    if CODED:
        tl.store(dsplits + LEVEL, tl.sum(dsplit, 1), inside)
    else:
        node = ((1 << LEVEL) - 1 + tl.arange(0, 1 << LEVEL))[None, :]
        tl.store(dsplits[:, None] + node, dsplit, inside[:, None] & (node < INNER))
    return left * dleft + right * dright


@triton.jit(do_not_specialize=["num_tokens", "gamma"])
def _tree_routing_backward_kernel(
    dgates_ptr,
    dweights_ptr,
    dreach_ptr,
    dsums_ptr,
    scores_ptr,
    gates_ptr,
    norm_ptr,
    ids_ptr,
    dscores_ptr,
    num_tokens,
    gamma,
    PARTS: tl.constexpr,
    E: tl.constexpr,
    CODED: tl.constexpr,
    TOP_K: tl.constexpr,
    LEVELS: tl.constexpr,
    INNER: tl.constexpr,
    DEEP: tl.constexpr,
    LOWEST: tl.constexpr,
    EPS: tl.constexpr,
    LOG_EPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < num_tokens
    row = t.to(tl.int64)
    expert, exists = _experts(E, DEEP, BLOCK_E)
    here = inside[:, None] & exists
    PART: tl.constexpr = LEVELS if CODED else 2 * E - 1
    columns = PARTS * (PART + 1) if CODED else PARTS * PART
    scores, dscores = scores_ptr + row * columns, dscores_ptr + row * columns
    gates = tl.load(gates_ptr + (row * E)[:, None] + expert, here, other=0.0)
    # Gates that are 0 pass no gradient.
    live = gates > 0
    dgates = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if dgates_ptr is not None:
        dgates += tl.load(dgates_ptr + (row * E)[:, None] + expert, live, other=0.0)
    if dweights_ptr is not None:
        for k in range(TOP_K):
            chosen = tl.load(ids_ptr + row * TOP_K + k, inside, other=E)
            dweight = tl.load(dweights_ptr + row * TOP_K + k, chosen < E, other=0.0)
            dgates += tl.where(live & (expert == chosen[:, None]), dweight[:, None], 0.0)
    mean = tl.sum(gates * dgates, 1)
    top = tl.load(norm_ptr + row * 2, inside, other=0.0)
    total = tl.load(norm_ptr + row * 2 + 1, inside, other=0.0)
    total = tl.where(total > 0, total, 1.0)
    for j in range(PARTS):
        splits, dsplits = scores + j * PART, dscores + j * PART
        reach = _reach(splits, inside, gamma, LEVELS, INNER, CODED)
        dreach = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        if dreach_ptr is not None:
            dreach += tl.load(dreach_ptr + ((row * PARTS + j) * E)[:, None] + expert, here, other=0.0)
        if dsums_ptr is not None:
            dentropy = tl.load(dsums_ptr + (row * PARTS + j) * 2, inside, other=0.0)[:, None]
            dall = tl.load(dsums_ptr + (row * PARTS + j) * 2 + 1, inside, other=0.0)[:, None]
            more = reach + LOG_EPS
            dreach += tl.where(exists, dall - dentropy * (tl.log(more) + reach / more), 0.0)
        # Infinite scores are replaced by constants and get no gradient.
        if CODED:
            score = tl.load(scores + PARTS * PART + j, inside, other=float("-inf"))
            share = tl.exp(_live(score, LOWEST) - top) / total
            dshare = share * (tl.sum(dgates * reach, 1) - mean)
            tl.store(dscores + PARTS * PART + j, tl.where(score < float("inf"), dshare, 0.0), inside)
            dreach += share[:, None] * dgates
        else:
            score, counted = _leaf_scores(splits, expert, here, reach, E, LOWEST)
            flow = tl.exp(counted - top[:, None]) / total[:, None] * (dgates - mean[:, None])
            dleaf = tl.where(score < float("inf"), flow * (reach + EPS), 0.0)
            tl.store((dsplits + E - 1)[:, None] + expert, dleaf, here)
            dreach += flow
        for up in tl.static_range(LEVELS):
            dreach = _store_level(splits, dsplits, dreach, inside, gamma, LEVELS - 1 - up, INNER, CODED)


def _tile(num_parts: int, num_experts: int, coded: bool) -> dict[str, int | bool | float]:
    """The constants of both kernels."""
    levels = (num_experts - 1).bit_length()
    block_e = 1 << levels
    return {
        "PARTS": num_parts,
        "E": num_experts,
        "CODED": coded,
        "LEVELS": levels,
        "INNER": block_e - 1 if coded else num_experts - 1,
        "DEEP": block_e if coded else 2 * num_experts - block_e,
        "LOWEST": -LARGEST,
        "EPS": EPSILON,
        "LOG_EPS": LOG_EPSILON,
        "BLOCK_T": max(1, min(16, BLOCK // block_e)),
        "BLOCK_E": block_e,
    }


def tree_routing(args: TreeRouting) -> tuple[torch.Tensor | None, ...]:
    """Gates ``(T, E)``, norm ``(T, 2)``, ids ``(T, K)`` int64, weights, reach and sums, or None for these."""
    scores, experts, top_k = args.scores.contiguous(), args.num_experts, args.top_k
    num_tokens, device = scores.shape[0], scores.device
    gates, norm = (torch.empty(num_tokens, n, dtype=torch.float32, device=device) for n in (experts, 2))
    ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=device)
    weights = reach = sums = None
    if 0 < top_k < experts:
        weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=device)
    if args.keep_reach:
        reach = torch.empty(num_tokens, args.num_parts, experts, dtype=torch.float32, device=device)
    if args.keep_sums:
        sums = torch.empty(num_tokens, args.num_parts, 2, dtype=torch.float32, device=device)
    if num_tokens:
        tile = _tile(args.num_parts, experts, args.coded)
        _tree_routing_kernel[(triton.cdiv(num_tokens, tile["BLOCK_T"]),)](
            scores, gates, norm, ids, weights, reach, sums, num_tokens, args.gamma, TOP_K=top_k, **tile, num_warps=4
        )
    return gates, norm, ids, weights, reach, sums


def tree_routing_backward(args: TreeRoutingBackward) -> torch.Tensor:
    """``dscores (T, C)``."""
    forward, scores = args.forward, args.forward.scores.contiguous()
    dscores = torch.empty_like(scores)
    if scores.shape[0]:
        tile = _tile(forward.num_parts, forward.num_experts, forward.coded)
        _tree_routing_backward_kernel[(triton.cdiv(scores.shape[0], tile["BLOCK_T"]),)](
            *(None if d is None else d.contiguous() for d in (args.dgates, args.dweights, args.dreach, args.dsums)),
            scores,
            args.gates,
            args.norm,
            args.ids,
            dscores,
            scores.shape[0],
            forward.gamma,
            TOP_K=forward.top_k,
            **tile,
            num_warps=4,
        )
    return dscores


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    cases = []
    others = {"ids_ptr": "*i64:16", "num_tokens": "i32"}
    for coded, experts, top_k in ((False, 64, 64), (False, 100, 8), (True, 256, 8)):
        tile = _tile(2, experts, coded) | {"TOP_K": top_k}
        pointers = "scores_ptr gates_ptr norm_ptr weights_ptr reach_ptr sums_ptr"
        constexprs = dict(tile)
        if top_k == experts:
            pointers, constexprs["weights_ptr"] = pointers.replace("weights_ptr ", ""), None
        signature = aot_signature(torch.float32, pointers, "", "", "gamma") | others
        cases.append((_tree_routing_kernel, signature, constexprs, {"num_warps": 4}))
        pointers = "dgates_ptr dweights_ptr dreach_ptr dsums_ptr scores_ptr gates_ptr norm_ptr dscores_ptr"
        constexprs = dict(tile)
        if top_k == experts:
            pointers, constexprs["dweights_ptr"] = pointers.replace("dweights_ptr ", ""), None
        signature = aot_signature(torch.float32, pointers, "", "", "gamma") | others
        cases.append((_tree_routing_backward_kernel, signature, constexprs, {"num_warps": 4}))
    return cases
