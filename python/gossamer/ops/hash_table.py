"""A table that gives each 64-bit key its own row, with reproducible batches of finds, inserts and evictions."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from gossamer import _backend
from gossamer._checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    MAX_SIZE,
    check_device,
    check_shape,
    check_strided,
    check_tensor,
)
from gossamer.ops import _hash_table_reference as reference
from gossamer.ops._bags import Bags
from gossamer.ops._hash_table_storage import BUCKET_SLOTS, INSERTED, POLICIES, Batch, Inserted, Storage
from gossamer.ops.gather_reduce import gather_reduce

EVICT = POLICIES
# Policies that count touches and add given scores.
_COUNTING = ("lfu", "epoch_lfu")
_MAX_EPOCH = 2**31 - 1
# The highest score that an import into an lru table may contain, since its clock continues from there.
_MOST_CLOCK = 2**62
_LAST_SERIAL = 2**31 - 1


class HashTableFull(ValueError):
    """Keys were refused because a table without eviction has no room for them; the table is unchanged."""


@functools.cache
def _kernels(backend: str) -> ModuleType:
    if backend == "reference":
        return reference
    if backend == "native":
        from gossamer.cpu_kernels import hash_table
    else:
        from gossamer.cuda_kernels import hash_table
    return hash_table


def _joined(parts: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    if len(parts) == 1:
        return parts[0]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


class HashTable:
    """A hash table in which every key owns a row of ``dim`` values, and no two keys ever share one.

    All calls take batches of keys, ``(n,)`` in ``key_dtype``; every value of that dtype is a valid key, and a batch may
    contain a key many times. A batch is processed as if its keys came one after another: first the keys that are in the
    table, then the others in order, so the result does not depend on threads or their timing. A batch does not evict
    keys that it has touched itself. Calls that take or return values process a batch in pieces of ``capacity // 4``
    keys, so later keys may evict earlier ones; :meth:`rows` processes the whole batch at once, and refuses keys that do
    not fit next to the batch's other keys.

    Keys are stored in buckets of 16 slots, each with a one-byte digest. A key has two candidate buckets, and buckets
    belong to partitions of about a thousand slots. When a key's partition holds its share of ``capacity``, the key with
    the lowest score in the two buckets is evicted (the first of equal ones). A table of up to about 1800 keys is one
    partition, so it evicts nothing before it is full. In larger tables partitions fill unevenly, and the first
    evictions occur at about 90 % load.

    Scores by ``evict``:

    - ``"lru"``: the number of the last call that touched the key.
    - ``"lfu"``: the number of touches, or the sum of the given ``scores``.
    - ``"epoch_lru"``, ``"epoch_lfu"``: the same in the lower 32 bits, with :attr:`epoch` in the upper bits: keys last
      touched in an older epoch are evicted first. Counts carry over into the next epoch and saturate at 2³² − 1.
    - ``"score"``: the last score given by the caller; a new key whose score is below every candidate's is refused.
    - ``None``: nothing is evicted; a batch that does not fit raises :class:`HashTableFull` and changes nothing.

    ``find``, ``contains``, ``rows`` without ``insert``, and ``export`` do not touch. Calls may come from several
    threads: each holds the table's lock. Not traced by ``torch.compile``.

    Args:
        dim: D, number of values per row.
        capacity: maximum number of keys, at least 1, also without eviction; :meth:`reserve` raises it.
        key_dtype: ``torch.int64`` or ``torch.int32``.
        value_dtype: ``torch.float32``, ``torch.float16`` or ``torch.bfloat16``.
        device: device of the table.
        evict: the policy above.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: ``dim`` or ``capacity`` is below 1, or ``evict`` is not a known policy.

    The two-choice buckets with digests and scores follow HierarchicalKV (arXiv 2603.17168).
    """

    def __init__(
        self,
        dim: int,
        capacity: int,
        *,
        key_dtype: torch.dtype = torch.int64,
        value_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        evict: str | None = None,
    ) -> None:
        if key_dtype not in INDEX_DTYPES:
            raise TypeError(f"key_dtype must be torch.int64 or torch.int32, got {key_dtype}")
        if value_dtype not in FLOAT_DTYPES:
            raise TypeError(f"value_dtype must be float32, float16 or bfloat16, got {value_dtype}")
        for name, value in (("dim", dim), ("capacity", capacity)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if evict not in EVICT:
            raise ValueError(f"evict must be one of {EVICT}, got {evict!r}")
        if device is None:
            raise TypeError("device must be a torch.device or its name, got NoneType")
        check_device("device", device)
        self.dim, self.capacity, self.evict = dim, capacity, evict
        self.key_dtype, self.value_dtype, self.device = key_dtype, value_dtype, torch.device(device)
        self.lock = threading.RLock()
        self._clock = self._serial = self._epoch = 0
        if self.device.type == "cuda" and (reason := _backend.cuda_kernels_unavailable()):
            raise ValueError(f"device must be one with gossamer's CUDA kernels, got {self.device}: {reason}")
        self._storage = self._allocate(capacity)
        # The device with its index, so that it does not depend on the current device later.
        self.device = self._storage.values.device

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.RLock()

    def __repr__(self) -> str:
        return (
            f"HashTable(dim={self.dim}, capacity={self.capacity}, len={len(self)}, key_dtype={self.key_dtype}, "
            f"value_dtype={self.value_dtype}, device={self.device}, evict={self.evict!r})"
        )

    def __len__(self) -> int:
        return int(self._storage.fill.sum())

    def _kernels(self) -> ModuleType:
        return _kernels(_backend.resolve("hash_table", self._storage.digests))

    def cast_(self, value_dtype: torch.dtype) -> None:
        """Convert the values to another dtype, rounding once; keys and rows do not change.

        Raises:
            TypeError: ``value_dtype`` is not float32, float16 or bfloat16.
        """
        if value_dtype not in FLOAT_DTYPES:
            raise TypeError(f"value_dtype must be float32, float16 or bfloat16, got {value_dtype}")
        with self.lock:
            self._storage = dataclasses.replace(self._storage, values=self._storage.values.to(value_dtype))
            self.value_dtype = value_dtype

    def _allocate(self, capacity: int) -> Storage:
        native = self.device.type == "cpu" and _backend.native_unavailable() is None
        empty = _kernels("native").empty if native else None
        values = (self.dim, self.value_dtype)
        return Storage.allocate(capacity, self.evict is not None, values, self.device, empty)

    @property
    def values(self) -> torch.Tensor:
        """The value storage, ``(slots, D)``; :meth:`rows` gives the rows of keys; other rows are undefined."""
        return self._storage.values

    @property
    def load_factor(self) -> float:
        """Number of keys as a fraction of ``capacity``."""
        return len(self) / self.capacity

    @property
    def epoch(self) -> int:
        """The upper half of the scores that the epoch policies set, from 0 to 2³¹ − 1."""
        return self._epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_EPOCH:
            raise ValueError(f"epoch must be an int in [0, 2**31), got {value!r}")
        self._epoch = value

    def _pieces(self, *tensors: torch.Tensor | None) -> Iterator[list[torch.Tensor | None]]:
        """The tensors in pieces so small that the table does not evict keys of the same piece."""
        count = tensors[0].shape[0]
        size = max(self.capacity // 4, 1) if self.evict is not None else max(count, 1)
        for begin in range(0, max(count, 1), size):
            yield [None if t is None else t[begin : begin + size] for t in tensors]

    def _insert(self, keys, scores, policy: str | None, marks=None, mark=0) -> Inserted:
        stamp = self._epoch << 32 if policy in ("epoch_lru", "epoch_lfu") else 0
        if policy in ("lru", "epoch_lru"):
            stamp |= self._clock + 1 if policy == "lru" else (self._clock + 1) & 0xFFFFFFFF
        if self._serial == _LAST_SERIAL:
            self._storage.buckets[:, 1:].zero_()
            self._serial = 0
        # Only a table without eviction needs the count, and reading it on CUDA stalls the stream.
        room = self.capacity - len(self) if policy is None else 0
        scores = None if scores is None else scores.contiguous()
        batch = Batch(keys, scores, policy, stamp, self._serial + 1, room, marks, mark)
        too_many, counts, *found = self._kernels().insert(self._storage, batch)
        if too_many >= 0:
            raise HashTableFull(
                f"the table is full: {too_many} new keys for {room} free rows of capacity={self.capacity}, with "
                "evict=None; reserve() makes room, erase() frees some"
            )
        self._clock, self._serial = self._clock + 1, self._serial + 1
        return Inserted(*found, counts)

    def rows(self, keys: torch.Tensor, insert: bool = False, scores: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of :attr:`values` that belong to the keys, for use with ``gather_reduce`` and ``sparse_update_``.

        Args:
            keys: ``(n,)``.
            insert: whether absent keys get a row of zeros; otherwise, or if refused, their row is −1.
            scores: as in :meth:`insert_or_assign`; only with ``insert``.

        Returns:
            ``(n,)`` int64. A row is valid until its key is removed or :meth:`reserve` moves all rows.

        Raises:
            HashTableFull: with ``evict=None``, the new keys do not fit.
            TypeError, ValueError: keys or scores are not what the table takes.
        """
        if insert:
            return self.insert_rows(keys, scores).rows
        if scores is not None:
            raise ValueError("scores must be None without insert, which sets none")
        with self.lock:
            return self._kernels().find(self._storage, self._check_keys(keys))

    def _reduce(
        self, keys: torch.Tensor, offsets: torch.Tensor | None, weights: torch.Tensor | None, mode: str
    ) -> torch.Tensor:
        """:func:`gossamer.gather_reduce` of the rows of ``keys``, shaped like its index and checked as such.

        Absent keys contribute nothing. Differentiable in ``weights``.
        """
        learns = weights is not None and weights.requires_grad and torch.is_grad_enabled()
        native = _backend.resolve("hash_table", self._storage.digests) == "native"
        with self.lock:
            if mode == "max" or learns or not native:
                rows = self.rows(keys.reshape(-1)).view(keys.shape)
                return gather_reduce(self.values, rows, offsets, weights, mode=mode, bounds="drop")
            self._check_keys(keys.reshape(-1))
            weights = None if weights is None else weights.detach()
            return self._kernels().reduce(self._storage, Bags(keys, offsets, weights, mode=mode))

    def insert_rows(
        self,
        keys: torch.Tensor,
        scores: torch.Tensor | None = None,
        *,
        marks: torch.Tensor | None = None,
        mark: int = 0,
    ) -> Inserted:
        """:meth:`rows` with ``insert``, returning the outcome per key: new rows hold zeros, and values of evicted keys
        are lost.

        ``marks (slots,)``, contiguous int64 parallel to :attr:`values`, is set to ``mark`` at the batch's rows.
        """
        keys = self._check_keys(keys)
        scores = self._check_scores(scores, keys.shape[0])
        if not isinstance(mark, int) or not -(2**63) <= mark < 2**63:
            raise TypeError(f"mark must be an int of 64 bits, got {mark!r}")
        with self.lock:
            if marks is not None:
                self._check_marks("marks", marks, (torch.int64,))
            done = self._insert(keys, scores, self.evict, marks, mark)
            if done.known is None or done.known[0]:
                self._kernels().start_rows(self.values, done.rows, done.status, None)
            return done

    def start_uniform(self, rows: torch.Tensor, keys: torch.Tensor, seed: int, bound: float) -> None:
        """Set rows to values uniform in ``(−bound, bound)`` that depend only on key, column and seed.

        Args:
            rows: ``(n,)`` int64, distinct rows of :attr:`values`.
            keys: ``(n,)``, the keys of the rows.
            seed: in ``[0, 2⁶³)``.
            bound: at least 0.
        """
        kernels = self._kernels() if self.device.type == "cpu" else reference
        rows, keys = self._check_rows(rows, 0), self._check_keys(keys)
        if rows.shape != keys.shape:
            raise ValueError(f"keys must be one for each row, got {keys.shape[0]} for {rows.shape[0]}")
        kernels.uniform_rows(self.values, rows, keys, seed, float(bound))

    def mark_rows(self, array: torch.Tensor, rows: torch.Tensor, value: int) -> None:
        """``array[rows] = value``, in place, for an array parallel to :attr:`values`.

        Args:
            array: ``(slots,)`` int64 or bool, contiguous.
            rows: ``(n,)`` int64 that :meth:`rows` or :meth:`insert_rows` gave; −1 is skipped.
            value: the value.
        """
        self._check_marks("array", array, (torch.int64, torch.bool))
        self._mark_rows(array, self._check_rows(rows, -1), value)

    def _mark_rows(self, array: torch.Tensor, rows: torch.Tensor, value: int) -> None:
        """:meth:`mark_rows` of contiguous rows that this table has just given."""
        self._kernels().mark_slots(array, rows, value)

    def contains(self, keys: torch.Tensor) -> torch.Tensor:
        """``(n,)`` bool: which keys are in the table."""
        return self.rows(keys) >= 0

    def find(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(values (n, D), found (n,) bool)``; values of absent keys are zeros."""
        with self.lock:
            rows = self.rows(keys)
            return self._gathered(rows), rows >= 0

    def _gathered(self, rows: torch.Tensor) -> torch.Tensor:
        kernels = self._kernels()
        out = kernels.result((rows.shape[0], self.dim), self.values)
        kernels.gather_rows(self.values, rows, out)
        return out

    def find_or_insert(
        self, keys: torch.Tensor, values: torch.Tensor | None = None, scores: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Values of the keys, after inserting those that were absent.

        Args:
            keys: ``(n,)``.
            values: ``(n, D)`` for absent keys, where a key's first occurrence counts; None for zeros.
            scores: as in :meth:`insert_or_assign`.

        Returns:
            ``(values (n, D), inserted (n,) bool)``; ``inserted`` is true at the position that created the row, and
            values of refused keys are zeros.

        Raises:
            HashTableFull: with ``evict=None``, the new keys do not fit.
            TypeError, ValueError: keys, values or scores are not what the table takes.
        """
        keys = self._check_keys(keys)
        values = None if values is None else self._check_values(values, keys.shape[0])
        scores = self._check_scores(scores, keys.shape[0])
        with self.lock:
            kernels, begin = self._kernels(), 0
            found = kernels.result((keys.shape[0], self.dim), self.values)
            inserted = torch.empty(keys.shape, dtype=torch.bool, device=keys.device)
            for piece_keys, piece_values, piece_scores in self._pieces(keys, values, scores):
                done = self._insert(piece_keys, piece_scores, self.evict)
                if done.known is None or done.known[0]:
                    kernels.start_rows(self.values, done.rows, done.status, piece_values)
                end = begin + done.rows.shape[0]
                kernels.gather_rows(self.values, done.rows, found[begin:end])
                torch.ge(done.status, INSERTED, out=inserted[begin:end])
                begin = end
            return found, inserted

    def insert_or_assign(
        self, keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Set the values of the keys; if a key occurs several times, its last value is kept.

        Args:
            keys: ``(n,)``.
            values: ``(n, D)``.
            scores: ``(n,)`` int64: required with ``evict="score"``; increments of at least 0, by default 1, with
                ``"lfu"`` and ``"epoch_lfu"``; else None.

        Returns:
            ``(n,)`` bool: true for stored keys; the others were refused.

        Raises:
            HashTableFull: with ``evict=None``, the new keys do not fit.
            TypeError, ValueError: keys, values or scores are not what the table takes.
        """
        keys = self._check_keys(keys)
        values = self._check_values(values, keys.shape[0])
        scores = self._check_scores(scores, keys.shape[0])
        with self.lock:
            return _joined([self._assign(*piece, self.evict) for piece in self._pieces(keys, values, scores)])[0]

    def _assign(self, keys, values, scores, policy) -> tuple[torch.Tensor]:
        rows = self._insert(keys, scores, policy).rows
        self._kernels().scatter_rows(self.values, rows, values)
        return (rows >= 0,)

    def accum_or_assign(
        self, keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Add to the values of present keys, and insert absent keys with the given values.

        Values of the same key are summed in order, in float32, and rounded once. Arguments, result and errors as in
        :meth:`insert_or_assign`.
        """
        keys = self._check_keys(keys)
        values = self._check_values(values, keys.shape[0])
        scores = self._check_scores(scores, keys.shape[0])
        with self.lock:
            return _joined([self._accumulate(*piece) for piece in self._pieces(keys, values, scores)])[0]

    def _accumulate(self, keys, values, scores) -> tuple[torch.Tensor]:
        done = self._insert(keys, scores, self.evict)
        rows, order = torch.sort(done.rows, stable=True)
        touched, counts = torch.unique_consecutive(rows, return_counts=True)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        sums = gather_reduce(values.float(), order, offsets)
        kept = touched >= 0
        touched, sums = touched[kept], sums[kept]
        old = self.values[touched].float()
        old[torch.isin(touched, done.rows[done.inserted])] = 0
        self.values[touched] = (old + sums).to(self.value_dtype)
        return (done.rows >= 0,)

    def insert_and_evict(
        self, keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """:meth:`insert_or_assign` that also returns the evicted and the refused keys.

        Returns:
            ``(keys (m,), values (m, D), scores (m,) int64)`` of evicted and refused keys, in the order of the positions
            that caused it. No key is lost: each is in the table or in the result.
        """
        keys = self._check_keys(keys)
        values = self._check_values(values, keys.shape[0])
        given = self._check_scores(scores, keys.shape[0])
        with self.lock:
            return _joined([self._insert_and_evict(*piece) for piece in self._pieces(keys, values, given)])

    def _insert_and_evict(self, keys, values, scores) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        done = self._insert(keys, scores, self.evict)
        refused = done.rows < 0
        left = (done.evicted | refused).nonzero().squeeze(1)
        refused = refused[left]
        victim_keys = keys if done.victim_keys is None else done.victim_keys.to(self.key_dtype)
        own = torch.zeros_like(done.rows) if scores is None else scores
        old_values = self._gathered(done.rows[left])
        self._kernels().scatter_rows(self.values, done.rows, values)
        return (
            torch.where(refused, keys[left], victim_keys[left]),
            torch.where(refused[:, None], values[left], old_values),
            torch.where(refused, own[left], own[left] if done.victim_scores is None else done.victim_scores[left]),
        )

    def erase(self, keys: torch.Tensor) -> torch.Tensor:
        """Remove keys; return ``(n,)`` bool, which keys were present."""
        with self.lock:
            rows = self.rows(keys)
            slots = rows[rows >= 0].unique()
            self._storage.digests[slots] = 0
            homes = slots // (BUCKET_SLOTS * self._storage.partition_buckets)
            self._storage.fill.index_add_(0, homes, torch.full_like(homes, -1, dtype=torch.int32))
            return rows >= 0

    def clear(self) -> None:
        """Remove all keys."""
        with self.lock:
            self._storage.clear()
            self._clock = self._serial = 0

    def live_rows(self) -> torch.Tensor:
        """The rows in use, ascending: ``(len,)`` int64."""
        with self.lock:
            return self._storage.digests.nonzero().squeeze(1)

    def reserve(self, capacity: int) -> None:
        """Make room for at least ``capacity`` keys. Every key keeps its values and score, and gets another row."""
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"capacity must be an int of at least 1, got {capacity!r}")
        with self.lock:
            if capacity <= self.capacity:
                return
            keys, values, scores = self.export()
            old = self.__dict__.copy()
            try:
                while True:
                    self.capacity, self._storage, self._serial = capacity, self._allocate(capacity), 0
                    rows = self._insert(keys, None, None).rows
                    if self.evict is None or not (self._storage.fill > self._storage.quota).any():
                        break
                    # A partition got more keys than its share; the next larger size distributes the keys differently.
                    capacity += capacity // 16 + 1
            except BaseException:
                self.__dict__.update(old)
                raise
            self._clock = old["_clock"]
            if self._storage.scores is not None:
                self._storage.scores[rows] = scores
            self._kernels().scatter_rows(self.values, rows, values)

    def export(
        self, predicate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Copies of the table's contents, ordered by row.

        Args:
            predicate: called with all ``keys (m,)`` and ``scores (m,)``, returns ``(m,)`` bool: the keys to export.

        Returns:
            ``(keys (m,), values (m, D), scores (m,) int64)``; scores are zeros with ``evict=None``.

        Raises:
            ValueError: the predicate does not return a bool tensor of shape ``(m,)``.
        """
        with self.lock:
            rows = self.live_rows()
            keys = self._storage.keys[rows].to(self.key_dtype)
            scores = rows.new_zeros(rows.shape) if self._storage.scores is None else self._storage.scores[rows]
            if predicate is not None:
                mask = predicate(keys, scores)
                if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.shape != keys.shape:
                    got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else repr(mask)
                    raise ValueError(f"predicate must return a bool tensor {tuple(keys.shape)}, got {got}")
                rows, keys, scores = rows[mask], keys[mask], scores[mask]
            return keys, self._gathered(rows), scores

    def import_(self, keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor | None = None) -> torch.Tensor:
        """Insert what :meth:`export` returned, with its scores; existing keys are overwritten.

        If not all keys fit, those with the highest scores in their buckets are kept.

        Args:
            keys: ``(n,)``; of equal keys the last one counts.
            values: ``(n, D)``.
            scores: ``(n,)`` int64, or None for zeros.

        Returns:
            ``(n,)`` bool: true for stored keys.

        Raises:
            HashTableFull: with ``evict=None``, the new keys do not fit.
            TypeError, ValueError: an argument does not fit the table, or a score is not valid for its policy.
        """
        keys = self._check_keys(keys)
        values = self._check_values(values, keys.shape[0])
        scores = keys.new_zeros(keys.shape, dtype=torch.int64) if scores is None else scores
        scores = self._checked_scores(scores, keys.shape[0], None if self.evict in ("score", None) else 0)
        if self.evict == "lru" and scores.numel() and int(scores.max()) > _MOST_CLOCK:
            raise ValueError(f"scores of an lru table must be at most {_MOST_CLOCK}, got {int(scores.max())}")
        with self.lock:
            policy = None if self.evict is None else "score"
            pieces = self._pieces(keys, values, None if policy is None else scores)
            stored = _joined([self._assign(*piece, policy) for piece in pieces])[0]
            if scores.numel() and self.evict in ("lru", "epoch_lru", "epoch_lfu"):
                latest = int(scores.max())
                # Later touches must be newer than the imported scores.
                self._clock = max(self._clock, latest if self.evict == "lru" else latest & 0xFFFFFFFF)
                self._epoch = max(self._epoch, 0 if self.evict == "lru" else min(latest >> 32, _MAX_EPOCH))
            return stored

    def _check_place(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.device != self.values.device:
            raise ValueError(f"{name} must be on the table's device, {self.device}, got {tensor.device}")

    def _check_keys(self, keys: torch.Tensor) -> torch.Tensor:
        check_tensor("keys", keys)
        check_shape("keys", keys, (None,), "(n,)")
        check_strided("keys", keys)
        if keys.dtype != self.key_dtype:
            raise TypeError(f"keys must have the table's key_dtype, {self.key_dtype}, got {keys.dtype}")
        self._check_place("keys", keys)
        return keys

    def _check_values(self, values: torch.Tensor, count: int) -> torch.Tensor:
        check_tensor("values", values)
        check_shape("values", values, (count, self.dim), "(n, D)")
        check_strided("values", values)
        if values.dtype != self.value_dtype:
            raise TypeError(f"values must have the table's value_dtype, {self.value_dtype}, got {values.dtype}")
        self._check_place("values", values)
        return values.detach()

    def _check_marks(self, name: str, array: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
        """Check that an array has one value per slot, because kernels write without bounds checks."""
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
        # Not on CUDA, where the test would stall the stream.
        if rows.device.type == "cpu" and rows.numel():
            low, high = (int(row) for row in rows.aminmax())
            if low < least or high >= self.values.shape[0]:
                raise ValueError(f"rows must be in [{least}, {self.values.shape[0]}), got {low} to {high}")
        return rows.contiguous()

    def _check_scores(self, scores: torch.Tensor | None, count: int) -> torch.Tensor | None:
        if scores is None:
            if self.evict == "score":
                raise ValueError("scores must be given with evict='score', got None")
            return None
        if self.evict not in ("score", *_COUNTING):
            raise ValueError(f"scores must be None with evict={self.evict!r}, which sets its own")
        return self._checked_scores(scores, count, 0 if self.evict in _COUNTING else None)

    def _checked_scores(self, scores: torch.Tensor, count: int, least: int | None) -> torch.Tensor:
        check_tensor("scores", scores)
        check_shape("scores", scores, (count,), "(n,)")
        if scores.dtype != torch.int64:
            raise TypeError(f"scores must be int64, got {scores.dtype}")
        check_strided("scores", scores)
        self._check_place("scores", scores)
        # Not on CUDA, where the test would stall the stream.
        if least is not None and scores.device.type == "cpu" and count and int(scores.min()) < least:
            raise ValueError(f"scores must be at least {least} with evict={self.evict!r}, got {int(scores.min())}")
        return scores
