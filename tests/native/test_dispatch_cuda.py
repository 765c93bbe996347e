"""The counting sort of csrc/cuda on the host, where there is no GPU; test_dispatch.py tests it on one."""

import cuda_model
import pytest
import torch

import gossamer
from gossamer import _backend
from gossamer.ops.dispatch import dispatch_reference
from gossamer.testing import random_expert_ids

if reason := _backend.native_unavailable():
    pytest.skip(reason, allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("the kernels are tested on the GPU", allow_module_level=True)


@pytest.fixture(scope="module")
def model():
    """The kernels, on the host."""
    return cuda_model.build()


def check(ids, laid, num_experts):
    """The sort of ``laid``, which are ``ids`` in some layout, against that by torch."""
    with gossamer.backend("cuda"):
        d = gossamer.dispatch(laid, num_experts)
    for value, wanted in zip((d.slots, d.rows, d.offsets), dispatch_reference(ids, num_experts), strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize(
    ("sizes", "skew", "dtype", "transposed"),
    [
        ((1, 1, 1), "uniform", torch.int64, False),
        ((37, 5, 3), "uniform", torch.int64, True),
        ((683, 7, 3), "uniform", torch.int32, True),
        ((683, 7, 3), "one", torch.int64, False),
        ((1025, 300, 2), "uniform", torch.int64, False),
        ((3, 5000, 2), "uniform", torch.int32, False),
        ((1100, 4500, 2), "uniform", torch.int64, True),
    ],
)
def test_sorts_by_expert(model, monkeypatch, sizes, skew, dtype, transposed):
    """One block and several, the last with few slots; experts in one pass and in two; ids in rows and in columns."""
    cuda_model.install(model, monkeypatch)
    num_tokens, num_experts, top_k = sizes
    ids = random_expert_ids(num_tokens, num_experts, top_k, skew=skew, dropped=0.1).to(dtype)
    check(ids, ids.t().contiguous().t() if transposed else ids, num_experts)


def test_blocks_of_several_rounds(model, monkeypatch):
    """More slots than the most blocks take in one round each; fewer blocks where there are many experts."""
    cuda_model.install(model, monkeypatch)
    words = model.cuda_dispatch_scratch_size
    assert [words(n, 6) for n in (0, 2048, 2049, 65536, 65537)] == [0, 0, 9 * 7, 256 * 7, 129 * 7]
    assert [words(2**20, e) // (e + 1) for e in (128, 512, 4096, 2**20)] == [256, 128, 32, 32]
    ids = random_expert_ids(65537, 6, 1, skew="zipf", dropped=0.1)
    check(ids, ids, 6)
