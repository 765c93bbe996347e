"""Snapshots of a hash table: a restored table goes on with the same bits, and what no table has held is refused."""

import pytest
import torch
from hash_table_calls import assert_same_state, random_keys, score_stream, scores_for, state, stream

import gossamer
from gossamer.ops import hash_table_state
from gossamer.ops.hash_table import EVICT


@pytest.mark.parametrize("evict", EVICT)
def test_restored_table_goes_on_with_the_same_bits(device, evict):
    """Over two partitions, behind evictions and erased keys, into a table that held others."""
    table, other = (gossamer.HashTable(2, 2200, evict=evict, device=device) for _ in range(2))
    distinct = 1200 if evict is None else 4000
    stream(table, device, 700, distinct, 1 if evict is None else 4)
    table.erase(random_keys(100, distinct, device, 1))
    assert table._storage.fill.numel() > 1
    other.insert_or_assign(
        random_keys(300, 300, device, 7), torch.ones(300, 2, device=device), scores_for(evict, 300, device, 7)
    )
    found = {name: tensor.cpu().clone() for name, tensor in hash_table_state.snapshot(table).items()}
    hash_table_state.check(other, found, "the snapshot")
    hash_table_state.restore(other, found)
    assert_same_state(table, other)
    assert other.epoch == table.epoch
    for mine, theirs in zip(*(further(t, device, evict) for t in (table, other)), strict=True):
        assert torch.equal(mine, theirs)
    assert_same_state(table, other)


def further(table, device, evict):
    keys = random_keys(300, 500, device, 21)
    if evict is None:
        return [*table.find_or_insert(keys, torch.ones(300, 2, device=device)), table.rows(keys)]
    return score_stream(table, 500) if evict == "score" else stream(table, device, 300, 800, 2)


def test_snapshot_is_a_copy(device):
    """Writes to a snapshot leave the table as it is, and a copy of one restores 32-bit keys and 16-bit values."""
    table = gossamer.HashTable(2, 100, key_dtype=torch.int32, value_dtype=torch.bfloat16, device=device)
    keys = torch.arange(20, device=device, dtype=torch.int32)
    table.insert_or_assign(keys, torch.ones(20, 2, device=device, dtype=torch.bfloat16))
    before, found = state(table), hash_table_state.snapshot(table)
    copy = {name: tensor.clone() for name, tensor in found.items()}
    for tensor in found.values():
        tensor.zero_()
    for mine, theirs in zip(before, state(table), strict=True):
        assert torch.equal(mine, theirs)
    table.clear()
    hash_table_state.restore(table, copy)
    for mine, theirs in zip(before, state(table), strict=True):
        assert torch.equal(mine, theirs)


def changed(name, change):
    return lambda tensors: {**tensors, name: change(tensors[name].clone())}


def at(place, value):
    def change(tensor):
        tensor[place] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "keys"}, "the file lacks the tensor 'keys'"),
        (changed("keys", torch.Tensor.int), "'keys' must be torch.int64 of shape .* got torch.int32"),
        (changed("values", lambda v: v[:, :1]), "'values' must be torch.float32 of shape .* got torch.float32"),
        (changed("scores", lambda s: s[:-1]), r"'scores' must be torch.int64 of shape \(20,\), got .* \(19,\)"),
        (changed("clock", lambda c: c[:1]), "'clock' must be"),
        (changed("rows", lambda r: r.flip(0)), "the file: rows must ascend within"),
        (changed("rows", at(-1, 1 << 40)), "rows must ascend within"),
        (changed("rows", at(0, -1)), "rows must ascend within"),
        (changed("keys", at(1, 0)), "keys must be distinct"),
        (changed("reach", at(0, -1)), "reach must be in"),
        (changed("reach", at(0, 1 << 20)), "reach must be in"),
        (changed("keys", lambda k: k.roll(1)), "a key lies where no search would find it"),
    ],
)
def test_damaged_snapshots_are_refused(device, damage, message):
    table = gossamer.HashTable(2, 600, device=device)
    table.insert_or_assign(torch.arange(20, device=device), torch.ones(20, 2, device=device))
    tensors = hash_table_state.snapshot(table)
    hash_table_state.check(table, tensors, "the file")
    damaged = damage(tensors)
    if message == "keys must be distinct":
        damaged["keys"][0] = damaged["keys"][1]
    with pytest.raises(ValueError, match=message):
        hash_table_state.check(table, damaged, "the file")


def test_more_keys_than_the_table_holds(device):
    large, small = gossamer.HashTable(2, 600, device=device), gossamer.HashTable(2, 10, device=device)
    large.insert_or_assign(torch.arange(20, device=device), torch.ones(20, 2, device=device))
    tensors = hash_table_state.snapshot(large)
    tensors["reach"] = torch.zeros_like(small._storage.buckets[:, 0])
    with pytest.raises(ValueError, match="the file holds 20 keys, more than the table's capacity of 10"):
        hash_table_state.check(small, tensors, "the file")
