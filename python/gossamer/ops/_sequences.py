"""Packed sequences: the checks of ``cu_seqlens`` and the number of sequences."""

from __future__ import annotations

import itertools

import torch

from gossamer._checks import check_index


def check_cu_seqlens(cu_seqlens: torch.Tensor | None, batch: int) -> None:
    """``cu_seqlens`` must be ``(N + 1,)`` int32 or int64, of a batch of one."""
    if cu_seqlens is None:
        return
    check_index("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (N + 1,), got {tuple(cu_seqlens.shape)}")
    if batch != 1:
        raise ValueError(f"a pack of sequences must have batch size 1 with cu_seqlens, got B={batch}")


def check_bounds(cu_seqlens: torch.Tensor | None, length: int) -> None:
    """On the CPU ``cu_seqlens`` must ascend from 0 to ``length``. Reads values, so it is called inside operators."""
    if cu_seqlens is None or cu_seqlens.device.type != "cpu":
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens must ascend from 0 to T={length}, got {bounds}")


def num_sequences(batch: int, cu_seqlens: torch.Tensor | None) -> int:
    """N with ``cu_seqlens``, otherwise B."""
    return batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
