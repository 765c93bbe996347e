"""Launcher of the native router."""

from __future__ import annotations

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import unit_rows


def topk_routing(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    sigmoid: bool,
    renormalize: bool,
    n_group: int,
    topk_group: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``ids (T, K)`` int64 and ``weights (T, K)`` float32 from float32 ``logits (T, E)``; see gossamer.nn.routing."""
    num_tokens, num_experts = logits.shape
    ids = torch.empty(num_tokens, top_k, dtype=torch.int64)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32)
    logits = unit_rows(logits)
    if bias is not None:
        bias = bias.float().contiguous()
    _C.topk_routing(
        logits.data_ptr(),
        logits.stride(0),
        (num_tokens, num_experts, top_k, n_group, topk_group),
        sigmoid,
        renormalize,
        scale,
        0 if bias is None else bias.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        torch.get_num_threads(),
    )
    return ids, weights
