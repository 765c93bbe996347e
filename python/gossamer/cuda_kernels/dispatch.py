"""Launcher of the CUDA counting sort."""

from __future__ import annotations

import torch

from gossamer import _C
from gossamer.cuda_kernels._stream import where


def dispatch(expert_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``slots, rows, offsets`` of :func:`gossamer.dispatch`, in two launches, or in one for few slots."""
    num_rows, device = expert_ids.numel(), expert_ids.device
    slots = torch.empty(num_rows, dtype=torch.int32, device=device)
    rows = torch.empty_like(slots)
    if num_rows == 0:
        return slots, rows, torch.zeros(num_experts + 1, dtype=torch.int32, device=device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    size = _C.cuda_dispatch_scratch_size(num_rows, num_experts)
    scratch = torch.empty(size, dtype=torch.int32, device=device)
    _C.cuda_dispatch(
        expert_ids.data_ptr(),
        expert_ids.dtype == torch.int64,
        num_rows,
        expert_ids.shape[1],
        *expert_ids.stride(),
        num_experts,
        slots.data_ptr(),
        rows.data_ptr(),
        offsets.data_ptr(),
        scratch.data_ptr(),
        *where(device),
    )
    return slots, rows, offsets
