"""Whether a backward pass may write over a tensor that its forward pass saved."""

from __future__ import annotations

import torch


def may_overwrite(saved: torch.Tensor) -> bool:
    """Whether this backward pass frees its graph and holds the only reference to ``saved``; never under a tracer.

    False while the backward pass itself is recorded, because an operator that overwrites its input has no derivative.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(saved) is not torch.Tensor:
        return False
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    count_users = getattr(torch._C, "_storage_Use_Count", None)
    if keeps_graph is None or count_users is None or keeps_graph():
        return False
    # Two references are expected: the saved tensor and the storage object made here.
    return count_users(saved.untyped_storage()._cdata) <= 2
