"""Snapshots of a hash table as tensors: a restored table continues with the same bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gossamer.ops._hash_table_storage import BUCKET_SLOTS, digests_and_buckets
from gossamer.ops.hash_table import HashTable


def snapshot(table: HashTable) -> dict[str, torch.Tensor]:
    """Copies of ``rows (m,)``, ``keys``, ``values (m, D)``, ``scores (m,)``, the buckets' ``reach``, and ``clock``."""
    with table.lock:
        rows = table.live_rows()
        keys, values, scores = table.export()
        return {
            "rows": rows,
            "keys": keys,
            "values": values,
            "scores": scores,
            "reach": table._storage.buckets[:, 0].clone(),
            "clock": torch.tensor([table._clock, table.epoch]),
        }


def expected(table: HashTable, count: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor of a snapshot with ``count`` keys."""
    return {
        "rows": (torch.int64, (count,)),
        "keys": (table.key_dtype, (count,)),
        "values": (table.value_dtype, (count, table.dim)),
        "scores": (torch.int64, (count,)),
        "reach": (torch.int32, (table._storage.buckets.shape[0],)),
        "clock": (torch.int64, (2,)),
    }


def check_tensors(
    tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], what: str
) -> None:
    """Check that each wanted tensor is present with its dtype and shape."""
    for name, (dtype, shape) in wanted.items():
        if name not in tensors:
            raise ValueError(f"{what} lacks the tensor {name!r}")
        found = tensors[name]
        if found.dtype != dtype or tuple(found.shape) != shape:
            raise ValueError(
                f"{what}: {name!r} must be {dtype} of shape {shape}, got {found.dtype} of shape {tuple(found.shape)}"
            )


def check(table: HashTable, tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Check that a snapshot could have come from ``table``.

    Raises:
        ValueError: it could not; the message names ``what`` and the rule.
    """
    count = tensors["rows"].numel() if "rows" in tensors else 0
    check_tensors(tensors, expected(table, count), what)
    rows, keys, reach = (tensors[name].cpu() for name in ("rows", "keys", "reach"))
    slots, size = table.values.shape[0], table._storage.partition_buckets
    if count > table.capacity:
        raise ValueError(f"{what} holds {count} keys, more than the table's capacity of {table.capacity}")
    if count and (rows[0] < 0 or rows[-1] >= slots or not (rows[1:] > rows[:-1]).all()):
        raise ValueError(f"{what}: rows must ascend within [0, {slots})")
    if keys.unique().numel() != count:
        raise ValueError(f"{what}: keys must be distinct")
    if (reach < 0).any() or (reach >= reach.numel()).any():
        raise ValueError(f"{what}: reach must be in [0, {reach.numel()})")
    _, first, second = (torch.from_numpy(a).long() for a in digests_and_buckets(keys, reach.numel() // size, size))
    bucket = rows // BUCKET_SLOTS
    begin = second // size * size
    # The distance of a key along its chain, which runs around its partition and then through the others.
    inside = (bucket - second) % size
    distance = torch.where(bucket // size * size == begin, inside, (bucket - begin) % reach.numel())
    if not ((bucket == first) | (distance <= reach[second])).all():
        raise ValueError(f"{what}: a key lies where no search would find it")


def restore(table: HashTable, tensors: Mapping[str, torch.Tensor]) -> None:
    """Restore ``table`` from a snapshot that :func:`check` has passed."""
    with table.lock:
        table.clear()
        storage, size = table._storage, table._storage.partition_buckets
        found = {name: tensor.to(table.device) for name, tensor in tensors.items()}
        rows = found["rows"]
        digests = digests_and_buckets(tensors["keys"], storage.fill.shape[0], size)[0]
        storage.digests[rows] = torch.from_numpy(digests).to(table.device)
        storage.keys[rows] = found["keys"].long()
        storage.values[rows] = found["values"]
        if storage.scores is not None:
            storage.scores[rows] = found["scores"]
        storage.buckets[:, 0] = found["reach"]
        homes = rows // (BUCKET_SLOTS * size)
        storage.fill.copy_(torch.bincount(homes, minlength=storage.fill.shape[0]))
        table._clock, table.epoch = (int(value) for value in tensors["clock"])
