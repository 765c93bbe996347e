"""The arrays of a hash table, and its operations in plain Python: slot by slot what the native kernels do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch

from gossamer._rounding import random_bits

BUCKET_SLOTS = 16
# The shared probing code has these: csrc/hash_table_core.h.
POLICIES = {None: 0, "lru": 1, "lfu": 2, "epoch_lru": 3, "epoch_lfu": 4, "score": 5}
REFUSED, HIT, INSERTED, REPLACED = range(4)

_LEAST_BUCKETS = 64
_ROOMY = 4
_LOW = 0xFFFFFFFF
_MOST = 2**63 - 1
_REACH, _SERIAL, _PINNED = range(3)


@dataclass
class Storage:
    """The arrays of a table of S slots in S / 16 buckets in P partitions; all on one device.

    Attributes:
        digests: ``(S,)`` uint8, 0 where a slot is empty.
        keys: ``(S,)`` int64.
        scores: ``(S,)`` int64, or None where nothing is evicted.
        buckets: ``(S/16, 3)`` int32: the longest chain from a bucket, the last batch that pinned slots of it, which.
        fill: ``(P,)`` int32, live slots.
        quota: ``(P,)`` int32, live slots from which on a new key evicts.
        values: ``(S, D)``, one row a slot.
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
        """An empty table for ``capacity`` keys with a twelfth more slots; ``empty`` makes its arrays, if given."""
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
        """Forget every key."""
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
    low, thirty_two = h & np.uint64(_LOW), np.uint64(32)
    spread = (h >> thirty_two) * np.uint64(partitions)
    first = ((spread & np.uint64(_LOW)) * np.uint64(size)) >> thirty_two
    second = (low * np.uint64(size - 1)) >> thirty_two
    second += np.uint64(1) * ((second >= first) & (size > 1))
    begin = (spread >> thirty_two) * np.uint64(size)
    digest = 1 + ((low & np.uint64(0xFFFF)) * np.uint64(255) >> np.uint64(16))
    return digest.astype(np.uint8), (begin + first).astype(np.int64), (begin + second).astype(np.int64)


class _Batch(NamedTuple):
    """How a batch sets scores and evicts."""

    policy: int
    stamp: int
    serial: int

    @property
    def stamps(self) -> bool:
        """Whether the stamp tells by itself what the batch has touched: no other batch sets that score."""
        return self.policy in (POLICIES["lru"], POLICIES["epoch_lru"])


class _Prober:
    """Views of a storage as arrays, and the places of a batch of keys in it."""

    def __init__(self, storage: Storage, keys: torch.Tensor) -> None:
        self.partitions, self.size = storage.fill.shape[0], storage.partition_buckets
        # Arrays share memory with the tensors: what is written here is written there.
        arrays = {f.name: getattr(storage, f.name) for f in fields(storage) if f.name != "values"}
        self.a = {name: None if t is None else t.numpy() for name, t in arrays.items()}
        self.keys = keys.tolist()
        self.digest, self.first, self.second = digests_and_buckets(keys, self.partitions, self.size)

    def chain(self, i: int) -> Iterator[tuple[int, int]]:
        """``(j, bucket)`` for the buckets after key i's second: round its partition, then the whole table."""
        begin = int(self.second[i]) // self.size * self.size
        local = int(self.second[i]) - begin
        for j in range(1, self.size):
            yield j, begin + (local + j) % self.size
        for j in range(self.size, self.partitions * self.size):
            yield j, (begin + j) % (self.partitions * self.size)

    def slots_with(self, bucket: int, digest: int) -> list[int]:
        """The slots of a bucket that have a digest; 0 for the empty ones."""
        begin = bucket * BUCKET_SLOTS
        return [begin + int(s) for s in np.flatnonzero(self.a["digests"][begin : begin + BUCKET_SLOTS] == digest)]

    def find(self, i: int, stay: bool = False) -> int:
        """The slot of key i, −1 where absent, −2 where it would leave the partition it must ``stay`` in."""
        reach = int(self.a["buckets"][self.second[i], _REACH])
        for bucket in (int(self.first[i]), int(self.second[i]), *self.chain_to(i, reach, stay)):
            for slot in self.slots_with(bucket, int(self.digest[i])):
                if int(self.a["keys"][slot]) == self.keys[i]:
                    return slot
        return -2 if stay and reach >= self.size else -1

    def chain_to(self, i: int, reach: int, stay: bool) -> Iterator[int]:
        """The chain's buckets up to ``reach``, within the partition if it must ``stay``."""
        for j, bucket in self.chain(i):
            if j > reach or (stay and j >= self.size):
                return
            yield bucket

    def victim(self, buckets: list[int], batch: _Batch) -> int:
        """The live slot of the buckets with the lowest score that the batch has not touched, or −1; first of equals."""
        best = -1
        for bucket in buckets:
            own = self.a["buckets"][bucket, _SERIAL] == batch.serial
            pinned = int(self.a["buckets"][bucket, _PINNED]) if own else 0
            for slot in range(bucket * BUCKET_SLOTS, (bucket + 1) * BUCKET_SLOTS):
                touched = self.a["scores"][slot] == batch.stamp if batch.stamps else pinned >> (slot % BUCKET_SLOTS) & 1
                if (
                    self.a["digests"][slot]
                    and not touched
                    and (best < 0 or self.a["scores"][slot] < self.a["scores"][best])
                ):
                    best = slot
        return best

    def claim(self, i: int, batch: _Batch, score: int, stay: bool) -> tuple[int, bool]:
        """``(slot, evicts)`` for a new key; −1 refused, −2 no room in the partition that it must ``stay`` in."""
        first, second = int(self.first[i]), int(self.second[i])
        evicts = batch.policy != POLICIES[None]
        full = evicts and bool(self.a["fill"][first // self.size] >= self.a["quota"][first // self.size])
        if not full:
            free1, free2 = self.slots_with(first, 0), self.slots_with(second, 0)
            if len(free1) >= _ROOMY or len(free1) >= max(len(free2), 1):
                return free1[0], False
            if free2:
                return free2[0], False
        else:
            victim = self.victim([first] if first == second else [first, second], batch)
            if victim >= 0:
                refused = batch.policy == POLICIES["score"] and score < self.a["scores"][victim]
                return (-1, False) if refused else (victim, True)
        for j, bucket in self.chain(i):
            if (evicts or stay) and j >= self.size:
                break
            slot = self.victim([bucket], batch) if full else next(iter(self.slots_with(bucket, 0)), -1)
            if full and slot >= 0 and batch.policy == POLICIES["score"] and score < self.a["scores"][slot]:
                slot = -1
            if slot >= 0:
                buckets = self.a["buckets"]
                buckets[second, _REACH] = max(buckets[second, _REACH], j)
                return slot, full
        return (-2 if stay and not evicts else -1), False

    def pin(self, slot: int, batch: _Batch) -> None:
        """Keep the batch from evicting a slot whose score does not say that it was touched."""
        if batch.stamps:
            return
        bucket = self.a["buckets"][slot // BUCKET_SLOTS]
        if bucket[_SERIAL] != batch.serial:
            bucket[_SERIAL], bucket[_PINNED] = batch.serial, 0
        bucket[_PINNED] |= 1 << (slot % BUCKET_SLOTS)


def result(shape: tuple[int, ...], values: torch.Tensor) -> torch.Tensor:
    """An uninitialised result in the dtype of ``values``."""
    return values.new_empty(shape)


def find(storage: Storage, keys: torch.Tensor) -> torch.Tensor:
    """The slot of each key ``(n,)``, −1 where absent: ``(n,)`` int64."""
    prober = _Prober(storage, keys)
    return torch.tensor([prober.find(i) for i in range(len(prober.keys))], dtype=torch.int64, device="cpu")


def _score(policy: int, stamp: int, given: int | None, old: int | None) -> int:
    if policy == POLICIES["lfu"]:
        return min((old or 0) + (1 if given is None else given), _MOST)
    if policy == POLICIES["epoch_lfu"]:
        return stamp | min(((old or 0) & _LOW) + (1 if given is None else given), _LOW)
    return given if policy == POLICIES["score"] else stamp


def insert(
    storage: Storage,
    keys: torch.Tensor,
    policy: int,
    stamp: int,
    serial: int,
    scores: torch.Tensor | None,
    room: int,
    marks: torch.Tensor | None = None,
    mark: int = 0,
) -> tuple[int, tuple[int, int, int] | None, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Find or insert each key: first those that are there, then the others in the order of the batch.

    Args:
        storage: the table, changed in place.
        keys: ``(n,)`` int64 or int32.
        policy: of :data:`POLICIES`.
        stamp: the score that the recency policies set; the epoch's bits for ``"epoch_lfu"``.
        serial: a number that the buckets have not seen, in int32.
        scores: ``(n,)`` int64 or None: increments of the frequency policies, scores of ``"score"``.
        room: how many new keys may come where nothing is evicted.
        marks: ``(slots,)`` int64 or None: set to ``mark`` where the batch's rows are.
        mark: what to set.

    Returns:
        How many distinct new keys there are where that is more than ``room``, and then nothing is inserted, else −1;
        how many positions inserted, evicted and were refused, or None where that is not known yet;
        ``(n,)`` int64 slots, −1 where refused; ``(n,)`` uint8 status; and by position what was evicted, key and score,
        or None for both where nothing was.
    """
    prober, n, batch = _Prober(storage, keys), keys.shape[0], _Batch(policy, stamp, serial)
    slots, status = [-1] * n, [REFUSED] * n
    given = [None] * n if scores is None else scores.tolist()
    scored = policy != POLICIES[None]
    victim_keys, victim_scores = [0] * n, [0] * n

    def touch(i: int, slot: int) -> None:
        slots[i], status[i] = slot, HIT
        if scored:
            prober.pin(slot, batch)
            prober.a["scores"][slot] = _score(policy, stamp, given[i], int(prober.a["scores"][slot]))

    def insert_missing(i: int, stay: bool) -> bool:
        slot = prober.find(i, stay)
        if slot == -2:
            return False
        if slot >= 0:
            touch(i, slot)
            return True
        score = _score(policy, stamp, given[i], None) if scored else 0
        slot, evicts = prober.claim(i, batch, score, stay)
        if slot == -2:
            return False
        if slot < 0:
            return True
        slots[i], status[i] = slot, REPLACED if evicts else INSERTED
        if evicts:
            victim_keys[i], victim_scores[i] = int(prober.a["keys"][slot]), int(prober.a["scores"][slot])
        else:
            prober.a["fill"][slot // BUCKET_SLOTS // prober.size] += 1
        prober.a["digests"][slot], prober.a["keys"][slot] = prober.digest[i], prober.keys[i]
        if scored:
            prober.a["scores"][slot] = score
            prober.pin(slot, batch)
        return True

    def result(new_keys: int):
        wide = [torch.tensor(x, dtype=torch.int64, device="cpu") for x in (slots, victim_keys, victim_scores)]
        victims = wide[1:] if scored else [None, None]
        counts = (status.count(INSERTED) + status.count(REPLACED), status.count(REPLACED), status.count(REFUSED))
        if marks is not None and new_keys < 0:
            mark_slots(marks, wide[0], mark)
        return new_keys, counts, wide[0], torch.tensor(status, dtype=torch.uint8, device="cpu"), *victims

    found = [(i, prober.find(i)) for i in range(n)]
    for i, slot in found:
        if slot >= 0:
            touch(i, slot)
    missing = [i for i, slot in found if slot < 0]
    new_keys = len({prober.keys[i] for i in missing})
    if not scored and new_keys > room:
        return result(new_keys)
    # Within partitions first: the native kernels do these in parallel, and what crosses partitions after them.
    leaving = [i for i in missing if not insert_missing(i, True)]
    for i in leaving:
        insert_missing(i, False)
    return result(-1)


def gather_rows(values: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """``out = values[slots]``, zeros for −1; ``out`` is contiguous."""
    out.copy_(values[slots.clamp(min=0)].masked_fill_((slots < 0)[:, None], 0))


def scatter_rows(values: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """``values[slots] = rows`` in place, −1 skipped; of equal slots the last position stays."""
    last = {slot: i for i, slot in enumerate(slots.tolist()) if slot >= 0}
    if last:
        to, source = (torch.tensor(list(places), device="cpu") for places in (last, last.values()))
        values[to] = rows[source]


def start_rows(values: torch.Tensor, slots: torch.Tensor, status: torch.Tensor, rows: torch.Tensor | None) -> None:
    """``values[slots] = rows`` in place where a position made its row, zeros for None."""
    made = status >= INSERTED
    values[slots[made]] = 0 if rows is None else rows[made]


# Elements that are drawn at a time.
_DRAWN = 1 << 22


def uniform_rows(values: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, seed: int, bound: float) -> None:
    """``values[slots]`` become uniform in ``(−bound, bound)``, as functions of key, column and seed; on any device."""
    first = torch.zeros(1, dtype=torch.int64, device=keys.device)
    # A few rows at a time: bits and float64 take several times what the rows do.
    rows = max(1, _DRAWN // values.shape[1])
    for some, at in zip(keys.long().split(rows), slots.split(rows), strict=True):
        bits = random_bits(seed, first, some, values.shape[1])
        values[at] = (((bits >> 8).double() + 0.5) * 2.0**-23 - 1).mul_(bound).float().to(values.dtype)


def mark_slots(array: torch.Tensor, slots: torch.Tensor, value: int) -> None:
    """``array[slots] = value`` in place, −1 skipped; ``array (S,)`` int64 or bool, ``slots (n,)``."""
    array[slots[slots >= 0]] = value
