"""Launchers of the native router."""

from __future__ import annotations

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import unit_rows


def _router(logits: torch.Tensor, top_k: int, sigmoid: bool, renormalize: bool, scale: float) -> tuple:
    return logits.data_ptr(), logits.stride(0), *logits.shape, top_k, sigmoid, renormalize, scale


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
    """``ids (T, K)`` int64 and ``weights (T, K)`` float32 from float32 ``logits (T, E)``; see softmax_topk."""
    ids = torch.empty(logits.shape[0], top_k, dtype=torch.int64)
    weights = torch.empty(logits.shape[0], top_k, dtype=torch.float32)
    logits = unit_rows(logits)
    if bias is not None:
        bias = bias.float().contiguous()
    _C.topk_routing(
        _router(logits, top_k, sigmoid, renormalize, scale),
        n_group,
        topk_group,
        0 if bias is None else bias.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        torch.get_num_threads(),
    )
    return ids, weights


def topk_routing_backward(
    dweights: torch.Tensor,
    logits: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    sigmoid: bool,
    renormalize: bool,
    scale: float,
) -> torch.Tensor:
    """``dlogits (T, E)`` from ``dweights (T, K)`` and what :func:`topk_routing` took and gave."""
    dlogits = torch.empty(logits.shape, dtype=torch.float32)
    logits, dweights = unit_rows(logits), dweights.contiguous()
    _C.topk_routing_backward(
        _router(logits, ids.shape[1], sigmoid, renormalize, scale),
        ids.data_ptr(),
        weights.data_ptr(),
        dweights.data_ptr(),
        dlogits.data_ptr(),
        torch.get_num_threads(),
    )
    return dlogits
