"""Launchers of the CUDA hash table; the arrays and the meaning of results are those of the reference in ``ops``."""

from __future__ import annotations

from typing import Any

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import vector


def _view(storage: Any) -> _C.HashTableView:
    arrays = (storage.digests, storage.keys, storage.scores, storage.buckets, storage.fill, storage.quota)
    pointers = (0 if a is None else a.data_ptr() for a in arrays)
    return _C.HashTableView(*pointers, storage.fill.shape[0], storage.partition_buckets)


def _where(device: torch.device) -> tuple[int, int]:
    return device.index or 0, torch.cuda.current_stream(device).cuda_stream


def find(storage: Any, keys: torch.Tensor) -> torch.Tensor:
    """The slot of each key ``(n,)``, −1 where absent: ``(n,)`` int64."""
    n, device = keys.shape[0], storage.digests.device
    slots = torch.empty(n, dtype=torch.int64, device=device)
    if n:
        with torch.cuda.device(device):
            _C.cuda_hash_table_find(_view(storage), vector(keys), n, slots.data_ptr(), *_where(device))
    return slots


def insert(
    storage: Any,
    keys: torch.Tensor,
    policy: int,
    stamp: int,
    serial: int,
    scores: torch.Tensor | None,
    room: int,
) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Find or insert each key; arguments and results as the reference's."""
    n, device = keys.shape[0], storage.digests.device
    scores = None if scores is None else scores.contiguous()
    slots = torch.empty(n, dtype=torch.int64, device=device)
    status = torch.zeros(n, dtype=torch.uint8, device=device)
    scored = storage.scores is not None
    victims = [torch.zeros_like(slots) for _ in range(2)] if scored else [None, None]
    if n == 0:
        return -1, slots, status, *victims
    with torch.cuda.device(device):
        view, where = _view(storage), _where(device)
        partitions = torch.empty(n, dtype=torch.int32, device=device)
        _C.cuda_hash_table_partitions(view, vector(keys), n, partitions.data_ptr(), *where)
        partitions, order = torch.sort(partitions, stable=True)
        edges = torch.arange(storage.fill.shape[0] + 1, dtype=torch.int32, device=device)
        begins = torch.searchsorted(partitions, edges)
        leaving = torch.zeros(1, dtype=torch.int32, device=device)
        pointers = (t.data_ptr() if t is not None else 0 for t in (scores, slots, status, *victims, leaving))
        batch = (order.data_ptr(), begins.data_ptr(), policy, stamp, serial, *pointers)
        _C.cuda_hash_table_insert(view, vector(keys), n, *batch, False, *where)
        if not scored and n > room:
            new_keys = keys[status == 0].unique().numel()
            if new_keys > room:
                return new_keys, slots, status, *victims
        _C.cuda_hash_table_insert(view, vector(keys), n, *batch, True, *where)
    return -1, slots, status, *victims


def gather_rows(values: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """``values[slots]``, zeros for −1."""
    slots = slots.contiguous()
    out = torch.empty(slots.shape[0], values.shape[1], dtype=values.dtype, device=values.device)
    if slots.numel():
        row_bytes = values.shape[1] * values.element_size()
        with torch.cuda.device(values.device):
            pointers = (slots.data_ptr(), slots.shape[0], out.data_ptr())
            _C.cuda_gather_rows(values.data_ptr(), row_bytes, *pointers, *_where(values.device))
    return out


def scatter_rows(values: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """``values[slots] = rows`` in place, −1 skipped; of equal slots the last position stays."""
    if slots.numel() == 0:
        return
    slots, order = torch.sort(slots, stable=True)
    rows = rows.contiguous()
    row_bytes = values.shape[1] * values.element_size()
    with torch.cuda.device(values.device):
        pointers = (slots.data_ptr(), order.data_ptr(), slots.shape[0], rows.data_ptr())
        _C.cuda_scatter_rows(values.data_ptr(), row_bytes, *pointers, *_where(values.device))
