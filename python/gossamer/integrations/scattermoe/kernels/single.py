"""ScatterMoE's product for one token."""

from __future__ import annotations

import torch

from gossamer._checks import check_index, check_shape, check_tensor
from gossamer.integrations.scattermoe.kernels.ops import check_experts
from gossamer.ops.dispatch import dispatch
from gossamer.ops.grouped_matmul import grouped_matmul


def single2scatter(X: torch.Tensor, W: torch.Tensor, expert_idxs: torch.Tensor) -> torch.Tensor:
    """``Y[j] = X[j]·W[expert_idxs[0, j]]`` for the k experts of one token; a single row of ``X`` is used for all.

    Args:
        X: ``(1, C)`` or ``(k, C)``.
        W: ``(E, C, N)``; a transposed view of ``(E, N, C)`` is not copied; the dtype of ``X``.
        expert_idxs: ``(1, k)`` int32 or int64; ids of E and above mean no expert; their rows are zero.

    Returns:
        ``(k, N)``, differentiable in ``X`` and ``W``; ScatterMoE's has no gradients.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit, or (on the CPU) an id is negative.
    """
    check_tensor("W", W)
    check_shape("W", W, (None, None, None), "(E, C, N)")
    check_experts("W", W)
    check_index("expert_idxs", expert_idxs)
    check_shape("expert_idxs", expert_idxs, (1, None), "(1, k)")
    check_tensor("X", X)
    if X.dim() != 2 or X.shape[0] not in (1, expert_idxs.shape[1]):
        raise ValueError(f"X must have shape (1, C) or (k, C) with k = {expert_idxs.shape[1]}, got {tuple(X.shape)}")
    ids = expert_idxs if X.shape[0] == 1 else expert_idxs.t()
    return grouped_matmul(X, W.transpose(1, 2), dispatch(ids, W.shape[0])).reshape(ids.numel(), W.shape[2])
