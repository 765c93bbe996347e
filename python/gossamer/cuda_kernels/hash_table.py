"""Launchers of the CUDA hash table; arguments and results as in ``ops/_hash_table_reference.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import pointer, vector
from gossamer.cpu_kernels.hash_table import batch_of, results_of, view_of
from gossamer.cuda_kernels._stream import where

if TYPE_CHECKING:
    from gossamer.ops._hash_table_storage import Batch, Served, Storage

# A status of csrc/hash_table_core.h.
_REFUSED = 0


def result(shape: tuple[int, ...], values: torch.Tensor) -> torch.Tensor:
    """An uninitialised result in the dtype of ``values``."""
    return values.new_empty(shape)


def find(storage: Storage, keys: torch.Tensor) -> torch.Tensor:
    """The slot of each key ``(n,)``, −1 where absent: ``(n,)`` int64."""
    n, device = keys.shape[0], storage.digests.device
    slots = torch.empty(n, dtype=torch.int64, device=device)
    if n:
        with torch.cuda.device(device):
            _C.cuda_hash_table_find(view_of(storage), vector(keys), n, slots.data_ptr(), *where(device))
    return slots


def insert(storage: Storage, batch: Batch) -> Served:
    """Find or insert each key, as the reference does, but without counts, which would stall the stream."""
    keys, policy = batch.keys, batch.policy
    n, device = keys.shape[0], storage.digests.device
    slots = torch.empty(n, dtype=torch.int64, device=device)
    status = torch.zeros(n, dtype=torch.uint8, device=device)
    scored = storage.scores is not None
    victims = [torch.zeros_like(slots) for _ in range(2)] if scored else [None, None]
    if n == 0:
        return -1, None, slots, status, *victims
    with torch.cuda.device(device):
        arguments = (view_of(storage), batch_of(batch), results_of(slots, status, victims))
        stream = where(device)
        partitions = torch.empty(n, dtype=torch.int32, device=device)
        unordered = policy is None or batch.stamps
        if unordered:
            _C.cuda_hash_table_stamp(*arguments, partitions.data_ptr(), *stream)
        else:
            _C.cuda_hash_table_partitions(arguments[0], vector(keys), n, partitions.data_ptr(), *stream)
        if policy is None and n > batch.room:
            new_keys = keys[status == _REFUSED].unique().numel()
            if new_keys > batch.room:
                return new_keys, None, slots, status, *victims
        partitions, order = torch.sort(partitions, stable=True)
        edges = torch.arange(storage.fill.shape[0] + 1, dtype=torch.int32, device=device)
        begins = torch.searchsorted(partitions, edges)
        leaving = torch.zeros(1, dtype=torch.int32, device=device)
        arguments += tuple(map(pointer, (order, begins, leaving)))
        if not unordered:
            _C.cuda_hash_table_insert(*arguments, False, *stream)
        _C.cuda_hash_table_insert(*arguments, True, *stream)
    if batch.marks is not None:
        mark_slots(batch.marks, slots, batch.mark)
    return -1, None, slots, status, *victims


def gather_rows(values: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """``out = values[slots]``, zeros for −1; ``out`` is contiguous."""
    slots = slots.contiguous()
    if slots.numel():
        row_bytes = values.shape[1] * values.element_size()
        with torch.cuda.device(values.device):
            pointers = (slots.data_ptr(), slots.shape[0], out.data_ptr())
            _C.cuda_gather_rows(values.data_ptr(), row_bytes, *pointers, *where(values.device))


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    """Contiguous rows, aligned for the widest loads."""
    rows = rows.contiguous()
    return rows.clone() if rows.data_ptr() % 16 else rows


def start_rows(values: torch.Tensor, slots: torch.Tensor, status: torch.Tensor, rows: torch.Tensor | None) -> None:
    """``values[slots] = rows`` in place at positions that created their row; zeros for None."""
    if slots.numel() == 0:
        return
    rows = None if rows is None else _aligned(rows)
    row_bytes = values.shape[1] * values.element_size()
    with torch.cuda.device(values.device):
        pointers = (slots.data_ptr(), status.data_ptr(), slots.shape[0], 0 if rows is None else rows.data_ptr())
        _C.cuda_start_rows(values.data_ptr(), row_bytes, *pointers, *where(values.device))


def mark_slots(array: torch.Tensor, slots: torch.Tensor, value: int) -> None:
    """``array[slots] = value`` in place, slots outside skipped; ``array (S,)`` int64 or bool, ``slots (n,)``."""
    if slots.numel():
        with torch.cuda.device(array.device):
            pointers = (slots.data_ptr(), slots.shape[0])
            stream = where(array.device)
            array_of = (array.data_ptr(), array.element_size(), array.shape[0])
            _C.cuda_mark_slots(*array_of, *pointers, int(value), *stream)


def scatter_rows(values: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """``values[slots] = rows`` in place, −1 skipped; if slots repeat, the last position wins."""
    if slots.numel() == 0:
        return
    slots, order = torch.sort(slots, stable=True)
    rows = _aligned(rows)
    row_bytes = values.shape[1] * values.element_size()
    with torch.cuda.device(values.device):
        pointers = (slots.data_ptr(), order.data_ptr(), slots.shape[0], rows.data_ptr())
        _C.cuda_scatter_rows(values.data_ptr(), row_bytes, *pointers, *where(values.device))
