"""The routing weights' gradient: partial sums by row of the expert layer's backward, summed and put in slot order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.common import aot_signature, clamped


@triton.jit(do_not_specialize=["num_slots", "num_rows"])
def _weight_gradient_kernel(
    partial_ptr,
    dy_ptr,
    bias_ptr,
    dweights_ptr,
    rows_ptr,
    offsets_ptr,
    num_slots,
    num_rows,
    num_partials,
    num_experts,
    H,
    stride_dy,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    inside = slot < num_slots
    row = tl.load(rows_ptr + slot, inside, other=0)
    live = inside & (row >= 0) & (row < tl.minimum(tl.load(offsets_ptr + num_experts), num_rows))
    total = tl.zeros((SLOTS,), tl.float32)
    for _ in range(num_partials):
        total += tl.load(partial_ptr + row, live, other=0.0)
        partial_ptr += num_rows
    if bias_ptr is not None:
        expert = tl.zeros((SLOTS,), tl.int32)
        for e0 in range(0, num_experts, BLOCK_E):
            e = e0 + tl.arange(0, BLOCK_E)
            end = tl.load(offsets_ptr + e + 1, e < num_experts, other=2147483647)
            expert += tl.sum((end[None, :] <= row[:, None]).to(tl.int32), 1)
        dy_row = dy_ptr + (slot // TOP_K).to(tl.int64)[:, None] * stride_dy
        bias_row = bias_ptr + clamped(expert, num_experts - 1).to(tl.int64)[:, None] * H
        for h0 in range(0, H, BLOCK_H):
            h = h0 + tl.arange(0, BLOCK_H)
            mask = live[:, None] & (h < H)[None, :]
            dy = tl.load(dy_row + h[None, :], mask, other=0.0).to(tl.float32)
            total += tl.sum(dy * tl.load(bias_row + h[None, :], mask, other=0.0).to(tl.float32), 1)
    tl.store(dweights_ptr + slot, total.to(dweights_ptr.dtype.element_ty), inside)


def routing_weight_gradient(
    partial: torch.Tensor,
    dy: torch.Tensor,
    down_bias: torch.Tensor | None,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """The routing weights' gradient ``(T, K)`` from partial sums ``(·, R)`` by row, with the down bias's part."""
    num_slots, (num_tokens, top_k) = rows.shape[0], weights.shape
    dweights = torch.empty(num_tokens, top_k, dtype=weights.dtype, device=weights.device)
    slots_per_program = 64
    _weight_gradient_kernel[(triton.cdiv(num_slots, slots_per_program),)](
        partial,
        dy,
        None if down_bias is None else down_bias.contiguous(),
        dweights,
        rows,
        offsets,
        num_slots,
        partial.shape[1],
        partial.shape[0],
        offsets.shape[0] - 1,
        dy.shape[1],
        dy.stride(0),
        TOP_K=top_k,
        SLOTS=slots_per_program,
        BLOCK_E=64,
        BLOCK_H=64,
        num_warps=4,
    )
    return dweights


def aot_cases(arch: int) -> list[tuple]:
    """The launch, for ahead-of-time compilation: (kernel, signature, constexprs, options)."""
    signature = aot_signature(
        torch.bfloat16, "dy_ptr bias_ptr dweights_ptr", "rows_ptr offsets_ptr", "num_partials num_experts H stride_dy"
    )
    signature |= {"partial_ptr": "*fp32:16", "num_slots": "i32", "num_rows": "i32"}
    constexprs = {"TOP_K": 8, "SLOTS": 64, "BLOCK_E": 64, "BLOCK_H": 64}
    return [(_weight_gradient_kernel, signature, constexprs, {"num_warps": 4})]
