"""The record of ragged groups of rows that operators take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.compiler import is_compiling

from gossamer._checks import check_shape, check_tensor
from gossamer.ops._registration import is_plain

MAX_ROWS = 2**31 - 1


class Groups(NamedTuple):
    """The tensors of a :class:`gossamer.Dispatch`, contiguous int32.

    Attributes:
        slots: ``(R,)``, the slot of each sorted row: all T·K of them, or the first of a ragged dispatch.
        rows: ``(T·K,)``, the sorted row of each slot.
        offsets: ``(E+1,)``, where each group starts.
    """

    slots: torch.Tensor
    rows: torch.Tensor
    offsets: torch.Tensor


NAMES = ("dispatch.slots", "dispatch.rows", "dispatch.offsets")


def check_groups(
    groups: Groups, num_rows: int, num_slots: int, num_experts: int, names: tuple[str, str, str] = NAMES
) -> None:
    """Check that the tensors are contiguous int32 of the right shapes on one device and, on the CPU, consistent.

    Offsets must ascend from 0 to at most ``num_rows``, every slot must occur once, and ``rows`` must be the inverse of
    ``slots``. Contents are read only from ordinary tensors on the CPU, where reading does not wait for a device.

    Args:
        groups: what is checked.
        num_rows: number of rows of buffers of sorted rows.
        num_slots: T·K.
        num_experts: E.
        names: names of the three tensors in error messages.

    Raises:
        TypeError: one is not a tensor, or has another dtype.
        ValueError: a shape, strides, a device or contents do not fit.
    """
    sizes = (num_slots, "(T·K,)"), (num_slots, "(T·K,)"), (num_experts + 1, "(E+1,)")
    for name, tensor, (size, symbols) in zip(names, groups, sizes, strict=True):
        check_tensor(name, tensor)
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be torch.int32, got {tensor.dtype}")
        check_shape(name, tensor, (size,), symbols)
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got stride {tensor.stride(0)}")
    slots, rows, offsets = groups
    of_slots, of_rows, of_offsets = names
    for name, tensor in ((of_rows, rows), (of_offsets, offsets)):
        if tensor.device != slots.device:
            raise ValueError(f"{name} must be on the device of {of_slots}, {slots.device}, got {tensor.device}")
    if is_compiling() or not slots.is_cpu or not is_plain(groups):
        return
    first, last, falls = int(offsets[0]), int(offsets[-1]), (offsets.diff() < 0).nonzero()
    if first != 0 or last > num_rows or falls.numel():
        got = f"a decrease after {int(offsets[falls[0, 0]])}" if falls.numel() else f"{first} to {last}"
        raise ValueError(f"{of_offsets} must ascend from 0 to at most {num_rows} rows, got {got}")
    if not num_slots:
        return
    low, high = int(slots.min()), int(slots.max())
    if low < 0 or high >= num_slots:
        raise ValueError(f"{of_slots} must be in [0, T·K={num_slots}), got values from {low} to {high}")
    found = rows.index_select(0, slots)
    wrong = (found != torch.arange(num_slots, dtype=torch.int32, device="cpu")).nonzero()
    if wrong.numel():
        row = int(wrong[0, 0])
        raise ValueError(
            f"{of_rows} must be the inverse of {of_slots}, which holds each slot once, got row {int(found[row])} for "
            f"slot {int(slots[row])} of row {row}"
        )
