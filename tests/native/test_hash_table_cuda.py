"""The hash table of csrc/cuda on the host, where there is no GPU; test_hash_table.py tests it on one."""

import itertools

import cuda_model
import pytest
import torch
from hash_table_calls import assert_same_state, score_stream, stream

import gossamer
from gossamer import _backend
from gossamer.ops.hash_table import EVICT

if reason := _backend.native_unavailable():
    pytest.skip(reason, allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("the kernels are tested on the GPU", allow_module_level=True)


# Dimension and dtype of rows that are copied in words of 4, 2 and 16 bytes.
ROWS = [(2, torch.float32), (3, torch.float16), (8, torch.bfloat16)]


@pytest.fixture(scope="module")
def model():
    """The kernels, on the host."""
    return cuda_model.build()


@pytest.mark.parametrize(("evict", "row"), list(zip(EVICT, itertools.cycle(ROWS), strict=False)))
def test_it_is_the_reference(model, monkeypatch, evict, row):
    """Every result and all state, bit by bit, over two partitions that overflow; rows in words of each width."""
    cuda_model.install(model, monkeypatch)
    capacity, distinct = (2200, 1000) if evict is None else (2200, 4000)

    dim, dtype = row

    def run(table):
        if evict == "score":
            return score_stream(table, distinct)
        return stream(table, "cpu", 700, distinct, 2 if evict else 1)

    first, second = (gossamer.HashTable(dim, capacity, evict=evict, value_dtype=dtype) for _ in range(2))
    with gossamer.backend("reference"):
        expected = run(first)
    # By default, not by force: sums of repeated rows are left to the kernels of this device.
    default = _backend._default
    monkeypatch.setattr(
        _backend,
        "_default",
        lambda primitive, device: "cuda" if primitive == "hash_table" else default(primitive, device),
    )
    for mine, reference in zip(run(second), expected, strict=True):
        assert torch.equal(mine, reference)
    assert_same_state(first, second)
    assert second._storage.fill.numel() == 2
