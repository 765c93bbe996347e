"""Launchers of the native lists of an expert layer's blocks."""

from __future__ import annotations

import torch

from gossamer import _C


def expert_topology(offsets: torch.Tensor, sizes: list[int], rows: int, wide: int, bm: int) -> list[torch.Tensor]:
    """What :func:`gossamer.ops._expert_topology.expert_topology` gives; ``sizes`` are those of its results."""
    found = [torch.empty(size, dtype=torch.int32) for size in sizes]
    pointers = [t.data_ptr() for t in found]
    experts = offsets.shape[0] - 1
    _C.expert_topology(offsets.data_ptr(), experts, rows, wide, bm, pointers, torch.get_num_threads())
    return found


def expert_places(
    offsets: torch.Tensor, padded_offsets: torch.Tensor, slots: torch.Tensor, padded_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`gossamer.ops._expert_topology.expert_places` gives; contiguous int32 in and out.

    Raises:
        ValueError: an expert has more rows than ``padded_offsets`` gives it.
    """
    slots_of_rows = torch.empty(padded_rows, dtype=torch.int32)
    rows_of_slots = torch.empty_like(slots)
    fits = _C.expert_places(
        offsets.data_ptr(),
        padded_offsets.data_ptr(),
        slots.data_ptr(),
        offsets.shape[0] - 1,
        slots.shape[0],
        padded_rows,
        slots_of_rows.data_ptr(),
        rows_of_slots.data_ptr(),
        torch.get_num_threads(),
    )
    if not fits:
        raise ValueError("the topology must be the one that BlockTopology.from_dispatch made from dispatch")
    return slots_of_rows, rows_of_slots
