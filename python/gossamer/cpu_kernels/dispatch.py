"""Launcher of the native counting sort."""

from __future__ import annotations

import torch

from gossamer import _C
from gossamer._checks import raise_negative
from gossamer.cpu_kernels._native import DTYPES


def dispatch(expert_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``slots (R,)``, ``rows (R,)`` and ``offsets (E+1,)``, int32, of ``expert_ids (T, K)`` of any strides.

    Raises:
        ValueError: an id is negative.
    """
    num_tokens, top_k = expert_ids.shape
    slots = torch.empty(num_tokens * top_k, dtype=torch.int32)
    rows = torch.empty_like(slots)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32)
    negative = _C.dispatch(
        expert_ids.data_ptr(),
        DTYPES[expert_ids.dtype],
        num_tokens,
        top_k,
        *expert_ids.stride(),
        num_experts,
        slots.data_ptr(),
        rows.data_ptr(),
        offsets.data_ptr(),
        torch.get_num_threads(),
    )
    if negative >= 0:
        raise_negative("expert_ids", expert_ids, negative)
    return slots, rows, offsets
