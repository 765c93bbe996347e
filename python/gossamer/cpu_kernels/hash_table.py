"""Launchers of the native hash table; arguments and results as in ``ops/_hash_table_reference.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer import _C
from gossamer.cpu_kernels._native import DTYPES, empty_huge, matrix, pointer, vector
from gossamer.cpu_kernels.gather_reduce import native_bags

if TYPE_CHECKING:
    from gossamer.ops._bags import Bags
    from gossamer.ops._hash_table_storage import Batch, Served, Storage


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An array of a new table, on huge pages if the system grants them."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    advise_huge_pages(tensor)
    return tensor


def advise_huge_pages(tensor: torch.Tensor) -> None:
    """Ask for huge pages under memory before it is first touched."""
    _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)


def collapse_huge_pages(tensor: torch.Tensor) -> None:
    """Move memory that is in use to huge pages."""
    _C.collapse_huge_pages(tensor.data_ptr(), tensor.nbytes)


def result(shape: tuple[int, ...], values: torch.Tensor) -> torch.Tensor:
    """An uninitialised result in the dtype of ``values``."""
    return empty_huge(shape, values.dtype)


def view_of(storage: Storage) -> _C.HashTableView:
    """A table's arrays as kernels take them."""
    arrays = (storage.digests, storage.keys, storage.scores, storage.buckets, storage.fill, storage.quota)
    return _C.HashTableView(*map(pointer, arrays), storage.fill.shape[0], storage.partition_buckets)


def batch_of(batch: Batch) -> _C.HashBatch:
    """A batch as kernels take it."""
    keys, scores, policy, stamp, serial, room, marks, mark = batch
    numbers = (policy or "none", stamp, serial, room)
    return _C.HashBatch(vector(keys), keys.shape[0], pointer(scores), *numbers, pointer(marks), mark)


def results_of(slots: torch.Tensor, status: torch.Tensor, victims: list[torch.Tensor | None]) -> _C.HashResults:
    """Where kernels write the rows, the status and the victims' keys and scores of a batch."""
    return _C.HashResults(slots.data_ptr(), status.data_ptr(), *map(pointer, victims))


def find(storage: Storage, keys: torch.Tensor) -> torch.Tensor:
    """The slot of each key ``(n,)``, −1 where absent: ``(n,)`` int64."""
    slots = empty_huge((keys.shape[0],), torch.int64)
    _C.hash_table_find(view_of(storage), vector(keys), keys.shape[0], slots.data_ptr(), torch.get_num_threads())
    return slots


def reduce(storage: Storage, bags: Bags) -> torch.Tensor:
    """Sums or means ``(B, D)`` of the values of the keys that bags list instead of rows; absent keys add nothing."""
    keys, values = bags.index.reshape(-1), storage.values
    slots = empty_huge(tuple(bags.index.shape), torch.int64)
    lists, _alive = native_bags(bags._replace(index=slots, drop=True))
    out = empty_huge(bags.result_shape(values), values.dtype)
    table = (matrix(values), *values.shape)
    _C.hash_table_reduce(
        view_of(storage), vector(keys), *table, lists, slots.data_ptr(), matrix(out), torch.get_num_threads()
    )
    return out


def insert(storage: Storage, batch: Batch) -> Served:
    """Find or insert each key, as the reference does."""
    n = batch.keys.shape[0]
    slots, status = empty_huge((n,), torch.int64), torch.empty(n, dtype=torch.uint8, device="cpu")
    victims = [empty_huge((n,), torch.int64) for _ in range(2)] if storage.scores is not None else [None, None]
    results = results_of(slots, status, victims)
    too_many, *counts = _C.hash_table_insert(view_of(storage), batch_of(batch), results, torch.get_num_threads())
    if counts[1] == 0:
        victims = [None, None]
    return too_many, tuple(counts), slots, status, *victims


def gather_rows(values: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """``out = values[slots]``, zeros for −1; ``out`` is contiguous."""
    slots = slots.contiguous()
    row_bytes = values.shape[1] * values.element_size()
    _C.gather_rows(
        values.data_ptr(), row_bytes, slots.data_ptr(), slots.shape[0], out.data_ptr(), torch.get_num_threads()
    )


def start_rows(values: torch.Tensor, slots: torch.Tensor, status: torch.Tensor, rows: torch.Tensor | None) -> None:
    """``values[slots] = rows`` in place for positions that made their row; zeros for None."""
    rows = None if rows is None else rows.contiguous()
    row_bytes = values.shape[1] * values.element_size()
    pointers = (slots.data_ptr(), status.data_ptr(), slots.shape[0], 0 if rows is None else rows.data_ptr())
    _C.start_rows(values.data_ptr(), row_bytes, *pointers, torch.get_num_threads())


def uniform_rows(values: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, seed: int, bound: float) -> None:
    """``values[slots]`` become uniform in ``(−bound, bound)``, determined by key, column and seed."""
    table = (values.data_ptr(), DTYPES[values.dtype], values.shape[1])
    lists = (slots.data_ptr(), vector(keys), slots.shape[0])
    _C.uniform_rows(*table, *lists, seed, bound, torch.get_num_threads())


def mark_slots(array: torch.Tensor, slots: torch.Tensor, value: int) -> None:
    """``array[slots] = value`` in place, −1 skipped; ``array (S,)`` int64 or bool, ``slots (n,)``."""
    pointers = (slots.data_ptr(), slots.shape[0])
    _C.mark_slots(array.data_ptr(), array.element_size(), *pointers, int(value), torch.get_num_threads())


def scatter_rows(values: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """``values[slots] = rows`` in place, −1 skipped; if slots repeat, the last position wins."""
    slots, rows = slots.contiguous(), rows.contiguous()
    row_bytes = values.shape[1] * values.element_size()
    _C.scatter_rows(
        values.data_ptr(), row_bytes, slots.data_ptr(), slots.shape[0], rows.data_ptr(), torch.get_num_threads()
    )
