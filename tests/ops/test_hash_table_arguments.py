"""gossamer.HashTable: arguments that it does not take."""

import pytest
import torch

import gossamer


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: gossamer.HashTable(0, 4), ValueError, "dim must be an int of at least 1, got 0"),
        (lambda t: gossamer.HashTable(2, 2.5), ValueError, "capacity must be an int of at least 1, got 2.5"),
        (lambda t: gossamer.HashTable(2, 4, evict="fifo"), ValueError, "evict must be one of .*, got 'fifo'"),
        (lambda t: gossamer.HashTable(2, 4, key_dtype=torch.int16), TypeError, "key_dtype must be"),
        (lambda t: gossamer.HashTable(2, 4, value_dtype=torch.float64), TypeError, "value_dtype must be"),
        (lambda t: t.find([1, 2]), TypeError, "keys must be a torch.Tensor, got list"),
        (lambda t: t.find(torch.zeros(2, dtype=torch.int32)), TypeError, "keys must have the table's key_dtype"),
        (lambda t: t.find(torch.zeros(2, 2, dtype=torch.int64)), ValueError, r"keys must have shape \(n,\)"),
        (lambda t: t.insert_or_assign(torch.arange(2), torch.zeros(2, 3)), ValueError, r"values must have shape"),
        (lambda t: t.insert_or_assign(torch.arange(2), torch.zeros(2, 2).half()), TypeError, "values must have"),
        (
            lambda t: t.insert_or_assign(torch.arange(2), torch.zeros(2, 2), torch.arange(2)),
            ValueError,
            "scores must be None with evict='lru'",
        ),
        (lambda t: t.rows(torch.arange(2), scores=torch.arange(2)), ValueError, "scores must be None without insert"),
        (lambda t: t.reserve(-1), ValueError, "capacity must be an int of at least 1, got -1"),
        (lambda t: gossamer.HashTable(2, 4, evict="score").rows(torch.arange(2), True), ValueError, "must be given"),
        (
            lambda t: gossamer.HashTable(2, 4, evict="lfu").rows(torch.arange(2), True, torch.tensor([1, -1])),
            ValueError,
            "scores must be at least 0 with evict='lfu', got -1",
        ),
        (
            lambda t: t.import_(torch.arange(1), torch.ones(1, 2), torch.tensor([-1])),
            ValueError,
            "scores must be at least 0 .*got -1",
        ),
        (
            lambda t: t.import_(torch.arange(1), torch.ones(1, 2), torch.tensor([2**63 - 1])),
            ValueError,
            "scores of an lru table must be at most",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    table = gossamer.HashTable(2, 4, evict="lru")
    with pytest.raises(error, match=message):
        call(table)
    assert len(table) == 0
