"""Launchers of the native lists of an expert layer's blocks."""

from __future__ import annotations

import torch

from gossamer import _C


def expert_topology(offsets: torch.Tensor, sizes: list[int], rows: int, wide: int, bm: int) -> list[torch.Tensor]:
    """What :func:`gossamer.ops._expert_topology.expert_topology` gives; ``sizes`` are those of its results.

    Raises:
        ValueError: ``offsets`` decrease, or need more than ``rows`` block rows.
    """
    found = [torch.empty(size, dtype=torch.int32) for size in sizes]
    pointers = [t.data_ptr() for t in found]
    experts = offsets.shape[0] - 1
    if not _C.expert_topology(offsets.data_ptr(), experts, rows, wide, bm, pointers, torch.get_num_threads()):
        raise ValueError(
            f"dispatch.offsets must ascend from 0 and need at most {rows} block rows of {bm}, got {offsets.tolist()}"
        )
    return found


def expert_places(
    offsets: torch.Tensor, padded_offsets: torch.Tensor, slots: torch.Tensor, padded_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`gossamer.ops._expert_topology.expert_places` gives; contiguous int32 in and out.

    Raises:
        ValueError: an expert has more rows than ``padded_offsets`` gives it, or ``slots`` are none.
    """
    slots_of_rows = torch.empty(padded_rows, dtype=torch.int32)
    rows_of_slots = torch.empty_like(slots)
    misfit = _C.expert_places(
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
    if misfit >= 0:
        rows, room = (int(t[misfit + 1] - t[misfit]) for t in (offsets, padded_offsets))
        raise ValueError(
            "the topology must be the one that BlockTopology.from_dispatch made from dispatch: expert "
            f"{misfit} has {rows} rows and room for {room}, of {slots.shape[0]} slots and {padded_rows} padded rows"
        )
    if misfit == -2:
        raise ValueError(f"dispatch.slots must be slots in [0, {slots.shape[0]})")
    return slots_of_rows, rows_of_slots
