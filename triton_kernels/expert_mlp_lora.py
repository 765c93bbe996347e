"""The expert feed-forward layer with low-rank updates: its kernels started from the updates' part of each product.

The floor is that of gossamer.triton_kernels.expert_mlp, with each factor read and its gradient written once.
"""

from __future__ import annotations

import torch

from gossamer._activation import Activation
from gossamer._layout import stored_transposed
from gossamer.triton_kernels.common import LowRankTerm, RowTables, row_tiles, unit_columns
from gossamer.triton_kernels.expert_mlp import up_projection
from gossamer.triton_kernels.expert_mlp_backward import down_backward, dweight
from gossamer.triton_kernels.gather_reduce import sum_slots
from gossamer.triton_kernels.grouped_matmul import rows_times_weight
from gossamer.triton_kernels.grouped_matmul_dweight import group_sums
from gossamer.triton_kernels.multi_low_rank import factor_gradient, shrink, shrink_block_m
from gossamer.triton_kernels.routing_weight_gradient import routing_weight_gradient


def _low_rows(x, factor, slots, offsets, x_div, tables, scale=1.0):
    """``scale·x[g(r)]·factor[e]ᵀ`` ``(R, r)`` float32 for ``factor (E, r, C)``; see ``shrink``."""
    block_m = shrink_block_m(x, slots.shape[0], factor.shape[0])
    table = row_tiles(offsets, slots.shape[0], block_m, tables)
    parts = shrink(x, factor, slots, table, block_m, x_div, scale=scale)
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def expert_mlp_lora(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    factors: tuple[torch.Tensor | None, ...],
    slots: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
    activation: Activation,
    interleaved: bool,
    scale: float,
    save: bool,
) -> tuple[torch.Tensor, ...]:
    """``y (T, H)``, and if ``save`` the pre-activation ``(R, 2I)``, ``x·A1ᵀ`` and ``act·A2ᵀ`` ``(R, r)``, else empty.

    Arguments as those of :func:`gossamer.cpu_kernels.expert_mlp_lora.expert_mlp_lora`.
    """
    num_rows, top_k = slots.shape[0], weights.shape[1]
    a1, b1, a2, b2 = (f if f is None else f.to(x.dtype) for f in factors)
    low1, low2 = (
        torch.empty((num_rows, a.shape[1]) if save and a is not None else (0,), dtype=torch.float32, device=x.device)
        for a in (a1, a2)
    )
    if num_rows == 0:
        return torch.empty_like(x), x.new_empty((0, gate_up.shape[1]) if save else (0,)), low1, low2
    x = unit_columns(x)
    up_term = down_term = None
    tables: RowTables = {}
    if a1 is not None:
        s1 = _low_rows(x, a1, slots, offsets, top_k, tables)
        up_term, low1 = LowRankTerm(s1, b1, scale), s1 if save else low1
    act, preact = up_projection(
        x, gate_up, gate_up_bias, slots, offsets, activation, interleaved, save, top_k, tables=tables, low=up_term
    )
    if a2 is not None:
        s2 = _low_rows(act, a2, slots, offsets, 0, tables)
        down_term, low2 = LowRankTerm(s2, b2, scale), s2 if save else low2
    out = rows_times_weight(act, down, down_bias, slots, offsets, 0, False, False, tables=tables, low=down_term)
    y = sum_slots(out, rows, offsets, top_k, weights)
    return y, x.new_empty(0) if preact is None else preact, low1, low2


def expert_mlp_lora_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    factors: tuple[torch.Tensor | None, ...],
    slots: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
    preact: torch.Tensor,
    low: tuple[torch.Tensor, torch.Tensor],
    activation: Activation,
    interleaved: bool,
    scale: float,
    needs: list[bool],
    overwrite: bool,
) -> tuple[torch.Tensor, ...]:
    """Gradients of x, gate_up, down, weights, gate_up_bias, down_bias and the factors, empty where ``needs`` says no.

    d(preact) is written over ``preact`` when ``overwrite``.
    """
    num_rows, top_k = slots.shape[0], weights.shape[1]
    need_x, need_gate_up, need_down, need_weights, need_gate_up_bias, need_down_bias, *need_factors = needs
    need_a1, need_b1, need_a2, need_b2 = need_factors
    dx, dgate_up, ddown, dweights, dgate_up_bias, ddown_bias = (x.new_empty(0) for _ in range(6))
    dfactors = [
        torch.empty(f.shape if need else (0,), dtype=x.dtype if f is None else f.dtype, device=x.device)
        for f, need in zip(factors, need_factors, strict=True)
    ]
    if num_rows == 0:
        like = (x, gate_up, down, weights, gate_up_bias, down_bias)
        grads = (torch.zeros_like(t) if need else x.new_empty(0) for t, need in zip(like, needs, strict=False))
        return *grads, *(g.zero_() for g in dfactors)
    da1, db1, da2, db2 = dfactors
    a1, b1, a2, b2 = (f if f is None else f.to(x.dtype) for f in factors)
    x, dy, weights = unit_columns(x), unit_columns(dy), weights.contiguous()

    wants = (
        need_x or need_gate_up or need_gate_up_bias or need_a1 or need_b1,
        need_down or need_a2,
        need_weights,
    )
    dpreact = act = partial = term = None
    tables: RowTables = {}
    if any(wants):
        if a2 is not None:
            ds2 = _low_rows(dy, b2.transpose(1, 2), slots, offsets, top_k, tables, scale)
            term = LowRankTerm(ds2, a2.transpose(1, 2), 1.0)
        dpreact, act, partial = down_backward(
            dy,
            down,
            slots,
            offsets,
            weights,
            preact,
            activation,
            interleaved,
            wants,
            overwrite,
            tables=tables,
            low=term,
        )
    if need_weights:
        dweights = routing_weight_gradient(partial, dy, down_bias, rows, offsets, weights)
    if need_down:
        ddown = dweight(act, dy, slots, offsets, 0, top_k, stored_transposed(down), tables)
    if need_a2:
        factor_gradient(ds2, act, slots, offsets, 0, da2, False)
    del act
    if need_b2:
        weighted = low[1] * weights.view(-1).index_select(0, slots).unsqueeze(1)
        factor_gradient(weighted, dy, slots, offsets, top_k, db2, True, scale=scale)
    if need_down_bias:
        ddown_bias = group_sums(dy, slots, offsets, top_k, weights)

    term = None
    if a1 is not None and (need_x or need_a1):
        ds1 = _low_rows(dpreact, b1.transpose(1, 2), slots, offsets, 0, tables, scale)
        term = LowRankTerm(ds1, a1.transpose(1, 2), 1.0)
    if need_x:
        dx_rows = rows_times_weight(
            dpreact, gate_up.transpose(1, 2), None, slots, offsets, 0, False, False, tables=tables, low=term
        )
        dx = sum_slots(dx_rows, rows, offsets, top_k, None)
        del dx_rows
    if need_gate_up:
        dgate_up = dweight(x, dpreact, slots, offsets, top_k, 0, stored_transposed(gate_up), tables)
    if need_a1:
        factor_gradient(ds1, x, slots, offsets, top_k, da1, False)
    if need_b1:
        factor_gradient(low[0], dpreact, slots, offsets, 0, db1, True, scale=scale)
    if need_gate_up_bias:
        dgate_up_bias = group_sums(dpreact, slots, offsets, 0)
    return dx, dgate_up, ddown, dweights, dgate_up_bias, ddown_bias, da1, db1, da2, db2
