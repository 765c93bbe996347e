"""Experts and routing weights of each token from its logits, and the gradient of the logits, in one kernel each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.common import aot_signature

if TYPE_CHECKING:
    from gossamer.ops.topk_routing import MassRouting, MassRoutingBackward, TopkRouting, TopkRoutingBackward

LARGEST = torch.finfo(torch.float32).max
EPSILON = 1e-20
# Logits that a program holds.
BLOCK = 2048


@triton.jit
def _cleaned(x, LOWEST: tl.constexpr):
    """Logits in the form used for ranking: NaN as the lowest number, which masks an expert, infinities as extremes."""
    return tl.minimum(tl.maximum(tl.where(x == x, x, LOWEST), LOWEST), -LOWEST)


@triton.jit(do_not_specialize=["num_tokens", "scale"])
def _topk_routing_kernel(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    num_tokens,
    scale,
    E: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    BEST: tl.constexpr,
    LOWEST: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    inside = (t < num_tokens)[:, None] & (e < E)[None, :]
    x = tl.load(logits_ptr + t.to(tl.int64)[:, None] * E + e[None, :], inside, other=float("-inf"))
    x = _cleaned(x, LOWEST)
    masked = x == LOWEST
    if SIGMOID:
        score = tl.where(masked, 0.0, tl.sigmoid(x))
        choice = score
        if bias_ptr is not None:
            choice += tl.load(bias_ptr + e, e < E, other=0.0).to(tl.float32)[None, :]
        choice = tl.where(masked | (choice != choice), LOWEST, tl.maximum(choice, LOWEST))
    else:
        top = tl.max(x, 1)
        score = tl.where(masked, 0.0, tl.exp(x - top[:, None]))
        choice = x
    if N_GROUP > 1:
        SIZE: tl.constexpr = E // N_GROUP
        members = tl.reshape(choice, (BLOCK_T, N_GROUP, SIZE))
        place = tl.arange(0, SIZE)[None, None, :]
        group = tl.max(members, 2)
        if BEST > 1 and SIZE > 1:
            first = tl.argmax(members, 2, tie_break_left=True)
            second = tl.max(tl.where(place == first[:, :, None], LOWEST, members), 2)
            group += tl.where(second == LOWEST, 0.0, second)
        g = tl.arange(0, N_GROUP)[None, :]
        chosen = tl.zeros((BLOCK_T, N_GROUP), tl.int32)
        for _ in tl.static_range(TOPK_GROUP):
            best = tl.argmax(tl.where(chosen == 0, group, float("-inf")), 1, tie_break_left=True)
            chosen = tl.where(g == best[:, None], 1, chosen)
        member = tl.broadcast_to(chosen[:, :, None], (BLOCK_T, N_GROUP, SIZE))
        choice = tl.where(tl.reshape(member, (BLOCK_T, BLOCK_E)) == 1, choice, LOWEST)
    # Padding, and experts chosen already, rank below every other expert, even a masked one, so ids are distinct and
    # exist.
    choice = tl.where((e < E)[None, :], choice, float("-inf"))
    column = tl.arange(0, K_PAD)[None, :]
    ids = tl.zeros((BLOCK_T, K_PAD), tl.int32)
    weights = tl.zeros((BLOCK_T, K_PAD), tl.float32)
    highest = tl.full((BLOCK_T,), LOWEST, tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(choice, 1, tie_break_left=True)
        here = e[None, :] == best[:, None]
        usable = tl.sum(tl.where(here & (choice > LOWEST), 1, 0), 1) > 0
        if RENORMALIZE and not SIGMOID:
            # The softmax over the chosen logits, from which the largest, the first one, is subtracted.
            value = tl.sum(tl.where(here, x, 0.0), 1)
            if k == 0:
                highest = value
            weight = tl.where(usable, tl.exp(value - highest), 0.0)
        else:
            weight = tl.where(usable, tl.sum(tl.where(here, score, 0.0), 1), 0.0)
        ids = tl.where(column == k, best[:, None], ids)
        weights = tl.where(column == k, weight[:, None], weights)
        choice = tl.where(here, float("-inf"), choice)
    if RENORMALIZE:
        total = tl.sum(weights, 1)
        weights /= ((total + EPS) if SIGMOID else tl.where(total > 0, total, 1.0))[:, None]
    elif not SIGMOID:
        total = tl.sum(score, 1)
        weights /= tl.where(total > 0, total, 1.0)[:, None]
    at = t.to(tl.int64)[:, None] * TOP_K + column
    known = (t < num_tokens)[:, None] & (column < TOP_K)
    tl.store(ids_ptr + at, ids.to(tl.int64), known)
    tl.store(weights_ptr + at, weights * scale, known)


@triton.jit(do_not_specialize=["num_tokens", "scale"])
def _topk_routing_backward_kernel(
    dweights_ptr,
    logits_ptr,
    weights_ptr,
    ids_ptr,
    dlogits_ptr,
    num_tokens,
    scale,
    E: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    LOWEST: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    column = tl.arange(0, K_PAD)[None, :]
    inside = (t < num_tokens)[:, None] & (e < E)[None, :]
    known = (t < num_tokens)[:, None] & (column < TOP_K)
    row = t.to(tl.int64)[:, None]
    ids = tl.load(ids_ptr + row * TOP_K + column, known, other=0)
    weights = tl.load(weights_ptr + row * TOP_K + column, known, other=0.0)
    dweights = tl.load(dweights_ptr + row * TOP_K + column, known, other=0.0)
    # Slots without an expert, and slots whose score underflows, have weight 0 and pass no gradient.
    live = weights > 0
    dweights = tl.where(live, dweights, 0.0)
    x = tl.load(logits_ptr + row * E + e[None, :], inside, other=float("-inf"))
    finite = (x == x) & (tl.abs(x) <= -LOWEST)
    if SIGMOID:
        picked = tl.load(logits_ptr + row * E + ids, known, other=0.0)
        scores = tl.where(live, tl.sigmoid(picked), 0.0)
        dscores = scale * dweights
        if RENORMALIZE:
            total = (tl.sum(scores, 1) + EPS)[:, None]
            dscores = (dscores - tl.sum(dscores * scores, 1)[:, None] / total) / total
        dpicked = dscores * scores * tl.where(live, tl.sigmoid(-picked), 0.0)
    else:
        mean = tl.sum(dweights * weights, 1)[:, None]
        dpicked = weights * (dweights - mean / scale) if RENORMALIZE else weights * dweights
    dlogits = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if not SIGMOID and not RENORMALIZE:
        clean = _cleaned(x, LOWEST)
        score = tl.where(clean == LOWEST, 0.0, tl.exp(clean - tl.max(clean, 1)[:, None]))
        total = tl.sum(score, 1)
        dlogits -= score * (mean / tl.where(total > 0, total, 1.0)[:, None])
    for k in tl.static_range(TOP_K):
        here = column == k
        expert = tl.sum(tl.where(here, ids, 0), 1)
        value = tl.sum(tl.where(here, dpicked, 0.0), 1)
        dlogits += tl.where(e[None, :] == expert[:, None], value[:, None], 0.0)
    tl.store(dlogits_ptr + row * E + e[None, :], tl.where(finite, dlogits, 0.0), inside)


@triton.jit
def _ordered(bits):
    """Convert the bits of a float32 to an int32 that compares in the same way, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["num_tokens", "mass"])
def _mass_routing_kernel(
    logits_ptr,
    ids_ptr,
    weights_ptr,
    num_tokens,
    mass,
    E: tl.constexpr,
    SLOTS: tl.constexpr,
    EXCEED: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)[None, :]
    row = t.to(tl.int64)[:, None]
    x = tl.load(logits_ptr + row * E + e, (t < num_tokens)[:, None] & (e < E), other=float("-inf"))
    # Adding 0 turns both zeros into the same one.
    x = tl.where(e < E, _cleaned(x, LOWEST) + 0.0, float("-inf"))
    top = tl.max(x, 1)[:, None]
    total = tl.sum(tl.where(x > LOWEST, tl.exp(x - top), 0.0), 1)[:, None]
    # Sorted with the expert in the low bits, so that of equal logits the lower expert comes first.
    key = _ordered(x.to(tl.int32, bitcast=True)).to(tl.int64)
    key = tl.sort((key << 32) | (BLOCK_E - 1 - e).to(tl.int64), descending=True)
    ids = BLOCK_E - 1 - (key & 0xFFFFFFFF).to(tl.int32)
    x = _ordered((key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
    p = tl.where(x > LOWEST, tl.exp(x - top), 0.0) / tl.where(total > 0, total, 1.0)
    before = tl.cumsum(p, 1) - p
    live = (p > 0) & ((before <= mass) if EXCEED else (before < mass))
    known = (t < num_tokens)[:, None] & (e < SLOTS)
    tl.store(ids_ptr + row * SLOTS + e, tl.where(live, ids, E).to(tl.int64), known)
    tl.store(weights_ptr + row * SLOTS + e, tl.where(live, p, 0.0), known)


@triton.jit(do_not_specialize=["num_tokens", "slots"])
def _mass_routing_backward_kernel(
    dweights_ptr,
    logits_ptr,
    weights_ptr,
    ids_ptr,
    dlogits_ptr,
    num_tokens,
    slots,
    E: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)[None, :]
    inside = (t < num_tokens)[:, None] & (e < E)
    row = t.to(tl.int64)
    dlogits = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    mean = tl.zeros((BLOCK_T,), tl.float32)
    for slot in range(slots):
        at = row * slots + slot
        weight = tl.load(weights_ptr + at, t < num_tokens, other=0.0)
        # Slots without an expert have weight 0 and pass no gradient, whatever the gradients of their weights are.
        value = tl.where(weight > 0, weight * tl.load(dweights_ptr + at, weight > 0, other=0.0), 0.0)
        expert = tl.load(ids_ptr + at, weight > 0, other=E)
        dlogits += tl.where(e == expert[:, None], value[:, None], 0.0)
        mean += value
    x = tl.load(logits_ptr + row[:, None] * E + e, inside, other=float("-inf"))
    finite = (x == x) & (tl.abs(x) <= -LOWEST)
    x = _cleaned(x, LOWEST)
    score = tl.where(x == LOWEST, 0.0, tl.exp(x - tl.max(x, 1)[:, None]))
    total = tl.sum(score, 1)
    dlogits -= score * (mean / tl.where(total > 0, total, 1.0))[:, None]
    tl.store(dlogits_ptr + row[:, None] * E + e, tl.where(finite, dlogits, 0.0), inside)


def _blocks(num_experts: int) -> tuple[int, int]:
    """Tokens and experts of a program."""
    block_e = triton.next_power_of_2(num_experts)
    return max(1, min(16, BLOCK // block_e)), block_e


def topk_routing(args: TopkRouting) -> tuple[torch.Tensor, torch.Tensor]:
    """``weights (T, K)`` float32 and ``ids (T, K)`` int64."""
    logits, bias, top_k = args.logits.contiguous(), args.bias, args.top_k
    num_tokens, num_experts = logits.shape
    ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits.device)
    if num_tokens == 0:
        return weights, ids
    block_t, block_e = _blocks(num_experts)
    _topk_routing_kernel[(triton.cdiv(num_tokens, block_t),)](
        logits,
        None if bias is None else bias.contiguous(),
        ids,
        weights,
        num_tokens,
        args.scale,
        E=num_experts,
        SIGMOID=args.sigmoid,
        RENORMALIZE=args.renormalize,
        TOP_K=top_k,
        K_PAD=triton.next_power_of_2(top_k),
        N_GROUP=args.n_group,
        TOPK_GROUP=args.topk_group,
        BEST=2 if args.sigmoid else 1,
        LOWEST=-LARGEST,
        EPS=EPSILON,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        num_warps=4,
    )
    return weights, ids


def topk_routing_backward(args: TopkRoutingBackward) -> torch.Tensor:
    """``dlogits (T, E)``."""
    forward, top_k = args.forward, args.forward.top_k
    num_tokens, num_experts = forward.logits.shape
    dlogits = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=args.dweights.device)
    if num_tokens == 0:
        return dlogits
    block_t, block_e = _blocks(num_experts)
    _topk_routing_backward_kernel[(triton.cdiv(num_tokens, block_t),)](
        args.dweights.contiguous(),
        forward.logits.contiguous(),
        args.weights,
        args.ids,
        dlogits,
        num_tokens,
        forward.scale,
        E=num_experts,
        SIGMOID=forward.sigmoid,
        RENORMALIZE=forward.renormalize,
        TOP_K=top_k,
        K_PAD=triton.next_power_of_2(top_k),
        LOWEST=-LARGEST,
        EPS=EPSILON,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        num_warps=4,
    )
    return dlogits


def mass_routing(args: MassRouting) -> tuple[torch.Tensor, torch.Tensor]:
    """``weights`` float32 and ``ids`` int64, ``(T, min(E, max_ranks))``."""
    logits, num_experts = args.logits.contiguous(), args.num_experts
    num_tokens, slots = logits.shape[0], min(num_experts, args.max_ranks)
    ids = torch.empty(num_tokens, slots, dtype=torch.int64, device=logits.device)
    weights = torch.empty(num_tokens, slots, dtype=torch.float32, device=logits.device)
    if num_tokens == 0:
        return weights, ids
    block_t, block_e = _blocks(num_experts)
    _mass_routing_kernel[(triton.cdiv(num_tokens, block_t),)](
        logits,
        ids,
        weights,
        num_tokens,
        args.mass,
        E=num_experts,
        SLOTS=slots,
        EXCEED=args.exceed,
        LOWEST=-LARGEST,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        num_warps=4,
    )
    return weights, ids


def mass_routing_backward(args: MassRoutingBackward) -> torch.Tensor:
    """``dlogits (T, E)``."""
    num_tokens, num_experts = args.forward.logits.shape
    dlogits = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=args.dweights.device)
    if num_tokens == 0:
        return dlogits
    block_t, block_e = _blocks(num_experts)
    _mass_routing_backward_kernel[(triton.cdiv(num_tokens, block_t),)](
        args.dweights.contiguous(),
        args.forward.logits.contiguous(),
        args.weights,
        args.ids,
        dlogits,
        num_tokens,
        args.ids.shape[1],
        E=num_experts,
        LOWEST=-LARGEST,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        num_warps=4,
    )
    return dlogits


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    cases = []
    for sigmoid, experts, top_k, groups, chosen in ((False, 64, 8, 1, 1), (True, 256, 8, 8, 4)):
        signature = aot_signature(torch.float32, "logits_ptr bias_ptr weights_ptr", "", "", "scale")
        signature |= {"ids_ptr": "*i64:16", "num_tokens": "i32"}
        shared = {"E": experts, "SIGMOID": sigmoid, "RENORMALIZE": True, "TOP_K": top_k, "K_PAD": top_k}
        shared |= {"LOWEST": -LARGEST, "EPS": EPSILON} | dict(
            zip(("BLOCK_T", "BLOCK_E"), _blocks(experts), strict=True)
        )
        constexprs = shared | {"N_GROUP": groups, "TOPK_GROUP": chosen, "BEST": 2 if sigmoid else 1}
        if not sigmoid:
            signature.pop("bias_ptr")
            constexprs["bias_ptr"] = None
        cases.append((_topk_routing_kernel, signature, constexprs, {"num_warps": 4}))
        # The backward pass of weights that are shares of all experts, which holds the most values.
        signature = aot_signature(torch.float32, "dweights_ptr logits_ptr weights_ptr dlogits_ptr", "", "", "scale")
        signature |= {"ids_ptr": "*i64:16", "num_tokens": "i32"}
        backward = shared | {"RENORMALIZE": sigmoid}
        cases.append((_topk_routing_backward_kernel, signature, backward, {"num_warps": 4}))
    for experts in (64, 256):
        shared = {"E": experts, "LOWEST": -LARGEST} | dict(zip(("BLOCK_T", "BLOCK_E"), _blocks(experts), strict=True))
        signature = aot_signature(torch.float32, "logits_ptr weights_ptr", "", "", "mass")
        signature |= {"ids_ptr": "*i64:16", "num_tokens": "i32"}
        cases.append((_mass_routing_kernel, signature, shared | {"SLOTS": experts, "EXCEED": True}, {"num_warps": 4}))
        signature = aot_signature(torch.float32, "dweights_ptr logits_ptr weights_ptr dlogits_ptr", "", "", "")
        signature |= {"ids_ptr": "*i64:16", "num_tokens": "i32", "slots": "i32"}
        cases.append((_mass_routing_backward_kernel, signature, shared, {"num_warps": 4}))
    return cases
