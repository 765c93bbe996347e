"""What calls of a hash table take and give: checks of arguments, and what a batch of inserts did."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gossamer._checks import check_shape, check_tensor
from gossamer.ops._hash_table_reference import INSERTED, REPLACED

_COUNTING = ("lfu", "epoch_lfu")


@dataclass(frozen=True)
class Inserted:
    """What :meth:`HashTable.insert_rows` did with each key of a batch of n.

    Attributes:
        rows: ``(n,)`` int64, rows of :attr:`HashTable.values`; −1 for a refused key.
        status: ``(n,)`` uint8, what the kernels say of each position.
        victim_keys: ``(n,)`` int64, the key that the position evicted, where it did; None where none can have.
        victim_scores: ``(n,)`` int64, that key's score; or None.
        known: the counts, where they are known.
    """

    rows: torch.Tensor
    status: torch.Tensor
    victim_keys: torch.Tensor | None
    victim_scores: torch.Tensor | None
    known: tuple[int, int, int] | None = None

    @property
    def inserted(self) -> torch.Tensor:
        """``(n,)`` bool, whether this position made the row; once for each new key."""
        return self.status >= INSERTED

    @property
    def evicted(self) -> torch.Tensor:
        """``(n,)`` bool, whether it evicted another key to do so."""
        return self.status == REPLACED

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many positions inserted, evicted, and were refused; on CUDA this waits for the device."""
        if self.known is not None:
            return self.known
        return int(self.inserted.sum()), int(self.evicted.sum()), int((self.rows < 0).sum())


class ArgumentChecks:
    """The checks of a table's arguments, by all but what its kernels look at."""

    dim: int
    evict: str | None
    key_dtype: torch.dtype
    value_dtype: torch.dtype
    device: torch.device
    values: torch.Tensor

    def _check_place(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.device != self.values.device:
            raise ValueError(f"{name} must be on the table's device, {self.device}, got {tensor.device}")

    def _check_keys(self, keys: torch.Tensor) -> torch.Tensor:
        check_tensor("keys", keys)
        check_shape("keys", keys, (None,), "(n,)")
        if keys.dtype != self.key_dtype:
            raise TypeError(f"keys must have the table's key_dtype, {self.key_dtype}, got {keys.dtype}")
        self._check_place("keys", keys)
        return keys

    def _check_values(self, values: torch.Tensor, count: int) -> torch.Tensor:
        check_tensor("values", values)
        check_shape("values", values, (count, self.dim), "(n, D)")
        if values.dtype != self.value_dtype:
            raise TypeError(f"values must have the table's value_dtype, {self.value_dtype}, got {values.dtype}")
        self._check_place("values", values)
        return values.detach()

    def _check_marks(self, name: str, array: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
        """One value for each slot, where kernels write without a look."""
        check_tensor(name, array)
        check_shape(name, array, (self.values.shape[0],), "(slots,), one for each row of values")
        if array.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {array.dtype}")
        if not array.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got stride {array.stride()}")
        self._check_place(name, array)

    def _check_rows(self, rows: torch.Tensor, least: int) -> torch.Tensor:
        check_tensor("rows", rows)
        check_shape("rows", rows, (None,), "(n,)")
        if rows.dtype != torch.int64:
            raise TypeError(f"rows must be int64, got {rows.dtype}")
        self._check_place("rows", rows)
        # On CUDA the test would stall the stream.
        if rows.device.type == "cpu" and rows.numel():
            low, high = (int(row) for row in rows.aminmax())
            if low < least or high >= self.values.shape[0]:
                raise ValueError(f"rows must be in [{least}, {self.values.shape[0]}), got {low} to {high}")
        return rows.contiguous()

    def _check_scores(self, scores: torch.Tensor | None, count: int) -> torch.Tensor | None:
        if scores is None:
            if self.evict == "score":
                raise ValueError("scores must be given: evict='score' has no others")
            return None
        if self.evict not in ("score", *_COUNTING):
            raise ValueError(f"scores must be None with evict={self.evict!r}, which sets its own")
        return self._checked_scores(scores, count, 0 if self.evict in _COUNTING else None)

    def _checked_scores(self, scores: torch.Tensor, count: int, least: int | None) -> torch.Tensor:
        check_tensor("scores", scores)
        check_shape("scores", scores, (count,), "(n,)")
        if scores.dtype != torch.int64:
            raise TypeError(f"scores must be int64, got {scores.dtype}")
        self._check_place("scores", scores)
        # On CUDA the test would stall the stream.
        if least is not None and scores.device.type == "cpu" and count and int(scores.min()) < least:
            raise ValueError(f"scores must be at least {least} with evict={self.evict!r}, got {int(scores.min())}")
        return scores
