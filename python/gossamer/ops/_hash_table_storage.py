"""Definitions that a hash table's kernels share: its arrays, the positions of a key, a batch, and its outcome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

BUCKET_SLOTS = 16
# Eviction policies of a full table; see HashTable.
POLICIES = ("lru", "lfu", "epoch_lru", "epoch_lfu", "score", None)
# The outcome at each position of a batch, numbered as in csrc/hash_table_core.h.
REFUSED, HIT, INSERTED, REPLACED = range(4)

_LEAST_BUCKETS = 64
LOW = 0xFFFFFFFF


@dataclass
class Storage:
    """The arrays of a table of S slots in S / 16 buckets in P partitions; all on one device.

    Attributes:
        digests: ``(S,)`` uint8, 0 where a slot is empty.
        keys: ``(S,)`` int64.
        scores: ``(S,)`` int64, or None where nothing is evicted.
        buckets: ``(S/16, 3)`` int32 per bucket: the longest chain that starts there, the last batch that pinned slots
            in it, and those slots.
        fill: ``(P,)`` int32, live slots.
        quota: ``(P,)`` int32, the number of live slots from which a new key evicts another.
        values: ``(S, D)``, one row per slot.
    """

    digests: torch.Tensor
    keys: torch.Tensor
    scores: torch.Tensor | None
    buckets: torch.Tensor
    fill: torch.Tensor
    quota: torch.Tensor
    values: torch.Tensor

    @property
    def partition_buckets(self) -> int:
        """Buckets of a partition."""
        return self.buckets.shape[0] // self.fill.shape[0]

    @classmethod
    def allocate(
        cls, capacity: int, scored: bool, values: tuple[int, torch.dtype], device: torch.device, empty=None
    ) -> Storage:
        """An empty table for ``capacity`` keys with a twelfth more slots; ``empty`` allocates its arrays, if given."""
        dim, dtype = values
        wanted = -(-(capacity + capacity // 12) // BUCKET_SLOTS)
        partitions = max(1, wanted // _LEAST_BUCKETS)
        buckets = partitions * -(-wanted // partitions)
        slots = buckets * BUCKET_SLOTS
        shares = torch.arange(partitions + 1, dtype=torch.float64, device="cpu")
        # Exact: capacity · partitions stays below 2^53 for any table that fits in memory.
        ends = torch.div(shares * capacity, partitions, rounding_mode="floor").long()

        def array(*shape, dtype):
            return torch.empty(shape, dtype=dtype, device=device) if empty is None else empty(shape, dtype=dtype)

        def zeros(*shape, dtype):
            return array(*shape, dtype=dtype).zero_()

        return cls(
            zeros(slots, dtype=torch.uint8),
            zeros(slots, dtype=torch.int64),
            zeros(slots, dtype=torch.int64) if scored else None,
            zeros(buckets, 3, dtype=torch.int32),
            zeros(partitions, dtype=torch.int32),
            (ends[1:] - ends[:-1]).to(device, torch.int32),
            array(slots, dim, dtype=dtype),
        )

    def clear(self) -> None:
        """Remove all keys."""
        self.digests.zero_()
        self.buckets.zero_()
        self.fill.zero_()


def mix(keys: np.ndarray) -> np.ndarray:
    """The finalizer of MurmurHash3 on uint64, a bijection in which every bit depends on every other."""
    h = keys.astype(np.uint64)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        h = (h ^ (h >> np.uint64(33))) * np.uint64(factor)
    return h ^ (h >> np.uint64(33))


def digests_and_buckets(keys: torch.Tensor, partitions: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The digest of each key, and its first and second bucket, in a table of ``partitions`` of ``size`` buckets."""
    h = mix(keys.cpu().numpy().astype(np.int64).view(np.uint64))
    low, thirty_two = h & np.uint64(LOW), np.uint64(32)
    spread = (h >> thirty_two) * np.uint64(partitions)
    first = ((spread & np.uint64(LOW)) * np.uint64(size)) >> thirty_two
    second = (low * np.uint64(size - 1)) >> thirty_two
    second += np.uint64(1) * ((second >= first) & (size > 1))
    begin = (spread >> thirty_two) * np.uint64(size)
    digest = 1 + ((low & np.uint64(0xFFFF)) * np.uint64(255) >> np.uint64(16))
    return digest.astype(np.uint8), (begin + first).astype(np.int64), (begin + second).astype(np.int64)


class Batch(NamedTuple):
    """A batch of keys to find or insert, and how it sets scores and evicts.

    Attributes:
        keys: ``(n,)`` int64 or int32.
        scores: ``(n,)`` contiguous int64 or None: increments of the frequency policies, scores of ``"score"``.
        policy: of :data:`POLICIES`.
        stamp: the score that the recency policies set; the epoch's bits for ``"epoch_lfu"``.
        serial: an int32 number that no earlier batch used.
        room: number of new keys allowed if nothing is evicted.
        marks: ``(slots,)`` int64 or None: set to ``mark`` at the batch's rows.
        mark: the value to set.
    """

    keys: torch.Tensor
    scores: torch.Tensor | None
    policy: str | None
    stamp: int
    serial: int
    room: int = 0
    marks: torch.Tensor | None = None
    mark: int = 0

    @property
    def stamps(self) -> bool:
        """Whether a score equal to the stamp proves that this batch touched the slot, because no other batch sets
        it.
        """
        return self.policy in ("lru", "epoch_lru")


@dataclass(frozen=True)
class Inserted:
    """The result of :meth:`HashTable.insert_rows` for each key of a batch of n.

    Attributes:
        rows: ``(n,)`` int64, rows of :attr:`HashTable.values`; −1 for a refused key.
        status: ``(n,)`` uint8, the kernels' outcome for each position.
        victim_keys: ``(n,)`` int64, the key that the position evicted, if any; None if no eviction is possible.
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
        """``(n,)`` bool, whether this position created the row; true once for each new key."""
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


# The result of a kernel family's ``insert``: first the number of distinct new keys if it exceeds the batch's room, in
# which case nothing is inserted, else −1; then the counts, rows, status and victims of :class:`Inserted`.
Served = tuple[int, tuple[int, int, int] | None, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
