"""Launchers of the native gates by soft trees and codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import empty_huge, pointer, unit_rows

if TYPE_CHECKING:
    from gossamer.ops.tree_routing import TreeRouting, TreeRoutingBackward


def _form(scores: torch.Tensor, args: TreeRouting) -> tuple:
    return (
        scores.data_ptr(),
        scores.stride(0),
        scores.shape[0],
        args.num_parts,
        args.num_experts,
        args.gamma,
        args.coded,
    )


def tree_routing(args: TreeRouting) -> tuple[tuple[torch.Tensor | None, ...], bool]:
    """Gates ``(T, E)``, norm ``(T, 2)``, ids ``(T, K)``, weights, reach and sums; whether no score is NaN or +∞."""
    scores = unit_rows(args.scores)
    num_tokens, num_experts, top_k = scores.shape[0], args.num_experts, args.top_k
    gates, norm = (empty_huge((num_tokens, n), torch.float32) for n in (num_experts, 2))
    ids = empty_huge((num_tokens, top_k), torch.int64)
    weights = empty_huge((num_tokens, top_k), torch.float32) if 0 < top_k < num_experts else None
    reach, sums = (
        empty_huge((num_tokens, args.num_parts, n), torch.float32) if kept else None
        for n, kept in ((num_experts, args.keep_reach), (2, args.keep_sums))
    )
    sound = _C.tree_routing(
        _form(scores, args),
        top_k=top_k,
        gates=gates.data_ptr(),
        norm=norm.data_ptr(),
        ids=ids.data_ptr(),
        weights=pointer(weights),
        reach=pointer(reach),
        sums=pointer(sums),
        num_threads=torch.get_num_threads(),
    )
    return (gates, norm, ids, weights, reach, sums), sound


def tree_routing_backward(args: TreeRoutingBackward) -> torch.Tensor:
    """``dscores (T, C)``."""
    scores = unit_rows(args.forward.scores)
    dscores = empty_huge(tuple(scores.shape), torch.float32)
    flows = [None if d is None else d.contiguous() for d in (args.dgates, args.dweights, args.dreach, args.dsums)]
    _C.tree_routing_backward(
        _form(scores, args.forward),
        top_k=args.forward.top_k,
        gates=args.gates.data_ptr(),
        norm=args.norm.data_ptr(),
        ids=args.ids.data_ptr(),
        dgates=pointer(flows[0]),
        dweights=pointer(flows[1]),
        dreach=pointer(flows[2]),
        dsums=pointer(flows[3]),
        dscores=dscores.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    return dscores
