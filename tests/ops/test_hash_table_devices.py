"""Where a hash table lies: torch's default device is not its own, and a GPU needs CUDA kernels."""

import pytest
import torch
from hash_table_calls import assert_same_state

import gossamer
from gossamer import _backend
from gossamer.ops import hash_table


def calls(keys, values):
    """A table, and the results of some calls."""
    table = gossamer.HashTable(2, 100, evict="lru")
    made, changed = table.find_or_insert(keys, values), table.insert_or_assign(keys[:5], values[:5])
    return table, [*made, *table.find(keys), changed]


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_default_device_is_not_the_tables(backend):
    """What a table makes lies where the table does, whatever torch's default is."""
    if reason := _backend.unavailable(backend, "cpu"):
        pytest.skip(reason)
    keys, values = torch.arange(40) % 30, torch.randn(40, 2)
    with gossamer.backend(backend):
        plain, expected = calls(keys, values)
        with torch.device("meta"):
            table, found = calls(keys, values)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert_same_state(table, plain)


def test_a_gpu_without_cuda_kernels_is_named_at_once(monkeypatch):
    """Making the table raises the error, instead of the first call, from plain Python that reads the host's memory."""
    monkeypatch.setattr(_backend, "cuda_kernels_unavailable", lambda: "gossamer was built without CUDA sources")
    monkeypatch.setattr(hash_table, "check_device", lambda name, value: None)
    with pytest.raises(ValueError, match="device must be one with gossamer's CUDA kernels, got cuda: gossamer was"):
        gossamer.HashTable(2, 10, device="cuda")
