"""Launchers of the native router."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import pointer, unit_rows

if TYPE_CHECKING:
    from gossamer.ops.topk_routing import MassRouting, MassRoutingBackward, TopkRouting, TopkRoutingBackward


def _router(logits: torch.Tensor, args: TopkRouting) -> tuple:
    return logits.data_ptr(), logits.stride(0), *logits.shape, args.top_k, args.sigmoid, args.renormalize, args.scale


def topk_routing(args: TopkRouting) -> tuple[torch.Tensor, torch.Tensor]:
    """``weights (T, K)`` float32 and ``ids (T, K)`` int64."""
    logits, bias = unit_rows(args.logits), args.bias
    if bias is not None:
        bias = bias.float().contiguous()
    ids = torch.empty(logits.shape[0], args.top_k, dtype=torch.int64)
    weights = torch.empty(logits.shape[0], args.top_k, dtype=torch.float32)
    _C.topk_routing(
        _router(logits, args),
        args.n_group,
        args.topk_group,
        pointer(bias),
        ids.data_ptr(),
        weights.data_ptr(),
        torch.get_num_threads(),
    )
    return weights, ids


def _backward(args: TopkRoutingBackward | MassRoutingBackward, router: tuple, logits: torch.Tensor) -> torch.Tensor:
    """``dlogits`` of the shape of the logits, which ``router`` points to."""
    dweights, dlogits = args.dweights.contiguous(), torch.empty(*logits.shape, dtype=torch.float32)
    pointers = (args.ids.data_ptr(), args.weights.data_ptr(), dweights.data_ptr(), dlogits.data_ptr())
    _C.topk_routing_backward(router, *pointers, torch.get_num_threads())
    return dlogits


def topk_routing_backward(args: TopkRoutingBackward) -> torch.Tensor:
    """``dlogits (T, E)``."""
    logits = unit_rows(args.forward.logits)
    return _backward(args, _router(logits, args.forward), logits)


def _shares(logits: torch.Tensor, slots: int) -> tuple:
    """The router's arguments for weights that are shares of all experts."""
    return logits.data_ptr(), logits.stride(0), *logits.shape, slots, False, False, 1.0


def mass_routing(args: MassRouting) -> tuple[torch.Tensor, torch.Tensor]:
    """``weights`` float32 and ``ids`` int64, ``(T, min(E, max_ranks))``."""
    logits, slots = unit_rows(args.logits), min(args.num_experts, args.max_ranks)
    ids = torch.empty(logits.shape[0], slots, dtype=torch.int64)
    weights = torch.empty(logits.shape[0], slots, dtype=torch.float32)
    _C.mass_routing(
        _shares(logits, slots),
        args.num_experts,
        args.max_ranks,
        args.mass,
        args.exceed,
        ids.data_ptr(),
        weights.data_ptr(),
        torch.get_num_threads(),
    )
    return weights, ids


def mass_routing_backward(args: MassRoutingBackward) -> torch.Tensor:
    """``dlogits`` of the shape of the logits."""
    logits = unit_rows(args.forward.logits)
    return _backward(args, _shares(logits, args.ids.shape[1]), logits)
