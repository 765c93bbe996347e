"""The operations of a hash table in plain Python; every slot is the same as with the native kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import torch

from gossamer._rounding import random_bits
from gossamer.ops._hash_table_storage import (
    BUCKET_SLOTS,
    HIT,
    INSERTED,
    LOW,
    REFUSED,
    REPLACED,
    Batch,
    Served,
    Storage,
    digests_and_buckets,
)

_ROOMY = 4
_MOST = 2**63 - 1
_REACH, _SERIAL, _PINNED = range(3)


class _Prober:
    """Views of a storage as arrays, and the positions of a batch of keys in it."""

    def __init__(self, storage: Storage, keys: torch.Tensor) -> None:
        self.partitions, self.size = storage.fill.shape[0], storage.partition_buckets
        # The arrays share memory with the tensors, so writes reach the table.
        arrays = {f.name: getattr(storage, f.name) for f in fields(storage) if f.name != "values"}
        self.a = {name: None if t is None else t.numpy() for name, t in arrays.items()}
        self.keys = keys.tolist()
        self.digest, self.first, self.second = digests_and_buckets(keys, self.partitions, self.size)

    def chain(self, i: int) -> Iterator[tuple[int, int]]:
        """``(j, bucket)`` for the buckets after key i's second bucket: first around its partition, then the whole
        table.
        """
        begin = int(self.second[i]) // self.size * self.size
        local = int(self.second[i]) - begin
        for j in range(1, self.size):
            yield j, begin + (local + j) % self.size
        for j in range(self.size, self.partitions * self.size):
            yield j, (begin + j) % (self.partitions * self.size)

    def slots_with(self, bucket: int, digest: int) -> list[int]:
        """The slots of a bucket with a given digest; digest 0 finds the empty slots."""
        begin = bucket * BUCKET_SLOTS
        return [begin + int(s) for s in (self.a["digests"][begin : begin + BUCKET_SLOTS] == digest).nonzero()[0]]

    def find(self, i: int, stay: bool = False) -> int:
        """The slot of key i; −1 if absent, −2 if the search would leave the partition although it must ``stay``."""
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

    def victim(self, buckets: list[int], batch: Batch) -> int:
        """The live slot of the buckets with the lowest score that the batch has not touched, the first of equal ones;
        or −1.
        """
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

    def claim(self, i: int, batch: Batch, score: int, stay: bool) -> tuple[int, bool]:
        """``(slot, evicts)`` for a new key; slot −1 means refused, −2 means no room in the partition in which it must
        ``stay``.
        """
        first, second = int(self.first[i]), int(self.second[i])
        evicts = batch.policy is not None
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
                refused = batch.policy == "score" and score < self.a["scores"][victim]
                return (-1, False) if refused else (victim, True)
        for j, bucket in self.chain(i):
            if (evicts or stay) and j >= self.size:
                break
            slot = self.victim([bucket], batch) if full else next(iter(self.slots_with(bucket, 0)), -1)
            if full and slot >= 0 and batch.policy == "score" and score < self.a["scores"][slot]:
                slot = -1
            if slot >= 0:
                buckets = self.a["buckets"]
                buckets[second, _REACH] = max(buckets[second, _REACH], j)
                return slot, full
        return (-2 if stay and not evicts else -1), False

    def pin(self, slot: int, batch: Batch) -> None:
        """Mark a slot as touched by the batch, which must not evict it, unless the scores already show that."""
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


def _score(batch: Batch, given: int | None, old: int | None) -> int:
    if batch.policy == "lfu":
        return min((old or 0) + (1 if given is None else given), _MOST)
    if batch.policy == "epoch_lfu":
        return batch.stamp | min(((old or 0) & LOW) + (1 if given is None else given), LOW)
    return given if batch.policy == "score" else batch.stamp


def insert(storage: Storage, batch: Batch) -> Served:
    """Find or insert each key: first the present keys, then the others in the order of the batch.

    The storage is changed in place.
    """
    prober, n = _Prober(storage, batch.keys), batch.keys.shape[0]
    slots, status = [-1] * n, [REFUSED] * n
    given = [None] * n if batch.scores is None else batch.scores.tolist()
    scored = batch.policy is not None
    victim_keys, victim_scores = [0] * n, [0] * n

    def touch(i: int, slot: int) -> None:
        slots[i], status[i] = slot, HIT
        if scored:
            prober.pin(slot, batch)
            prober.a["scores"][slot] = _score(batch, given[i], int(prober.a["scores"][slot]))

    def insert_missing(i: int, stay: bool) -> bool:
        slot = prober.find(i, stay)
        if slot == -2:
            return False
        if slot >= 0:
            touch(i, slot)
            return True
        score = _score(batch, given[i], None) if scored else 0
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

    def result(too_many: int) -> Served:
        wide = [torch.tensor(x, dtype=torch.int64, device="cpu") for x in (slots, victim_keys, victim_scores)]
        victims = wide[1:] if scored else [None, None]
        counts = (status.count(INSERTED) + status.count(REPLACED), status.count(REPLACED), status.count(REFUSED))
        if batch.marks is not None and too_many < 0:
            mark_slots(batch.marks, wide[0], batch.mark)
        return too_many, counts, wide[0], torch.tensor(status, dtype=torch.uint8, device="cpu"), *victims

    found = [(i, prober.find(i)) for i in range(n)]
    for i, slot in found:
        if slot >= 0:
            touch(i, slot)
    missing = [i for i, slot in found if slot < 0]
    new_keys = len({prober.keys[i] for i in missing})
    if not scored and new_keys > batch.room:
        return result(new_keys)
    # Insertions within a partition come first, as in the native kernels, which run them in parallel.
    leaving = [i for i in missing if not insert_missing(i, True)]
    for i in leaving:
        insert_missing(i, False)
    return result(-1)


def gather_rows(values: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """``out = values[slots]``, zeros for −1; ``out`` is contiguous."""
    out.copy_(values[slots.clamp(min=0)].masked_fill_((slots < 0)[:, None], 0))


def scatter_rows(values: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """``values[slots] = rows`` in place, skipping −1; of equal slots the last one wins."""
    last = {slot: i for i, slot in enumerate(slots.tolist()) if slot >= 0}
    if last:
        to, source = (torch.tensor(list(places), device="cpu") for places in (last, last.values()))
        values[to] = rows[source]


def start_rows(values: torch.Tensor, slots: torch.Tensor, status: torch.Tensor, rows: torch.Tensor | None) -> None:
    """``values[slots] = rows`` in place for positions that created their row; None means zeros."""
    made = status >= INSERTED
    values[slots[made]] = 0 if rows is None else rows[made]


# Number of elements drawn at a time.
_DRAWN = 1 << 22


def uniform_rows(values: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, seed: int, bound: float) -> None:
    """Set ``values[slots]`` to values uniform in ``(−bound, bound)`` that depend on key, column and seed only; on any
    device.
    """
    first = torch.zeros(1, dtype=torch.int64, device=keys.device)
    # A few rows at a time, because bits and float64 values take several times the memory of the rows.
    rows = max(1, _DRAWN // values.shape[1])
    for some, at in zip(keys.long().split(rows), slots.split(rows), strict=True):
        bits = random_bits(seed, first, some, values.shape[1])
        values[at] = (((bits >> 8).double() + 0.5) * 2.0**-23 - 1).mul_(bound).float().to(values.dtype)


def mark_slots(array: torch.Tensor, slots: torch.Tensor, value: int) -> None:
    """``array[slots] = value`` in place, −1 skipped; ``array (S,)`` int64 or bool, ``slots (n,)``."""
    array[slots[slots >= 0]] = value
