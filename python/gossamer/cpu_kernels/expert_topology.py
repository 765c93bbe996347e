"""Launchers of the native lists of an expert layer's blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer import _C

if TYPE_CHECKING:
    from gossamer.ops._expert_topology import ExpertPlaces, ExpertTopology


def expert_topology(args: ExpertTopology) -> tuple[torch.Tensor, ...]:
    """The lists of blocks; contiguous int32 in and out.

    Raises:
        ValueError: ``offsets`` decrease, or need more than ``rows`` block rows.
    """
    (offsets, rows, wide, bm), found = args, args.new_lists()
    pointers = [t.data_ptr() for t in found]
    experts = offsets.shape[0] - 1
    if not _C.expert_topology(offsets.data_ptr(), experts, rows, wide, bm, pointers, torch.get_num_threads()):
        raise ValueError(
            f"dispatch.offsets must ascend from 0 and need at most {rows} block rows of {bm}, got {offsets.tolist()}"
        )
    return found


def expert_places(args: ExpertPlaces) -> tuple[torch.Tensor, torch.Tensor]:
    """The slot in each padded row, and the padded row of each slot; contiguous int32 in and out.

    Raises:
        ValueError: an expert has more rows than ``padded_offsets`` gives it, or ``slots`` holds a number that is not a
            slot.
    """
    offsets, padded_offsets, slots, padded_rows = args
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
